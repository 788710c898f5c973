"""A process of its own is measured: what an actor says of its memory is what it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.config.run import RunConfig

READINGS = 3
"""The system's own pages differ by tens of MiB from one process to the next."""


@pytest.mark.slow
def test_weights_are_there_once_and_blocks_that_are_in_use(
    workspace: RunConfig, tmp_path: Path
) -> None:
    """While the second version of the weights is loaded, and while groups of eight are sampled."""
    taken = []
    for _ in range(READINGS):
        tokenizer = str(workspace.run_dir / "tokenizer.json")
        program = [sys.executable, "-m", "tests.actors.generation.held", tokenizer, str(tmp_path)]
        out = subprocess.run(program, capture_output=True, text=True, check=True).stdout
        found = json.loads(out.splitlines()[-1])
        if found["weights"] > 3 * found["parameters"]:
            pytest.skip("this processor multiplies bf16 weights as fp32")
        assert found["weights"] == pytest.approx(2 * found["parameters"], rel=0.01)
        taken.append(found["taken"] / (found["weights"] + found["cache"]))
        if taken[-1] <= 1.1:
            return
    raise AssertionError(f"{taken} times the weights and blocks in use")
