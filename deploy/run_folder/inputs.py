"""What a run was made from: fingerprints of what its stages read and wrote, in ``run.json``.

::

    {"format": 1, "stages": {"sft": {
        "began": "2026-01-31 09:30:00 UTC",
        "settings": {"sft.lr": 0.002, ...},
        "reads":  {"data.demonstrations": [{"path", "bytes", "lines", "xxh3_128"}], ...},
        "writes": {"sft/policy.safetensors": [{...}]}}}}

Paths inside the run's folder are relative to it. A stage compares what it is about to read with
what other stages, and it itself before, have read, as long as something stands on that: the
weights of `sft` and `reward`, the checkpoints of `train`. Contents decide: the same bytes under
another path are no change; another order, an appended line are one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import xxhash

from common.config.run import RunConfig
from common.errors import ConfigError, DataError
from common.files import one_line, resolve, write_atomic
from deploy.run_folder.resume_rules import flat, within

_FORMAT = 1
FUNCTION = "function "
"""Begins the name of a user's reward function among what is read. It may be mended while a run
waits (exit code 7 says so), so a change of one is told, not refused."""
_OUTPUTS = {
    "sft": "sft/policy.safetensors",
    "reward": "reward_model/reward.safetensors",
    "train": "checkpoints/step-*",
}
_TOKENIZER = ("tokenizer.vocab_size", "tokenizer.words")
_COMMON = ("seed", "model", *_TOKENIZER, "learner", "data.too_long", "rollout.max_response_tokens")
_SETTINGS: Mapping[str, Sequence[str]] = {
    "tokenizer": _TOKENIZER,
    "sft": (*_COMMON, "sft"),
    "reward": (*_COMMON, "reward_model"),
    "train": (),
}
"""What a stage's result depends on beside its files, by prefix; a checkpoint has its own copy."""

