"""`talipot compare RUN RUN...`: outcomes, curves, and what differs between the runs.

Runs are sorted by their outcome, best first: the held-out score of `talipot evaluate` where every
run has one by the same judge, else the mean score of the last tenth of its iterations.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from common.config.run import RunConfig
from common.errors import ConfigError, DataError
from common.files import write_atomic
from common.metric_catalogue import Logged
from deploy.evaluation.charts import MOST_LINES, Series, lines_chart
from deploy.evaluation.curves import Steps, series_of, steps_of
from deploy.evaluation.facts import algorithm_of, facts_of
from deploy.evaluation.intervals import Interval
from deploy.evaluation.presentation import Tone, tone_of
from deploy.evaluation.report import environment
from deploy.evaluation.results import figure
from deploy.run_folder.fingerprints import FileFacts
from deploy.run_folder.inputs import RunInputs
from deploy.run_folder.log_lines import Line, read_metrics
from deploy.run_folder.resume_rules import flat, within

_NOT_COMPARED = (
    *("name", "output", "cluster", "reuse", "quickstart", "data", "model.start", "preset"),
    *("train.checkpoint_every", "train.keep_checkpoints"),
)
"""Prefixes of fields that say where a run is, or name files, which are compared by content."""
_PARTS = (
    *(("reuse.tokenizer", "tokenizer"), ("tokenizer", "tokenizer")),
    *(("reuse.sft", "supervised policy"), ("sft/", "supervised policy")),
    *(("reuse.reward_model", "reward model"), ("reward_model/", "reward model")),
)
"""Beginnings of names in ``run.json``, and the part of a run that the file belongs to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One run, as it stands beside others."""

    config: RunConfig
    lines: list[Line]
    steps: Steps
    """Of policy training; not empty."""
    evaluation: Mapping[str, Any]
    """Of `talipot evaluate`; empty where there is none."""
    files: dict[str, list[FileFacts]] = field(default_factory=dict)
    """What policy training read."""

    @property
    def score(self) -> float:
        """Mean score per response in the last tenth of the iterations."""
        scores = [m[Logged.SCORE] for m in self.steps.values() if Logged.SCORE in m]
        return fmean(scores[-max(1, len(scores) // 10) :]) if scores else float("nan")

    @property
    def held_out(self) -> float | None:
        """Score of the trained policy on held-out prompts, by the judge where there is one."""
        value: float | None = self.evaluation.get("judge_score_policy")
        return value

    @property
    def win(self) -> Interval | None:
        """Win rate over what training began with."""
        rate = figure(self.evaluation, "win_rate")
        return rate if isinstance(rate, Interval) else None

    @property
    def win_tone(self) -> Tone:
        """How the win rate is coloured."""
        return tone_of(self.win.low, self.win.high, 0.5, "higher") if self.win else ""

    @property
    def kl(self) -> float | None:
        """KL to the reference policy in the last iteration, nats per response."""
        return self.steps[max(self.steps)].get(Logged.KL)

    @property
    def seconds(self) -> float:
        """Seconds of all iterations."""
        return sum(metrics.get(Logged.SECONDS, 0.0) for metrics in self.steps.values())

    @property
    def done(self) -> str:
        """Iterations that are done, of how many."""
        return f"{max(self.steps)}/{self.config.train.iterations}"

    @property
    def facts(self) -> dict[str, str]:
        """What it is, in a few words."""
        return facts_of(self.config, self.lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Several runs, the best first."""

    runs: list[Compared]
    names: list[str]
    """What each is called: its name, or its path where names are the same."""
    by: str
    """What they are sorted by."""
    differences: list[tuple[str, list[str]]]
    """Fields and files that differ, with the value of each run."""

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Yield a row of texts for each run, under `COLUMNS`."""
        for name, run in zip(self.names, self.runs, strict=True):
            win = f"{run.win.mean:.1%}" if run.win else "-"
            held_out = "-" if run.held_out is None else f"{run.held_out:.3f}"
            kl = "-" if run.kl is None else f"{run.kl:.2f}"
            numbers = (f"{run.score:.3f}", held_out, win, kl, f"{run.seconds:,.0f}", run.done)
            yield (name, algorithm_of(run.config).split(",")[0].split(" with")[0], *numbers)


COLUMNS = ("run", "algorithm", "score", "held-out", "win rate", "KL", "seconds", "iterations")
TITLES = {
    "score": "mean score per response, last tenth of the iterations",
    "held-out": "score on held-out prompts, by talipot evaluate",
    "win rate": "over what training began with",
    "KL": "to the reference policy in the last iteration, nats per response",
    "seconds": "of all iterations",
}


def compare_runs(configs: Sequence[RunConfig]) -> Comparison:
    """Read runs and put them in order.

    Raises:
        ConfigError: fewer than two, more than a chart can tell apart, or one twice.
        DataError: a run has not trained a policy yet, or a log is damaged.
    """
    folders = [config.run_dir for config in configs]
    if len(configs) < 2 or len(configs) > MOST_LINES:
        raise ConfigError(f"compare takes 2 to {MOST_LINES} runs, and {len(configs)} are given")
    if len(set(folders)) < len(folders):
        raise ConfigError("compare: a run is given twice; give each once")
    runs = [_read(config) for config in configs]
    # Scores of different judges say nothing about each other.
    judges = {run.config.evaluate.judge for run in runs}
    held_out = len(judges) == 1 and all(run.held_out is not None for run in runs)
    runs.sort(key=lambda run: (run.held_out or 0.0) if held_out else run.score, reverse=True)
    names = [run.config.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.config.run_dir) for run in runs]
    return Comparison(
        runs=runs,
        names=names,
        by="held-out" if held_out else "score",
        differences=[*_files_that_differ(runs), *_fields_that_differ(runs)],
    )


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write the page: table, curves on top of each other, and what differs.

    Raises:
        StorageError: it cannot be written.
    """
    page = (
        environment()
        .get_template("comparison.html.j2")
        .render(
            names=comparison.names,
            runs=comparison.runs,
            columns=COLUMNS[1:],
            rows=[row[1:] for row in comparison.rows()],
            titles=TITLES,
            by=TITLES[comparison.by],
            charts=list(_charts(comparison)),
            differences=comparison.differences,
        )
    )
    write_atomic(path, [page.encode()])


