"""Eight people and a server that is killed, over HTTP, as browsers meet it."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from common.config.run import RunConfig
from common.run_folder import RoundFolder
from deploy.feedback.store import Store
from tests.deploy.feedback.labelers import Simulated, at_work
from tests.deploy.feedback.rounds import plain, round_in
from tests.deploy.feedback.test_loop import ROOT, trained

PAIRS, PEOPLE, KILLS = 300, 8, 5


def serving(config: RunConfig) -> subprocess.Popen[bytes]:
    """The command that serves the newest round."""
    return subprocess.Popen(
        [sys.executable, "-m", "deploy.cli", "feedback", "serve", str(config.run_dir)],
        stdout=subprocess.DEVNULL,
        cwd=ROOT,
    )


def answers_in(folder: RoundFolder) -> int:
    store = Store(folder.answers)
    count = len(store.standing())
    store.close()
    return count


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_what_was_acknowledged_is_stored_whenever_the_server_is_killed(
    workspace: RunConfig, tmp_path: Path
) -> None:
    config = trained(workspace, tmp_path)
    made = round_in(config.run_dir, plain(PAIRS), overlap=2, overlap_share=1.0, repeat_share=0.0)
    people = [
        Simulated(
            run=config.run_dir,
            name=f"p{number}",
            quality=lambda _, text: len(text),
            noise=0.2,
            twice=0.2,
        )
        for number in range(PEOPLE)
    ]
    rng = random.Random(0)
    server = serving(config)
    deadline = time.monotonic() + 500
    with at_work(people, together=True):
        for kill in range(1, KILLS + 1):
            until = rng.uniform(0.5, 0.95) * kill * 2 * PAIRS / KILLS
            while answers_in(made) < until:
                assert time.monotonic() < deadline and server.poll() is None
                time.sleep(0.01)
            server.send_signal(signal.SIGKILL)
            server.wait()
            server = serving(config)
        while answers_in(made) < 2 * PAIRS:
            assert time.monotonic() < deadline and server.poll() is None
            time.sleep(0.1)
    server.send_signal(signal.SIGINT)
    server.wait()
    store = Store(made.answers)
    standing, kept = store.standing(), [row["key"] for row in store.history()]
    assert store.left() == 0
    store.close()
    assert len({(a.pair_uid, a.labeler) for a in standing}) == len(standing) == 2 * PAIRS
    assert set(Counter(a.pair_uid for a in standing).values()) == {2}
    said = [key for who in people for key in who.acknowledged]
    assert len(said) > 1.9 * PAIRS, "nearly all were acknowledged"
    assert set(said) <= set(kept) and len(kept) == len(set(kept))
