"""What killed writers leave is removed by the next writer of that name, and by nobody too early."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from common.files import write_atomic
from common.models.pretrained.writing import written_whole
from common.unfinished import PARTIAL, REPLACED, left_by_writers, unfinished


def killed(work: Callable[[], None]) -> None:
    """Let another process work until it is killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def torn() -> Iterator[bytes]:
    yield b"half"
    os.kill(os.getpid(), signal.SIGKILL)


def torn_folder(target: Path) -> None:
    with written_whole(target) as folder:
        (folder / "model").write_bytes(b"".join(torn()))


def test_a_file(tmp_path: Path) -> None:
    target, other = tmp_path / "a.json", tmp_path / "a.json.b"
    for path in (target, target, other):  # the second removes what the first left
        killed(lambda path=path: write_atomic(path, torn()))  # type: ignore[misc]
    assert len(left_by_writers(target, PARTIAL)) == 1
    write_atomic(target, [b"whole"])
    assert {*tmp_path.iterdir()} == {target, *left_by_writers(other, PARTIAL)}
    assert len(left_by_writers(other, PARTIAL)) == 1


def test_a_folder_and_what_it_was_to_replace(tmp_path: Path) -> None:
    target = tmp_path / "policy"
    killed(lambda: torn_folder(target))
    (tmp_path / f".policy.0123abcd.{REPLACED}").mkdir()  # killed between its last two moves
    (tmp_path / f".policy.old.0123abcd.{REPLACED}").mkdir()
    with written_whole(target) as folder:
        assert left_by_writers(target, PARTIAL) == [folder]
        assert left_by_writers(target, REPLACED), "the only whole one, until this one is"
    assert {path.name for path in tmp_path.iterdir()} == {
        "policy",
        f".policy.old.0123abcd.{REPLACED}",
    }


def test_what_a_living_writer_writes_stays(tmp_path: Path) -> None:
    target = tmp_path / "policy"
    with written_whole(target) as slow:
        with written_whole(target) as fast:
            (fast / "name").write_text("fast")
        assert slow.exists()
        (slow / "name").write_text("slow")
    assert (target / "name").read_text() == "slow"
    assert [*tmp_path.iterdir()] == [target]


def test_writers_of_one_name_hinder_nobody(tmp_path: Path) -> None:
    """Each looks for dead ones while others have just begun."""
    target = tmp_path / "a"

    def write(number: int) -> None:
        for _ in range(50):
            write_atomic(target, [bytes([number]) * 100])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert [*tmp_path.iterdir()] == [target]
    assert len(set(target.read_bytes())) == 1


def test_where_nobody_can_tell_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a"
    killed(lambda: write_atomic(target, torn()))

    def no_locks(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with unfinished(target) as partial:
        partial.rename(target)
    assert len(left_by_writers(target, PARTIAL)) == 1
