"""Histories of real runs, as health checks read them: kept in ``recorded/``, and read back.

``python -m tests.deploy.recorded_history RUN > tests/deploy/recorded/NAME.jsonl``
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from common.config.run import RunConfig
from deploy.health.checks import what_checks_read
from deploy.health.history import History
from deploy.run_folder.folder import config_of
from deploy.run_folder.log_lines import HELD_OUT, Line, read_lines

SECTIONS = {"train", "rollout", "evaluate", "reward_service"}
FOLDER = Path(__file__).parent / "recorded"


def main(run: str) -> None:
    """Print the settings that checks read, and a line for each iteration and evaluation."""
    config = config_of(Path(run))
    settings = config.model_dump(mode="json", include=SECTIONS)
    print(json.dumps(settings))
    for line in read_lines(config.folder.metrics).lines:
        if line.stage in ("train", HELD_OUT):
            read = what_checks_read(line.metrics, config)
            metrics = {name: float(f"{value:.6g}") for name, value in read.items()}
            facts = {"stage": line.stage, "step": line.step, "time": round(line.time, 1)}
            print(json.dumps({**facts, "metrics": metrics}))


def recorded(name: str) -> tuple[RunConfig, list[Line]]:
    """Read one back."""
    first, *rest = (FOLDER / f"{name}.jsonl").read_text(encoding="utf8").splitlines()
    return RunConfig.model_validate(json.loads(first)), [Line(**json.loads(text)) for text in rest]


def growing(name: str) -> Iterator[History]:
    """The history after each of its lines, as a run at work has it."""
    config, lines = recorded(name)
    history = History.of(config, ())
    for line in lines:
        history.add(line)
        yield history


if __name__ == "__main__":
    main(*sys.argv[1:])
