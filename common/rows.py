"""Rows of the files that users bring, each with the place to name when it is wrong.

    path -> `sources` -> JsonlSource | ParquetSource -> (row, "file:line" | "file:row N")

Streamed by `rows`, or by number through `index` and `row`. What a row must hold is decided in
`common.data`; here a file is only required to be one.
"""

from __future__ import annotations

import codecs
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from common.errors import DataError
from common.files import one_line, resolve

MAX_LINE_BYTES: Final = 64 * 2**20  # one record; more is a file without line breaks
PARQUET_BATCH_ROWS: Final = 1024
_BOM: Final = codecs.BOM_UTF8

Row = Mapping[str, object]


def type_name(value: object) -> str:
    """How an error names the type of a value."""
    return "null" if value is None else f"of type {type(value).__name__}"


def sources(paths: Sequence[str]) -> list[JsonlSource | ParquetSource]:
    """Check that every file is there and of a known kind.

    Raises:
        DataError: no path, a missing file, a folder, an unknown extension, or no way to reach it.
    """
    if isinstance(paths, str):
        raise TypeError("paths must be a sequence of paths, not one text")
    if not paths:
        raise DataError("no data files: name at least one .jsonl or .parquet file")
    return [_source(path) for path in paths]


def _source(path: str) -> JsonlSource | ParquetSource:
    filesystem, inner = resolve(path)
    makers: dict[str, Callable[..., JsonlSource | ParquetSource]] = {
        ".jsonl": JsonlSource,
        ".parquet": ParquetSource,
    }
    extension = os.path.splitext(inner)[1]
    if extension not in makers:
        raise DataError(f"{path}: extension {extension!r} is unknown; use .jsonl or .parquet")
    try:
        found = filesystem.get_file_info(inner).type
    except OSError as error:
        raise DataError(f"{path}: cannot be reached ({one_line(error)}); check it") from error
    if found == fs.FileType.Directory:
        raise DataError(f"{path}: is a folder; name the files in it")
    if found != fs.FileType.File:
        raise DataError(f"{path}: no such file; check the path")
    return makers[extension](path, filesystem, inner)


class JsonlSource:
    """One JSON object a line; blank lines are passed over."""

    def __init__(self, path: str, filesystem: fs.FileSystem, inner: str) -> None:
        self._path, self._fs, self._inner = path, filesystem, inner
        self._offsets: NDArray[np.int64] | None = None  # [rows, 3]: line number, start, length

    def rows(self) -> Iterator[tuple[Row, str]]:
        """Stream every row with its place. Raises: DataError."""
        for number, _, raw in self._lines():
            yield self._parse(raw, number)

    def index(self) -> int:
        """Scan once for the offsets (24 bytes a row are held), return the number of rows."""
        places = [(number, start, len(raw)) for number, start, raw in self._lines()]
        self._offsets = np.asarray(places, dtype=np.int64).reshape(-1, 3)
        return len(self._offsets)

    def row(self, index: int) -> tuple[Row, str]:
        """Row `index`, from 0, with its place. Raises: DataError."""
        assert self._offsets is not None, "index() comes first"
        number, start, length = self._offsets[index].tolist()
        try:
            with self._fs.open_input_file(self._inner) as stream:
                return self._parse(stream.read_at(length, start), number)
        except OSError as error:
            raise DataError(f"{self._path}: cannot be read ({one_line(error)})") from error

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        """(line number from 1, byte offset, bytes) of every line that is not blank."""
        start, number, count = 0, 0, 0
        try:
            with self._fs.open_input_stream(self._inner, compression=None) as raw_stream:
                stream = io.BufferedReader(raw_stream, buffer_size=2**20)
                while raw := stream.readline(MAX_LINE_BYTES + 1):
                    number += 1
                    if len(raw) > MAX_LINE_BYTES:
                        raise DataError(
                            f"{self._path}:{number}: longer than {MAX_LINE_BYTES >> 20} MiB; "
                            "write one JSON object per line"
                        )
                    if raw.removeprefix(_BOM).strip():
                        count += 1
                        yield number, start, raw
                    start += len(raw)
        except OSError as error:
            raise DataError(f"{self._path}: cannot be read ({one_line(error)})") from error
        if not count:
            raise DataError(f"{self._path}: holds no records; write one JSON object per line")

    def _parse(self, raw: bytes, number: int) -> tuple[Row, str]:
        place = f"{self._path}:{number}"
        try:
            # Editors of some systems open a file with a mark, and of two files that were joined
            # the second one's stands in the middle.
            text = raw.removeprefix(_BOM).decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{place}: byte {error.start + 1} of the line is not UTF-8; save it as UTF-8"
            ) from error
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{place}: torn JSON ({one_line(error)}); write one complete object per line"
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f'{place}: is {type_name(row)}; write an object such as {{"prompt": "..."}}'
            )
        return row, place


class ParquetSource:
    """Rows of a Parquet file, numbered from 1."""

    def __init__(self, path: str, filesystem: fs.FileSystem, inner: str) -> None:
        self._path, self._fs, self._inner = path, filesystem, inner
        self._starts: NDArray[np.int64] | None = None  # [row groups + 1]: first row of each
        self._held: tuple[int, pa.RecordBatch] | None = None  # the row group read last

    def rows(self) -> Iterator[tuple[Row, str]]:
        """Stream every row with its place. Raises: DataError."""
        number = 0
        try:
            with self._fs.open_input_file(self._inner) as stream:
                for batch in pq.ParquetFile(stream).iter_batches(PARQUET_BATCH_ROWS):
                    for index in range(batch.num_rows):
                        number += 1
                        yield self._row(batch, index, number)
        except (pa.ArrowException, OSError) as error:
            raise self._torn(error) from error
        if not number:
            raise DataError(f"{self._path}: holds no records; write at least one row")

    def index(self) -> int:
        """Read the footer, return the number of rows."""
        try:
            with self._fs.open_input_file(self._inner) as stream:
                meta = pq.ParquetFile(stream).metadata
        except (pa.ArrowException, OSError) as error:
            raise self._torn(error) from error
        sizes = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
        self._starts = np.cumsum([0, *sizes], dtype=np.int64)
        if not meta.num_rows:
            raise DataError(f"{self._path}: holds no records; write at least one row")
        return int(meta.num_rows)

    def row(self, index: int) -> tuple[Row, str]:
        """Read the row group of `index` unless it was the last one read: keep groups small."""
        assert self._starts is not None, "index() comes first"
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        if self._held is None or self._held[0] != group:
            try:
                with self._fs.open_input_file(self._inner) as stream:
                    table = pq.ParquetFile(stream).read_row_group(group)
            except (pa.ArrowException, OSError) as error:
                raise self._torn(error) from error
            self._held = group, table.combine_chunks().to_batches()[0]
        return self._row(self._held[1], index - int(self._starts[group]), index + 1)

    def _row(self, batch: pa.RecordBatch, index: int, number: int) -> tuple[Row, str]:
        place = f"{self._path}:row {number}"
        row: dict[str, object] = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                row[name] = column[index].as_py()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{place}: field {name!r}: byte {error.start + 1} is not UTF-8; "
                    "write it as UTF-8"
                ) from error
        return row, place

    def _torn(self, error: Exception) -> DataError:
        return DataError(
            f"{self._path}: torn or not Parquet ({one_line(error)}); write or copy it again"
        )
