"""README.md of a policy's folder: what it was trained from, on what, how, and what was measured.

Facts of the run alone, as it recorded them. Paths of this machine are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.config.run import RunConfig
from common.models.pretrained.config_files import CONFIG
from common.models.pretrained.writing import CARD
from deploy.run_folder.fingerprints import Facts
from deploy.run_folder.inputs import RunInputs
from deploy.run_folder.log_lines import read_lines
from deploy.run_folder.resume_rules import flat

_STAGES: Mapping[str, Sequence[str]] = {"sft": ("sft",), "train": ("sft", "reward", "train")}
"""The stages that a policy of each is made of."""
_SECTIONS = {"sft": "sft", "reward": "reward_model", "train": "train"}
_HOW = ("learner.precision", "rollout.temperature", "rollout.top_p", "rollout.top_k", "seed")
_NOT_TOLD = (".start", ".checkpoint_every", ".keep_checkpoints")
"""Ends of fields that say nothing of the policy; a start is a path of this machine."""


def add_card(folder: Path, config: RunConfig, stage: str) -> None:
    """Write the card of what a stage left, if that is a folder for others to load."""
    if (folder / CONFIG).exists():
        write_card(folder / CARD, config, stage)


def write_card(path: Path, config: RunConfig, stage: str, iteration: int | None = None) -> None:
    """Write the model card of what `stage` left (sft or train).

    Args:
        path: the file.
        config: the run's.
        stage: sft or train.
        iteration: how many iterations the policy was trained for; None: all of its stage.
    """
    inputs = RunInputs(config.run_dir)
    stages = [name for name in _STAGES[stage] if name in inputs.stages]
    lines = [f"# {config.name}", "", f"Trained with Talipot, stages: {', '.join(stages)}."]
    if iteration is not None:
        lines[-1] += f" Policy of iteration {iteration} of {config.train.iterations}."
    for name in stages:
        lines += ["", f"## {name}", "", *_read(inputs.stages[name].reads)]
        lines += ["", *_table("setting", "value", _settings(config, name))]
        if measured := _metrics(config, name, iteration if name == "train" else None):
            lines += ["", *_table("metric", "last value", measured)]
    path.write_text("\n".join(lines) + "\n", encoding="utf8")


def _read(reads: Facts) -> Iterator[str]:
    """Yield a table of files with their fingerprints."""
    yield "| read | file | size | xxh3-128 |"
    yield "|---|---|---|---|"
    for name, files in sorted(reads.items()):
        for file in files:
            size = f"{file.bytes} bytes" if file.lines is None else f"{file.lines} lines"
            yield f"| {name} | {Path(file.path).name} | {size} | `{file.xxh3_128}` |"


def _settings(config: RunConfig, stage: str) -> dict[str, Any]:
    prefix = f"{_SECTIONS[stage]}."
    values = dict(flat(config.model_dump(mode="json")))
    return {
        name: value
        for name, value in values.items()
        if (name.startswith(prefix) and not name.endswith(_NOT_TOLD)) or name in _HOW
    }


def _metrics(config: RunConfig, stage: str, iteration: int | None) -> dict[str, str]:
    """Return the last values that a stage logged, up to an iteration."""
    logged = [
        line
        for line in read_lines(config.folder.metrics).lines
        if line.stage == stage and (iteration is None or line.step <= iteration)
    ]
    return {k: f"{v:.6g}" for k, v in sorted(logged[-1].metrics.items())} if logged else {}


def _table(left: str, right: str, values: Mapping[str, Any]) -> Iterator[str]:
    yield f"| {left} | {right} |"
    yield "|---|---|"
    for name, value in values.items():
        yield f"| {name} | {value} |"
