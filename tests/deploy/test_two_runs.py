"""Two runs at once on one machine, each in a cluster of its own, and each found by its folder."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.config.recipe import save_config
from common.config.run import RunConfig
from deploy.standing import Standing, standing_of
from tests.deploy.commands import start, until_logged
from tests.deploy.workers.test_attach import command
from tests.workspaces import run_copy

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]
Started = tuple[RunConfig, subprocess.Popen[str]]


@pytest.fixture
def two(
    workspace: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Started, Started]]:
    """Two commands that train in local clusters of their own until they are stopped."""
    # Two object stores of Ray's own choice may be more than the machine's shared memory.
    monkeypatch.setenv("RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES", str(200 * 2**20))
    started: list[Started] = []
    for name in ("older", "newer"):
        config = run_copy(
            workspace,
            tmp_path / name,
            train={"iterations": 10_000, "checkpoint_every": 5, "ppg": None},
            rollout={"actors": 1, "cpus_per_actor": 0.1},
            reward_service={"cpus_per_replica": 0.1},
            learner={"ranks": 1},
            cluster={"dashboard": False},
        )
        recipe = tmp_path / f"{name}.yaml"
        save_config(config, recipe)
        started.append((config, start("train", str(recipe))))
        until_logged(started[-1][1], config.folder.metrics)
    yield started[0], started[1]
    for _, driver in started:
        driver.kill()
        driver.communicate(timeout=60)


def until(config: RunConfig, state: str) -> Standing:
    deadline = time.monotonic() + 30
    while (found := standing_of(config)).state != state:
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    return found


def test_each_run_is_found_by_its_own_folder(two: tuple[Started, Started], tmp_path: Path) -> None:
    (older, first), (newer, second) = two
    found = [until(config, "running") for config in (older, newer)]
    assert found[0].cluster != found[1].cluster
    # Ray's "auto" is the newest cluster; the older run is scaled in its own, by its folder alone.
    folder = str(older.run_dir)
    for config in (older, newer):
        code, _, out, _ = command("scale", str(config.run_dir), "--actors=2")
        assert (code, out) == (0, "rollout workers: 1 -> 2\n")
    # An address that a user gives is sent this machine's token only where the mode says so.
    elsewhere = ["--address", found[1].cluster]
    wrong = command("scale", folder, "--actors=3", *elsewhere, RAY_AUTH_MODE="token")
    assert wrong[0] == 5
    assert "not at work in this cluster" in wrong[1][-1]
    # A second command attaches there, too, and stops the run for the first one.
    attached = start("train", str(tmp_path / "older.yaml"))
    assert attached.stdout is not None
    assert any("attached to run:controller" in line for line in attached.stdout)
    time.sleep(5)  # the line comes just before it begins to follow the run
    attached.send_signal(signal.SIGINT)
    _, error = attached.communicate(timeout=90)
    assert attached.returncode == 130
    assert "stopped after iteration" in error
    first.communicate(timeout=90)
    assert until(older, "not running").notes[0].startswith("`talipot train --resume")
    # The newer one does not notice, until it is stopped too.
    assert until(newer, "running").notes == ()
    second.send_signal(signal.SIGTERM)
    second.communicate(timeout=90)
    assert until(newer, "not running").step > 0
