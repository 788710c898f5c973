"""What a run was made from: fingerprints of what its stages read and wrote, in ``run.json``.

::

    {"format": 1, "stages": {"sft": {
        "began": "2026-01-31 09:30:00 UTC",
        "settings": {"sft.lr": 0.002, ...},
        "reads":  {"data.demonstrations": [{"path", "bytes", "lines", "xxh3_128"}], ...},
        "writes": {"sft/policy.safetensors": [{...}]}}}}

Paths inside the run's folder are relative to it. A stage compares what it is about to read with
what other stages, and it itself before, have read, as long as something depends on that: the
weights of `sft` and `reward`, the checkpoints of `train`. Contents decide: the same bytes under
another path are no change; another order, an appended line are one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.config.earlier import settings_as_of_now
from common.config.run import RunConfig
from common.errors import ConfigError, DataError
from common.files import is_local, one_line, write_atomic
from common.run_folder import RunFolder
from deploy.run_folder.fingerprints import Facts, FileFacts, difference, fingerprint
from deploy.run_folder.reads import FUNCTION, REUSED, Reads, is_given
from deploy.run_folder.resume_rules import flat, within
from deploy.run_folder.weights import weights_in

_FORMAT = 1
_TOKENIZER = ("tokenizer.vocab_size", "tokenizer.words")
_COMMON = ("seed", "model", *_TOKENIZER, "learner", "data.too_long", "rollout.max_response_tokens")
_SETTINGS: Mapping[str, Sequence[str]] = {
    "tokenizer": _TOKENIZER,
    "sft": (*_COMMON, "sft"),
    "reward": (*_COMMON, "reward_model"),
    "train": (),
}
"""What a stage's result depends on beside its files, by prefix; a checkpoint has its own copy."""


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
        """Read it; a run without one (new, or of an earlier version) has recorded nothing yet.

        Raises:
            DataError: it is damaged.
        """
        self.folder = RunFolder(run_dir.absolute())
        self.stages: dict[str, StageFacts] = {}
        path = self.folder.inputs
        if not path.exists():
            return
        try:
            recorded = json.loads(path.read_text(encoding="utf8"))["stages"]
            self.stages = {name: _stage(values) for name, values in recorded.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}: damaged ({one_line(error)}); put it back, or remove it to take the run's "
                "inputs as they are now"
            ) from None

    def standing(self) -> list[str]:
        """List the stages whose results exist, in their order."""
        results = {
            "sft": weights_in(self.folder.sft.path),
            "reward": weights_in(self.folder.reward_model.path),
            "train": self.folder.checkpoints.glob("step-*"),
        }
        return [
            stage
            for stage, paths in results.items()
            if any(path.exists() and path.suffix != ".partial" for path in paths)
        ]

    def recorded(self, stage: str) -> set[str]:
        """Return the fields of the recipe whose files `stage` compares by their contents."""
        facts = self.stages.get(stage)
        # Whatever path is given, what it holds is compared with the run's own tokenizer.
        return {"tokenizer.path"} | (set(facts.reads) if facts else set())

    def check(self, stage: str, reads: Reads) -> tuple[Facts, list[str]]:
        """Compare what `stage` is about to read with what results of this run depend on.

        Returns:
            The facts of the files, and a line for each reward function that changed.

        Raises:
            DataError: a file is missing, or is another one than results of this run depend on.
        """
        facts = self.look_all(reads)
        changed: dict[str, list[str]] = {}
        told: list[str] = []
        for other in self.standing():
            before = self.stages.get(other, StageFacts()).reads
            if other == stage:
                for name in sorted(n for n in before.keys() - facts.keys() if n.startswith(REUSED)):
                    changed.setdefault(f"{name} is not taken any more", []).append(other)
            for name in sorted(before.keys() & facts.keys()):
                # What the run made itself may be made again, until training depends on it.
                if other == stage != "train" and not is_given(name):
                    continue
                if not (what := difference(name, before[name], facts[name])):
                    continue
                if name.startswith(FUNCTION):
                    told.append(what)
                else:
                    changed.setdefault(what, []).append(other)
        if changed:
            raise DataError(f"{self.folder.path}: {self._refusal(changed)}")
        for other, left in self.stages.items():
            if other != stage:
                self._require_as_written(other, left.writes, facts)
        return facts, told

    def require_result(self, stage: str) -> None:
        """Refuse what a stage has left where it is another one than it wrote.

        Nothing is known of runs of earlier versions.

        Raises:
            DataError: it is missing, or was changed.
        """
        if facts := self.stages.get(stage):
            there = self.look_all({name: [self.folder.path / name] for name in facts.writes})
            self._require_as_written(stage, facts.writes, there)

    def _require_as_written(self, stage: str, written: Facts, there: Facts) -> None:
        for name in sorted(written.keys() & there.keys()):
            if what := difference(name, written[name], there[name]):
                raise DataError(
                    f"{self.folder.path}: {what} since `{stage}` wrote it; put back what it was, "
                    f"or remove it and give `talipot {stage} --resume {self.folder.path}`"
                )

    def require_repeat(self, stage: str, config: RunConfig) -> None:
        """Refuse to replace what `train` depends on, once it has begun, by something else.

        Raises:
            ConfigError: policy training depends on what the stage would replace by another.
        """
        if stage == "train" or "train" not in self.standing():
            return
        before, now = self.stages.get(stage), settings_of(stage, config)
        if before is None:
            raise ConfigError(
                f"{self.folder.path}: training has begun on what `{stage}` left, and how that was "
                "made is not recorded; give the new run another name"
            )
        if differing := changed_settings(before.settings, now):
            raise ConfigError(
                f"{self.folder.path}: training has begun on what `{stage}` left, and it would be "
                f"replaced by another: {'; '.join(differing)}; take these back, or give the new "
                "run another name"
            )

    def begin(self, stage: str, config: RunConfig, reads: Facts) -> None:
        """Record a stage's beginning. Raises StorageError when that cannot be written."""
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        resumed = stage == "train" and stage in self.stages and stage in self.standing()
        self.stages[stage] = StageFacts(
            began=self.stages[stage].began if resumed else now,
            settings=settings_of(stage, config),
            reads=reads,
            writes=self.stages[stage].writes if resumed else {},
        )
        self._save()

    def end(self, stage: str, writes: Sequence[Path]) -> None:
        """Record what a stage left in the run's folder. Raises StorageError."""
        self.stages.setdefault(stage, StageFacts()).writes = {
            self.folder.name_of(path): [self.look(path)] for path in writes
        }
        self._save()

    def look_all(self, reads: Reads) -> Facts:
        """Fingerprint every file."""
        return {name: [self.look(path) for path in paths] for name, paths in reads.items()}

    def look(self, path: str | Path) -> FileFacts:
        """Read a file once, and say what it is.

        Raises:
            DataError: it is missing or cannot be read.
        """
        inside = is_local(path) and Path(path).is_relative_to(self.folder.path)
        return fingerprint(path, self.folder.name_of(Path(path)) if inside else str(path))

    def _refusal(self, changed: Mapping[str, Sequence[str]]) -> str:
        """Say what changed since which stages read it, and how to go on."""
        listed = "; ".join(
            f"{what} since {' and '.join(f'`{stage}`' for stage in stages)} read it"
            for what, stages in changed.items()
        )
        advice = "put back what it was, or give the new run another name"
        if "train" not in self.standing():
            folders = {"sft": self.folder.sft.path, "reward": self.folder.reward_model.path}
            bound = sorted({stage for stages in changed.values() for stage in stages})
            results = ", ".join(str(folders[stage]) for stage in bound)
            advice += f", or remove {results} to make that anew"
        return f"{listed}; {advice}"

    def _save(self) -> None:
        stages = {name: asdict(facts) for name, facts in self.stages.items()}
        text = json.dumps({"format": _FORMAT, "stages": stages}, indent=1)
        write_atomic(self.folder.inputs, [text.encode()])


def settings_of(stage: str, config: RunConfig) -> dict[str, Any]:
    """Return the fields that a stage's result depends on; of a path to weights the contents do.

    How often a checkpoint is written changes no result.
    """
    return {
        name: value
        for name, value in flat(config.model_dump(mode="json"))
        if not name.endswith((".start", ".checkpoint_every_s"))
        and any(within(name, prefix) for prefix in _SETTINGS[stage])
    }


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Say which fields differ, with both values."""
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
    return StageFacts(
        began=values["began"], settings=settings_as_of_now(values["settings"]), **files
    )
