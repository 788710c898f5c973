"""One writer per run: who is refused, who is let in, and whose lock is taken over."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import StorageError
from deploy.run_folder.lock import RunLock, holder_of, writing

ROOT = Path(__file__).parents[3]
_HOLD = """
import sys, time
from pathlib import Path
from deploy.run_folder.lock import RunLock
lock = RunLock(Path(sys.argv[1]), "train")
{then}
print("held", flush=True)
time.sleep(60)
"""


@contextmanager
def holder(run: Path, then: str = "") -> Iterator[subprocess.Popen[str]]:
    """A process that holds a run's lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD.format(then=then), str(run)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def take(run: Path, patience_s: float = 0.0) -> RunLock:
    return RunLock(run, "sft", patience_s=patience_s)


def test_a_second_writer_is_refused_with_the_first_ones_host_process_and_start(
    tmp_path: Path,
) -> None:
    before = time.time()
    with holder(tmp_path) as first, pytest.raises(StorageError) as refused:
        take(tmp_path)
    text = str(refused.value)
    assert "\n" not in text
    for part in (str(tmp_path), socket.gethostname(), f"process {first.pid}", "talipot train"):
        assert part in text
    stamp = text.split("since ")[1].split(" UTC")[0]
    began = time.mktime(time.strptime(stamp, "%Y-%m-%d %H:%M:%S")) - time.timezone
    assert before - 2 < began < time.time() + 2


def test_a_lock_of_a_killed_process_is_taken_over_at_once(tmp_path: Path) -> None:
    with holder(tmp_path) as first:
        first.kill()
        first.wait()
        assert json.loads((tmp_path / "lock").read_text())["pid"] == first.pid, "its note stays"
        lock = take(tmp_path)
    assert holder_of(tmp_path / "lock") == lock.holder
    lock.release()


def test_a_dying_holder_is_waited_for(tmp_path: Path) -> None:
    with holder(tmp_path) as first:
        threading.Timer(0.5, first.kill).start()
        take(tmp_path, patience_s=20.0).release()


def test_a_release_lets_the_next_one_in_and_another_run_is_another_lock(tmp_path: Path) -> None:
    first = take(tmp_path / "a")
    other = take(tmp_path / "b")
    with pytest.raises(StorageError, match="talipot sft"):
        take(tmp_path / "a")
    first.release()
    first.release()
    again = take(tmp_path / "a")
    first.release()  # of a lock that is another's by now
    with pytest.raises(StorageError):
        take(tmp_path / "a")
    again.release()
    other.release()


def test_two_threads_of_one_process_are_two_writers(tmp_path: Path) -> None:
    with writing(tmp_path, "train"), pytest.raises(StorageError, match=f"process {os.getpid()}"):
        take(tmp_path)
    take(tmp_path).release()


def test_a_forked_child_does_not_keep_its_dead_parents_lock(tmp_path: Path) -> None:
    then = "import os\nif os.fork() == 0:\n    os.close(1)\n    time.sleep(5)\n    os._exit(0)"
    with holder(tmp_path, then) as first:
        first.send_signal(signal.SIGKILL)
        first.wait()
        take(tmp_path, patience_s=1.0).release()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        take(tmp_path / "file")
    (tmp_path / "run" / "lock").mkdir(parents=True)
    with pytest.raises(StorageError, match="cannot be written"):
        take(tmp_path / "run")


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that knows no flock."""

    def unknown(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unknown)


@pytest.mark.usefixtures("no_flock")
def test_without_flock_the_note_is_the_lock(tmp_path: Path) -> None:
    first = take(tmp_path)
    with pytest.raises(StorageError, match=f"process {os.getpid()}"):
        take(tmp_path)
    first.release()
    again = take(tmp_path)
    note = tmp_path / "lock"
    again_note = note.read_text()
    # A process that ended, and another one that has its number now.
    with holder_that_ended() as pid:
        for gone in (replace(again.holder, pid=pid), replace(again.holder, born="boot 1")):
            note.write_text(json.dumps(asdict(gone)))
            taken = take(tmp_path)
            assert holder_of(note) == taken.holder
    note.write_text(again_note)
    with pytest.raises(StorageError):
        take(tmp_path)
    elsewhere = replace(again.holder, host="node-7", pid=2**30, stage="train")
    note.write_text(json.dumps(asdict(elsewhere)))
    with pytest.raises(StorageError, match=rf"node-7.*ps -p {2**30}.*remove {note}"):
        take(tmp_path)
    note.unlink()
    take(tmp_path).release()
    assert not note.exists()


@contextmanager
def holder_that_ended() -> Iterator[int]:
    """The number of a process that is not there any more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    yield process.pid
