"""Checkpoints: written beside their final name, checksummed, made durable, renamed at the end.

``checkpoints/step-000010/`` holds the engines' state, the auxiliary memory and ``state.json``
(iteration, versions, prompt cursor, ledger, KL controller), and ``checksums.json`` over all files.
A torn checkpoint never has its final name; a damaged one is recognised and the one before is used.

Names: ``step-N.TOKEN.partial`` is being written, or was when its writer died; ``step-N.replaced``
is a ``step-N`` that another one takes the place of, and stays usable until that one has its name.

A run has one writer (`deploy.run_folder.lock`). Should there be two all the same, neither touches
what the other is writing, nor a whole checkpoint of a later step than its own.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import CheckpointError, StorageError
from common.files import one_line
from common.run_folder import RunFolder
from common.wire.hashing import file_digest

_SUMS, _STATE = "checksums.json", "state.json"
_RANKS = "rank-*.safetensors"
"""Files that are read whether a checksum names them or not."""
_READERS = 8
"""Files that are read at once to be hashed: storage over a network is faster by several."""


def write(
    run_dir: Path,
    step: int,
    fill: Callable[[Path], dict[str, Any]],
    *,
    keep: int,
    best: int | None = None,
    then: str = "",
) -> Path:
    """Write a checkpoint; `fill` writes tensors into a folder and returns the JSON state.

    Killed at any point, it leaves at least the whole ones that were there. Afterwards the newest
    `keep` up to this step are left, that of step `best`, and those of later steps that are whole: a
    run goes on from its newest whole one, so a later one is either damaged or another writer's.
    `then` is what carries on with it; by default that of policy training.

    Raises:
        StorageError: the disk is full or not writable; older checkpoints stay.
    """
    unfinished = Unfinished(run_dir, step, then)
    try:
        with unfinished.attempt():
            state = fill(unfinished.folder)
        final = unfinished.finish(state, {})
    except BaseException:
        unfinished.drop()
        raise
    for path in outdated(run_dir, step, keep=keep, best=best):
        remove(path)
    return final


class Unfinished:
    """A checkpoint that is being written, by whomever."""

    def __init__(self, run_dir: Path, step: int, then: str = "") -> None:
        """Make its folder.

        Args:
            run_dir: of the run.
            step: that it is of.
            then: what carries on with it, for errors; by default that of policy training.

        Raises:
            StorageError: the disk is full or not writable.
        """
        self._then = then or f"`talipot train --resume {run_dir}`"
        self._final = RunFolder(run_dir).checkpoint(step)
        self.folder = self._final.with_name(f"{self._final.name}.{secrets.token_hex(4)}.partial")
        with self.attempt():
            self.folder.mkdir(parents=True)

    def finish(self, state: Mapping[str, Any], sums: Mapping[str, str]) -> Path:
        """Give it its name, once all of it is there.

        Args:
            state: what its JSON says.
            sums: hashes of files by their paths in the folder; others are hashed here. One whose
                file is not there makes it not whole.

        Raises:
            StorageError: the disk is full or not writable; older checkpoints stay.
        """
        folder, final = self.folder, self._final
        with self.attempt():
            (folder / _STATE).write_text(json.dumps(state, indent=1), encoding="utf8")
            found = {str(path.relative_to(folder)): path for path in _files(folder)}
            here = {n: file_digest(path) for n, path in found.items() if n not in sums}
            (folder / _SUMS).write_text(json.dumps({**sums, **here}, indent=1), encoding="utf8")
            for path in (*folder.rglob("*"), folder):
                _sync(path)
            if final.exists():
                _make_way(final)
            folder.rename(final)
            _sync(final.parent)
        return final

    def drop(self) -> None:
        """Give it up: what is not whole is of no use."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Do a part of it: what fails is said in one line, and leaves nothing.

        Raises:
            StorageError: the disk is full or not writable.
        """
        try:
            yield
        except (OSError, StorageError) as error:
            self.drop()
            raise StorageError(
                f"{self._final}: checkpoint could not be written ({one_line(error)}); free space "
                f"or correct rights, then {self._then}"
            ) from None


def outdated(run_dir: Path, step: int, *, keep: int, best: int | None) -> list[Path]:
    """Return what the checkpoint of a step takes the place of, under names that nobody looks for.

    Removing it may take as long as its files are large. Of `keep` and `best` see `write`.

    Raises:
        StorageError: the folder is not writable.
    """
    final, finished = RunFolder(run_dir).checkpoint(step), _finished(run_dir)
    kept = [p for p in finished if not p.suffix and p.name <= final.name][-keep:]
    if best is not None:
        kept.append(RunFolder(run_dir).checkpoint(best))
    gone: list[Path] = []
    for path in finished:
        if path not in kept and (path.stem <= final.name or not is_whole(path)):
            gone.append(path.with_name(f"{path.stem}.{secrets.token_hex(4)}.partial"))
            try:
                path.rename(gone[-1])
            except OSError as error:
                raise _unremoved(path, error) from None
    return gone


def rewind(run_dir: Path, step: int) -> None:
    """Remove what a run that goes on from `step` does not need any more.

    That is later checkpoints, which `newest` passed over as damaged, and what dead writers left
    unfinished. Only for whoever holds the run's lock, and so knows that no other writer lives.

    Raises:
        StorageError: the folder is not writable.
    """
    later = [p for p in _finished(run_dir) if p.stem > RunFolder(run_dir).checkpoint(step).name]
    for path in (*later, *RunFolder(run_dir).checkpoints.glob("step-*.partial")):
        remove(path)


def remove(folder: Path) -> None:
    """Remove a folder, though another one is removing it too.

    Raises:
        StorageError: it is not writable.
    """

    def passed_over(_: object, path: str, found: tuple[Any, BaseException, Any]) -> None:
        if not isinstance(found[1], FileNotFoundError):
            raise found[1]

    try:
        shutil.rmtree(folder, onerror=passed_over)
    except OSError as error:
        raise _unremoved(folder, error) from None


def _unremoved(folder: Path, error: OSError) -> StorageError:
    return StorageError(f"{folder}: cannot be removed ({one_line(error)}); correct its rights")


def newest(run_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest whole checkpoint and its state; None when there is none at all.

    Raises:
        CheckpointError: there are checkpoints, but every one is damaged.
    """
    finished = _finished(run_dir)
    for folder in reversed(finished):
        if is_whole(folder):
            state: dict[str, Any] = json.loads((folder / _STATE).read_text(encoding="utf8"))
            return folder, state
    if finished:
        raise CheckpointError(f"{finished[-1]}: every checkpoint of this run is damaged")
    return None


