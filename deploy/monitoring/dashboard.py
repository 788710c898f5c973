"""The Grafana dashboard of Talipot's runs: rows of panels, each a few expressions of PromQL.

``python -m deploy.monitoring.dashboard > deploy/monitoring/talipot.json``

Ray labels every series with its process (`WorkerId`), and leaves those of one that died standing
for half a minute: states are folded by `max`, what is done is added up as rates.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from common.live_metrics import Live
from common.metric_catalogue import Logged
from common.metric_facts import Catalogue

_WIDTH: Final = 24
"""Columns of Grafana's grid."""
_HEIGHT: Final = 8
_UNITS: Final = {
    "seconds": "s",
    "s": "s",
    "share": "percentunit",
    "bytes": "bytes",
    "tokens per second": "none",
}


@dataclass(frozen=True, slots=True)
class Query:
    """One expression, and what its lines are called."""

    expression: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves that are drawn together."""

    title: str
    unit: str
    queries: tuple[Query, ...]
    description: str = ""


def series(metric: Catalogue, **labels: str) -> str:
    """Return the series of a metric, of the chosen runs."""
    chosen = ",".join(['run=~"$run"', *(f'{key}="{value}"' for key, value in labels.items())])
    return f"ray_talipot_{metric.facts.series}{{{chosen}}}"


def state(metric: Catalogue, *by: str, stage: str = "train") -> Query:
    """Return the value of a metric now, by some of its labels; `stage` empty: by its stage too."""
    of_stage = {"stage": stage} if stage and isinstance(metric, Logged) else {}
    every = ["run", *(["stage"] if not stage else []), *by]
    names = " ".join(f"{{{{{label}}}}}" for label in every)
    called = f"{names} {metric.facts.series.replace('_', ' ')}"
    return Query(f"max by ({', '.join(every)}) ({series(metric, **of_stage)})", called)


def rise(metric: Catalogue, *by: str, over: str = "10m") -> Query:
    """Return by how much a counter has risen of late."""
    every = ", ".join(["run", *by])
    names = " ".join(f"{{{{{label}}}}}" for label in ["run", *by])
    return Query(
        f"sum by ({every}) (increase({series(metric)}[{over}]))",
        f"{names} {metric.facts.series.removesuffix('_total').replace('_', ' ')}",
    )


def panel(title: str, *queries: Query, of: Catalogue, description: str = "") -> Panel:
    """Return a panel with the unit, and the advice, of a metric."""
    facts = of.facts
    return Panel(
        title=title if facts.unit in ("1", title.lower()) else f"{title}, {facts.unit}",
        unit=_UNITS.get(facts.unit, "none"),
        queries=queries,
        description=description or facts.look_for,
    )


def states(title: str, *metrics: Catalogue, stage: str = "train") -> Panel:
    """Return a panel of some metrics' values, by all their labels."""
    return panel(title, *(state(m, *m.labels, stage=stage) for m in metrics), of=metrics[0])


