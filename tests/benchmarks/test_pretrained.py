"""Both sides of the benchmark of pretrained models do the same work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.benchmarks.pretrained import (
    SMOLLM2,
    library,
    packed_step,
    padded_step,
    policy,
    rows,
    run,
    written,
)

TINY = replace(
    SMOLLM2,
    shape={**SMOLLM2.shape, "vocab_size": 64, "num_hidden_layers": 2, "intermediate_size": 64},
    batch=3,
    prompt=4,
    response=5,
    lengths=(4, 9, 6),
    repeats={"generation": 1, "llama": 1, "fp32": 1, "bf16": 1},
)


def test_both_steps_take_the_same_gradients(tmp_path: Path) -> None:
    path, batch = written(TINY, tmp_path / "model"), rows(TINY)
    ours, theirs = policy(path, "fp32"), library(path, torch.float32)
    assert float(packed_step(ours, batch)) == pytest.approx(float(padded_step(theirs, batch)))
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.decoder.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-4)


def test_it_runs() -> None:
    results = {result.key: result for result in run(TINY)}
    assert results.keys() == {
        "pretrained_step_vs_padded",
        "pretrained_step_vs_padded_bf16",
        "pretrained_shared_prompts_bf16",
    }
    assert all(result.value > 0 for result in results.values())
