"""Samples of a run's trajectory log: what the policy answered at first, and what at last."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import DataError
from common.files import one_line
from common.run_folder import RunFolder

SHOWN = 12
"""Prompts shown, at evenly spaced ranks: a rule, not a choice."""
_LONGEST = 1_200
"""Characters of a text that are shown."""
_COLUMNS = ["prompt_uid", "prompt_text", "response_text", "score", "score_components"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One response, and what it was given for it."""

    title: str
    score: float
    text: str
    parts: str = ""
    """Components of the score, where it has several."""
    prompt: str = ""
    """Where the two sides answer different prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedSamples:
    """Responses of a first and a last iteration, side by side."""

    note: str
    rows: list[tuple[str, list[Side]]]
    """A prompt that both sides answer, or an empty text, and the sides."""


def logged_samples(folder: RunFolder) -> LoggedSamples | None:
    """Read the first and the last iteration's trajectories; None where there are not two.

    Raises:
        DataError: a log is damaged.
    """
    files = sorted(folder.trajectories(0).parent.glob("iteration-*.parquet"))
    numbers = [int(found[0]) for p in files if (found := re.findall(r"\d+", p.stem))]
    if len(numbers) < 2:
        return None
    first, last = (_rows(folder.trajectories(end(numbers))) for end in (min, max))
    if not first or not last:
        return None
    ends = min(numbers), max(numbers)
    titles = [f"iteration {number}" for number in ends]
    named = f"iterations {ends[0]} and {ends[1]}"
    earlier = {row["prompt_uid"]: row for row in first}
    both = [(earlier[row["prompt_uid"]], row) for row in last if row["prompt_uid"] in earlier]
    if len(both) >= SHOWN // 2:
        pairs = [
            (old["prompt_text"], [_side(titles[0], old), _side(titles[1], new)])
            for old, new in _spaced(both)
        ]
        note = f"prompts that {named} both asked, evenly spaced"
    else:
        ranked = [_spaced(sorted(rows, key=lambda row: row["score"])) for rows in (first, last)]
        pairs = [
            ("", [_side(titles[0], old, alone=True), _side(titles[1], new, alone=True)])
            for old, new in zip(*ranked, strict=False)
        ]
        note = (
            f"responses each of {named}, of different prompts: "
            "at evenly spaced ranks by score, from the lowest to the highest"
        )
    return LoggedSamples(
        note=f"{len(pairs)} {note}; nothing was picked. The number is the score.",
        rows=[(_cut(prompt), sides) for prompt, sides in pairs],
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    """Read a log, without the columns that a page does not show."""
    try:
        rows: list[dict[str, Any]] = pq.read_table(path, columns=_COLUMNS).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path}: damaged ({one_line(error)}); move it away, or put it back"
        ) from None
    return rows


def _side(title: str, row: dict[str, Any], *, alone: bool = False) -> Side:
    components = dict(row["score_components"] or [])
    parts = ", ".join(f"{name} {value:.3g}" for name, value in sorted(components.items()))
    return Side(
        title=title,
        score=row["score"],
        text=_cut(row["response_text"]),
        parts=parts if len(components) > 1 else "",
        prompt=_cut(row["prompt_text"]) if alone else "",
    )


def _spaced(rows: Sequence[Any]) -> list[Any]:
    """Take `SHOWN` of the rows, evenly spaced, the first and the last among them."""
    if len(rows) <= SHOWN:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (SHOWN - 1))] for i in range(SHOWN)]


def _cut(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " …"
