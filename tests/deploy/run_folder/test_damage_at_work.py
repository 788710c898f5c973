"""Files of a run at work flipped, cut and emptied: commands say so, and the run does not notice.

What it reads again (weights, the tokenizer) is put back as it was; logs stay damaged.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import ray

from common.config.recipe import save_config
from common.config.run import RunConfig
from tests.deploy.commands import Run, start, until_logged
from tests.deploy.run_folder.test_damage import CODES, LONGEST_S, damaged
from tests.workspaces import run_copy

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.usefixtures("cluster"),
    pytest.mark.timeout(1800),
]
ITERATIONS = 300
AT_LEAST = 300
"""Damages while the run is at work."""


def begun(workspace: RunConfig, folder: Path) -> tuple[RunConfig, subprocess.Popen[str]]:
    """A run of its own process, in the tests' cluster."""
    folder.mkdir()
    train = {"iterations": ITERATIONS, "checkpoint_every": 3, "keep_checkpoints": 2}
    config = run_copy(workspace, folder, train=train)
    recipe = folder / "recipe.yaml"
    save_config(config, recipe)
    started = start("train", str(recipe), address=ray.get_runtime_context().gcs_address)
    until_logged(started, config.folder.metrics)
    return config, started


def readers(run: Path, scratch: Path) -> list[list[str]]:
    """Commands that may be given while a run is at work."""
    return [
        ["status", str(run), "--json"],
        ["status", str(run), "--live"],
        ["report", str(run)],
        ["samples", str(run), "--json"],
        ["sample", str(run), "-p", "read the old", "--sft"],
        ["sample", str(run), "-p", "read the old", "--checkpoint", "latest"],
        ["sample", str(run), "-p", "read the old", "--checkpoint", "best"],
        ["export", str(run), str(scratch), "--checkpoint", "latest"],
        ["config", "--config", str(run / "config.yaml")],
    ]


def test_a_run_at_work_does_not_notice(workspace: RunConfig, tmp_path: Path, run: Run) -> None:
    whole, started = begun(workspace, tmp_path / "whole")
    _, error = started.communicate(timeout=600)
    assert started.returncode == 0, error
    expected = whole.folder.policy.weights.read_bytes()

    config, started = begun(workspace, tmp_path / "damaged")
    rng, cases = random.Random(2), 0
    sampled = run("sample", str(config.run_dir), "-p", "read the old", "--sft")
    assert sampled.code == 0, sampled
    lasting = [config.folder.tokenizer, config.folder.sft.weights]
    lasting += [config.folder.reward_model.weights, config.folder.config, config.folder.inputs]
    while started.poll() is None:
        files = [p for p in config.run_dir.rglob("*") if p.is_file() and p.name != "lock"]
        path, command = (
            rng.choice(sorted(files)),
            rng.choice(readers(config.run_dir, tmp_path / "e")),
        )
        where = f"case {cases}: {path.relative_to(config.run_dir)}, {' '.join(command)}"
        try:
            raw = path.read_bytes()
            bad = damaged(raw, rng)
            path.write_bytes(bad)
        except FileNotFoundError:  # a checkpoint, or part of a write, that is gone meanwhile
            continue
        begin = time.monotonic()
        outcome = run(*command)
        assert time.monotonic() - begin < LONGEST_S, where
        assert outcome.code in CODES, f"{where}: {outcome}"
        if outcome.code:
            assert outcome.error.splitlines()[-1].startswith("error "), f"{where}: {outcome}"
        elif "--sft" in command:
            assert outcome.out == sampled.out, where
        shutil.rmtree(tmp_path / "e", ignore_errors=True)
        if path in lasting:
            path.write_bytes(raw)
        cases += 1
    _, error = started.communicate()
    assert started.returncode == 0, error
    assert config.folder.policy.weights.read_bytes() == expected
    assert cases >= AT_LEAST
