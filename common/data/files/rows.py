"""Rows of the files that users bring, each with the place to name when it is wrong.

    path -> `files_at` -> file -> `source_of` -> JsonlSource    -> Row, place "file:line"
                                               | JsonSource     -> Row, place "file:element N"
                                               | ParquetSource  -> Row, place "file:row N"

What a row must hold is decided in `common.data.records`; here a file is only required to be one. Of
a Parquet file only the columns that are asked for are read: others may be of any type, broken
or huge. JSON lines are streamed, packed ones too; a JSON array is read as a whole.
"""

from __future__ import annotations

import codecs
import io
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Final, NoReturn, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from common.data.files.lists import LINES, PACKED, TABLES, files_at
from common.data.files.values import (
    Foreign,
    Kind,
    has_json,
    integer,
    is_plain,
    json_of,
    kind_of,
    storage_of,
    stored_kind,
    type_name,
)
from common.errors import DataError
from common.files import one_line, resolve

MAX_LINE_BYTES: Final = 64 * 2**20  # one record; more is a file without line breaks
PARQUET_BATCH_ROWS: Final = 1024
_BOM: Final = codecs.BOM_UTF8


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a file."""

    values: Mapping[str, object]
    """Of the columns that were asked for, those that the row has."""
    others: tuple[tuple[str, Kind], ...]
    """Name and kind of each other column."""
    further: Mapping[str, object]
    """What other columns hold, of those that were asked for, as JSON has it."""
    place: str
    """``file:line``, ``file:row N`` of a Parquet file, ``file:element N`` of an array; all count
    from 1."""


Refused = Callable[[DataError], None]
"""Told of a row that cannot be read; the next one follows when it returns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """What is read of a row."""

    wanted: tuple[str, ...]
    """Columns that a record is made of, where they are there."""
    further: tuple[str, ...] | None = ()
    """Others, which go with it as they are: these, each of which has to be there; None is all."""

    def are_further(self, name: str) -> bool:
        """Whether a column goes with the record."""
        return name not in self.wanted and (self.further is None or name in self.further)

    def require(self, names: Collection[str], place: str) -> None:
        """Refuse what lacks a column that was asked for by name. Raises: DataError."""
        missing = [name for name in self.further or () if name not in names]
        if missing:
            raise DataError(
                f"{place}: field {missing[0]!r}: missing; data.columns asks for it: add it, or "
                "take it out there"
            )


class Source(Protocol):
    """A file of rows."""

    def rows(self, columns: Columns, refused: Refused = ...) -> Iterator[Row]:
        """Yield its rows, with these columns. Raises: DataError, of a row by way of `refused`."""
        ...


def _raise(error: DataError) -> NoReturn:
    raise error


def sources(paths: Sequence[str]) -> list[Source]:
    """Find every file that is meant, and check that it is there and of a known kind.

    Raises:
        DataError: no path, no such file, an unknown extension, or no way to reach it.
    """
    if isinstance(paths, str):
        raise TypeError("paths must be a sequence of paths, not one text")
    if not paths:
        raise DataError("no data files: name at least one .jsonl, .json or .parquet file")
    return [source_of(path) for path in files_at(paths)]


def source_of(path: str) -> Source:
    """Return the reader of one file, by its name; raises as `sources`."""
    filesystem, inner = resolve(path)
    plain, ending = os.path.splitext(inner)
    compression = PACKED.get(ending)
    extension = os.path.splitext(plain)[1] if compression else ending
    if extension in TABLES and compression is None:
        return ParquetSource(path, filesystem, inner)
    if extension not in (*LINES, ".json"):
        shown = (os.path.splitext(plain)[1] if compression else "") + ending
        raise DataError(
            f"{path}: extension {shown!r} is unknown; use .jsonl or .json, either of them with "
            ".gz or .zst too, or .parquet"
        )
    reader = JsonSource if extension == ".json" else JsonlSource
    return reader(path, filesystem, inner, compression)


