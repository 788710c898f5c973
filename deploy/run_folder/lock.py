"""One writer for each run: a lock on the run's folder, held while a stage writes into it.

The lock is the kernel's (`flock` on ``RUN/lock``), so it ends with the process that holds it,
however that dies, and nobody has to judge whether a holder is still alive. The file holds a note
for whoever is refused or looks for the run: host, process, stage, start, and the address of the
cluster that the run is at work on. Where the file system knows no `flock`, the note itself is the
lock: one of a process of this host that is gone is taken over, one of another host has to be
removed by hand, because nothing here can tell what lives there.

Who holds it: the command during `sft`, `reward` and `quickstart`, the controller during policy
training (it outlives its command), `replay` for the folder of its own. Whoever only reads a run, or
attaches to its controller, takes none.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from common.errors import StorageError
from common.run_folder import RunFolder

PATIENCE_S = 5.0
"""How long a holder may take to go before the next one is refused: a controller notices the end of
its node within a second, and a command hands the lock to the controller that it starts."""
_POLL_S, _SETTLE_S = 0.05, 0.5
_UNKNOWN = -1
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


_SINCE = "%Y-%m-%d %H:%M:%S UTC"


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a run's lock, as its note says."""

    host: str
    pid: int
    born: str
    """When the process began, as its kernel counts: tells it from a later one of the same number;
    empty where the system does not say."""
    stage: str
    since: str
    """UTC, as `_SINCE`."""
    token: str
    """Tells one holding from the next."""
    cluster: str = ""
    """Address of the Ray cluster that it is at work on; empty where it has none yet."""

    @property
    def began(self) -> float:
        """Unix seconds of `since`."""
        return datetime.strptime(f"{self.since}+0000", f"{_SINCE}%z").timestamp()

    def __str__(self) -> str:
        return f"`talipot {self.stage}` on host {self.host}, process {self.pid}, since {self.since}"


class RunLock:
    """The right to write into a run's folder; `release` it after use."""

    def __init__(
        self, run_dir: Path, stage: str, *, cluster: str = "", patience_s: float = PATIENCE_S
    ) -> None:
        """Wait until the lock is free, at most `patience_s`.

        Raises:
            StorageError: another writer holds it (named), or the folder cannot be written.
        """
        self._path = RunFolder(run_dir).lock
        self._handle: int | None = None
        self.holder = Holder(
            host=socket.gethostname(),
            pid=os.getpid(),
            born=_born(os.getpid()),
            stage=stage,
            since=datetime.now(UTC).strftime(_SINCE),
            token=secrets.token_hex(8),
            cluster=cluster,
        )
        deadline = time.monotonic() + patience_s
        try:
            while not self._take():
                if time.monotonic() > deadline:
                    raise _refusal(run_dir, self._path)
                time.sleep(_POLL_S)
        except OSError as error:
            raise StorageError(f"{run_dir}: cannot be written: {error}") from None
        _HELD.add(self)

    def release(self) -> None:
        """Give the folder free; nothing to do when that was done."""
        if self not in _HELD:
            return
        _HELD.discard(self)
        if self._handle is None:
            with suppress(FileNotFoundError):
                self._path.unlink()
            return
        os.ftruncate(self._handle, 0)
        os.close(self._handle)

    def _take(self) -> bool:
        handle = _locked(self._path)
        if handle is None:
            return False
        if handle == _UNKNOWN:
            return self._take_by_note()
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(asdict(self.holder)).encode(), 0)
        except OSError:
            os.close(handle)
            raise
        self._handle = handle
        return True

    def _take_by_note(self) -> bool:
        """Write the note: of two that write at once, the note that stays says who has the lock."""
        holder = holder_of(self._path)
        if holder is not None and not _gone(holder):
            return False
        ours = self._path.with_name(f"lock.{self.holder.token}")
        ours.write_text(json.dumps(asdict(self.holder)), encoding="utf8")
        ours.replace(self._path)
        time.sleep(_SETTLE_S)
        return holder_of(self._path) == self.holder


