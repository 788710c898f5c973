"""The script of `make gpu`, on the processor: the same code, a tiny model, no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.run import NONE

ROOT = Path(__file__).parents[2]


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    """It has a process group and an accelerator of its own: in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "tests.gpu.run", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_every_role_is_checked_and_measured(tmp_path: Path) -> None:
    done = script(str(tmp_path), "--device", "cpu", "--small")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    checks, figures = found["checks"], found["figures"]
    assert all(check["holds"] for check in checks.values())
    for kind in ("float32", "bfloat16"):
        for model in ("palm", "qwen3", "gemma2"):
            assert f"{model}: sampled log-probabilities, {kind}" in checks
            assert f"{model}: steps replayed and computed, {kind}" in checks
    assert checks["weights: numbers that differ after a publication"]["off"] == 0
    assert figures.keys() == {
        "copy",
        "product",
        "decode_tiny",
        "decode_tiny_mixed_vs_computed",
        "decode_tiny_vs_computed",
        "decode_tiny_vs_hf",
        "learner_mfu",
        "sync",
        "iteration",
    }
    assert all(figure["value"] > 0 for figure in figures.values())
    assert found["engine"].startswith("DeepSpeed")


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = script(str(tmp_path))
    assert (done.returncode, done.stdout.strip()) == (0, NONE)
    assert not list(tmp_path.iterdir())


NEITHER = """
import importlib.util, sys

MISSING = ("ray", "deepspeed", "pytest", "hypothesis")

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name in MISSING else found(name, *more)
sys.meta_path.insert(0, Block())
from tests.gpu.run import main
sys.exit(main([sys.argv[1], "--device", "cpu", "--small"]))
"""


@pytest.mark.slow
def test_it_needs_neither_ray_nor_deepspeed_nor_what_tests_need(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NEITHER, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["engine"].startswith("plain PyTorch")
    assert all(check["holds"] for check in found["checks"].values())
