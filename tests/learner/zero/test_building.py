"""Networks get their weights where they are kept: what a rank reads of them. Real Ray gangs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import ray
import torch

from common.config.model import LoraConfig, PalmConfig
from common.models.adapters import attach_adapter
from common.models.build import build_policy
from common.models.filling import Source, Weights, stored
from common.models.weight_files import save_weights
from deploy.workers.calls import start_function
from deploy.workers.gang import LearnerGang
from learner.rank import LearnerRank
from learner.zero.engine import ZeroEngine

pytestmark = pytest.mark.usefixtures("cluster")

SHAPE = PalmConfig(vocab_size=331, dim=48, layers=2, heads=2, head_dim=8, context=32)
"""Large enough that ZeRO 3 does not keep all of it whole on every rank."""
TOKENS = torch.arange(16).view(1, 16)


def counted(weights: Weights, read: list[int]) -> Iterator[tuple[str, Source]]:
    """The same weights; `read` is told how many numbers are asked for."""

    def asked(source: Source) -> Source:
        def part(begin: int, end: int) -> torch.Tensor:
            read.append(end - begin)
            return source(begin, end)

        return part

    return ((name, asked(source)) for name, source in weights)


def built(
    path: Path, stage: int, precision: Literal["fp32", "bf16"], adapters: bool, rank: LearnerRank
) -> tuple[int, int, dict[str, torch.Tensor], torch.Tensor]:
    """Build a policy without memory from a file; returns numbers read, bytes kept of them, weights
    and logits."""
    network, read = build_policy(SHAPE, empty=True), list[int]()
    shapes = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    weights = ((name, stored(path, name, shape)) for name, shape in shapes.items())
    if adapters:
        attach_adapter(network, "policy", LoraConfig(rank=2), seed=0)
    engine = ZeroEngine(
        network,
        counted(weights, read),
        zero_stage=stage,
        precision=precision,
        weight_decay=0.0,
        max_grad_norm=1.0,
        eps=1e-8,
    )
    base = [p for n, p in engine.network.named_parameters() if "lora" not in n and "value" not in n]
    kept = sum(getattr(p, "ds_tensor", p).nbytes for p in base)
    with torch.no_grad():
        logits, _ = engine(TOKENS)
    return sum(read), kept, engine.full_state(), logits


@pytest.mark.parametrize(
    ("stage", "precision", "adapters"),
    [(0, "fp32", False), (2, "fp32", False), (3, "fp32", False), (3, "bf16", True)],
)
def test_a_rank_reads_and_keeps_its_part(
    gangs: dict[int, LearnerGang],
    tmp_path: Path,
    stage: int,
    precision: Literal["fp32", "bf16"],
    adapters: bool,
) -> None:
    whole = build_policy(SHAPE)
    whole.initialise(7)
    path = tmp_path / "policy.safetensors"
    save_weights(whole.state_dict(), path, {})
    count = sum(tensor.numel() for tensor in whole.state_dict().values())
    sizes = {name: p.numel() for name, p in whole.decoder.named_parameters()}
    build = partial(built, path, stage, precision, adapters)
    for ranks, gang in gangs.items():
        found = ray.get([start_function(rank, build) for rank in gang.ranks])
        parts = ranks if stage == 3 else 1
        kept_bytes = sum(
            -(-size // parts) * (2 if adapters and "norm" not in name else 4)
            for name, size in sizes.items()
        )
        for read, kept, state, logits in found:
            # The head is small, and whole in memory; every rank reads it so.
            assert count / parts - 64 < read < count / parts + 64
            assert kept == kept_bytes
            for name in state:
                if "lora" not in name:
                    tensor = whole.state_dict()[name]
                    rounded = adapters and "norm" not in name and name.startswith("palm")
                    expected = tensor.bfloat16().float() if rounded else tensor
                    assert torch.equal(state[name], expected), name
            if not adapters:
                assert torch.equal(logits, whole(TOKENS)[0])
        first, *others = (set(state) for *_, state, _ in found)
        assert whole.state_dict().keys() <= first
        assert not any(others), "what is exported is whole on one rank alone"
        if stage == 3:
            assert sum(read for read, *_ in found) < count * 1.05


@pytest.mark.usefixtures("one_rank")
def test_weights_that_are_missing_are_told() -> None:
    network = build_policy(SHAPE, empty=True)
    weights = [pair for pair in network.first_weights(0) if "norm" not in pair[0]]
    with pytest.raises(AssertionError, match=r"no weights for \['palm\.blocks\.0\.norm\.weight'"):
        ZeroEngine(
            network,
            weights,
            zero_stage=0,
            precision="fp32",
            weight_decay=0.0,
            max_grad_norm=1.0,
            eps=1e-8,
        )