Reads = Mapping[str, Sequence[str | Path]]
"""Files by what they are to a stage: ``data.prompts``, ``sft/policy.safetensors``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFacts:
    """One file as it was when a stage used it."""

    path: str
    bytes: int
    lines: int | None
    """Of a .jsonl file."""
    xxh3_128: str
    """Of all its bytes."""

    def __str__(self) -> str:
        size = f"{self.bytes} bytes" if self.lines is None else f"{self.lines} lines"
        return f"{size}, {self.xxh3_128[:12]}"


Facts = dict[str, list[FileFacts]]


@dataclass(slots=True, kw_only=True)
class StageFacts:
    """What one stage read, under which settings, and what it left."""

    began: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    reads: Facts = field(default_factory=dict)
    writes: Facts = field(default_factory=dict)


class RunInputs:
    """A run's manifest; whoever changes it holds the run's lock."""

    def __init__(self, run_dir: Path) -> None:
        """Read it; a run without one (new, or of before) has recorded nothing yet.

        Raises:
            DataError: it is damaged.
        """
        self.run_dir = run_dir.absolute()
        self.stages: dict[str, StageFacts] = {}
        path = self._path
        if not path.exists():
            return
        try:
            held = json.loads(path.read_text(encoding="utf8"))["stages"]
            self.stages = {name: _stage(values) for name, values in held.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}: damaged ({one_line(error)}); put it back, or remove it to take the run's "
                "inputs as they are now"
            ) from None

    @property
    def _path(self) -> Path:
        return self.run_dir / "run.json"

    def standing(self) -> list[str]:
        """The stages whose results are there, in their order."""
        return [
            stage
            for stage, made in _OUTPUTS.items()
            if any(path.suffix != ".partial" for path in self.run_dir.glob(made))
        ]

    def recorded(self, stage: str) -> set[str]:
        """Fields of the recipe whose files `stage` compares by their contents."""
        facts = self.stages.get(stage)
        # Whatever path is given, what it holds is compared with the run's own tokenizer.
        return {"tokenizer.path"} | (set(facts.reads) if facts else set())

    def check(self, stage: str, reads: Reads) -> tuple[Facts, list[str]]:
        """What `stage` is about to read: its facts, and a line for each function that was mended.

        Raises:
            DataError: a file is missing, or is another one than results of this run stand on.
        """
        found = self.look_all(reads)
        changed: dict[str, list[str]] = {}
        told: list[str] = []
        for other in self.standing():
            held = self.stages.get(other, StageFacts()).reads
            for name in sorted(held.keys() & found.keys()):
                # What the run made itself may be made again, until training stands on it.
                if other == stage != "train" and not _is_given(name):
                    continue
                if not (what := difference(name, held[name], found[name])):
                    continue
                if name.startswith(FUNCTION):
                    told.append(what)
                else:
                    changed.setdefault(what, []).append(other)
        if changed:
            raise DataError(f"{self.run_dir}: {self._refusal(changed)}")
        return found, told

    def require_repeat(self, stage: str, config: RunConfig) -> None:
        """`sft` and `reward` may be done again, with the same result only once `train` has begun.

        Raises:
            ConfigError: policy training stands on what the stage would replace by another.
        """
        if stage == "train" or "train" not in self.standing():
            return
        before, now = self.stages.get(stage), settings_of(stage, config)
        if before is None:
            raise ConfigError(
                f"{self.run_dir}: training has begun on what `{stage}` left, and how that was made "
                "is not recorded; give the new run another name"
            )
        if found := changed_settings(before.settings, now):
            raise ConfigError(
                f"{self.run_dir}: training has begun on what `{stage}` left, and it would be "
                f"replaced by another: {'; '.join(found)}; take these back, or give the new run "
                "another name"
            )

    def begin(self, stage: str, config: RunConfig, reads: Facts) -> None:
        """Record a stage's beginning. Raises StorageError when that cannot be written."""
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        resumed = stage == "train" and stage in self.stages and stage in self.standing()
        self.stages[stage] = StageFacts(
            began=self.stages[stage].began if resumed else now,
            settings=settings_of(stage, config),
            reads=reads,
        )
        self._save()

    def end(self, stage: str, writes: Sequence[str]) -> None:
        """Record what a stage left, by paths in the run's folder. Raises StorageError."""
        made = {name: [self.look(self.run_dir / name)] for name in writes}
        self.stages[stage].writes = made
        self._save()

    def look_all(self, reads: Reads) -> Facts:
        """`look` at every file."""
        return {name: [self.look(path) for path in paths] for name, paths in reads.items()}

    def look(self, path: str | Path) -> FileFacts:
        """Read a file once, and say what it is.

        Raises:
            DataError: it is missing or cannot be read.
        """
        filesystem, inner = resolve(path)
        digest, size, lines, last = xxhash.xxh3_128(), 0, 0, b"\n"
        try:
            with filesystem.open_input_stream(inner, compression=None) as stream:
                while chunk := stream.read(1 << 22):
                    digest.update(chunk)
                    size += len(chunk)
                    lines += chunk.count(b"\n")
                    last = chunk[-1:]
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; check the path") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({one_line(error)})") from None
        is_text = str(path).endswith(".jsonl")
        return FileFacts(
            path=self._named(str(path)),
            bytes=size,
            lines=lines + (last != b"\n") if is_text else None,
            xxh3_128=digest.hexdigest(),
        )

    def _named(self, path: str) -> str:
        inside = "://" not in path and Path(path).is_relative_to(self.run_dir)
        return str(Path(path).relative_to(self.run_dir)) if inside else path

    def _refusal(self, changed: Mapping[str, Sequence[str]]) -> str:
        """What changed since which stages read it, and how to go on."""
        listed = "; ".join(
            f"{what} since {' and '.join(f'`{stage}`' for stage in stages)} read it"
            for what, stages in changed.items()
        )
        bound = sorted({stage for stages in changed.values() for stage in stages})
        mend = "put back what it was, or give the new run another name"
        if "train" not in self.standing():
            made = ", ".join(str((self.run_dir / _OUTPUTS[stage]).parent) for stage in bound)
            mend += f", or remove {made} to make that anew"
        return f"{listed}; {mend}"

    def _save(self) -> None:
        stages = {name: asdict(facts) for name, facts in self.stages.items()}
        text = json.dumps({"format": _FORMAT, "stages": stages}, indent=1)
        write_atomic(self._path, [text.encode()])


