"""Checkpoints: whole or not there; a damaged one gives way to the one before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import CheckpointError, StorageError
from deploy import checkpoints


def filler(value: int) -> Any:
    def fill(folder: Path) -> dict[str, Any]:
        (folder / "policy").mkdir()
        (folder / "policy" / "weights.bin").write_bytes(bytes([value]) * 1000)
        return {"iteration": value}

    return fill


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_the_newest_are_kept(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path) is None
    for step in (1, 2, 10):
        checkpoints.write(tmp_path, step, filler(step), keep=2)
    assert steps(tmp_path) == ["step-000002", "step-000010"]
    found = checkpoints.newest(tmp_path)
    assert found is not None
    assert found[1] == {"iteration": 10}


@pytest.mark.parametrize("damage", ["flip", "remove", "sums", "state"])
def test_a_damaged_one_gives_way(tmp_path: Path, damage: str) -> None:
    for step in (1, 2):
        checkpoints.write(tmp_path, step, filler(step), keep=2)
    last = tmp_path / "checkpoints" / "step-000002"
    weights = last / "policy" / "weights.bin"
    if damage == "flip":
        weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    elif damage == "remove":
        weights.unlink()
    elif damage == "sums":
        (last / "checksums.json").write_text("{", encoding="utf8")
    else:
        (last / "state.json").write_text(json.dumps({"iteration": 9}), encoding="utf8")
    found = checkpoints.newest(tmp_path)
    assert found is not None
    assert found[1] == {"iteration": 1}


def test_all_damaged_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    checkpoints.write(tmp_path, 1, filler(1), keep=1)
    (tmp_path / "checkpoints" / "step-000001" / "state.json").unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoints.newest(tmp_path)


def test_a_write_that_fails_leaves_the_older_one(tmp_path: Path) -> None:
    checkpoints.write(tmp_path, 1, filler(1), keep=1)

    def full(folder: Path) -> dict[str, Any]:
        (folder / "half").write_bytes(b"x")
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"step-000002.*No space left"):
        checkpoints.write(tmp_path, 2, full, keep=1)
    found = checkpoints.newest(tmp_path)
    assert found is not None
    assert found[1] == {"iteration": 1}
    checkpoints.write(tmp_path, 2, filler(2), keep=1)
    assert steps(tmp_path) == ["step-000002"]


def test_a_kill_at_any_rename_leaves_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same step is written again, and the writer dies before each of its renames."""
    checkpoints.write(tmp_path, 1, filler(1), keep=1)
    for method in ("replace", "rename"):
        with monkeypatch.context() as killed:
            killed.setattr(Path, method, _die)
            with pytest.raises(KeyboardInterrupt):
                checkpoints.write(tmp_path, 1, filler(2), keep=1)
        found = checkpoints.newest(tmp_path)
        assert found is not None
        assert found[1] == {"iteration": 1}
    checkpoints.write(tmp_path, 1, filler(2), keep=1)
    assert steps(tmp_path) == ["step-000001"]
    found = checkpoints.newest(tmp_path)
    assert found is not None
    assert found[1] == {"iteration": 2}


def _die(*_: object) -> None:
    raise KeyboardInterrupt


def test_damaged_later_steps_never_displace_a_whole_one(tmp_path: Path) -> None:
    for step in (1, 9):
        checkpoints.write(tmp_path, step, filler(step), keep=2)
    (tmp_path / "checkpoints" / "step-000009" / "state.json").write_text("{", encoding="utf8")
    checkpoints.write(tmp_path, 2, filler(2), keep=1)
    assert steps(tmp_path) == ["step-000002"]
