"""How the columns of comparisons are read that are no plain texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

from common.data.files.values import type_name
from common.errors import DataError

Split = Literal["", "train", "valid1", "valid2"]


def _confidence(value: object, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{field}: is {type_name(value)}; write a number from 0.5 to 1")
    if not 0.5 <= value <= 1:
        raise DataError(
            f"{field}: is {value:.6g}, outside 0.5 ... 1; below 0.5 swap chosen and rejected"
        )
    return float(value)


def _told(value: object, _: str) -> str:
    return value if isinstance(value, str) else ""


def _seconds(value: object, _: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and 0 <= value < math.inf else 0.0  # type: ignore[operator, arg-type]


def _round(value: object, _: str) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _split(value: object, _: str) -> Split:
    return value if value in ("train", "valid1", "valid2") else ""


OF_ROUNDS: Final[Mapping[str, Callable[[object, str], Any]]] = {
    "pair_uid": _told,
    "round": _round,
    "seconds": _seconds,
    "split": _split,
}
"""Columns that rounds of feedback add, and how they are read: other people's files may have columns
of these names, with whatever in them. They are written only where they say something."""
READERS: Final[Mapping[str, Callable[[object, str], Any]]] = {
    "confidence": _confidence,
    **OF_ROUNDS,
}
"""How the columns are read that are no texts."""
