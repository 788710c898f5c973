"""A run's report: one HTML page that needs nothing but itself."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from common.config.run import RunConfig
from common.errors import DataError
from common.files import one_line, write_atomic
from common.metric_catalogue import Logged
from common.run_folder import RunFolder
from deploy.evaluation.curves import sections, steps_of
from deploy.evaluation.facts import facts_of, reference_of
from deploy.evaluation.frontier import frontier
from deploy.evaluation.intervals import Interval
from deploy.evaluation.logged_samples import logged_samples
from deploy.evaluation.presentation import EVALUATION, Presentation, tone_of
from deploy.evaluation.results import figure
from deploy.evaluation.worked import drawn_timeline
from deploy.health.checks import CHECKS, verdicts
from deploy.health.history import History
from deploy.run_folder.events import USUAL, read_events
from deploy.run_folder.log_lines import Line, read_metrics
from deploy.screen import visible

_PHASES = {
    Logged.COLLECT_SECONDS: "rollouts",
    Logged.LEARN_SECONDS: "policy phase",
    Logged.AUXILIARY_SECONDS: "auxiliary phase",
    Logged.PUBLISH_SECONDS: "publishing",
}
_EVENTS = 40
SAMPLES = 24
"""Samples shown, evenly spaced over all that there are: a rule, not a choice."""


def write_report(
    run_dir: Path, summary: Presentation = EVALUATION, config: RunConfig | None = None
) -> Path:
    """Write ``report.html`` of a run, finished or not; return its path.

    `summary` says how to show what ``summary.json`` holds; without that file the report shows
    ``evaluation.json``. `config` is the run's recipe, which the head of the page is made of.

    Raises:
        DataError: the run has no metrics, or a file that the page is made of is damaged.
    """
    folder = RunFolder(run_dir)
    lines = read_metrics(folder.metrics)
    shown, figures, note = summary, _json(folder.summary), ""
    tiles = shown.tiles_of(figures)
    if not figures:
        figures = _json(folder.evaluation)
        shown, note = _evaluation(figures, config)
        tiles = [*shown.tiles_of(figures), *_tiles(lines, evaluated=bool(figures))]
    table = shown.table(figures)
    samples = _samples(folder.samples)
    drawn = sections(lines)
    chosen = config is not None and bool(config.train.dynamic_sampling or config.data.curriculum)
    for section in drawn:
        if section.stage == "train":
            chart = frontier(folder, steps_of(lines, "train"), chosen=chosen)
            section.charts.extend([chart] if chart else [])
    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            name=run_dir.absolute().name,
            facts=facts_of(config, lines) if config else {},
            tiles=tiles,
            win=_win(figures, config, judged=shown is summary or "judge_score" in _names(shown)),
            table=table,
            table_note=note,
            intervals=any(cell.interval for _, cells in table.rows for cell in cells),
            stages=_stage_times(figures, shown.stages),
            health=verdicts(History.of(config, lines)) if config else [],
            checks=len(CHECKS) if config and steps_of(lines, "train") else 0,
            events=_faults(folder.events),
            phases=_phases(lines),
            timeline=drawn_timeline(folder, lines),
            sections=drawn,
            samples=samples,
            samples_note=summary.samples_note,
            sample_titles=dict(zip(("before", "after"), summary.sample_titles, strict=True)),
            logged=None if samples else logged_samples(folder),
            config=_text(folder.config),
            versions=_versions(),
        )
    )
    write_atomic(folder.report, [page.encode()])
    return folder.report


def environment() -> Environment:
    """Return the templates of our pages; what they are given is text, never markup.

    Characters that turn the direction of a line, or steer a terminal, are shown as escapes.
    """
    return Environment(
        loader=PackageLoader("deploy.evaluation", "."),
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
    )


# ------------------------------------------------------------------ parts of the page


def _evaluation(figures: Mapping[str, Any], config: RunConfig | None) -> tuple[Presentation, str]:
    """Return how to show ``evaluation.json``, and by whom and of which policy it is.

    Without a judge its score is the run's own reward a second time, which is left out.
    """
    shown, note = EVALUATION, ""
    if config is not None:
        shown = shown.naming(reference_of(config))
    if all(figures.get(f"judge_score_{s}") == figures.get(f"score_{s}") for s in shown.sides):
        shown = shown.without("judge_score")
    elif config is not None and config.evaluate.judge:
        note = f", by {config.evaluate.judge}"
    if config is not None and figures.get("iteration", 0) not in (0, config.train.iterations):
        note += f"; of the checkpoint of iteration {figures['iteration']}"
    return shown, note


def _names(shown: Presentation) -> set[str]:
    return {measure.name for measure in shown.rows}


def _tiles(lines: Sequence[Line], *, evaluated: bool) -> list[tuple[str, str]]:
    """Write out how far the stages of a run came, by its log."""
    tiles = []
    if train := steps_of(lines, "train"):
        scores = [m[Logged.SCORE] for m in train.values() if Logged.SCORE in m]
        if some := max(1, len(scores) // 10) if scores else 0:
            ends = f"{fmean(scores[:some]):.3g} → {fmean(scores[-some:]):.3g}"
            means = "iteration" if some == 1 else f"{some} iterations"
            tiles.append((ends, f"score per response, first and last {means}"))
        kl = train[max(train)].get(Logged.KL)
        if kl is not None and not evaluated:
            tiles.append((f"{kl:.3g}", "KL to the reference policy at the end, nats"))
    reward, sft = (steps_of(lines, stage) for stage in ("reward", "sft"))
    if reward and (accuracy := reward[max(reward)].get(Logged.ACCURACY_HELDOUT)) is not None:
        tiles.append((f"{accuracy:.1%}", "reward model, held-out accuracy"))
    if sft and (loss := sft[max(sft)].get(Logged.HELDOUT_LOSS)) is not None:
        before = sft[max(sft)].get(Logged.HELDOUT_LOSS_BEFORE)
        since = "" if before is None else f"{before:.2f} → "
        tiles.append((f"{since}{loss:.2f}", "supervised policy, held-out loss"))
    return tiles


def _win(
    figures: Mapping[str, Any], config: RunConfig | None, *, judged: bool
) -> dict[str, str] | None:
    """Write out the win rate with its interval, its colour and what it is of."""
    rate = figure(figures, "win_rate")
    if not isinstance(rate, Interval):
        return None
    by = "" if judged else ", by the run's own reward"
    pairs = ""
    if "pairs_judged" in figures:  # not in evaluations of earlier versions
        pairs = f"{figures['pairs_judged']} of {figures['pairs_asked']} prompts judged{by}"
    tone = tone_of(rate.low, rate.high, 0.5, "higher")
    return {
        "over": "supervised policy" if config is None else reference_of(config),
        "rate": f"{rate.mean:.1%}",
        "low": f"{rate.low:.1%}",
        "high": f"{rate.high:.1%}",
        "tone": tone,
        "verdict": "" if tone else ", which holds 50 %: no difference is shown",
        "ties": f"{figures['ties_share']:.1%}",
        "judged": pairs,
    }


def _faults(path: Path) -> list[dict[str, str]]:
    """Return what does not happen in every run, the last `_EVENTS`, as the page shows it."""
    found = [event for event in read_events(path) if event.what not in USUAL]
    return [
        {
            "time": f"{datetime.fromtimestamp(event.time, UTC):%-d %b, %H:%M:%S}",
            "what": f"{event.worker} {event.what}".strip(),
            "detail": event.detail,
        }
        for event in found[-_EVENTS:]
    ]


def _phases(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Return the mean seconds of each phase of an iteration, and their share of the longest."""
    train = steps_of(lines, "train").values()
    means = {
        title: sum(metrics.get(metric, 0.0) for metrics in train) / len(train)
        for metric, title in _PHASES.items()
        if any(metric in metrics for metrics in train)
    }
    return _bars(means, "{:.2f}")


def _stage_times(figures: Mapping[str, Any], stages: Sequence[str]) -> list[dict[str, Any]]:
    """Return the seconds of each stage and their share of the longest."""
    times = {s: figures[f"seconds_{s}"] for s in stages if f"seconds_{s}" in figures}
    return _bars(times, "{:.0f}")


def _bars(times: Mapping[str, float], form: str) -> list[dict[str, Any]]:
    longest = max(times.values(), default=1.0) or 1.0
    return [
        {"name": name, "seconds": form.format(seconds), "width": f"{100 * seconds / longest:.1f}"}
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