def reads_of(stage: str, config: RunConfig) -> Reads:
    """The files that a stage (or `replay`) reads; what earlier stages left if it is there."""
    reads: dict[str, Sequence[str | Path]] = {}
    data, folder = config.data, config.run_dir
    wanted = ["tokenizer.json"]
    if stage == "sft":
        reads["data.demonstrations"] = data.demonstrations
        if config.sft.start is not None:
            reads["sft.start"] = [config.sft.start]
    elif stage == "reward":
        reads["data.demonstrations"] = data.demonstrations
        reads["data.comparisons"] = data.comparisons
        wanted.append(_OUTPUTS["sft"])
    else:
        if stage == "train":
            reads |= _functions(config) | {"data.prompts": data.prompts}
        wanted.append(_OUTPUTS["sft"])
        if config.reward_service.needs_model:
            wanted.append(_OUTPUTS["reward"])
    return reads | {name: [folder / name] for name in wanted if (folder / name).exists()}


def _functions(config: RunConfig) -> dict[str, list[str | Path]]:
    """Files of the user's reward functions that are found from here; none is imported."""
    found: dict[str, list[str | Path]] = {}
    for component in config.reward_service.components.values():
        if component.kind == "function" and (file := _source(component.target.split(":")[0])):
            found[FUNCTION + component.target] = [file]
    return found


def _source(module: str) -> Path | None:
    """Where a module's source is. `importlib.util.find_spec` would run its packages."""
    places: Sequence[str] | None = None
    origin: str | None = None
    names = module.split(".")
    for depth in range(len(names)):
        spec = PathFinder.find_spec(".".join(names[: depth + 1]), places)
        if spec is None:
            return None
        places, origin = spec.submodule_search_locations, spec.origin
    return Path(origin) if origin and Path(origin).is_file() else None


def _is_given(name: str) -> bool:
    """Whether an input comes from outside, not from an earlier stage of the run."""
    return name.startswith(("data.", "tokenizer.path", "sft.start", FUNCTION))


def difference(name: str, old: Sequence[FileFacts], new: Sequence[FileFacts]) -> str:
    """What of an input changed; empty when its contents did not."""
    before, now = [f.xxh3_128 for f in old], [f.xxh3_128 for f in new]
    if before == now:
        return ""
    if len(old) != len(new):
        was, are = ([f.path for f in files] for files in (old, new))
        return f"{name}: {', '.join(was)} -> {', '.join(are)} changed"
    if sorted(before) == sorted(now):
        return f"{name}: the order of its files changed"
    pairs = [(o, n) for o, n in zip(old, new, strict=True) if o.xxh3_128 != n.xxh3_128]
    return f"{name}: " + ", ".join(f"{n.path} changed ({o} -> {n})" for o, n in pairs)


def settings_of(stage: str, config: RunConfig) -> dict[str, Any]:
    """Fields that a stage's result depends on; of `sft.start` the contents do."""
    return {
        name: value
        for name, value in flat(config.model_dump(mode="json"))
        if name != "sft.start" and any(within(name, prefix) for prefix in _SETTINGS[stage])
    }


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, "absent") != new.get(name, "absent")
    ]


def _stage(values: Mapping[str, Any]) -> StageFacts:
    files = {
        part: {name: [FileFacts(**f) for f in facts] for name, facts in values[part].items()}
        for part in ("reads", "writes")
    }
    return StageFacts(began=values["began"], settings=values["settings"], **files)
