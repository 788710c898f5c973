"""Manifests for the Prometheus operator on Kubernetes: whom to ask, and our rules.

``python -m deploy.monitoring.manifests > deploy/kubernetes/monitoring.yaml``
"""

from __future__ import annotations

from importlib import resources
from typing import Any, Final

import yaml

_HEAD: Final = """\
# For the Prometheus operator, beside raycluster.yaml: which pods hand out metrics, and our rules.
# Written by `python -m deploy.monitoring.manifests`; do not edit. How to use it: docs/cluster.md.
"""
_NAME: Final = "talipot"
_EVERY: Final = "10s"
"""As often as Ray passes values on."""


def manifests() -> list[dict[str, Any]]:
    """Return both resources."""
    rules = resources.files("deploy.monitoring") / "rules.yaml"
    groups = yaml.safe_load(rules.read_text(encoding="utf8"))["groups"]
    endpoint = {"port": "metrics", "interval": _EVERY}
    # KubeRay names the port of metrics so in every pod of a cluster.
    pods = {"matchLabels": {"ray.io/cluster": _NAME}}
    return [
        _resource("PodMonitor", {"selector": pods, "podMetricsEndpoints": [endpoint]}),
        _resource("PrometheusRule", {"groups": groups}),
    ]


def _resource(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": kind,
        "metadata": {"name": _NAME, "labels": {"app": _NAME}},
        "spec": spec,
    }


def page() -> str:
    """Write both as one file."""
    return _HEAD + yaml.safe_dump_all(manifests(), sort_keys=False, width=100, allow_unicode=True)


if __name__ == "__main__":
    print(page(), end="")
