"""Where bytes live: a local path or any URI that `pyarrow.fs` understands (s3://, gs://, ...)."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote, unquote

from pyarrow import ArrowInvalid, fs

from common.errors import DataError, StorageError
from common.reasoning_tasks import file_of, is_task
from common.unfinished import unfinished

_NOT_IN_URIS = re.compile(r"""[^\w\-.~!$&'()*+,;=:@/?#%\[\]]|[^\x00-\x7f]|%(?![0-9A-Fa-f]{2})""")


def resolve(path: str | os.PathLike[str]) -> tuple[fs.FileSystem, str]:
    """Split `path` into a file system and the path inside it.

    Only a text with "://" is a URI, so a relative path such as `data:v2/a.jsonl` stays local; a
    local path may start with ``~``. In a URI, blanks and the like may stand as they are or as
    ``%20``. The name of tasks (`common.reasoning_tasks`) is that of a file in memory.

    Raises:
        DataError: the URI's scheme is unknown or its file system cannot be reached.
    """
    text = os.fspath(path)
    if is_task(text):
        return file_of(text)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return fs.LocalFileSystem(), str(Path(os.path.expanduser(text)).absolute())
    if scheme.lower() == "file":
        return fs.LocalFileSystem(), _local(text, rest)
    try:
        filesystem, inner = fs.FileSystem.from_uri(_NOT_IN_URIS.sub(_escaped, text))
    except (ArrowInvalid, OSError) as error:
        raise DataError(
            f"{text}: not a URI that can be read ({one_line(error)}); "
            "use a local path, file://, s3:// or gs://"
        ) from error
    return filesystem, inner


def _local(uri: str, rest: str) -> str:
    """Return the path in ``file://[localhost]/path``; a file's name may hold ``#`` and ``?``."""
    host, slash, path = rest.partition("/")
    if host.lower() not in ("", "localhost") or not slash:
        raise DataError(f"{uri}: names the host '{host}'; write file:///path, or the path alone")
    return unquote(slash + path)


def _escaped(character: re.Match[str]) -> str:
    return quote(character[0], safe="")


def is_local(path: str | os.PathLike[str]) -> bool:
    """Whether a path is one of this machine, and no URI and no name of tasks."""
    text = os.fspath(path)
    return "://" not in text and not is_task(text)


def is_utf8(text: str) -> bool:
    """Whether an argument or a file's name was valid UTF-8 before Python decoded it."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def one_line(error: object) -> str:
    """Return the text of `error` (or another object) on one line of at most 160 characters.

    Our messages have one line.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def write_atomic(path: str | os.PathLike[str], chunks: Iterable[bytes | memoryview]) -> None:
    """Write `chunks` to `path` so that a reader sees the old file or the whole new one.

    Local: temporary file beside it, fsync, rename, fsync of the folder; what a killed writer of
    `path` left there is removed. Elsewhere: temporary object, then a move, because closing a
    half-written upload would publish it.

    Raises:
        StorageError: the target cannot be written.
    """
    filesystem, inner = resolve(path)
    temporary = f"{inner}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        if isinstance(filesystem, fs.LocalFileSystem):
            _write_local(Path(inner), chunks)
            return
        try:
            with filesystem.open_output_stream(temporary) as stream:
                for chunk in chunks:
                    stream.write(chunk)
            filesystem.move(temporary, inner)
        except BaseException:
            if filesystem.get_file_info(temporary).type == fs.FileType.File:
                filesystem.delete_file(temporary)
            raise
    except OSError as error:
        raise StorageError(
            f"{os.fspath(path)}: cannot be written ({one_line(error)}); "
            "check the folder, its rights and the free space"
        ) from error


def _write_local(target: Path, chunks: Iterable[bytes | memoryview]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(target) as temporary:
        with temporary.open("wb") as stream:
            for chunk in chunks:
                stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    # Without this the rename itself may be lost in a power cut, though the bytes are safe.
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
