"""Panels over a lost worker: what was added up falls by its share, and by no more."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from common.live_metrics import Live
from deploy.monitoring.dashboard import dashboard
from tests.deploy.test_prometheus import PROMETHEUS, prometheus

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROMETHEUS is None, reason="needs Debian's package prometheus"),
]
WORKERS = ("rollout-0", "rollout-1", "rollout-2", "rollout-3")
LOST, BORN = 20 * 60, 21 * 60
"""Seconds after which rollout-2 is lost, and rollout-3 begins in its place."""
WHOLE = 40 * 60
STEP = 15
RISES = {Live.BUSY_SECONDS: 0.5, Live.CALLS: 0.25, Live.TOKENS: 100.0}
"""Per second and worker."""
STANDS = {Live.HELD_VERSION: 7.0, Live.RESIDENT_BYTES: 1e9}


def lives(worker: str) -> range:
    """When it tells."""
    begin = BORN if worker == "rollout-3" else 0
    return range(begin, LOST if worker == "rollout-2" else WHOLE, STEP)


def text(start: float) -> str:
    """All that the workers tell, as Prometheus reads it from a file."""
    lines = []
    for metric in [*RISES, *STANDS]:
        name = f"ray_talipot_{metric.facts.series}"
        lines.append(f"# TYPE {name} gauge")
        for worker in WORKERS:
            labels = f'run="r",role="rollout",worker="{worker}",WorkerId="{worker}"'
            for at in lives(worker):
                value = RISES.get(metric, 0.0) * (at - lives(worker)[0]) + STANDS.get(metric, 0.0)
                lines.append(f"{name}{{{labels}}} {value} {start + at}")
    return "\n".join([*lines, "# EOF\n"])


def ranged(client: httpx.Client, expression: str, start: float) -> list[list[float]]:
    """The values of each line of a panel, in steps of 15 s from the tenth minute on."""
    answer = client.get(
        "/api/v1/query_range",
        params={"query": expression, "start": start + 600, "end": start + WHOLE - 60, "step": STEP},
    )
    assert answer.status_code == 200, (expression, answer.text)
    return [[float(v) for _, v in found["values"]] for found in answer.json()["data"]["result"]]


def test_no_panel_jumps_by_more_than_the_lost_workers_share(tmp_path: Path) -> None:
    start = time.time() // STEP * STEP - 3 * 3600
    (tmp_path / "told.txt").write_text(text(start), encoding="utf8")
    promtool = shutil.which("promtool")
    assert promtool is not None
    command = [promtool, "tsdb", "create-blocks-from", "openmetrics", "told.txt", "data"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    named = [f"ray_talipot_{metric.facts.series}{{" for metric in [*RISES, *STANDS]]
    expressions = [
        target["expr"].replace('run=~"$run"', 'run="r"')
        for panel in dashboard()["panels"]
        for target in panel.get("targets", ())
        if any(name in target["expr"] for name in named)
    ]
    drawn = 0
    with prometheus(tmp_path, "127.0.0.1:9") as client:
        for expression in expressions:
            for values in ranged(client, expression, start):
                drawn += 1
                share = max(values) / 3
                jumps = [abs(b - a) for a, b in itertools.pairwise(values)]
                assert max(jumps, default=0.0) <= share * 1.05, expression
        # That the test can fail: a sum over what stands would double where a worker is told twice.
        (summed,) = ranged(client, "sum(ray_talipot_resident_bytes)", start)
        assert max(summed) == 4e9, "Prometheus holds what is told no more for five minutes"
    assert len(expressions) >= 4
    assert drawn >= 3
