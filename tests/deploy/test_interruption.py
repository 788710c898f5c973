"""Commands that are interrupted, and runs whose driver is killed."""

from __future__ import annotations

import io
import json
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import ray
from rich.console import Console

from common.config.recipe import load_config
from common.errors import ClusterError
from deploy.run_folder import checkpoints
from deploy.run_folder.lock import writing
from deploy.stages import policy
from deploy.stages.session import Session
from deploy.workers.attach import own_address
from tests.deploy.commands import Run, refused, start, until_logged

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.mark.parametrize(
    ("command", "sent", "code"),
    [
        pytest.param("sft", signal.SIGINT, 130, marks=pytest.mark.chaos),
        ("train", signal.SIGTERM, 143),
    ],
)
def test_interruption(
    recipe: Callable[..., str], tmp_path: Path, command: str, sent: signal.Signals, code: int
) -> None:
    path = recipe(sft={"epochs": 1000}, train={"iterations": 1000, "checkpoint_every": 0})
    options = ["learner.ranks=1", "rollout.actors=1"]
    started = start(command, path, *options, address=ray.get_runtime_context().gcs_address)
    log = tmp_path / "run" / "metrics.jsonl"
    until_logged(started, log)
    started.send_signal(sent)
    out, error = started.communicate(timeout=100)
    assert started.returncode == code, error
    assert ("interrupted" if sent == signal.SIGINT else "terminated") in error
    assert "Traceback" not in out + error
    assert json.loads(log.read_text(encoding="utf8").splitlines()[0])["stage"] == command
    found = checkpoints.newest(tmp_path / "run")
    if command == "train":
        assert found is not None
        assert f"stopped after iteration {found[1]['iteration']} with a checkpoint" in error


@pytest.mark.chaos
def test_a_run_outlives_its_driver_and_can_be_attached_to(
    run: Run, recipe: Callable[..., str], tmp_path: Path
) -> None:
    path = recipe(train={"iterations": 40, "ppg": None})
    driver = start("train", path, address=ray.get_runtime_context().gcs_address)
    until_logged(driver, tmp_path / "run" / "metrics.jsonl")
    driver.kill()
    driver.communicate(timeout=30)
    folder = str(tmp_path / "run")
    refused(run("train", "--resume", folder, "rollout.actors=1"), 2, "at work", "rollout.actors")
    attached = run("train", "--resume", folder)
    assert attached.code == 0, attached
    assert "attached to run:controller" in attached.out
    facts = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf8"))
    assert facts["finished"]
    assert facts["rollouts_trained"] == facts["rollouts_issued"] == 40 * 16
    again = run("train", "--resume", folder)
    assert again.code == 0
    assert "nothing to train" in " ".join(again.out.split())
    with pytest.raises(ValueError, match="Failed to look up actor"):
        ray.get_actor("run:controller", namespace="talipot")


@pytest.mark.parametrize("ends", [True, False])
def test_a_controller_that_is_dying_is_waited_for(
    recipe: Callable[..., str], cluster: None, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    """It holds the lock for a moment after its name is gone; not so somebody in another cluster.

    Another begins only where the cluster was named: a command's own one ends with that command.
    """
    monkeypatch.setattr(policy, "_SETTLES_S", 20.0 if ends else 0.5)
    config = load_config(Path(recipe()), ["cluster.address=127.0.0.1:1"] if ends else [])
    session = Session(config, Console(), attached=True)
    with ExitStack() as held:
        held.enter_context(writing(config.run_dir, "train"))
        if ends:
            threading.Timer(1.0, held.close).start()
            assert policy._controller_of(session, config) is None
            assert not session.attached
        else:
            with pytest.raises(ClusterError, match="is at work, and not in this cluster"):
                policy._controller_of(session, config)


def test_a_controller_that_is_cut_off_is_waited_for_longer(
    recipe: Callable[..., str], cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its node goes on for as long as Ray does not notice there, and so does it."""
    monkeypatch.setattr(policy, "_SETTLES_S", 0.2)
    monkeypatch.setattr(policy, "_PATIENCE_S", 0.1)
    config = load_config(Path(recipe()), ["cluster.address=127.0.0.1:1"])
    said = io.StringIO()
    session = Session(config, Console(file=said, width=400), attached=True)
    with ExitStack() as held:
        held.enter_context(writing(config.run_dir, "train", cluster=own_address()))
        threading.Timer(1.5, held.close).start()
        assert policy._controller_of(session, config) is None
        assert said.getvalue().count("waits for `talipot train` on host ") == 1
    monkeypatch.setattr(policy, "_CUT_OFF_S", 0.5)
    session.attached = True
    with (
        writing(config.run_dir, "train", cluster=own_address()),
        pytest.raises(ClusterError, match=r"is still written by .*; end it there"),
    ):
        policy._controller_of(session, config)
