"""Which files are meant by the paths of a recipe: files, folders of them, and patterns.

    data/a.jsonl     the file
    data             every data file in the folder, but not in folders inside it
    data/*.jsonl     every file that fits: `*` and `?` stand for letters, `[ab]` for one of these,
                     `**` for folders in between

The same files in the same order on every machine: those of a folder or pattern by their names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Final
from urllib.parse import quote

from pyarrow import fs

from common.errors import DataError
from common.files import is_local, one_line, resolve

LINES: Final = (".jsonl", ".ndjson")
"""Endings of JSON lines."""
TABLES: Final = (".parquet",)
PACKED: Final = {".gz": "gzip", ".zst": "zstd"}
"""Endings of packed files of JSON, and what Arrow calls their codec."""
_WILD = re.compile(r"[*?\[]")
_WILD_IN_URI = re.compile(r"[*\[]")
"""In a URI the question mark begins its options."""


def files_at(paths: Sequence[str]) -> list[str]:
    """Return every file that the paths mean, in their order.

    Raises:
        DataError: a file is not there, a folder or pattern has none, it cannot be reached, or a
            file that a folder or pattern means is named a second time.
    """
    files: list[str] = []
    named: dict[str, str] = {}
    for path in paths:
        for file in _files_of(path):
            by = named.setdefault(file, path)
            # Who writes one file twice, by its own name, gets it twice.
            if file in files and not by == path == file:
                raise DataError(f"{file}: is meant twice, by {by} and {path}; name it once")
            files.append(file)
    return files


def is_data_file(name: str) -> bool:
    """Whether a file of a folder is one to read, by the ending of its name."""
    plain, ending = os.path.splitext(name)
    if ending in PACKED:
        ending = os.path.splitext(plain)[1]
        return ending in (*LINES, ".json")
    return ending in (*LINES, *TABLES, ".json")


def _files_of(path: str) -> list[str]:
    filesystem, inner = resolve(path)
    kind = _kind(filesystem, inner, path)
    if kind == fs.FileType.File:
        return [path]
    if kind == fs.FileType.Directory:
        files = [file for file in _matching(path, "", ["*"]) if is_data_file(file)]
        if not files:
            raise DataError(
                f"{path}: is a folder without a data file of its own; put .jsonl, .json or "
                f".parquet files into it, or name others by a pattern such as {path}/**/*.jsonl"
            )
        return files
    text, _, options = (path, "", "") if is_local(path) else path.partition("?")
    wild = (_WILD if is_local(path) else _WILD_IN_URI).search(text)
    if wild is None:
        raise DataError(f"{path}: no such file; check the path")
    cut = text.rfind("/", 0, wild.start()) + 1
    files = _matching(text[:cut] or ".", options, text[cut:].split("/"))
    if not files:
        raise DataError(f"{path}: no file fits this pattern; check it")
    return files


def _matching(folder: str, options: str, pattern: list[str]) -> list[str]:
    """List the files below a folder whose names fit, folder by folder."""
    options = f"?{options}" if options else ""
    filesystem, inner = resolve(folder + options)
    deep = len(pattern) > 1
    try:
        selector = fs.FileSelector(inner, recursive=deep, allow_not_found=True)
        infos = filesystem.get_file_info(selector)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({one_line(error)}); check it") from error
    root = "" if folder == "." else folder if folder.endswith("/") else f"{folder}/"
    names = (info.path[len(inner) :].strip("/") for info in infos if info.is_file)
    fitting = [name for name in sorted(names) if _fits(name.split("/"), pattern)]
    return [f"{root}{name if is_local(folder) else quote(name)}{options}" for name in fitting]


def _fits(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path, name by name, fits; a hidden name only where the dot is written."""
    if not pattern:
        return not names
    first = pattern[0]
    if names and names[0].startswith(".") and not first.startswith("."):
        return False
    if first == "**":
        return _fits(names, pattern[1:]) or (bool(names) and _fits(names[1:], pattern))
    return bool(names) and fnmatchcase(names[0], first) and _fits(names[1:], pattern[1:])


def _kind(filesystem: fs.FileSystem, inner: str, path: str) -> fs.FileType:
    try:
        return filesystem.get_file_info(inner).type
    except OSError as error:
        raise DataError(f"{path}: cannot be reached ({one_line(error)}); check it") from error
