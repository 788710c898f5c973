"""A run's report: one HTML page that needs nothing but itself."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from common.errors import DataError
from common.files import one_line, write_atomic
from common.metric_catalogue import Logged
from common.run_folder import RunFolder
from deploy.evaluation.charts import Series, line_chart
from deploy.evaluation.intervals import Interval
from deploy.evaluation.presentation import EVALUATION, Presentation
from deploy.evaluation.results import figure
from deploy.run_folder.log_lines import Line, read_metrics

SAMPLES = 24
"""Samples shown, evenly spaced over all that there are: a rule, not a choice."""

_CURVES: dict[str, tuple[tuple[Logged, str], ...]] = {
    "sft": ((Logged.LOSS, "Loss, nats per token"), (Logged.TOKENS_PER_SECOND, "Tokens per second")),
    "reward": ((Logged.LOSS, "Loss"), (Logged.ACCURACY, "Accuracy on training batches")),
    "train": (
        (Logged.SCORE, "Score per response"),
        (Logged.KL, "KL to the supervised policy, nats per response"),
        (Logged.ENTROPY, "Entropy, nats per token"),
        (Logged.RESPONSE_LENGTH, "Response length, tokens"),
        (Logged.EOS_SHARE, "Share of responses that end"),
        (Logged.EXPLAINED_VARIANCE, "Explained variance of the value network"),
        (Logged.VALUE_LOSS, "Value loss"),
        (Logged.CLIP_FRACTION, "Share of clipped tokens"),
        (Logged.UPDATE_KL, "KL of one update, nats per token"),
        (Logged.AUXILIARY_VALUE_LOSS, "Auxiliary value loss"),
        (Logged.AUXILIARY_CLONE_KL, "KL that cloning allowed"),
        (Logged.STALENESS, "Staleness, versions"),
        (Logged.TOKENS_PER_SECOND, "Sampled tokens per second and actor"),
        (Logged.SECONDS, "Seconds per iteration"),
    ),
}
_TITLES = {"sft": "Supervised policy", "reward": "Reward model", "train": "Policy"}


def write_report(run_dir: Path, summary: Presentation = EVALUATION) -> Path:
    """Write ``report.html`` of a run, finished or not; return its path.

    `summary` says how to show what ``summary.json`` holds; without that file the report shows
    ``evaluation.json``.

    Raises:
        DataError: the run has no metrics, or a file that the page is made of is damaged.
    """
    folder = RunFolder(run_dir)
    lines = read_metrics(folder.metrics)
    shown, figures = summary, _json(folder.summary)
    if not figures:
        shown, figures = EVALUATION, _json(folder.evaluation)
    environment = Environment(
        loader=PackageLoader("deploy.evaluation", "."), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("report.html.j2").render(
        name=run_dir.absolute().name,
        tiles=shown.tiles_of(figures),
        win=_win(figures),
        table=shown.table(figures),
        stages=_stage_times(figures, shown.stages),
        sections=_sections(lines),
        samples=_samples(folder.samples),
        samples_note=summary.samples_note,
        sample_titles=dict(zip(("before", "after"), summary.sample_titles, strict=True)),
        config=_text(folder.config),
        versions=_versions(),
    )
    write_atomic(folder.report, [page.encode()])
    return folder.report


# ------------------------------------------------------------------ parts of the page


def _sections(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Draw the curves of each stage; of a step that a resumed run logged twice, the later one."""
    sections = []
    for stage, curves in _CURVES.items():
        steps = {line.step: line.metrics for line in lines if line.stage == stage}
        marks = [s for s in sorted(steps) if Logged.AUXILIARY_SECONDS in steps[s]]
        charts = []
        for key, title in curves:
            at = [s for s in sorted(steps) if key in steps[s]]
            if at:
                series = Series(
                    title=title, steps=at, values=[float(steps[s][key]) for s in at], marks=marks
                )
                charts.append({"title": title, "svg": line_chart(series)})
        if charts:
            sections.append({"title": _TITLES[stage], "charts": charts, "marked": bool(marks)})
    return sections


def _win(figures: Mapping[str, Any]) -> dict[str, str] | None:
    """Write out the win rate with its interval and what it is of."""
    rate = figure(figures, "win_rate")
    if not isinstance(rate, Interval):
        return None
    judged = ""
    if "pairs_judged" in figures:  # not in evaluations of earlier versions
        judged = f"{figures['pairs_judged']} of {figures['pairs_asked']} prompts judged"
    return {
        "rate": f"{rate.mean:.1%}",
        "low": f"{rate.low:.1%}",
        "high": f"{rate.high:.1%}",
        "ties": f"{figures['ties_share']:.1%}",
        "judged": judged,
    }


def _stage_times(figures: Mapping[str, Any], stages: Sequence[str]) -> list[dict[str, Any]]:
    """Return the seconds of each stage and their share of the longest."""
    times = {s: figures[f"seconds_{s}"] for s in stages if f"seconds_{s}" in figures}
    longest = max(times.values(), default=1.0)
    return [
        {"name": name, "seconds": f"{seconds:.0f}", "width": f"{100 * seconds / longest:.1f}"}
        for name, seconds in times.items()
    ]


def _samples(path: Path) -> list[dict[str, Any]]:
    """Read `SAMPLES` rows, evenly spaced; half a row at the end is left out."""
    lines, rows = _text(path).splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise DataError(f"{path}:{number}: damaged ({one_line(error)})") from None
    stride = max(1, math.ceil(len(rows) / SAMPLES))
    return rows[::stride]


def _versions() -> str:
    packages = ("talipot", "torch", "ray", "deepspeed", "pyarrow")
    named = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            named.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:  # run from a source tree that is not installed
            continue
    return ", ".join(named)


def _json(path: Path) -> dict[str, Any]:
    text = _text(path)
    try:
        figures = json.loads(text) if text else {}
    except ValueError:
        figures = None
    if not isinstance(figures, dict):
        raise DataError(
            f"{path}: damaged; remove it, or write it again with the command that wrote it"
        )
    return figures


def _text(path: Path) -> str:
    return path.read_text(encoding="utf8", errors="replace") if path.exists() else ""
