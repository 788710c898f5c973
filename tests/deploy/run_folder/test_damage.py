"""Every file of a finished run flipped, cut and emptied: a line or the same result, never another.

Files of text have no checksum: a digit of a log that turned into another digit is read as it
stands. Weights, checkpoints and the tokenizer are compared with what was recorded.
"""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import pytest

from common.config.recipe import save_config
from common.config.run import RunConfig
from deploy.cli.main import main
from tests.deploy.commands import Outcome, Run
from tests.workspaces import run_copy

LONGEST_S = 10.0
CODES = {0, 2, 3, 4, 5, 7, 8}
"""5 and above: what a command needs beside files may be named by a file."""


@pytest.fixture(scope="module")
def finished(workspace: RunConfig, cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run through all stages, with a report."""
    folder = tmp_path_factory.mktemp("damaged")
    train = {"iterations": 2, "checkpoint_every": 1, "keep_checkpoints": 2}
    config = run_copy(workspace, folder, train=train)
    for stage in (config.folder.sft.path, config.folder.reward_model.path):
        shutil.rmtree(stage)
    recipe = folder / "recipe.yaml"
    save_config(config, recipe)
    for command in (["sft"], ["reward"], ["train"]):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--config", str(recipe)])
        assert ended.value.code == 0
    with pytest.raises(SystemExit):
        main(["report", str(config.run_dir)])
    return config.run_dir


def commands(run: Path, scratch: Path) -> list[list[str]]:
    """Commands that read a run, each in a way of its own."""
    return [
        ["status", str(run), "--json"],
        ["report", str(run)],
        ["samples", str(run), "--json"],
        ["sample", str(run), "-p", "read the old"],
        ["sample", str(run), "-p", "read the old", "--sft"],
        ["sample", str(run), "-p", "read the old", "--checkpoint", "latest"],
        ["sample", str(run), "-p", "read the old", "--checkpoint", "best"],
        ["export", str(run), str(scratch)],
        ["train", "--resume", str(run)],
        ["status", str(run)],
        ["config", "--config", str(run / "config.yaml")],
    ]


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """Cut, emptied, or a few bits turned."""
    kind = rng.choice(["flip", "flip", "cut", "empty", "zeros"])
    if kind == "empty" or not raw:
        return b""
    at = rng.randrange(len(raw))
    if kind == "cut":
        return raw[:at]
    if kind == "zeros":
        return raw[:at] + bytes(len(raw) - at)
    changed = bytearray(raw)
    for _ in range(rng.choice([1, 1, 8])):
        changed[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def checked_files(run: Path) -> set[Path]:
    """Files whose contents are recorded."""
    found = {run / "tokenizer.json"}
    for pattern in ("*/*.safetensors", "checkpoints/step-*/**/*"):
        found |= {path for path in run.glob(pattern) if path.is_file()}
    return found


def damage_all(finished: Path, tmp_path: Path, run: Run, seed: int, cases: int) -> None:
    """So many cases; each file in turn, each with a command drawn."""
    rng = random.Random(seed)
    files = sorted(path for path in finished.rglob("*") if path.is_file() and path.name != "lock")
    every = commands(finished, tmp_path / "export")
    whole = {" ".join(command): looked(run, command, tmp_path) for command in every}
    for found, _ in whole.values():
        assert found.code == 0, found.error
    for case in range(cases):
        path = files[case % len(files)]
        command = rng.choice(every)
        raw = path.read_bytes()
        bad = damaged(raw, rng)
        path.write_bytes(bad)
        where = f"seed {seed}, case {case}: {path.relative_to(finished)}, {' '.join(command)}"
        try:
            begin = time.monotonic()
            outcome, left = looked(run, command, tmp_path)
            assert time.monotonic() - begin < LONGEST_S, where
            assert outcome.code in CODES, f"{where}: {outcome}"
            if outcome.code:
                last = outcome.error.splitlines()[-1]
                assert last.startswith("error "), f"{where}: {outcome}"
            elif path in checked_files(finished) and bad != raw and reads_numbers(command):
                expected = whole[" ".join(command)]
                assert (outcome.out, left) == (expected[0].out, expected[1]), where
        finally:
            path.write_bytes(raw)


def reads_numbers(command: list[str]) -> bool:
    """Whether what it shows follows from weights."""
    return command[0] in ("sample", "export")


def looked(run: Run, command: list[str], tmp_path: Path) -> tuple[Outcome, bytes]:
    """How a command ends, and the weights that it wrote."""
    shutil.rmtree(tmp_path / "export", ignore_errors=True)
    outcome = run(*command)
    left = sorted((tmp_path / "export").rglob("*.safetensors"))
    return outcome, b"".join(path.read_bytes() for path in left)


def test_a_damaged_file_is_a_line_or_the_same_result(
    finished: Path, tmp_path: Path, run: Run
) -> None:
    damage_all(finished, tmp_path, run, seed=0, cases=80)


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_two_thousand_damages(finished: Path, tmp_path: Path, run: Run) -> None:
    damage_all(finished, tmp_path, run, seed=1, cases=2000)
