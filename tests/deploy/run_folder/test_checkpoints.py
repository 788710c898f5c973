"""Checkpoints: whole or not there; a damaged one gives way to the one before."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from common.errors import CheckpointError, StorageError
from deploy.run_folder import checkpoints


def filler(value: int) -> Any:
    def fill(folder: Path) -> dict[str, Any]:
        (folder / "policy").mkdir()
        (folder / "policy" / "weights.safetensors").write_bytes(bytes([value]) * 1000)
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


SUMS = ("", "{", "{}", "[]", "null", "3", '"x"', '{"state.json": 3}', "[[]]")


@pytest.mark.parametrize("damage", ["flip", "remove", "state", *SUMS])
def test_a_damaged_one_gives_way(tmp_path: Path, damage: str) -> None:
    for step in (1, 2):
        checkpoints.write(tmp_path, step, filler(step), keep=2)
    last = tmp_path / "checkpoints" / "step-000002"
    weights = last / "policy" / "weights.safetensors"
    if damage == "flip":
        weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    elif damage == "remove":
        weights.unlink()
    elif damage in SUMS:
        (last / "checksums.json").write_text(damage, encoding="utf8")
    else:
        (last / "state.json").write_text(json.dumps({"iteration": 9}), encoding="utf8")
    found = checkpoints.newest(tmp_path)
    assert found is not None
    assert found[1] == {"iteration": 1}


def test_what_others_put_beside_it_is_nothing_to_it(tmp_path: Path) -> None:
    """As file systems and people do; but a rank's file would be read."""
    checkpoints.write(tmp_path, 1, filler(1), keep=1)
    folder = tmp_path / "checkpoints" / "step-000001"
    for name in ("._state.json", "notes.json", ".nfs01"):
        (folder / name).write_text("x")
    assert checkpoints.is_whole(folder)
    (folder / "policy" / "rank-00007.safetensors").write_text("x")
    assert not checkpoints.is_whole(folder)


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


def test_two_writers_leave_each_others_checkpoints_alone(tmp_path: Path) -> None:
    """The slower one writes step 5 while the faster one writes step 9."""
    begun, done = threading.Event(), threading.Event()

    def slow(folder: Path) -> dict[str, Any]:
        (folder / "a").write_text("x", encoding="utf8")
        begun.set()
        assert done.wait(30)
        (folder / "b").write_text("x", encoding="utf8")
        return {"iteration": 5}

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(checkpoints.write, tmp_path, 5, slow, keep=2)
        assert begun.wait(30)
        checkpoints.write(tmp_path, 9, filler(9), keep=2)
        done.set()
        assert first.result().name == "step-000005"
    assert steps(tmp_path) == ["step-000005", "step-000009"]
    checkpoints.write(tmp_path, 5, filler(5), keep=1)
    assert steps(tmp_path) == ["step-000005", "step-000009"]
    assert checkpoints.is_whole(tmp_path / "checkpoints" / "step-000005")
    found = checkpoints.newest(tmp_path)
    assert found is not None
    assert found[1] == {"iteration": 9}


def test_a_run_that_stands_at_a_step_leaves_nothing_behind_it(tmp_path: Path) -> None:
    """The controller goes back to the newest whole one; a later damaged one must not come back."""
    for step in (1, 2, 3):
        checkpoints.write(tmp_path, step, filler(step), keep=3)
    state = tmp_path / "checkpoints" / "step-000003" / "state.json"
    state.write_bytes(b"{")
    left = tmp_path / "checkpoints" / "step-000004.0123abcd.partial"
    old = tmp_path / "checkpoints" / "step-000004.partial"
    left.mkdir()
    old.mkdir()
    found = checkpoints.newest(tmp_path)
    assert found is not None
    checkpoints.rewind(tmp_path, found[1]["iteration"])
    assert steps(tmp_path) == ["step-000001", "step-000002"]


@pytest.mark.parametrize("damaged", ["step-000001", "step-000001.replaced"])
def test_a_writer_that_died_between_its_last_moves_hinders_nobody(
    tmp_path: Path, damaged: str
) -> None:
    folder = tmp_path / "checkpoints"
    checkpoints.write(tmp_path, 1, filler(1), keep=1)
    shutil.copytree(folder / "step-000001", folder / "step-000001.replaced")
    (folder / damaged / "state.json").write_text("{", encoding="utf8")
    checkpoints.write(tmp_path, 1, filler(2), keep=1)
    assert steps(tmp_path) == ["step-000001"]
    found = checkpoints.newest(tmp_path)
    assert found is not None
    assert found[1] == {"iteration": 2}
