"""The head of a cluster that falls silent, or whose processes end."""

from __future__ import annotations

import io
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from ray._private import worker as ray_worker
from rich.console import Console

from common.config.recipe import save_config
from common.config.run import RunConfig
from common.errors import ClusterError
from deploy.stages.session import Session
from deploy.workers import head
from deploy.workers.head import HeadWatch, code_of, ended_here
from tests.deploy.workers.test_attach import HERE, gcs


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_LOOK_S", 0.05)
    monkeypatch.setattr(head, "_ANSWER_S", 0.5)
    monkeypatch.setattr(head, "_SILENT_S", 1.0)


def watched() -> tuple[HeadWatch, list[str]]:
    said: list[str] = []
    return HeadWatch(said.append), said


def until(said: list[str]) -> None:
    deadline = time.monotonic() + 20
    while not said:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("token", ["", "a" * 32])
def test_a_head_that_falls_silent_is_told_once(token: str) -> None:
    """One that asks for a token answers too."""
    watch, said = watched()
    with gcs(HERE, token=token) as address:
        assert code_of(address) is (
            grpc.StatusCode.UNAUTHENTICATED if token else grpc.StatusCode.OK
        )
        watch.start(address)
        time.sleep(2.0)
        assert said == [], "it answers"
    until(said)
    time.sleep(0.5)
    assert said == [f"the head of the cluster at {address} is silent for 1 s"]


def test_a_head_that_cannot_be_asked_is_not_silent() -> None:
    """As one behind `ray://`, or one that speaks TLS."""
    with gcs(HERE) as address:
        pass
    assert code_of(address) is grpc.StatusCode.UNAVAILABLE
    watch, said = watched()
    watch.start(address)
    time.sleep(2.5)
    watch.stop()
    assert said == []


def test_nothing_is_told_once_it_is_stopped() -> None:
    watch, said = watched()
    with gcs(HERE) as address:
        watch.start(address)
        time.sleep(0.2)
        watch.stop()
    time.sleep(2.0)
    assert said == []
    assert not any(thread.name == "head" for thread in threading.enumerate())


def test_a_process_of_ours_that_ends_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    started = subprocess.Popen(["sleep", "60"])
    processes: dict[str, list[Any]] = {"raylet": [SimpleNamespace(process=started)]}
    monkeypatch.setattr(ray_worker, "_global_node", SimpleNamespace(all_processes=processes))
    watch, said = watched()
    assert ended_here() == ""
    with gcs(HERE) as address:
        watch.start(address)
        started.kill()
        until(said)
    assert said == ["a process of the local cluster has ended: raylet, by signal 9"]
    monkeypatch.setattr(ray_worker, "_global_node", None)
    assert ended_here() == ""


@pytest.mark.parametrize(
    ("stage", "attached", "again"),
    [
        ("sft", False, "carry on with `talipot sft --resume "),
        ("train", True, "carry on with `talipot train --resume "),
        ("evaluate", False, "give the command again"),
    ],
)
def test_a_session_without_its_head_says_how_to_go_on(
    stage: str, attached: bool, again: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is attached to another's run writes nothing into its folder."""

    def raised(error: Exception) -> None:
        raise error

    monkeypatch.setattr("deploy.stages.session.end_now", raised)
    monkeypatch.setattr("deploy.stages.session.end_here", lambda: None)
    config = RunConfig.model_validate({"output": str(tmp_path), "name": "x"})
    config.run_dir.mkdir()
    save_config(config, config.folder.config)
    session = Session(config, Console(file=io.StringIO()), attached=attached)
    with session.stage(stage, stage):
        pass
    with pytest.raises(ClusterError, match=f"a raylet has ended; {again}"):
        session.end_without_head("a raylet has ended")
    events = config.folder.events.read_text() if config.folder.events.exists() else ""
    assert (f"{stage}: a raylet has ended" in events) is not attached
