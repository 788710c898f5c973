"""A rank's part of checkpoints, written and hashed beside training.

A phase may last for an hour, and nobody can ask a rank that is in one whether it has written what
was to be written before: it leaves a file that says so beside it, which `written` looks for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Final

from common.errors import StorageError
from common.files import one_line, write_atomic
from common.wire.hashing import file_digest
from learner.batch.pulse import beat
from learner.zero.process_group import rank
from learner.zero.state_files import Snapshot

_MARK: Final = "rank-{}.written"
_BEAT_S: Final = 5.0
_WRITE_S: Final = 3600.0
"""For which a disk may write; after that a silent rank is taken for dead, as elsewhere."""


class CheckpointWriter:
    """Writes one checkpoint at a time, in a thread of its own."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._sums: dict[str, str] = {}
        self._problem = ""

    def begin(
        self, folder: Path, snapshots: Mapping[str, Snapshot], others: Sequence[Path] = ()
    ) -> None:
        """Begin to write, once what was begun before is written.

        Args:
            folder: of the checkpoint.
            snapshots: what is written, by folders in it.
            others: files in it that are there already, and are hashed.

        Raises:
            StorageError: what was begun before could not be written.
        """
        self.wait()
        self._sums, self._problem = {}, ""
        left = dict(snapshots)

        def write() -> None:
            try:
                paths = list(others)
                for name in list(left):
                    paths.append(left.pop(name).write(folder / name))
                    beat()
                for path in paths:
                    self._sums[str(path.relative_to(folder))] = file_digest(path)
                    beat()
            except Exception as error:  # whatever it is, it is no checkpoint, and is told
                self._problem = one_line(error) or type(error).__name__
            said = json.dumps({"sums": self._sums, "problem": self._problem})
            if folder.exists():  # else it was given up, and must not come back
                with suppress(StorageError):  # whoever waits for the thread is told the problem
                    write_atomic(folder / _MARK.format(rank()), [said.encode()])

        self._thread = Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> dict[str, str]:
        """Wait until all is written; returns the hashes of files by their paths in the folder.

        Raises:
            StorageError: it could not be written; told once.
        """
        if self._thread is not None:
            until = time.monotonic() + _WRITE_S
            while self._thread.is_alive() and time.monotonic() < until:
                self._thread.join(_BEAT_S)
                beat()  # one large file may take longer than a rank may be silent
            self._thread.join()
            self._thread = None
        problem, self._problem = self._problem, ""
        if problem:
            raise StorageError(problem)
        return self._sums


def written(folder: Path, ranks: int) -> dict[str, str] | None:
    """Return the hashes of all files that ranks wrote; None while one is still writing.

    Raises:
        StorageError: a rank could not write its part.
    """
    marks = [folder / _MARK.format(rank) for rank in range(ranks)]
    if not all(mark.exists() for mark in marks):
        return None
    sums: dict[str, str] = {}
    for mark in marks:
        said = json.loads(mark.read_bytes())
        if said["problem"]:
            raise StorageError(said["problem"])
        sums |= said["sums"]
    return sums


def forget_marks(folder: Path) -> None:
    """Remove what said that ranks had written: a finished checkpoint is whole by its hashes."""
    for mark in folder.glob(_MARK.format("*")):
        mark.unlink()
