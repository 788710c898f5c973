"""Fingerprints of files: what a file was when a stage used it, and how two of them differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from common.errors import DataError
from common.files import one_line, resolve


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFacts:
    """One file as it was when a stage used it."""

    path: str
    bytes: int
    lines: int | None
    """Of a .jsonl file."""
    xxh3_128: str
    """Of all its bytes."""

    def __str__(self) -> str:
        size = f"{self.bytes} bytes" if self.lines is None else f"{self.lines} lines"
        return f"{size}, {self.xxh3_128[:12]}"


Facts = dict[str, list[FileFacts]]
"""Files by what they are to a stage: ``data.prompts``, ``sft/policy.safetensors``."""


def fingerprint(path: str | Path, name: str) -> FileFacts:
    """Read a file once; its path is recorded as `name`.

    Raises:
        DataError: it is missing or cannot be read.
    """
    filesystem, inner = resolve(path)
    digest, size, lines, last = xxhash.xxh3_128(), 0, 0, b"\n"
    try:
        with filesystem.open_input_stream(inner, compression=None) as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
                size += len(chunk)
                lines += chunk.count(b"\n")
                last = chunk[-1:]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)})") from None
    return FileFacts(
        path=name,
        bytes=size,
        lines=lines + (last != b"\n") if str(path).endswith(".jsonl") else None,
        xxh3_128=digest.hexdigest(),
    )


def files_in(path: Path) -> list[Path]:
    """List the files of a folder, of the folders in it too; of a file itself."""
    if not path.is_dir():
        return [path]
    return sorted(inner for inner in path.rglob("*") if inner.is_file())


def tensors_in(folder: Path) -> list[Path]:
    """List the files of weights in a folder."""
    return [path for path in files_in(folder) if path.suffix == ".safetensors"]


def difference(name: str, old: Sequence[FileFacts], new: Sequence[FileFacts]) -> str:
    """Say what changed in the files of one name; empty when their contents did not."""
    before, now = [f.xxh3_128 for f in old], [f.xxh3_128 for f in new]
    if before == now:
        return ""
    if len(old) != len(new):
        was, are = ([f.path for f in files] for files in (old, new))
        return f"{name}: {', '.join(was)} -> {', '.join(are)} changed"
    if sorted(before) == sorted(now):
        return f"{name}: the order of its files changed"
    pairs = [(o, n) for o, n in zip(old, new, strict=True) if o.xxh3_128 != n.xxh3_128]
    return f"{name}: " + ", ".join(f"{n.path} changed ({o} -> {n})" for o, n in pairs)
