"""The Grafana dashboard: all of the catalogue is on it, and Grafana's own types read it."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from grafana_foundation_sdk.models.prometheus import Dataquery

from common.live_metrics import Live
from common.metric_catalogue import Logged
from deploy.monitoring.dashboard import dashboard

MONITORING = Path(__file__).resolve().parents[2] / "deploy" / "monitoring"
SHIPPED = MONITORING / "talipot.json"


@pytest.fixture(scope="module")
def shipped() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(SHIPPED.read_text(encoding="utf8"))
    return found


def expressions(page: dict[str, Any]) -> list[str]:
    """Every expression of the dashboard."""
    return [target["expr"] for panel in page["panels"] for target in panel.get("targets", ())]


def lost(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """What of ours is not in theirs, which has defaults beside it."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [p for key in ours for p in lost(ours[key], theirs.get(key), f"{path}/{key}")]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [p for i, (a, b) in pairs for p in lost(a, b, f"{path}/{i}")]
    return [] if ours == theirs else [f"{path}: {ours!r} became {theirs!r}"]


def test_what_is_shipped_is_what_is_generated(shipped: dict[str, Any]) -> None:
    assert shipped == dashboard(), (
        "run: python -m deploy.monitoring.dashboard > deploy/monitoring/talipot.json"
    )


def test_all_of_the_catalogue_is_shown_and_nothing_else(shipped: dict[str, Any]) -> None:
    named = set(re.findall(r"ray_talipot_(\w+)", " ".join(expressions(shipped))))
    assert named == {metric.facts.series for metric in [*Logged, *Live]}


def test_every_expression_folds_the_process(shipped: dict[str, Any]) -> None:
    for expression in expressions(shipped):
        for series in re.finditer(r"(\w+) by \([\w, ]+\) \((?:\w+\()?ray_talipot_", expression):
            assert series[1] in ("max", "sum", "avg")
        folded = len(re.findall(r"(?:max|sum|avg) by", expression))
        assert folded == len(re.findall("ray_talipot_", expression)), expression


def test_grafanas_own_types_read_it(shipped: dict[str, Any]) -> None:
    register_default_plugins()
    read = Dashboard.from_json(shipped)
    assert lost(shipped, json.loads(JSONEncoder().encode(read))) == []
    panels = [panel for panel in read.panels or [] if getattr(panel, "targets", None)]
    assert len(panels) == sum("targets" in panel for panel in shipped["panels"])
    for panel in panels:
        for target in panel.targets:
            assert isinstance(target, Dataquery)
            assert target.expr


def test_panels_lie_beside_each_other(shipped: dict[str, Any]) -> None:
    panels = shipped["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    for one, other in combinations((panel["gridPos"] for panel in panels), 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)


def test_grafana_is_told_where_it_lies() -> None:
    """By a provisioning file of the form that Grafana's documentation has."""
    found = yaml.safe_load((MONITORING / "grafana.yaml").read_text(encoding="utf8"))
    assert found["apiVersion"] == 1
    (provider,) = found["providers"]
    assert (provider["name"], provider["type"]) == ("talipot", "file")
    assert Path(provider["options"]["path"]).is_absolute()
