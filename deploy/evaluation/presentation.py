"""How results are shown: the table of all sides, and the figures above it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from deploy.evaluation.intervals import Interval
from deploy.evaluation.results import figure

Tone = Literal["", "good", "bad"]
"""How an outcome is coloured: only where its interval leaves no doubt."""


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure by its name in a run's files, and how it is shown."""

    name: str
    title: str
    form: str
    """As ``str.format`` takes it."""
    better: Literal["", "higher", "lower"] = ""
    """Which value is the better one, where that can be said."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One measure of one side, written out; empty where there is none."""

    value: str = ""
    interval: str = ""
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Titles of columns, and rows of a title and a cell for each column."""

    columns: list[str]
    rows: list[tuple[str, list[Cell]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Presentation:
    """What to show of a task's results, and in which words."""

    sides: Mapping[str, str]
    """Side -> title of its column."""
    rows: tuple[Measure, ...]
    """Measures of sides."""
    tiles: tuple[Measure, ...]
    """Measures of the whole run."""
    stages: tuple[str, ...] = ()
    """Stages whose seconds are known, in their order."""
    sample_titles: tuple[str, str] = ("supervised", "trained")
    """Whose the answers before and after are."""
    samples_note: str = "samples."
    """After their number: what the rows of ``samples.jsonl`` are, and what their marks mean."""

    def table(self, figures: Mapping[str, Any]) -> Table:
        """Arrange figures; sides and measures of which there are none are left out."""
        rows = [(m.title, _cells(figures, m, list(self.sides))) for m in self.rows]
        rows = [(title, cells) for title, cells in rows if any(cell.value for cell in cells)]
        kept = [i for i in range(len(self.sides)) if any(cells[i].value for _, cells in rows)]
        columns = list(self.sides.values())
        return Table(
            [columns[i] for i in kept],
            [(title, [cells[i] for i in kept]) for title, cells in rows],
        )

    def naming(self, reference: str) -> Presentation:
        """Call what the trained policy is compared with by its name."""
        sides = {side: reference if side == "sft" else title for side, title in self.sides.items()}
        return replace(self, sides=sides)

    def without(self, name: str) -> Presentation:
        """Leave one measure of the sides out."""
        return replace(self, rows=tuple(m for m in self.rows if m.name != name))

    def tiles_of(self, figures: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Write out (value, title) of each figure of the whole run."""
        known = [m for m in self.tiles if m.name in figures]
        return [(m.form.format(figures[m.name]), m.title) for m in known]


def tone_of(low: float, high: float, of: float, better: str) -> Tone:
    """Return how an interval compares with a value: not at all where it holds that."""
    if not better or low <= of <= high:
        return ""
    return "good" if (low > of) == (better == "higher") else "bad"


def _cells(figures: Mapping[str, Any], measure: Measure, sides: Sequence[str]) -> list[Cell]:
    """Write one measure out; the last side is coloured where its interval leaves the other's."""
    cells = [_cell(figures, measure, side) for side in sides]
    values = [figure(figures, measure.name, side) for side in sides[-2:]]
    if len(values) == 2 and all(isinstance(value, Interval) for value in values):
        old, new = (value for value in values if isinstance(value, Interval))
        # Two intervals that meet are no difference: neither end of the old lies in the new.
        near = old.high if new.low > old.high else old.low
        if new.low > old.high or new.high < old.low:
            cells[-1] = replace(cells[-1], tone=tone_of(new.low, new.high, near, measure.better))
    return cells


def _cell(figures: Mapping[str, Any], measure: Measure, side: str) -> Cell:
    value = figure(figures, measure.name, side)
    if value is None:
        return Cell()
    if isinstance(value, Interval):
        ends = " to ".join(measure.form.format(end) for end in (value.low, value.high))
        return Cell(measure.form.format(value.mean), ends)
    return Cell(measure.form.format(value))


SCORE = Measure("score", "score by the run's own reward", "{:.3f}")
RESPONSE_LENGTH = Measure("response_length", "response length (tokens)", "{:.1f}")
NLL = Measure("nll", "NLL under the reference policy (nats per token)", "{:.2f}")
KL = Measure("kl", "KL to the reference policy, nats", "{:.1f}")

EVALUATION = Presentation(
    sides={"sft": "supervised", "policy": "trained policy"},
    rows=(
        Measure("judge_score", "judge's score", "{:.3f}"),
        SCORE,
        Measure("distinct", "distinct responses", "{:.1%}"),
        RESPONSE_LENGTH,
        NLL,
    ),
    tiles=(KL,),
)
"""Of `talipot evaluate`."""
