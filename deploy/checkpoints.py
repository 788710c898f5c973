"""Checkpoints: written beside their final name, checksummed, renamed at the end.

``checkpoints/step-000010/`` holds the engines' state, the auxiliary memory and ``state.json``
(iteration, versions, prompt cursor, ledger, KL controller), and ``checksums.json`` over all files.
A torn checkpoint never has its final name; a damaged one is recognised and the one before is used.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from common.errors import CheckpointError, StorageError

_SUMS = "checksums.json"


def write(run_dir: Path, step: int, fill: Callable[[Path], dict[str, Any]], *, keep: int) -> Path:
    """Write a checkpoint; `fill` writes tensors into a folder and returns the JSON state.

    Raises:
        StorageError: the disk is full or not writable; older checkpoints stay.
    """
    final = run_dir / "checkpoints" / f"step-{step:06d}"
    partial = final.with_suffix(".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        state = fill(partial)
        (partial / "state.json").write_text(json.dumps(state, indent=1), encoding="utf8")
        sums = {str(p.relative_to(partial)): _checksum(p) for p in _files(partial)}
        (partial / _SUMS).write_text(json.dumps(sums, indent=1), encoding="utf8")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    except OSError as error:
        raise StorageError(f"{final}: checkpoint could not be written: {error}") from None
    for old in _finished(run_dir)[:-keep]:
        shutil.rmtree(old)
    return final


def newest(run_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and its state; None when there is none at all.

    Raises:
        CheckpointError: there are checkpoints, but every one is damaged.
    """
    finished = _finished(run_dir)
    for folder in reversed(finished):
        if is_whole(folder):
            state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf8"))
            return folder, state
    if finished:
        raise CheckpointError(f"{finished[-1]}: every checkpoint of this run is damaged")
    return None


def is_whole(folder: Path) -> bool:
    """Whether every file is there and has its checksum."""
    try:
        sums: dict[str, str] = json.loads((folder / _SUMS).read_text(encoding="utf8"))
        return all(_checksum(folder / name) == value for name, value in sums.items())
    except (OSError, ValueError):
        return False


def _finished(run_dir: Path) -> list[Path]:
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted(p for p in found if p.is_dir() and p.suffix != ".partial")


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != _SUMS)


def _checksum(path: Path) -> str:
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()
