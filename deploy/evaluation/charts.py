"""Line charts as inline SVG that follow the colours of the page they stand in."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_TEXT = "#010203"
"""Stands for the page's own text colour; no chart uses it for data."""
_LINES = ("#010211", "#010212", "#010213", "#010214", "#010215", "#010216")
"""Stand for the page's colours of lines, ``--line-1`` and so on."""
_MARK = "#010221"
MOST_LINES = len(_LINES)
"""Lines that one chart can tell apart."""
_FEW = 40
"""Values up to which each is a dot."""
_NOISY = 20
"""Values from which a running mean is drawn."""
_DENSE = 400
"""Values from which the line is a band between the least and the largest of its neighbours."""
_BINS = 160
MOST_MARKS = 80
"""Ticks on an axis that can be told apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One metric of one stage over its steps."""

    title: str
    steps: Sequence[float]
    values: Sequence[float]
    marks: Sequence[float] = ()
    """Steps to mark on the axis: where an auxiliary phase ran."""

    @property
    def finite(self) -> list[tuple[float, float]]:
        """The points that can be drawn."""
        return [(x, y) for x, y in zip(self.steps, self.values, strict=True) if math.isfinite(y)]

    @property
    def says_something(self) -> bool:
        """Whether there are two values that differ."""
        return len({y for _, y in self.finite}) > 1


def line_chart(series: Series) -> Markup:
    """Draw one series; values that are not finite are left out."""
    return lines_chart(series.title, [series])


class Point(NamedTuple):
    """A place in a picture of one metric against another."""

    x: float
    y: float


def frontier_chart(title: str, path: Sequence[Point], marks: Sequence[Point]) -> Markup:
    """Draw a way through two metrics, its end as a dot, and others beside it, dashed."""

    def draw(axes: Axes) -> None:
        axes.plot(*zip(*path, strict=True), color=_LINES[0], linewidth=1.6)
        axes.plot(*path[-1], color=_LINES[0], marker="o", markersize=4)
        if marks:
            across = zip(*marks, strict=True)
            axes.plot(
                *across, color=_LINES[1], linewidth=1.2, linestyle="--", marker="o", markersize=3
            )

    return _chart(title, draw, whole=False)


def lines_chart(title: str, lines: Sequence[Series]) -> Markup:
    """Draw some series of one metric as an SVG element, in the colours of the page.

    Of many values the line is their running mean, with themselves, or the band that they lie in,
    faint behind it.
    """

    def draw(axes: Axes) -> None:
        for series, colour in zip(lines, _LINES, strict=False):
            _draw(axes, series, colour)
        _tick(axes, [step for series in lines for step in series.marks])

    return _chart(title, draw, whole=True)


def _chart(title: str, draw: Callable[[Axes], None], *, whole: bool) -> Markup:
    """Draw on axes as all charts have them; `whole`: their steps are whole numbers."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure = Figure(figsize=(3.7, 2.1), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=whole))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.tick_params(labelsize=8, length=0, pad=5, colors=_TEXT)
        axes.yaxis.offsetText.set(color=_TEXT, size=8)
        axes.grid(axis="y", color=_TEXT, alpha=0.15, linewidth=0.6)
        axes.set_axisbelow(True)
        for side in axes.spines.values():
            side.set_visible(False)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    return _inline(drawn.getvalue(), title)


def running_mean(values: Sequence[float]) -> list[float]:
    """Return the mean of each value and its neighbours, a fifteenth of all around it.

    At the ends there are fewer neighbours, on one side.
    """
    half, count = max(1, len(values) // 30), len(values)
    sums = np.concatenate(([0.0], np.cumsum(np.asarray(values, dtype=np.float64))))
    first = np.maximum(np.arange(count) - half, 0)
    last = np.minimum(np.arange(count) + half + 1, count)
    return [float(mean) for mean in (sums[last] - sums[first]) / (last - first)]


def _draw(axes: Axes, series: Series, colour: str) -> None:
    points = series.finite
    steps, values = [x for x, _ in points], [y for _, y in points]
    if len(values) < _NOISY:
        dots = "o" if len(values) < _FEW else ""
        axes.plot(steps, values, color=colour, linewidth=1.6, marker=dots, markersize=2.4)
        return
    means = running_mean(values)
    if len(values) < _DENSE:
        axes.plot(steps, values, color=colour, linewidth=0.9, alpha=0.45)
        axes.plot(steps, means, color=colour, linewidth=1.7)
        return
    bins = [part for part in np.array_split(np.arange(len(values)), _BINS) if len(part)]
    at = [steps[part[len(part) // 2]] for part in bins]
    low, high = ([end(values[i] for i in part) for part in bins] for end in (min, max))
    axes.fill_between(at, low, high, color=colour, alpha=0.22, linewidth=0)
    axes.plot(at, [means[part[len(part) // 2]] for part in bins], color=colour, linewidth=1.6)


def _tick(axes: Axes, marks: Sequence[float]) -> None:
    """Draw a tick on the axis at each mark, as one path; too many to be told apart are none."""
    if not marks or len(marks) > MOST_MARKS:
        return
    axes.plot(
        np.repeat(marks, 3),
        [0.0, 0.05, math.nan] * len(marks),
        transform=axes.get_xaxis_transform(),
        color=_MARK,
        linewidth=1.2,
        solid_capstyle="butt",
        zorder=5,
    )


def _inline(document: str, title: str) -> Markup:
    """Cut out the svg element, named for screen readers, with the page's own colours."""
    svg = document[document.index("<svg") :].replace(_TEXT, "currentColor")
    svg = svg.replace(_MARK, "var(--mark)")
    for number, colour in enumerate(_LINES, 1):
        svg = svg.replace(colour, f"var(--line-{number})")
    name = Markup.escape(title)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{name}"', 1))