@contextmanager
def writing(run_dir: Path, stage: str, cluster: str = "") -> Iterator[Holder]:
    """Hold a run's lock meanwhile. Raises what `RunLock` raises."""
    lock = RunLock(run_dir, stage, cluster=cluster)
    try:
        yield lock.holder
    finally:
        lock.release()


def at_work(run_dir: Path) -> Holder | None:
    """Return who is writing into a run's folder now; None where nobody is.

    The note alone does not tell, because that of a process which was killed stays.
    """
    path = RunFolder(run_dir).lock
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except OSError as error:
        held = error.errno not in _NO_FLOCK
    finally:
        os.close(handle)
    deadline = time.monotonic() + _SETTLE_S
    while (holder := holder_of(path)) is None and held and time.monotonic() < deadline:
        time.sleep(_POLL_S)  # its note is just being written
    return None if holder is None or (not held and _gone(holder)) else holder


def remove_unused(run_dir: Path, made: Sequence[str]) -> None:
    """Remove a folder in which nothing lies but its lock and what was `made` in it.

    A folder with other files stays, and so does one that another process is writing into.
    """
    path = RunFolder(run_dir).lock
    with suppress(OSError):
        handle = _locked(path)
        if handle is None:
            return
        try:
            if set(os.listdir(run_dir)) <= {path.name, *made}:
                # While it is locked: whoever waits for it sees that it is not the file any more.
                shutil.rmtree(run_dir)
        finally:
            if handle != _UNKNOWN:
                os.close(handle)


def holder_of(path: Path) -> Holder | None:
    """Read what a lock's file says of its holder; None when it says nothing."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf8")))
    except (OSError, ValueError, TypeError):
        return None  # no file, none holds it, or its note is just being written


def _locked(path: Path) -> int | None:
    """Open and lock a file; returns its handle.

    None where another process has it, and `_UNKNOWN` where the file system knows no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), os.stat(path)):
            return handle
        os.close(handle)  # the folder was removed meanwhile, and perhaps made again
        return None
    except OSError as error:
        os.close(handle)
        if error.errno in _NO_FLOCK:
            return _UNKNOWN
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.ENOENT):
            return None
        raise


def _refusal(run_dir: Path, path: Path) -> StorageError:
    holder = holder_of(path)
    if holder is None:
        return StorageError(f"{run_dir}: another process is writing into this run; wait for it")
    advice = "wait for it or stop it, or set name to another one"
    if holder.stage == "train":
        advice += f"; `talipot train --resume {run_dir}` attaches to it"
    if holder.host != socket.gethostname():
        advice += (
            f"; if that process is gone (ask `ps -p {holder.pid}` on {holder.host}), its lock ends "
            f"with it, on a network file system once the server notices: remove {path} if it stays"
        )
    return StorageError(
        f"{run_dir}: `talipot {holder.stage}` on host {holder.host}, process {holder.pid}, has "
        f"been writing into this run since {holder.since}; {advice}"
    )


def _gone(holder: Holder) -> bool:
    """Whether a holder is certainly dead: a process of this host that is not there any more."""
    return holder.host == socket.gethostname() and _born(holder.pid) != holder.born


def _born(pid: int) -> str:
    """Return boot and clock ticks at which a process began; "" when unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf8", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf8").strip()
    except OSError:
        return ""
    # The name in parentheses may hold spaces; state and start are the 1st and 20th field after it
    # (proc(5)).
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else f"{boot} {fields[19]}"


_HELD: set[RunLock] = set()


def _forget() -> None:
    """Close the parent's locks in a forked child, which would keep them beyond its death."""
    for lock in list(_HELD):
        if lock._handle is not None:
            os.close(lock._handle)
    _HELD.clear()


os.register_at_fork(after_in_child=_forget)
