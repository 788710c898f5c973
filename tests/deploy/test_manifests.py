"""The Prometheus operator's manifests: generated, of its shape, and about pods that there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import yaml

from deploy.monitoring.manifests import manifests, page
from tests.deploy.test_cluster import TEXTS, shape

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "deploy" / "kubernetes" / "monitoring.yaml"
METADATA = shape("name labels", labels=TEXTS)
TEXT = {"type": "string", "minLength": 1}
DURATION = {"type": "string", "pattern": r"^[0-9]+[smh]$"}
RULE = shape("alert expr annotations", "for labels", alert=TEXT, expr=TEXT, labels=TEXTS)
RULE["properties"]["annotations"] = shape("summary description", summary=TEXT, description=TEXT)
RULE["properties"]["for"] = DURATION
SPECS = {
    "PodMonitor": shape(
        "selector podMetricsEndpoints",
        selector=shape("matchLabels", matchLabels=TEXTS),
        podMetricsEndpoints={
            "type": "array",
            "minItems": 1,
            "items": shape("port interval", port=TEXT, interval=DURATION),
        },
    ),
    "PrometheusRule": shape(
        "groups",
        groups={
            "type": "array",
            "minItems": 1,
            "items": shape("name rules", rules={"type": "array", "minItems": 7, "items": RULE}),
        },
    ),
}
"""Of the operator's own schema what is used here, and nothing else."""


def shipped() -> list[Any]:
    return list(yaml.safe_load_all(SHIPPED.read_text(encoding="utf8")))


def test_what_is_shipped_is_what_is_generated() -> None:
    assert SHIPPED.read_text(encoding="utf8") == page(), (
        "run: python -m deploy.monitoring.manifests > deploy/kubernetes/monitoring.yaml"
    )
    assert shipped() == manifests()


def test_they_are_of_the_operators_shape() -> None:
    for resource in shipped():
        whole = shape(
            "apiVersion kind metadata spec",
            apiVersion={"const": "monitoring.coreos.com/v1"},
            metadata=METADATA,
            spec=SPECS[resource["kind"]],
        )
        jsonschema.validate(resource, whole)


def test_the_monitor_finds_the_clusters_pods_and_port() -> None:
    monitor = shipped()[0]["spec"]
    (cluster,) = yaml.safe_load_all((SHIPPED.parent / "raycluster.yaml").read_text(encoding="utf8"))
    assert monitor["selector"]["matchLabels"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    head = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    ports = {port["name"] for port in head["ports"]}
    assert {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]} <= ports


def test_the_rules_are_ours() -> None:
    ours = yaml.safe_load((ROOT / "deploy" / "monitoring" / "rules.yaml").read_text("utf8"))
    assert shipped()[1]["spec"]["groups"] == ours["groups"]