def is_whole(folder: Path) -> bool:
    """Whether every file is there and has its checksum; what others put beside is nothing to it."""
    try:
        sums = json.loads((folder / _SUMS).read_text(encoding="utf8"))
        read = {str(path.relative_to(folder)) for path in folder.rglob(_RANKS)}
        if not {_STATE, *read} <= sums.keys():
            return False
        with ThreadPoolExecutor(_READERS) as pool:
            # The map has no name: who leaves at the first difference leaves it, and it ends.
            return all(
                here == there
                for here, there in zip(
                    pool.map(file_digest, [folder / name for name in sums]),
                    sums.values(),
                    strict=True,
                )
            )
    except (OSError, ValueError, AttributeError):
        return False


def _make_way(final: Path) -> None:
    """Rename a step's checkpoint, so that a whole one of that step exists all the time."""
    replaced = final.with_suffix(".replaced")
    if replaced.exists():  # a writer died between its last two moves
        if not is_whole(final):
            shutil.rmtree(final)
            return
        shutil.rmtree(replaced)
    final.replace(replaced)


def _finished(run_dir: Path) -> list[Path]:
    """List what has no partial name, oldest first; of one step, the replaced one first."""
    finished = [p for p in RunFolder(run_dir).checkpoints.glob("step-*") if p.suffix != ".partial"]
    return sorted(finished, key=lambda path: (path.stem, path.suffix != ".replaced"))


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != _SUMS)


def _sync(path: Path) -> None:
    """Make a file, or a folder's list of names, outlast a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
