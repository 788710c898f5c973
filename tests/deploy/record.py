"""Records what the rules read of a run out of the Prometheus of `talipot monitor`, for their tests.

Once the run has ended, into ``recorded/healthy.json``::

    python -m tests.deploy.record http://127.0.0.1:9090 quickstart > ...

Every series is told each 15 s from the run's first to its last word, without the labels that Ray
adds and no rule reads.
"""

from __future__ import annotations

import json
import re
import sys
import time
from itertools import groupby
from pathlib import Path
from typing import Any

import httpx
import yaml

RULES = Path(__file__).resolve().parents[2] / "deploy" / "monitoring" / "rules.yaml"
KEPT = {"run", "stage", "pool", "cause", "check", "severity", "role", "worker"}
KEPT |= {"WorkerId", "NodeAddress", "ip"}
STEP = 15


def main(url: str, run: str) -> None:
    """Print the series as promtool reads them."""
    text = RULES.read_text(encoding="utf8")
    names = {name for rule in _rules(text) for name in re.findall(r"ray_\w+", rule["expr"])}
    with httpx.Client(base_url=url, timeout=60) as client:
        (told,) = _range(client, f'max(ray_talipot_iteration_end{{run="{run}"}})', 86_400, None)
        begin, end = float(told["values"][0][0]), float(told["values"][-1][0])
        found = []
        for name in sorted(names):
            chosen = f'{name}{{run="{run}"}}' if name.startswith("ray_talipot_") else name
            for series in _range(client, chosen, end - begin, end):
                labels = {k: v for k, v in series["metric"].items() if k in KEPT}
                values = {round(float(at)): value for at, value in series["values"]}
                # Moments are told from the first on: promtool's clock begins with 0.
                moments = name == "ray_talipot_iteration_end"
                found.append(
                    {
                        "series": f"{name}{{{_written(labels)}}}",
                        "values": _values(values, begin, end, begin if moments else 0.0),
                    }
                )
    print(json.dumps({"seconds": round(end - begin), "series": found}, indent=1))


def _rules(text: str) -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(text)["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def _range(
    client: httpx.Client, expression: str, seconds: float, end: float | None
) -> list[dict[str, Any]]:
    until = time.time() if end is None else end
    answer = client.get(
        "/api/v1/query_range",
        params={"query": expression, "start": until - seconds, "end": until, "step": STEP},
    )
    answer.raise_for_status()
    found: list[dict[str, Any]] = answer.json()["data"]["result"]
    return found


def _written(labels: dict[str, str]) -> str:
    return ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))


def _values(told: dict[int, str], begin: float, end: float, zero: float) -> str:
    """Write values in promtool's notation: repeated ones once, gaps as ``_``."""
    moments = range(round(begin), round(end) + 1, STEP)
    texts = [
        f"{float(told[at]) - zero:.4f}".rstrip("0").rstrip(".") if at in told else "_"
        for at in moments
    ]
    return " ".join(
        f"{text}x{count - 1}" if (count := len(list(same))) > 1 else text
        for text, same in groupby(texts)
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
