"""Line charts as inline SVG that follow the colours of the page they stand in."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_TEXT = "#010203"
"""Stands for the page's own text colour; no chart uses it for data."""
_LINE = "#1f7a63"
_MARK = "#c05621"


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One metric of one stage over its steps."""

    title: str
    steps: Sequence[float]
    values: Sequence[float]
    marks: Sequence[float] = ()
    """Steps to mark: where an auxiliary phase ran."""


def line_chart(series: Series) -> Markup:
    """Draw the series as an SVG element; values that are not finite are left out."""
    points = [(x, y) for x, y in zip(series.steps, series.values, strict=True) if math.isfinite(y)]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": series.title}):
        figure = Figure(figsize=(3.7, 2.1), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for step in series.marks:
            axes.axvline(step, color=_MARK, linewidth=0.8, linestyle=(0, (2, 2)), alpha=0.8)
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=_LINE,
            linewidth=1.6,
            marker="o" if len(points) < 40 else "",
            markersize=2.4,
        )
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.tick_params(labelsize=8, length=0, colors=_TEXT)
        axes.grid(axis="y", color=_TEXT, alpha=0.15, linewidth=0.6)
        axes.set_axisbelow(True)
        for side in axes.spines.values():
            side.set_visible(False)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    return _inline(drawn.getvalue(), series.title)


def _inline(document: str, title: str) -> Markup:
    """Cut out the svg element, named for screen readers, with the page's own text colour."""
    svg = document[document.index("<svg") :].replace(_TEXT, "currentColor")
    name = Markup.escape(title)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{name}"', 1))