def _read(config: RunConfig) -> Compared:
    folder = config.folder
    lines = read_metrics(folder.metrics)
    steps = steps_of(lines, "train")
    if not steps:
        raise DataError(f"{config.run_dir}: has not trained a policy yet; `talipot train` does")
    evaluation = {}
    if folder.evaluation.exists():
        try:
            evaluation = json.loads(folder.evaluation.read_text(encoding="utf8"))
        except ValueError:
            raise DataError(f"{folder.evaluation}: damaged; evaluate that run again") from None
    stage = RunInputs(config.run_dir).stages.get("train")
    return Compared(
        config=config,
        lines=lines,
        steps=steps,
        evaluation=evaluation,
        files=dict(stage.reads) if stage else {},
    )


def _charts(comparison: Comparison) -> Iterator[tuple[str, Any]]:
    """Yield title and drawing of each metric that two of the runs have, and that differs."""
    titles: dict[str, str] = {}
    found: list[dict[str, Series]] = []
    for run in comparison.runs:
        drawn = {}
        for name, title, steps, values in series_of(run.steps):
            titles.setdefault(name, title)
            drawn[name] = Series(title=title, steps=steps, values=values)
        found.append(drawn)
    for name, title in titles.items():
        lines = [drawn.get(name, Series(title=title, steps=[], values=[])) for drawn in found]
        different = {value for line in lines for _, value in line.finite}
        if len(different) > 1 and sum(bool(line.finite) for line in lines) > 1:
            yield title, lines_chart(title, lines)


def _files_that_differ(runs: Sequence[Compared]) -> Iterator[tuple[str, list[str]]]:
    """Yield what policy training read where not all runs read the same contents."""
    read = [_by_part(run.files) for run in runs]
    for name in sorted({name for files in read for name in files}):
        each = [files.get(name, []) for files in read]
        if len({tuple(sorted(f.xxh3_128 for f in files)) for files in each}) > 1:
            yield name, [" + ".join(map(str, files)) or "-" for files in each]


def _by_part(files: Mapping[str, Sequence[FileFacts]]) -> dict[str, list[FileFacts]]:
    """Group files by what they are to a run, its own or those of the run that it is made from."""
    parts: dict[str, list[FileFacts]] = {}
    for name, facts in files.items():
        part = next((part for start, part in _PARTS if name.startswith(start)), name)
        parts.setdefault(part, []).extend(facts)
    return parts


def _fields_that_differ(runs: Sequence[Compared]) -> Iterator[tuple[str, list[str]]]:
    """Yield the fields of the recipes whose values differ."""
    flats = [dict(flat(run.config.model_dump(mode="json"))) for run in runs]
    for name in dict.fromkeys(name for values in flats for name in values):
        if any(within(name, prefix) for prefix in _NOT_COMPARED):
            continue
        shown = ["-" if name not in values else _shown(values[name]) for values in flats]
        if len(set(shown)) > 1 and not set(shown) <= {"null", "-"}:
            yield name, shown


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return '""' if value == "" else str(value)
