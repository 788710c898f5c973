"""What is not whole yet: it lies beside its final name until it is, as ``.NAME.TOKEN.partial``.

Its writer holds the kernel's lock on it (`flock`), which ends with the writer however that dies. So
the next writer of the same name can tell what nobody is writing any more, and removes it: what a
killed process left costs room only until then. Where the file system knows no such lock, nothing is
removed, for nothing can be told.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL, REPLACED = "partial", "replaced"
"""What is being written, and what had the name before."""
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def unfinished(target: Path, *, folder: bool = False) -> Iterator[Path]:
    """Give an empty file or folder beside `target`, whose folder exists, to write into.

    The caller gives it the name of `target` once it is whole; what has kept its own is removed.
    What dead writers of `target` left is removed before.

    Raises:
        OSError: nothing can be written there.
    """
    for dead in left_by_writers(target, PARTIAL):
        _remove_if_dead(dead)
    partial, handle = _begin(target, folder)
    try:
        yield partial
    finally:
        _remove(partial)
        os.close(handle)


def left_by_writers(target: Path, kind: str) -> list[Path]:
    """List what writers of `target`, dead or alive, have beside it."""
    name = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.{kind}")
    return [path for path in target.parent.iterdir() if name.fullmatch(path.name)]


def _begin(target: Path, folder: bool) -> tuple[Path, int]:
    """Make what is written into, and lock it, before anybody takes it for a dead writer's."""
    while True:
        partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.{PARTIAL}")
        if folder:
            partial.mkdir()
        else:
            partial.touch(exist_ok=False)
        with suppress(FileNotFoundError):  # somebody has done so already: once more
            handle = os.open(partial, os.O_RDONLY)
            _lock(handle, fcntl.LOCK_SH)
            if partial.exists():
                return partial, handle
            os.close(handle)


def _remove_if_dead(partial: Path) -> None:
    """Remove what a writer left, unless one holds it."""
    with suppress(FileNotFoundError):  # its writer has just given it its name
        handle = os.open(partial, os.O_RDONLY)
        try:
            if _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
                _remove(partial)
        finally:
            os.close(handle)


def _lock(handle: int, how: int) -> bool:
    """Whether the lock is ours now; it is not where the file system has none to give."""
    try:
        fcntl.flock(handle, how)
    except OSError as error:
        # EBADF: a network file system that locks for writing only what is open for it.
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EBADF, *_NO_FLOCK):
            return False
        raise
    return True


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
