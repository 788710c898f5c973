"""The catalogue names every metric, and every metric of the catalogue is logged.

That a run logs no other name is the log's own check: it raises for one (`logged_as`).
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from common.metric_catalogue import Logged
from common.metric_facts import LABELS
from common.metric_names import logged_as

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    ROOT / "common" / "metrics.py",
    *(
        path
        for package in ("learner", "reward_service", "deploy/control", "deploy/stages")
        for path in (ROOT / package).rglob("*.py")
    ),
]


def used(path: Path) -> set[str]:
    """Entries of the catalogue that a file names."""
    return {
        node.attr
        for node in ast.walk(ast.parse(path.read_text("utf8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "Logged"
    }


def test_every_entry_is_logged_somewhere() -> None:
    assert {metric.name for metric in Logged} == set().union(*map(used, SOURCES))


@pytest.mark.parametrize("metric", Logged)
def test_entries_are_whole(metric: Logged) -> None:
    facts = metric.facts
    assert facts.stages and facts.unit and facts.meaning and not facts.meaning.endswith(".")
    assert set(metric.labels) <= LABELS.keys()
    values = [f"a {label}" for label in metric.labels]
    assert logged_as(metric.of(*values)) == (metric, dict(zip(metric.labels, values, strict=True)))


def test_names_are_those_that_were_always_written() -> None:
    assert Logged.WORKERS_LOST_BY.of("rollout", "died") == "workers_lost/rollout/died"
    assert Logged.STALENESS_COUNT.of(0) == "staleness/0"
    assert Logged.DROPPED.of("dead letter") == "dropped/dead letter"
    assert Logged.HTTP_RETRIES.of("judge") == "http/judge/retries"
    assert Logged.COMPONENT.of("{brace}") == "component/{brace}"
    assert json.dumps({Logged.SCORE: 1.0}) == '{"score": 1.0}'
    assert {Logged.SCORE: 1.0} == {"score": 1.0}


def test_a_name_that_is_none() -> None:
    for name in ("scores", "workers_lost", "workers_lost/a/b/c", "http/a/tries", ""):
        with pytest.raises(KeyError, match="metric_catalogue"):
            logged_as(name)
