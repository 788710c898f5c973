"""Checkpoints are written beside training, and whoever could not write says so."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import StorageError
from common.wire.hashing import file_digest
from learner import checkpointing
from learner.checkpointing import CheckpointWriter, forget_marks, written
from learner.zero.state_files import Snapshot

pytestmark = pytest.mark.usefixtures("one_rank")


def shot(value: float) -> Snapshot:
    return Snapshot({"w|master@0": torch.full((3,), value)}, {"w": (3,)})


def test_it_goes_on_while_the_caller_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that were there are hashed too, and the mark comes after everything else."""
    go_on, whole = threading.Event(), Snapshot.write

    def slow(self: Snapshot, folder: Path) -> Path:
        assert go_on.wait(20)
        return whole(self, folder)

    monkeypatch.setattr(Snapshot, "write", slow)
    (tmp_path / "memory.parquet").write_bytes(b"rows")
    writer = CheckpointWriter()
    writer.begin(tmp_path, {"policy": shot(1.0)}, [tmp_path / "memory.parquet"])
    assert written(tmp_path, 1) is None
    go_on.set()
    sums = writer.wait()
    names = ("policy/rank-00000.safetensors", "memory.parquet")
    assert sums == {name: file_digest(tmp_path / name) for name in names}
    assert written(tmp_path, 1) == sums
    assert written(tmp_path, 2) is None, "another rank has not"
    forget_marks(tmp_path)
    assert written(tmp_path, 1) is None
    assert {p.name for p in tmp_path.iterdir()} == {"policy", "memory.parquet"}


def test_the_next_one_waits_for_the_one_before(tmp_path: Path) -> None:
    writer = CheckpointWriter()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        writer.begin(tmp_path / name, {"policy": shot(1.0)})
    assert written(tmp_path / "one", 1) is not None
    assert writer.wait().keys() == {"policy/rank-00000.safetensors"}


def test_what_was_given_up_does_not_come_back(tmp_path: Path) -> None:
    writer = CheckpointWriter()
    writer.begin(tmp_path / "gone", {"policy": shot(1.0)})
    with pytest.raises(StorageError, match="gone"):
        writer.wait()
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("where", ["the disk", "the hash", "memory"])
def test_what_cannot_be_written_is_told_to_both(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    def out_of_memory(*_: Any) -> Any:
        raise MemoryError

    if where == "the disk":
        (tmp_path / "policy").write_bytes(b"not a folder")
        says = "policy"
    elif where == "memory":
        monkeypatch.setattr(Snapshot, "write", out_of_memory)
        says = "MemoryError"
    else:
        monkeypatch.setattr(checkpointing, "file_digest", full)
        says = "No space left"
    writer = CheckpointWriter()
    writer.begin(tmp_path, {"policy": shot(1.0)})
    with pytest.raises(StorageError, match=says):
        writer.wait()
    with pytest.raises(StorageError, match=says):
        written(tmp_path, 1)
    monkeypatch.undo()
    (tmp_path / "elsewhere").mkdir()
    writer.begin(tmp_path / "elsewhere", {"policy": shot(1.0)})  # and it is told once
    assert writer.wait()
