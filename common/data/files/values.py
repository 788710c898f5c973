"""What a value of a column may be: as JSON has it, of which kind, and of which type in Parquet."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Final, Literal

import pyarrow as pa

from common.errors import DataError

_LONGEST_INTEGER: Final = 640  # digits; no Python converts fewer

Kind = Literal["text", "number", "other"]


@dataclass(frozen=True, slots=True)
class Foreign:
    """A value of a column whose type no record has a use for; it was not converted."""

    type: str


def type_name(value: object) -> str:
    """Name the type of a value, for an error."""
    if isinstance(value, Foreign):
        return f"of type {value.type}"
    return "null" if value is None else f"of type {type(value).__name__}"


def json_of(value: object, field: str) -> object:
    """Return a value as JSON has it. Raises: DataError, of what it has no form for."""
    match value:
        case None | bool() | int() | str():
            return value
        case Decimal():
            return float(value)
        case float() if math.isfinite(value):
            return value
        case datetime.date() | datetime.time():
            return value.isoformat()
        case Mapping():
            return {str(key): json_of(of, field) for key, of in value.items()}
        case list() | tuple():
            return [json_of(one, field) for one in value]
    what = f"{value}" if isinstance(value, float) else type_name(value)
    raise DataError(
        f"{field}: is {what}, which JSON has no form for; write it otherwise, or leave the column "
        "out of data.columns"
    )


def has_json(stored: pa.DataType) -> bool:
    """Whether the values of a column are no bytes, and nothing that holds bytes."""
    is_, stored = pa.types, _stored(stored)
    if is_.is_nested(stored):
        inner = [stored.field(i).type for i in range(stored.num_fields)]
        return all(has_json(one) for one in inner)
    known = is_.is_date(stored) or is_.is_time(stored) or is_.is_timestamp(stored)
    binary = is_.is_binary(stored) or is_.is_large_binary(stored) or is_.is_binary_view(stored)
    return known or (is_plain(stored) and not binary)


def kind_of(value: object) -> Kind:
    """Return the kind of a value."""
    if isinstance(value, str):
        return "text"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return "number" if number else "other"


def integer(digits: str) -> int | float:
    """Read an integer of any length, also in columns that nobody reads."""
    return int(digits) if len(digits) < _LONGEST_INTEGER else float(digits)


def stored_kind(stored: pa.DataType) -> Kind:
    """Return the kind of a Parquet column's values, by its type."""
    is_, stored = pa.types, _stored(stored)
    if (
        is_.is_string(stored)
        or is_.is_large_string(stored)
        or is_.is_string_view(stored)
        or is_.is_binary(stored)
        or is_.is_large_binary(stored)
        or is_.is_binary_view(stored)
    ):
        return "text"
    number = is_.is_integer(stored) or is_.is_floating(stored) or is_.is_decimal(stored)
    return "number" if number else "other"


def _stored(stored: pa.DataType) -> pa.DataType:
    """Return the type of the values themselves, under dictionaries and extensions."""
    if isinstance(stored, pa.BaseExtensionType):
        return _stored(stored.storage_type)
    return _stored(stored.value_type) if pa.types.is_dictionary(stored) else stored


def storage_of(column: pa.Array) -> pa.Array:
    """Take off the extension type that a column may carry."""
    return column.storage if isinstance(column.type, pa.BaseExtensionType) else column


def is_plain(stored: pa.DataType) -> bool:
    """Whether Python holds its values as text, number, truth or null."""
    truth = pa.types.is_boolean(stored) or pa.types.is_null(stored)
    return truth or stored_kind(stored) != "other"
