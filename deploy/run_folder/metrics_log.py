"""What a run says while it goes: metrics.jsonl, activity.jsonl, TensorBoard, Ray."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from common.endings import take_all
from common.errors import StorageError
from common.run_folder import RunFolder
from deploy.gauges import Gauges, Reading
from deploy.run_folder.activity import Activity
from deploy.run_folder.log_lines import cut_torn_end
from deploy.trackers import Outbox, Step, close_all


class RunLog:
    """Appends to a run's logs. One writer per run at a time."""

    def __init__(
        self,
        run_dir: Path,
        outboxes: Sequence[Outbox] = (),
        ask: Callable[[], Iterable[Reading]] = tuple,
    ) -> None:
        """Go on with the logs of a run's folder; every line goes to the outboxes too.

        `ask` tells what changes between the lines, for Ray's metrics.
        """
        from torch.utils.tensorboard import SummaryWriter  # with torch, where a log is written

        self.run_dir, folder = run_dir, RunFolder(run_dir)
        self._outboxes = outboxes
        self.activity = Activity(folder.activity)
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            cut_torn_end(folder.metrics)
            self._file = folder.metrics.open("a", encoding="utf8")
            self._board = SummaryWriter(str(folder.tensorboard))
        except OSError as error:
            raise StorageError(f"{run_dir}: cannot be written: {error}") from None
        self.gauges = Gauges(run_dir.name, ask)

    def write(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Append one step of a stage.

        Raises:
            KeyError: a metric is not in the catalogue.
            StorageError: the disk is full.
        """
        line = Step(stage=stage, step=step, time=time.time(), metrics=dict(metrics))
        readings = [Reading.logged(stage, name, value) for name, value in metrics.items()]
        try:
            self._file.write(json.dumps(asdict(line)) + "\n")
            self._file.flush()
            for name, value in metrics.items():
                self._board.add_scalar(f"{stage}/{name}", value, step)
            self.gauges.set(readings, whole=True)
            self.gauges.ask()
            for outbox in self._outboxes:
                outbox.put(line)
        except OSError as error:
            raise StorageError(f"{self.run_dir}: metrics cannot be written: {error}") from None

    def close(self) -> None:
        """Flush and close.

        Raises:
            StorageError: the disk is full.
        """
        try:
            take_all(
                self._file.close,
                self.activity.close,
                self._board.close,
                self.gauges.close,
                partial(close_all, self._outboxes),
            )
        except OSError as error:
            raise StorageError(f"{self.run_dir}: metrics cannot be written: {error}") from None