ROWS: Final[dict[str, tuple[Panel, ...]]] = {
    "Outcome": (
        states("Score", Logged.SCORE, stage=""),
        states("Parts of the score", Logged.COMPONENT, Logged.COMPONENT_PART, stage=""),
        states("Score by source", Logged.SOURCE_SCORE, stage=""),
        states(
            "Held-out prompts",
            Logged.GREEDY_SCORE,
            Logged.GREEDY_SOLVED,
            Logged.PASS_AT,
            Logged.METRIC_ERROR,
            stage="held_out",
        ),
        states("KL to the reference", Logged.KL, stage=""),
        states("KL coefficient", Logged.KL_COEF),
    ),
    "Responses": (
        states("Length", Logged.RESPONSE_LENGTH, stage=""),
        states("Responses that end", Logged.EOS_SHARE, stage=""),
        states("Prompts whose responses have one score", Logged.EQUAL_GROUPS),
        states("Spread of scores", Logged.SCORE_DEVIATION),
        states(
            "Responses of an evaluation",
            Logged.RESPONSES,
            Logged.UNSCORED,
            Logged.UNJUDGED,
            stage="held_out",
        ),
        states("Prompts trained on", Logged.PROMPTS_TRAINED, Logged.PROMPTS_LEFT_OUT),
    ),
    "Learning": (
        states("Entropy", Logged.ENTROPY),
        states("Clipped tokens", Logged.CLIP_FRACTION, Logged.VALUE_CLIP_FRACTION),
        states("KL of one update", Logged.UPDATE_KL),
        states("Epochs left early", Logged.STOPPED_BY_KL),
        states("Gradient norm", Logged.GRADIENT_NORM, stage=""),
        states("Losses", Logged.POLICY_LOSS, Logged.VALUE_LOSS),
        states(
            "Auxiliary phase: losses",
            Logged.AUXILIARY_VALUE_LOSS,
            Logged.AUXILIARY_SEPARATE_VALUE_LOSS,
            Logged.AUXILIARY_CLONE_KL,
            Logged.AUXILIARY_CLONE_KL_FIRST,
        ),
        states("Explained variance", Logged.EXPLAINED_VARIANCE),
        states("Sampler against learner, KL", Logged.MISMATCH_KL),
        states("Sampler against learner, ratios", Logged.RATIO_DEVIATION, Logged.MISMATCH_RATIO),
        states("Learning rate", Logged.LR),
        states("Optimizer steps", Logged.POLICY_STEPS),
    ),
    "Throughput": (
        panel(
            "Response tokens per second: sampled, scored, trained on",
            Query(
                f"sum by (run, role) (rate({series(Live.TOKENS)}[1m]))",
                "{{run}} {{role}}",
            ),
            of=Live.CALLS,
            description="One actor's own speed is beside it.",
        ),
        states("Sampled by one actor", Logged.TOKENS_PER_SECOND, stage=""),
        panel(
            "Share of time at work",
            Query(
                f"avg by (run, role) (rate({series(Live.BUSY_SECONDS)}[1m]))", "{{run}} {{role}}"
            ),
            of=Logged.EOS_SHARE,
            description="A role that is always at work is what the others wait for.",
        ),
        panel(
            "Calls per second",
            Query(f"sum by (run, role) (rate({series(Live.CALLS)}[1m]))", "{{run}} {{role}}"),
            of=Live.CALLS,
        ),
        states(
            "Seconds of an iteration",
            Logged.SECONDS,
            Logged.COLLECT_SECONDS,
            Logged.LEARN_SECONDS,
            Logged.AUXILIARY_SECONDS,
            Logged.PUBLISH_SECONDS,
        ),
        states(
            "Seconds of workers, added up",
            Logged.GENERATE_SECONDS,
            Logged.LOAD_SECONDS,
            Logged.SCORE_SECONDS,
        ),
        states("Memory of the largest rollout actor", Logged.ACTOR_WEIGHTS, Logged.ACTOR_CACHE),
        states("Seconds of an evaluation", Logged.EVALUATE_SECONDS, stage="held_out"),
        panel(
            "Time since the last iteration",
            Query(
                f"time() - max by (run) ({series(Live.ITERATION_END)})",
                "{{run}}",
            ),
            of=Logged.SECONDS,
        ),
    ),
    "Elasticity": (
        states("Workers", Logged.WORKERS),
        states("Seconds to grow", Logged.SCALE_SECONDS),
        panel(
            "Versions behind the newest, by actor",
            Query(
                f"max by (run) ({series(Logged.POLICY_VERSION)}) - on (run) group_right () "
                f"max by (run, worker) ({series(Live.HELD_VERSION)})",
                "{{run}} {{worker}}",
            ),
            of=Logged.POLICY_VERSION,
            description="An actor loads a version with its first lease of it.",
        ),
        states("Age of the oldest rollout trained", Logged.STALENESS),
        states("Rollouts trained, by age", Logged.STALENESS_COUNT),
        panel(
            "Leases given again, results too late, in ten minutes",
            rise(Logged.LEASES_REISSUED),
            rise(Logged.LATE_COMMITS),
            of=Logged.LEASES_REISSUED,
        ),
    ),
    "Failures": (
        states("What health checks find", Live.HEALTH),
        panel(
            "Workers lost in ten minutes, by cause",
            rise(Logged.WORKERS_LOST_BY, "pool", "cause"),
            rise(Logged.WORKERS_LOST, "pool"),
            rise(Logged.WORKERS_DRAINED, "pool"),
            of=Logged.WORKERS_LOST,
        ),
        panel(
            "Restarts of the learner in an hour",
            rise(Logged.LEARNER_RESTARTS, over="1h"),
            of=Logged.LEARNER_RESTARTS,
        ),
        panel(
            "Rollouts not trained, or sampled again, in ten minutes",
            rise(Logged.DROPPED, "reason"),
            rise(Logged.RESAMPLED, "reason"),
            of=Logged.DROPPED,
        ),
        panel(
            "Slices of weights read again, in ten minutes",
            rise(Logged.WEIGHTS_RELOADED),
            of=Logged.WEIGHTS_RELOADED,
        ),
        panel(
            "Requests to endpoints, in ten minutes",
            *(
                rise(metric, "component")
                for metric in (
                    Logged.HTTP_REQUESTS,
                    Logged.HTTP_RETRIES,
                    Logged.HTTP_FAILURES,
                    Logged.HTTP_DEAD_LETTERS,
                    Logged.HTTP_CIRCUIT_OPENED,
                )
            ),
            of=Logged.HTTP_REQUESTS,
        ),
        states("Memory of each process", Live.RESIDENT_BYTES),
    ),
    "Supervised stages": (
        states("Loss", Logged.LOSS, Logged.HELDOUT_LOSS, Logged.HELDOUT_LOSS_BEFORE, stage=""),
        states(
            "Reward model: accuracy",
            Logged.ACCURACY,
            Logged.ACCURACY_HELDOUT,
            Logged.ACCURACY_REPORTED,
            stage="reward",
        ),
        states("Mean score of demonstrations", Logged.REFERENCE_MEAN, stage="reward"),
        states("Passes over the data", Logged.EPOCHS, stage=""),
        states("Tokens of the data", Logged.TOKENS, stage=""),
    ),
}


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana reads it."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS.items():
        panels.append(_row(len(panels) + 1, title, top))
        top += 1
        width = 8 if len(row) % 3 == 0 else 6
        across = _WIDTH // width
        for place, shown in enumerate(row):
            x, y = width * (place % across), top + _HEIGHT * (place // across)
            panels.append(_panel(len(panels) + 1, shown, x, y, width))
        top += _HEIGHT * -(-len(row) // across)
    return {
        "uid": "talipot",
        "title": "Talipot",
        "tags": ["talipot"],
        "timezone": "browser",
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source(), _runs()]},
        "panels": panels,
    }


def _source() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
    }


def _runs() -> dict[str, Any]:
    query = f"label_values(ray_talipot_{Live.ITERATION_END.facts.series}, run)"
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": query, "refId": "runs"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def _row(number: int, title: str, y: int) -> dict[str, Any]:
    place = {"h": 1, "w": _WIDTH, "x": 0, "y": y}
    return {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place}


def _panel(number: int, shown: Panel, x: int, y: int, width: int) -> dict[str, Any]:
    return {
        "id": number,
        "type": "timeseries",
        "title": shown.title,
        "description": shown.description,
        "gridPos": {"h": _HEIGHT, "w": width, "x": x, "y": y},
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "fieldConfig": {
            "defaults": {
                "unit": shown.unit,
                "custom": {"lineWidth": 2, "showPoints": "auto", "spanNulls": 120_000},
            },
            "overrides": [],
        },
        "options": {
            "legend": {
                "showLegend": True,
                "displayMode": "list",
                "placement": "bottom",
                "calcs": ["lastNotNull"],
            },
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "expr": query.expression,
                "legendFormat": query.legend,
                "datasource": {"type": "prometheus", "uid": "${datasource}"},
            }
            for place, query in enumerate(shown.queries)
        ],
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=1))