class JsonlSource:
    """One JSON object a line; blank lines are passed over."""

    def __init__(
        self, path: str, filesystem: fs.FileSystem, inner: str, compression: str | None = None
    ) -> None:
        self._path, self._fs, self._inner = path, filesystem, inner
        self._compression = compression

    def rows(self, columns: Columns, refused: Refused = _raise) -> Iterator[Row]:
        """Stream every row. Raises: DataError, of a row by way of `refused`."""
        for number, raw in self._lines():
            place = f"{self._path}:{number}"
            try:
                row = _row(_object(self._parse(raw, place), place), columns, place)
            except DataError as error:
                refused(error)
                continue
            yield row

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield line number, from 1, and bytes of every line that is not blank."""
        blank = True
        for number, raw in self._numbered():
            if raw.removeprefix(_BOM).strip():
                blank = False
                yield number, raw
        if blank:
            raise DataError(f"{self._path}: holds no records; write one JSON object per line")

    def _numbered(self) -> Iterator[tuple[int, bytes]]:
        """Yield every line with its number."""
        number = 0
        with self._open() as stream:
            while raw := stream.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(raw) > MAX_LINE_BYTES:
                    raise DataError(
                        f"{self._path}:{number}: longer than {MAX_LINE_BYTES >> 20} MiB; "
                        "write one JSON object per line"
                    )
                yield number, raw

    @contextmanager
    def _open(self) -> Iterator[io.BufferedReader]:
        """Open the file, unpacked."""
        try:
            with self._fs.open_input_stream(self._inner, compression=self._compression) as stream:
                yield io.BufferedReader(stream, buffer_size=2**20)
        except OSError as error:
            raise DataError(f"{self._path}: cannot be read ({one_line(error)})") from error

    def _parse(self, raw: bytes, place: str) -> object:
        try:
            # Editors of some systems open a file with a mark, and of two files that were joined
            # the second one's stands in the middle.
            text = raw.removeprefix(_BOM).decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{place}: byte {error.start + 1} of the line is not UTF-8; save it as UTF-8"
            ) from error
        try:
            value: object = json.loads(text, parse_int=integer)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{place}: torn JSON ({one_line(error)}); write one complete object per line"
            ) from error
        return value


class JsonSource(JsonlSource):
    """A JSON array of objects, whose elements count from 1; or JSON lines under that name."""

    def rows(self, columns: Columns, refused: Refused = _raise) -> Iterator[Row]:
        """Yield every row. Raises: DataError, of an element by way of `refused`."""
        if not self._is_array():
            yield from super().rows(columns, refused)
            return
        for number, element in enumerate(self._elements(), 1):
            place = f"{self._path}:element {number}"
            try:
                row = _row(_object(element, place), columns, place)
            except DataError as error:
                refused(error)
                continue
            yield row

    def _is_array(self) -> bool:
        with self._open() as stream:
            start = stream.read(len(_BOM)).removeprefix(_BOM)
            while piece := start or stream.read(2**16):
                if start := piece.lstrip():
                    return start.startswith(b"[")
        return False

    def _elements(self) -> list[object]:
        with self._open() as stream:
            whole = stream.read()
        try:
            elements: list[object] = json.loads(
                whole.removeprefix(_BOM).decode(), parse_int=integer
            )
        except UnicodeDecodeError as error:
            line = whole.count(b"\n", 0, error.start) + 1
            raise DataError(f"{self._path}:{line}: is not UTF-8; save it as UTF-8") from error
        except json.JSONDecodeError as error:
            raise DataError(
                f"{self._path}:{error.lineno}: torn JSON ({error.msg}, column {error.colno}); "
                "write one complete array of objects"
            ) from error
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{self._path}: torn JSON ({one_line(error)}); write one complete array of objects"
            ) from error
        if not elements:
            raise DataError(f"{self._path}: holds no records; write at least one object")
        return elements


class ParquetSource:
    """Rows of a Parquet file, numbered from 1."""

    def __init__(self, path: str, filesystem: fs.FileSystem, inner: str) -> None:
        self._path, self._fs, self._inner = path, filesystem, inner

    def rows(self, columns: Columns, refused: Refused = _raise) -> Iterator[Row]:
        """Stream every row; no other column is read.

        Raises:
            DataError: of a row by way of `refused`; a column that was asked for by name is missing.
        """
        number = 0
        try:
            with self._fs.open_input_file(self._inner) as stream:
                file = pq.ParquetFile(stream)
                schema = file.schema_arrow
                names = self._names(schema, columns.wanted)
                further = self._further(schema, columns)
                others = tuple(
                    (field.name, stored_kind(field.type))
                    for field in schema
                    if field.name not in names
                )
                for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=[*names, *further]):
                    stored = {name: storage_of(batch.column(name)) for name in (*names, *further)}
                    for index in range(batch.num_rows):
                        number += 1
                        place = f"{self._path}:row {number}"
                        try:
                            values = {
                                name: self._value(stored[name], index, f"{place}: field {name!r}")
                                for name in names
                            }
                            more = {
                                name: json_of(
                                    stored[name][index].as_py(), f"{place}: field {name!r}"
                                )
                                for name in further
                            }
                        except DataError as error:
                            refused(error)
                            continue
                        yield Row(values=values, others=others, further=more, place=place)
        except pa.ArrowNotImplementedError as error:
            raise DataError(
                f"{self._path}: cannot be read here ({one_line(error)}); write it without that"
            ) from error
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{self._path}: torn or not Parquet ({one_line(error)}); write or copy it again"
            ) from error
        if not number:
            raise DataError(f"{self._path}: holds no records; write at least one row")

    def _names(self, schema: pa.Schema, wanted: Sequence[str]) -> list[str]:
        """Return the wanted columns that the file has."""
        for name in wanted:
            if schema.names.count(name) > 1:
                raise DataError(f"{self._path}: column {name!r} is there twice; keep one of them")
        return [name for name in wanted if name in schema.names]

    def _further(self, schema: pa.Schema, columns: Columns) -> list[str]:
        """Return the columns that go with a record; of all, those that JSON has a form for."""
        columns.require(schema.names, self._path)
        named = columns.further is not None
        further = [
            field.name
            for field in schema
            if columns.are_further(field.name) and (named or has_json(field.type))
        ]
        return self._names(schema, further)

    def _value(self, column: pa.Array, index: int, field: str) -> object:
        plain = is_plain(column.type) or pa.types.is_nested(column.type)
        if column[index].is_valid and not plain:
            return Foreign(str(column.type))
        try:
            value = column[index].as_py()
            # Some writers leave out that their bytes are text.
            value = value.decode() if isinstance(value, bytes) else value
        except UnicodeDecodeError as error:
            raise DataError(
                f"{field}: byte {error.start + 1} is not UTF-8; write it as UTF-8"
            ) from error
        return float(value) if isinstance(value, Decimal) else value


def _object(value: object, place: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise DataError(
            f'{place}: is {type_name(value)}; write an object such as {{"prompt": "..."}}'
        )
    return value


def _row(values: Mapping[str, object], columns: Columns, place: str) -> Row:
    wanted = columns.wanted
    columns.require(values.keys(), place)
    return Row(
        values={name: values[name] for name in wanted if name in values},
        others=tuple((name, kind_of(values[name])) for name in values if name not in wanted),
        further={
            name: json_of(value, f"{place}: field {name!r}")
            for name, value in values.items()
            if columns.are_further(name)
        },
        place=place,
    )
