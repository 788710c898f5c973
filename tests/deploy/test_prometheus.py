"""A real Prometheus over a real run: dashboard and rules find data for every expression."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import yaml

from common.config.run import RunConfig
from common.live_metrics import Live
from common.metric_catalogue import Logged
from deploy.monitoring.dashboard import dashboard
from deploy.workers.gang import LearnerGang
from tests.deploy.control.runs import Run, stop_idle_pools
from tests.workspaces import run_copy

PROMETHEUS = shutil.which("prometheus")
RULES = Path(__file__).resolve().parents[2] / "deploy" / "monitoring" / "rules.yaml"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROMETHEUS is None, reason="needs Debian's package prometheus"),
]
ABSENT = {
    # Supervised stages, which this run has not.
    *(metric for metric in Logged if not {"train", "held_out"} & {*metric.facts.stages}),
    # What its recipe has not: sources, parts of scores, endpoints, a curriculum ...
    Logged.SOURCE_SCORE,
    Logged.COMPONENT_PART,
    Logged.PROMPTS_LEFT_OUT,
    Logged.UNJUDGED,
    Logged.EQUAL_GROUPS,
    Logged.HTTP_REQUESTS,
    Logged.HTTP_RETRIES,
    Logged.HTTP_FAILURES,
    Logged.HTTP_DEAD_LETTERS,
    Logged.HTTP_CIRCUIT_OPENED,
    # ... and nobody scaled it.
    Logged.SCALE_SECONDS,
}
"""What a run may lack, by what it is."""


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[httpx.Client]:
    """A Prometheus that asks one address each second."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "prometheus.yaml").write_text(
        yaml.safe_dump(
            {
                "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                "rule_files": [str(RULES)],
                "scrape_configs": [
                    {"job_name": "ray", "static_configs": [{"targets": [target]}]},
                ],
            }
        ),
        encoding="utf8",
    )
    assert PROMETHEUS is not None
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [
                PROMETHEUS,
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            deadline = time.monotonic() + 60
            while True:
                try:
                    if client.get("/-/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                assert process.poll() is None, (folder / "prometheus.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield client
    finally:
        process.terminate()
        process.wait(timeout=60)


def ask(client: httpx.Client, expression: str) -> list[dict[str, Any]]:
    """What an expression says now."""
    answer = client.get("/api/v1/query", params={"query": expression})
    assert answer.status_code == 200, (expression, answer.text)
    found: list[dict[str, Any]] = answer.json()["data"]["result"]
    return found


def parts(run: str) -> dict[str, set[str]]:
    """Every expression over one run, without comparisons, and the series that it names."""
    (group,) = yaml.safe_load(RULES.read_text(encoding="utf8"))["groups"]
    found = [
        target["expr"].replace('run=~"$run"', f'run="{run}"')
        for panel in dashboard()["panels"]
        for target in panel.get("targets", ())
    ]
    for rule in group["rules"]:
        found += [f"max({name})" for name in re.findall(r"ray_\w+", rule["expr"])]
    return {text: {*re.findall(r"ray_talipot_(\w+)", text)} for text in found}


@pytest.mark.usefixtures("cluster")
def test_every_expression_has_data(workspace: RunConfig, tmp_path: Path) -> None:
    copied = run_copy(
        workspace,
        tmp_path,
        train={"iterations": 4, "ppg": {"n_pi": 1, "e_aux": 1, "minibatches": 1}},
        evaluate={"every": 2, "prompts": 8, "samples": 2, "greedy": True, "solved": 0.0},
    )
    config = copied.model_copy(update={"name": "scraped"})
    copied.run_dir.rename(config.run_dir)
    node = ray.nodes()[0]
    gang = LearnerGang(config, "scraped")
    wanted, seen, alerts = parts("scraped"), set[str](), set[str]()
    ended = threading.Event()
    with prometheus(
        tmp_path, f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
    ) as client:

        def look() -> None:
            while not ended.wait(0.5):
                for expression in wanted.keys() - seen:
                    if ask(client, expression):
                        seen.add(expression)
                alerts.update(a["metric"]["alertname"] for a in ask(client, "ALERTS"))

        thread = threading.Thread(target=look)
        with Run(config, gang) as controller:
            thread.start()
            try:
                assert controller.run()["finished"]
                deadline = time.monotonic() + 60
                absent = {metric.facts.series for metric in ABSENT}
                while time.monotonic() < deadline:
                    missing = {e for e in wanted.keys() - seen if not wanted[e] & absent}
                    if not missing:
                        break
                    time.sleep(0.5)
            finally:
                ended.set()
                thread.join()
        stop_idle_pools()
        gang.stop()
    assert missing == set()
    known = {metric.facts.series for metric in [*Logged, *Live]}
    assert set().union(*wanted.values()) <= known
    shown = set().union(*(wanted[expression] for expression in seen))
    assert shown & absent == set(), "what is defined to be absent is not there"
    assert alerts <= {"TalipotHealth", "TalipotRunGone"}
