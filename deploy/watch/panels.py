"""The curves of the live page: which metrics of the catalogue are drawn together, on which tab."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from common.metric_catalogue import Logged
from common.metric_names import known_as
from deploy.run_folder.log_lines import HELD_OUT, Line

Tab = str
Columns = Mapping[str, Mapping[str, Mapping[int, float]]]
"""Stage -> name of a metric -> step -> value."""
MOST_POINTS: Final = 1200
"""Of a curve: more than a screen has columns. Longer ones are means of neighbours."""


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves that are drawn together."""

    title: str
    metrics: tuple[Logged, ...]
    stages: tuple[str, ...] = ("train",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One curve."""

    label: str
    values: list[float | None]
    """At the steps of its panel; None where there is none."""
    last: float
    """As it was logged."""
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A panel with its curves."""

    title: str
    unit: str
    note: str
    """What to look for."""
    steps: list[float]
    every: int
    """How many steps a point is the mean of."""
    curves: list[Curve]


TABS: Final[Mapping[Tab, tuple[Panel, ...]]] = {
    "outcome": (
        Panel("Score", (Logged.SCORE,), ("train", HELD_OUT)),
        Panel("Held-out, greedy", (Logged.GREEDY_SCORE, Logged.GREEDY_SOLVED), (HELD_OUT,)),
        Panel("Held-out, solved", (Logged.PASS_AT,), (HELD_OUT,)),
        Panel("Parts of the score", (Logged.COMPONENT, Logged.COMPONENT_PART), ("train", HELD_OUT)),
        Panel("Score by source", (Logged.SOURCE_SCORE,), ("train", HELD_OUT)),
        Panel("KL to the reference", (Logged.KL,), ("train", HELD_OUT)),
        Panel("KL coefficient", (Logged.KL_COEF,)),
        Panel("Response length", (Logged.RESPONSE_LENGTH,), ("train", HELD_OUT)),
        Panel("Responses that end", (Logged.EOS_SHARE,), ("train", HELD_OUT)),
        Panel("Spread of scores", (Logged.SCORE_DEVIATION,)),
        Panel("Groups of one score", (Logged.EQUAL_GROUPS,)),
        Panel("Standard error, held-out", (Logged.METRIC_ERROR,), (HELD_OUT,)),
        Panel(
            "Responses of an evaluation",
            (Logged.RESPONSES, Logged.UNSCORED, Logged.UNJUDGED),
            (HELD_OUT,),
        ),
    ),
    "learning": (
        Panel("Entropy", (Logged.ENTROPY,)),
        Panel("Clipped tokens", (Logged.CLIP_FRACTION, Logged.VALUE_CLIP_FRACTION)),
        Panel("KL of one update", (Logged.UPDATE_KL,)),
        Panel("Gradient norm", (Logged.GRADIENT_NORM,)),
        Panel("Policy loss", (Logged.POLICY_LOSS,)),
        Panel("Value loss", (Logged.VALUE_LOSS,)),
        Panel("Explained variance", (Logged.EXPLAINED_VARIANCE,)),
        Panel(
            "Auxiliary phase: value losses",
            (Logged.AUXILIARY_VALUE_LOSS, Logged.AUXILIARY_SEPARATE_VALUE_LOSS),
        ),
        Panel(
            "Auxiliary phase: KL of cloning",
            (Logged.AUXILIARY_CLONE_KL, Logged.AUXILIARY_CLONE_KL_FIRST),
        ),
        Panel("Sampler against learner, KL", (Logged.MISMATCH_KL,)),
        Panel("Sampler against learner, ratios", (Logged.RATIO_DEVIATION, Logged.MISMATCH_RATIO)),
        Panel("Learning rate", (Logged.LR,)),
        Panel("Optimizer steps", (Logged.POLICY_STEPS,)),
        Panel("Epochs left early", (Logged.STOPPED_BY_KL,)),
        Panel("Prompts trained on", (Logged.PROMPTS_TRAINED, Logged.PROMPTS_LEFT_OUT)),
    ),
    "throughput": (
        Panel(
            "Seconds of an iteration",
            (
                Logged.SECONDS,
                Logged.COLLECT_SECONDS,
                Logged.LEARN_SECONDS,
                Logged.AUXILIARY_SECONDS,
                Logged.PUBLISH_SECONDS,
            ),
        ),
        Panel(
            "Seconds of workers, added up",
            (Logged.GENERATE_SECONDS, Logged.LOAD_SECONDS, Logged.SCORE_SECONDS),
        ),
        Panel("Seconds of an evaluation", (Logged.EVALUATE_SECONDS,), (HELD_OUT,)),
        Panel("Memory of the largest rollout actor", (Logged.ACTOR_WEIGHTS, Logged.ACTOR_CACHE)),
        Panel("Sampled tokens per second and actor", (Logged.TOKENS_PER_SECOND,)),
        Panel("Age of the oldest rollout", (Logged.STALENESS,)),
        Panel("Rollouts by age", (Logged.STALENESS_COUNT,)),
        Panel("Version published last", (Logged.POLICY_VERSION,)),
        Panel("Requests to endpoints", (Logged.HTTP_REQUESTS, Logged.HTTP_RETRIES)),
        Panel(
            "Failures of endpoints",
            (Logged.HTTP_FAILURES, Logged.HTTP_DEAD_LETTERS, Logged.HTTP_CIRCUIT_OPENED),
        ),
    ),
    "workers": (
        Panel("Workers", (Logged.WORKERS,)),
        Panel("Workers lost", (Logged.WORKERS_LOST, Logged.WORKERS_LOST_BY)),
        Panel("Workers that left", (Logged.WORKERS_DRAINED,)),
        Panel("Seconds to grow", (Logged.SCALE_SECONDS,)),
        Panel("Restarts of the learner", (Logged.LEARNER_RESTARTS,)),
        Panel(
            "Leases given again, results too late", (Logged.LEASES_REISSUED, Logged.LATE_COMMITS)
        ),
        Panel("Rollouts not trained, or sampled again", (Logged.DROPPED, Logged.RESAMPLED)),
        Panel("Slices of weights read again", (Logged.WEIGHTS_RELOADED,)),
    ),
    "supervised": (
        Panel("Supervised policy: loss", (Logged.LOSS, Logged.HELDOUT_LOSS), ("sft",)),
        Panel("Reward model: loss", (Logged.LOSS, Logged.HELDOUT_LOSS), ("reward",)),
        Panel(
            "Reward model: accuracy",
            (Logged.ACCURACY, Logged.ACCURACY_HELDOUT, Logged.ACCURACY_REPORTED),
            ("reward",),
        ),
        Panel("Gradient norm", (Logged.GRADIENT_NORM,), ("sft", "reward")),
        Panel("Tokens per second", (Logged.TOKENS_PER_SECOND,), ("sft", "reward")),
    ),
}
_STAGE_NAMES = {
    "train": "training",
    HELD_OUT: "held-out",
    "sft": "policy",
    "reward": "reward model",
}


def columns_of(lines: Mapping[str, Sequence[Line]]) -> Columns:
    """Turn a log's lines, by stage, into columns."""
    columns: dict[str, dict[str, dict[int, float]]] = {}
    for stage, steps in lines.items():
        names = columns[stage] = {}
        for line in steps:
            for name, value in line.metrics.items():
                if math.isfinite(value):
                    names.setdefault(name, {})[line.step] = value
    return columns


def drawn(tab: Tab, columns: Columns) -> list[Drawn]:
    """Return a tab's panels as far as something of them was logged.

    Args:
        tab: one of `TABS`.
        columns: of the surviving history.
    """
    found = []
    for panel in TABS[tab]:
        series = list(_series(panel, columns))
        if not series:
            continue
        steps = sorted({step for _, _, values in series for step in values})
        every = math.ceil(len(steps) / MOST_POINTS)
        curves = [
            Curve(
                label=label,
                values=_means([values.get(step) for step in steps], every),
                last=values[max(values)],
                meaning=metric.facts.meaning,
            )
            for metric, label, values in series
        ]
        facts = panel.metrics[0].facts
        found.append(
            Drawn(
                title=panel.title,
                unit="" if facts.unit in ("1", panel.title.lower()) else facts.unit,
                note=facts.look_for,
                steps=[step for step in _means(steps, every) if step is not None],
                every=every,
                curves=curves,
            )
        )
    return found


def _series(panel: Panel, columns: Columns) -> Iterator[tuple[Logged, str, Mapping[int, float]]]:
    """Yield metric, label and values by step of each curve that has some."""
    there = {
        stage: {
            name: (panel.metrics.index(metric), metric)
            for name in columns.get(stage, {})
            if (metric := known_as(name)) in panel.metrics and metric is not None
        }
        for stage in panel.stages
    }
    several = sum(map(bool, there.values())) > 1
    for stage, found in there.items():
        # pass@8 comes before pass@16.
        for name in sorted(found, key=lambda name: (found[name][0], len(name), name)):
            words = [_STAGE_NAMES[stage]] if several else []
            yield found[name][1], ", ".join([*words, name.replace("_", " ")]), columns[stage][name]


def _means(values: Sequence[float | None], every: int) -> list[float | None]:
    """Return the means of neighbours, None where there are none; the last is of what is left."""
    if every == 1:
        return list(values)
    means: list[float | None] = []
    for begin in range(0, len(values), every):
        some = [value for value in values[begin : begin + every] if value is not None]
        means.append(sum(some) / len(some) if some else None)
    return means
