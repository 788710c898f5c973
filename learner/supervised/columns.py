"""Examples as Arrow columns: ranks of one node read them where the object store has them.

As Python lists every rank would have each token as an object of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Generic, TypeVar, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from learner.supervised.examples import EncodedComparison, EncodedPair

Example = TypeVar("Example", EncodedPair, EncodedComparison)

_TOKENS = pa.large_list(pa.int32())
_SCHEMAS: dict[type[Any], pa.Schema] = {
    EncodedPair: pa.schema(
        [
            ("prompt", _TOKENS),
            ("response", _TOKENS),
            ("between", _TOKENS),  # begin, end, begin, end; nothing here reads the conversation
        ]
    ),
    EncodedComparison: pa.schema(
        [
            ("prompt", _TOKENS),
            ("chosen", _TOKENS),
            ("rejected", _TOKENS),
            ("confidence", pa.float64()),
            ("split", pa.large_string()),
        ]
    ),
}


class Rows(Sequence[Example], ABC, Generic[Example]):
    """Examples of one kind, each made when it is asked for."""

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Drawn[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Drawn[Example]:
        """Make an example, or take some as a list would."""
        if isinstance(index, slice):
            return Drawn(self, range(len(self))[index])
        return self.made(range(len(self))[index])

    @abstractmethod
    def made(self, row: int) -> Example:
        """Make the example of a row, from 0."""


class Columns(Rows[Example], Generic[Example]):
    """All examples, in Arrow columns."""

    def __init__(self, kind: type[Example], table: pa.Table) -> None:
        """Read a table in the schema of its kind; `columns` makes one."""
        self._kind: type[Example] = kind
        self._table = table.combine_chunks()
        self._fields = {name: _Field(self._table[name]) for name in self._table.column_names}

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as the table, whose bytes are not copied where they are received."""
        return Columns, (self._kind, self._table)

    def __len__(self) -> int:
        """Count the examples."""
        return int(self._table.num_rows)

    def made(self, row: int) -> Example:
        """Make the example of a row."""
        values: dict[str, Any] = {name: field.at(row) for name, field in self._fields.items()}
        if "between" in values:
            ends = iter(values["between"])
            values["between"] = tuple(zip(ends, ends, strict=True))
        found: Example = self._kind(**values)
        return found


class Drawn(Rows[Example], Generic[Example]):
    """Examples in another order, and any number of times."""

    def __init__(self, examples: Sequence[Example], order: Iterable[int]) -> None:
        """Take them by their numbers."""
        self._examples: Sequence[Example] = examples
        self._order = np.fromiter(order, dtype=np.int64)

    def __len__(self) -> int:
        """Count them, each as often as it was drawn."""
        return len(self._order)

    def made(self, row: int) -> Example:
        """Return an example."""
        found: Example = self._examples[int(self._order[row])]
        return found


def columns(kind: type[Example], examples: Iterable[Example]) -> Columns[Example]:
    """Lay out examples as columns."""
    found: dict[str, list[Any]] = {field.name: [] for field in _SCHEMAS[kind]}
    for example in examples:
        for name, values in found.items():
            value: Any = getattr(example, name)
            values.append([*chain(*value)] if name == "between" else value)
    return Columns(kind, pa.table(found, schema=_SCHEMAS[kind]))


class _Field:
    """A column, of which one value is read at a time."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        array = column.chunk(0) if column.num_chunks else pa.array([], type=column.type)
        self._array = array
        self._offsets: npt.NDArray[np.int64] | None = None
        if pa.types.is_large_list(array.type):
            self._offsets = array.offsets.to_numpy()
            self._values: npt.NDArray[np.int32] = array.values.to_numpy()

    def at(self, row: int) -> Any:
        if self._offsets is None:
            return self._array[row].as_py()
        return self._values[self._offsets[row] : self._offsets[row + 1]].tolist()


def lengths_of(
    examples: Sequence[EncodedComparison], rows: Iterable[int]
) -> Iterator[tuple[int, int]]:
    """Yield rows of comparisons with the tokens that both sides take, padded to the longer one."""
    for row in rows:
        found = examples[row]
        longer = max(len(found.chosen), len(found.rejected))
        yield row, 2 * (len(found.prompt) + longer)
