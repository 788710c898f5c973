"""Names of columns that were meant to be others: missing ones, and slips of the finger."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from common.data.files.values import Kind

_KINDS: Final[dict[str, Kind]] = {
    "confidence": "number",
    "messages": "other",
}  # of the columns that are not text
_OTHER_WORDS: Final = frozenset(
    {"labeled", "confident", "conference"}
)  # near an optional column, and meant
_SHOWN_COLUMNS: Final = 12
_LONG: Final = 9  # letters; in a word so long two slips are believed


@lru_cache(maxsize=64)  # the columns of a file rarely change from row to row
def column_fault(
    required: tuple[str, ...],
    optional: tuple[str, ...],
    columns: tuple[str, ...],
    others: tuple[tuple[str, Kind], ...],
) -> str | None:
    """Say what is wrong with the names of the columns; other columns may be there, unread."""
    for name in required:
        if name not in columns:
            if near := _misspelt(name, others):
                return f"field {name!r}: missing; rename {near!r} to {name!r}"
            if near := _misspelt("messages", others):
                return f"field {near!r}: unknown; rename it to 'messages'"
            return (
                f"field {name!r}: missing; add it, or rename the column that holds it (columns "
                f"found: {_listed(columns, others)})"
            )
    for name in optional:
        # A misspelt optional field would otherwise be dropped without a word.
        if name not in columns and (near := _misspelt(name, others)):
            return f"field {near!r}: unknown; rename it to {name!r} or take it out"
    return None


def _misspelt(name: str, others: tuple[tuple[str, Kind], ...]) -> str | None:
    """Find the column that may mean `name`: of its kind, and a slip of the finger away from it.

    Common columns of other people's data (``label``, ``prompt_id``, ``confidence_level``) are
    further away, or of another kind.
    """
    slips = 1 if len(name) < _LONG else 2
    for other, kind in others:
        word = other.strip(" _-").casefold()
        if (
            kind == _KINDS.get(name, "text")
            and word not in _OTHER_WORDS
            and _slips(word, name) <= slips
        ):
            return other
    return None


def _slips(a: str, b: str) -> int:
    """Count letters that are missing, added, wrong or swapped (restricted Damerau distance)."""
    if abs(len(a) - len(b)) > 2:
        return 3
    before, last = [0] * (len(b) + 1), list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            best = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and other == a[i - 2]:
                best = min(best, before[j - 2] + 1)
            row.append(best)
        before, last = last, row
    return last[-1]


def _listed(columns: tuple[str, ...], others: tuple[tuple[str, Kind], ...]) -> str:
    names = [*columns, *(name for name, _ in others)]
    more = [f"and {len(names) - _SHOWN_COLUMNS} more"] if len(names) > _SHOWN_COLUMNS else []
    return ", ".join([*map(repr, names[:_SHOWN_COLUMNS]), *more]) or "none"
