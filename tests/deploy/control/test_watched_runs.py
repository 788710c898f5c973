"""A run that somebody looks at: the page sees it at work, and changes nothing."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.config.recipe import save_config
from common.config.run import RunConfig
from deploy.run_folder.activity import Span, read_activity
from deploy.workers.gang import LearnerGang
from tests.deploy.control.runs import finish
from tests.deploy.watch.served import served
from tests.workspaces import run_copy

pytestmark = pytest.mark.usefixtures("cluster")


def test_a_run_that_is_watched_ends_in_the_same_weights(
    workspace: RunConfig,
    gang: LearnerGang,
    reference: tuple[RunConfig, dict[str, Any]],
    tmp_path: Path,
) -> None:
    """The page's server goes while the run is at work, and comes again."""
    config = run_copy(workspace, tmp_path)
    save_config(config, config.run_dir / "config.yaml")
    seen: list[dict[str, Any]] = []
    lanes: list[dict[str, Any] | None] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            with served([config.run_dir]) as url, httpx.Client(base_url=url, timeout=30) as client:
                for _ in range(10):
                    state = client.get("api/runs/0/state").json()
                    seen.append(state["standing"])
                    client.get("api/runs/0/panels/outcome")
                    lanes.append(client.get("api/runs/0/workers").json()["timeline"])
                    client.get("api/runs/0/samples")

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        facts = finish(config, gang)
    finally:
        ended.set()
        thread.join()
    assert facts["weights_hash"] == reference[1]["weights_hash"]
    running = [standing for standing in seen if standing["state"] == "running"]
    assert {standing["step"] for standing in running} & {1, 2, 3}
    assert any(len(standing["workers"]) == 3 for standing in running)
    assert all(standing["metrics"]["score"] for standing in running if standing["step"] > 1)
    drawn = [lane["name"] for timeline in lanes if timeline for lane in timeline["lanes"]]
    assert {name.partition("-")[0] for name in drawn} == {"learner", "rollout", "reward"}
    assert any(standing["under_way"] for standing in running)
    told = {
        (span["worker"].partition("-")[0], span["what"]) for s in running for span in s["under_way"]
    }
    assert told <= {
        ("learner", "starting"),
        ("learner", "learning"),
        ("learner", "auxiliary"),
        ("learner", "publishing"),
        ("learner", "saving"),
        ("rollout", "sampling"),
        ("reward", "scoring"),
    }
    _is_whole(read_activity(config.folder.activity), config)


def _is_whole(spans: list[Span], config: RunConfig) -> None:
    """Everybody's work is there, and nobody did two things at once."""
    did = {(span.worker.partition("-")[0], span.what) for span in spans}
    assert did >= {
        ("learner", "learning"),
        ("learner", "publishing"),
        ("learner", "saving"),
        ("rollout", "loading"),
        ("rollout", "sampling"),
        ("reward", "scoring"),
    }
    for what in ("learning", "publishing"):
        assert sum(span.what == what for span in spans) == config.train.iterations
    for worker in {span.worker for span in spans}:
        own = sorted((span.begin, span.end) for span in spans if span.worker == worker)
        for (_, end), (begin, _) in itertools.pairwise(own):
            assert begin >= end - 2e-3, worker  # written in milliseconds
