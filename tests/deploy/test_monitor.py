"""`talipot monitor`: a Prometheus of its own over the cluster, and what is refused in one line."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from common.config.recipe import save_config
from common.config.run import RunConfig
from tests.deploy.commands import Outcome, Run, refused
from tests.workspaces import run_copy

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "deploy.cli", "monitor"]
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="needs Debian's package prometheus"
)


HEAD = """
import ray
context = ray.init(address="local", num_cpus=1, log_to_driver=False, logging_level="ERROR")
print(context.address_info["gcs_address"], flush=True)
input()
"""


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """The address of a cluster with a dashboard, which keeps the list of who hands out metrics."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_AUTH_MODE", "disabled")
        process = subprocess.Popen(
            [sys.executable, "-c", HEAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate("\n", timeout=60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_without_prometheus_it_says_how_to_have_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    refused(run("monitor"), 2, "prometheus is not installed", "apt-get install prometheus")


@needs_prometheus
def test_a_cluster_that_is_gone_or_a_run_that_rests_is_one_line(
    run: Run, workspace: RunConfig, tmp_path: Path
) -> None:
    address = f"127.0.0.1:{free_port()}"
    refused(run("monitor", "--address", address), 5, address)
    config = run_copy(workspace, tmp_path)
    save_config(config, config.run_dir / "config.yaml")
    refused(run("monitor", str(config.run_dir)), 5, "is not at work on any cluster")


@needs_prometheus
@pytest.mark.slow
def test_a_port_that_is_taken_is_one_line(head: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [*COMMAND, "--address", head, "--port", port],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    refused(Outcome(done.returncode, done.stderr, done.stdout), 2, f"--port {port}")


@needs_prometheus
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_scrapes_the_cluster_with_our_rules_and_ends_what_it_started(
    head: str, number: signal.Signals
) -> None:
    port = free_port()
    started = subprocess.Popen(
        [*COMMAND, "--address", head, "--port", str(port)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        deadline = time.monotonic() + 120
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            while True:
                assert started.poll() is None, started.communicate()
                assert time.monotonic() < deadline
                try:
                    targets = client.get("/api/v1/targets").json()["data"]["activeTargets"]
                    if any(target["health"] == "up" for target in targets):
                        break
                except (httpx.TransportError, ValueError):
                    pass
                time.sleep(0.3)
            rules = client.get("/api/v1/rules").json()["data"]["groups"]
            assert {rule["name"] for group in rules for rule in group["rules"]} >= {
                "TalipotHealth",
                "TalipotRunGone",
            }
        started.send_signal(number)
        out, error = started.communicate(timeout=60)
    finally:
        if started.poll() is None:
            started.kill()
    assert f"http://127.0.0.1:{port}/alerts" in out
    assert error == {signal.SIGINT: "", signal.SIGTERM: "error terminated\n"}[number]
    assert started.returncode == {signal.SIGINT: 0, signal.SIGTERM: 143}[number]
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{port}/-/ready")
