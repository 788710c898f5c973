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
from common.run_folder import RunFolder
from deploy.evaluation.charts import Series, line_chart
from deploy.run_folder.log_lines import Line, read_metrics

SAMPLES = 24
"""Signatures shown, evenly spaced over the held-out ones: a rule, not a choice."""

_CURVES: dict[str, tuple[tuple[str, str], ...]] = {
    "sft": (("loss", "Loss, nats per token"), ("tokens_per_second", "Tokens per second")),
    "reward": (("loss", "Loss"), ("accuracy", "Accuracy on training batches")),
    "train": (
        ("score", "Score per response"),
        ("kl", "KL to the supervised policy, nats per response"),
        ("entropy", "Entropy, nats per token"),
        ("response_length", "Response length, tokens"),
        ("eos_share", "Share of responses that end"),
        ("explained_variance", "Explained variance of the value network"),
        ("value_loss", "Value loss"),
        ("clip_fraction", "Share of clipped tokens"),
        ("update_kl", "KL of one update, nats per token"),
        ("auxiliary/value_loss", "Auxiliary value loss"),
        ("auxiliary/clone_kl", "KL that cloning allowed"),
        ("staleness", "Staleness, versions"),
        ("tokens_per_second", "Sampled tokens per second and actor"),
        ("seconds", "Seconds per iteration"),
    ),
}
_TITLES = {"sft": "Supervised policy", "reward": "Reward model", "train": "Policy"}
_SIDES = {"human": "people's lines", "sft": "supervised", "policy": "trained policy"}
_ROWS: tuple[tuple[str, str, str], ...] = (
    ("judge_conformance", "PEP 257 conformance (judge: ruff)", "{:.1%}"),
    ("rouge_l", "ROUGE-L to the human line", "{:.3f}"),
    ("quality", "Labeler's quality, noise-free", "{:.3f}"),
    ("judge_score", "Judge's score", "{:.3f}"),
    ("score", "Score by the run's own reward", "{:.3f}"),
    ("distinct", "Distinct responses", "{:.1%}"),
    ("response_length", "Response length, tokens", "{:.1f}"),
    ("nll", "NLL under the supervised policy, nats per token", "{:.2f}"),
)
_TILES: tuple[tuple[str, str, str], ...] = (
    ("kl", "KL to the supervised policy, nats", "{:.1f}"),
    ("reward_model_accuracy", "reward model, held-out accuracy", "{:.1%}"),
    ("rollouts_trained", "rollouts trained", "{:,}"),
    ("rollouts_dropped", "rollouts dropped", "{:,}"),
    ("seconds_pipeline", "seconds for everything", "{:.0f}"),
)
_STAGES = ("harvest", "tokenizer", "sft", "comparisons", "reward", "train", "evaluate")


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` of a run, finished or not; returns its path.

    Raises:
        DataError: the run has no metrics, or a file that the page is made of is damaged.
    """
    folder = RunFolder(run_dir)
    lines = read_metrics(folder.metrics)
    summary = _json(folder.summary) or _json(folder.evaluation)
    environment = Environment(
        loader=PackageLoader("deploy", "."), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("report.html.j2").render(
        name=run_dir.absolute().name,
        tiles=_tiles(summary),
        win=_win(summary),
        sides=[title for side, title in _SIDES.items() if _has(summary, side)],
        rows=_comparison(summary),
        stages=_stage_times(summary),
        sections=_sections(lines),
        samples=_samples(folder.samples),
        config=_text(folder.config),
        versions=_versions(),
    )
    write_atomic(folder.report, [page.encode()])
    return folder.report


# ------------------------------------------------------------------ parts of the page


def _sections(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Curves by stage. A resumed run's log holds a step twice: the later one counts."""
    sections = []
    for stage, curves in _CURVES.items():
        steps = {line.step: line.metrics for line in lines if line.stage == stage}
        marks = [s for s in sorted(steps) if "auxiliary_seconds" in steps[s]]
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


def _comparison(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table: a cell per side, with its interval where one was measured."""
    rows = []
    for key, title, form in _ROWS:
        if key == "judge_score" and "quality_sft" in summary:
            continue  # the quickstart's judge is its labeler: the same figure twice
        cells = []
        for side in _SIDES:
            value = summary.get(f"{key}_{side}")
            bounds = [summary.get(f"{key}_{end}_{side}") for end in ("low", "high")]
            interval = ""
            if all(isinstance(b, float) for b in bounds):
                interval = " to ".join(form.format(b) for b in bounds)
            if _has(summary, side):
                shown = "" if value is None else form.format(value)
                cells.append({"value": shown, "interval": interval})
        if any(cell["value"] for cell in cells):
            rows.append({"title": title, "cells": cells})
    return rows


def _has(summary: Mapping[str, Any], side: str) -> bool:
    return any(f"{key}_{side}" in summary for key, _, _ in _ROWS)


def _tiles(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {"value": form.format(summary[key]), "title": title}
        for key, title, form in _TILES
        if key in summary
    ]


def _win(summary: Mapping[str, Any]) -> dict[str, str] | None:
    """The win rate with its interval and what it is of, written out."""
    if "win_rate" not in summary:
        return None
    keys = ("win_rate", "win_rate_low", "win_rate_high", "ties_share")
    judged = ""
    if "pairs_judged" in summary:  # not in evaluations of earlier versions
        judged = f"{summary['pairs_judged']} of {summary['pairs_asked']} prompts judged"
    return {key: f"{summary[key]:.1%}" for key in keys} | {"judged": judged}


def _stage_times(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Seconds of each stage and their share of the longest."""
    times = {s: summary[f"seconds_{s}"] for s in _STAGES if f"seconds_{s}" in summary}
    longest = max(times.values(), default=1.0)
    return [
        {"name": name, "seconds": f"{seconds:.0f}", "width": f"{100 * seconds / longest:.1f}"}
        for name, seconds in times.items()
    ]


def _samples(path: Path) -> list[dict[str, Any]]:
    """`SAMPLES` rows, evenly spaced; half a row at the end is left out."""
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
        found = json.loads(text) if text else {}
    except ValueError as error:
        found = error
    if not isinstance(found, dict):
        raise DataError(f"{path}: damaged; remove it, or write it again with `talipot evaluate`")
    return found


def _text(path: Path) -> str:
    return path.read_text(encoding="utf8", errors="replace") if path.exists() else ""
