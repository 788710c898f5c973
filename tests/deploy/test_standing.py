"""How far a run is, told by files that other processes left in its folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from common.config.recipe import save_config
from common.config.run import RunConfig
from common.errors import RewardError
from deploy.run_folder.failures import note_failure, note_success
from deploy.run_folder.lock import Holder, writing
from deploy.run_folder.progress import telling, told
from deploy.standing import lines_of, standing_of
from tests.deploy.commands import Run

ROOT = Path(__file__).parents[2]
FACTS = {
    "iteration": 5,
    "iterations": 20,
    "issued": 96,
    "trained": 80,
    "dropped": 0,
    "in_flight": 16,
    "metrics": {"seconds": 2.0, "kl": 0.5, "score": 1.25},
    "counts": {"workers/rollout": 2, "leases_reissued": 1},
    "workers": [
        {"name": f"rollout-{i}", "state": "working", "calls": 1, "node": "ab" * 8, "pid": 7}
        for i in range(40)
    ],
}


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run that was trained for five iterations of 20, the last ones two seconds long."""
    config = RunConfig.model_validate(
        {"name": "run", "output": str(tmp_path), "train": {"iterations": 20}}
    )
    config.run_dir.mkdir()
    save_config(config, config.folder.config)
    for stage, step, seconds in (("sft", 9, 1.0), *(("train", i, 2.0) for i in range(1, 6))):
        line = {"stage": stage, "step": step, "time": 0.0, "metrics": {"seconds": seconds}}
        with config.folder.metrics.open("a", encoding="utf8") as file:
            file.write(json.dumps(line) + "\n")
    return config


@contextmanager
def telling_facts(config: RunConfig, holder: Holder) -> Iterator[None]:
    """A controller that has told these facts."""
    with telling(config.folder.status, holder.token, lambda: FACTS):
        deadline = time.monotonic() + 30
        while (last := told(config.run_dir)) is None or last.token != holder.token:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield


def shown(config: RunConfig) -> str:
    lines = lines_of(standing_of(config))
    texts = ("".join(p if isinstance(p, str) else p[0] for p in line) for line in lines)
    return "\n".join(texts)


def test_a_run_at_work_is_live_and_has_time_left(config: RunConfig) -> None:
    with writing(config.run_dir, "train", "10.0.0.1:7") as holder, telling_facts(config, holder):
        found = standing_of(config)
        text = shown(config)
    assert (found.state, found.step, found.steps) == ("running", 5, 20)
    assert found.seconds_left == 15 * 2.0
    assert found.cluster == "10.0.0.1:7"
    assert found.notes == ()
    order = ["5/20", "about 30 s", "in flight", "score", "kl", "seconds", "leases_reissued"]
    order += ["rollout-0", "rollout-31", "more workers  "]
    assert sorted(order, key=text.index) == order, text
    assert "rollout-32" not in text


def test_of_a_run_that_has_ended_nothing_is_live(config: RunConfig) -> None:
    with writing(config.run_dir, "train") as holder, telling_facts(config, holder):
        pass
    found = standing_of(config)
    assert (found.state, found.stage, found.step, found.steps) == ("not running", "train", 5, 20)
    assert (found.workers, found.told_seconds_ago) == ((), None)
    assert found.notes == (f"`talipot train --resume {config.run_dir}` carries on with it",)
    # The next writer has told nothing yet, and what is there is of the last one.
    with writing(config.run_dir, "train"):
        assert (standing_of(config).state, standing_of(config).workers) == ("running", ())
    config.folder.result.write_text('{"iterations": 20}', encoding="utf8")
    assert (standing_of(config).state, standing_of(config).notes) == ("finished", ())


def test_why_a_stage_failed_is_said_until_the_run_goes_on(config: RunConfig) -> None:
    def event(what: str) -> None:
        with config.folder.events.open("a", encoding="utf8") as file:
            file.write(json.dumps({"time": 1.0, "worker": "w", "what": what, "detail": ""}) + "\n")

    event("started")
    assert not [note for note in standing_of(config).notes if note.startswith("failed")]
    note_failure(config.folder.events, "train", KeyError("no such\nmetric"))
    event("stopped")
    assert "failed in train: KeyError: 'no such\\nmetric'" in standing_of(config).notes
    note_failure(config.folder.events, "train", RewardError("it raised"))
    assert "failed in train: it raised" in standing_of(config).notes
    event("started")
    assert not [note for note in standing_of(config).notes if note.startswith("failed")]
    note_failure(config.folder.events, "sft", RewardError("no disk"))
    note_success(config.folder.events, "sft")
    assert not [note for note in standing_of(config).notes if note.startswith("failed")]


def test_a_run_that_hangs_is_said_to(config: RunConfig) -> None:
    with writing(config.run_dir, "train") as holder:
        note = {"token": holder.token, "time": time.time() - 3700, "facts": FACTS}
        config.folder.status.write_text(json.dumps(note), encoding="utf8")
        found = standing_of(config)
    assert found.state == "running"
    assert "told nothing for 1 h 01 min" in found.notes[0]
    assert not any("--resume" in note for note in found.notes)


@pytest.mark.parametrize("text", ["", "[]", '{"token": "x"}', '{"facts": {}, "time": 0}', "\xff"])
def test_a_status_that_cannot_be_read_is_none(config: RunConfig, text: str) -> None:
    config.folder.status.write_text(text, encoding="latin1")
    assert told(config.run_dir) is None
    with writing(config.run_dir, "train"):
        assert standing_of(config).state == "running"


def test_another_stage_at_work_is_told_by_its_log(config: RunConfig) -> None:
    with writing(config.run_dir, "sft"):
        found = standing_of(config)
    assert (found.state, found.stage, found.step) == ("running", "sft", 9)
    assert "`talipot sft` on host" in found.writer


def test_a_killed_writer_runs_no_more(config: RunConfig) -> None:
    code = (
        "import sys, time; from pathlib import Path; from deploy.run_folder.lock import RunLock; "
        "lock = RunLock(Path(sys.argv[1]), 'train'); print('held', flush=True); time.sleep(60)"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", code, str(config.run_dir)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert started.stdout is not None and started.stdout.readline() == "held\n"
    assert standing_of(config).state == "running"
    started.kill()
    started.communicate()
    assert standing_of(config).state == "not running", "its note stays, and says nothing"


def test_a_full_disk_ends_no_run_by_its_status(tmp_path: Path) -> None:
    with telling(tmp_path / "gone" / "status.json", "x", lambda: FACTS):
        pass


def test_status_as_json_or_until_the_run_ends(run: Run, config: RunConfig) -> None:
    folder = str(config.run_dir)
    found: dict[str, Any] = json.loads(run("status", folder, "--json").out)
    assert (found["run"], found["state"], found["step"]) == (folder, "not running", 5)
    watched = run("status", folder, "--watch")
    assert watched.code == 0
    assert "not running" in watched.out
    assert run("status", folder, "--watch", "--json").code == 2


def test_status_imports_neither_ray_nor_torch(config: RunConfig) -> None:
    """So it answers in a second, and nothing of a cluster can hold it."""
    code = (
        "import sys; from deploy.cli.main import main\n"
        "try: main(['status', sys.argv[1]])\n"
        "except SystemExit as ended: print(ended.code, {'ray', 'torch'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(config.run_dir)],
        cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "0 set()", done.stdout
