"""What roles compute on a device, against float64 on the processor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from actors.generation.interface import Generated
from actors.generation.torch_forward import TorchForward
from common.batching import sequence_batch
from common.config.model import PalmConfig
from common.config.run import RunConfig
from common.logprobs import Sampling, chosen_reader
from common.models.build import build_policy
from common.models.decoder import Decoder
from common.models.networks import PolicyNetwork
from common.models.palm import PaLM
from common.wire.weights import FlatBuffer, Manifest
from learner import actor_critic
from learner.learner import Learner
from tests.actors.generation.asked import engine as engine_of
from tests.actors.generation.asked import requests
from tests.common.models.pretrained.tiny import loaded, reference
from tests.gpu.engines import Build
from tests.plain_engine import plain
from tests.scored import trajectories
from tests.workspaces import run_copy

FP32, BF16 = 1e-4, 0.1
"""Bounds of log-probabilities, in nats: of the worst in fp32 (invariant I1), and of the root mean
square of what bf16 rounds."""
WHOLE = Sampling(temperature=0.8)
FILTERED = Sampling(temperature=0.8, top_k=40, top_p=0.95)
"""In fp32: rounding in bf16 puts tokens on the other side of the filter, and others weigh more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line: how far from float64, and how far it may be."""

    name: str
    off: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether it is within its bound; a number that is none is not."""
        return self.off <= self.bound


def checks(workspace: RunConfig, root: Path, device: str, build: Build) -> Iterator[Check]:
    """Compare every role."""
    for name in ("palm", "qwen3", "gemma2"):
        for dtype, bound in ((torch.float32, FP32), (torch.bfloat16, BF16)):
            kind = str(dtype).removeprefix("torch.")
            off = _sampling(_tiny(name, root), device, dtype)
            yield Check(name=f"{name}: sampled log-probabilities, {kind}", off=off, bound=bound)
            off = _replayed(_tiny(name, root).to(device, dtype))
            yield Check(name=f"{name}: steps replayed and computed, {kind}", off=off, bound=bound)
    yield from _phases(workspace, root, device, build)


def _tiny(name: str, root: Path) -> Decoder:
    if name != "palm":
        return loaded(reference(name), root / name).eval().requires_grad_(False)
    palm = PaLM(PalmConfig(vocab_size=101, dim=48, layers=3, heads=4, head_dim=12, context=96))
    palm.initialise(0)
    return palm.eval().requires_grad_(False)


@torch.no_grad()
def _sampling(decoder: Decoder, device: str, dtype: torch.dtype) -> float:
    """Sample on the device, and score the samples by the same weights in float64."""
    sampling = FILTERED if dtype == torch.float32 else WHOLE
    rounded = {name: tensor.to(dtype).double() for name, tensor in decoder.state_dict().items()}
    engine = engine_of(decoder.to(device, dtype), graphs=True, sampling=sampling)
    asked = requests([3, 9, 9, 17, 30], copies=3)
    made = engine.generate(asked)
    exact = PolicyNetwork(decoder.to("cpu")).double()
    exact.decoder.load_state_dict(rounded)
    batch = sequence_batch([r.prompt_ids for r in asked], [g.response_ids for g in made])
    columns, _ = exact(
        batch.tokens_BT,
        lengths_B=batch.lengths_B,
        predict_BR=batch.predict_BR,
        read=chosen_reader(batch.response_BR, sampling),
    )
    off = torch.cat(
        [
            torch.tensor(found.logprobs) - expected[: len(found.logprobs)]
            for found, expected in zip(made, columns[..., 0], strict=True)
        ]
    )
    return float(off.abs().max() if dtype == torch.float32 else off.square().mean().sqrt())


def _replayed(decoder: Decoder) -> float:
    """Sample two leases with graphs and without; returns by how much log-probabilities differ.

    1 stands for another token, and for a GPU that replayed nothing.
    """
    pairs: list[tuple[Generated, Generated]] = []
    replaying, computing = (
        engine_of(decoder, graphs=graphs, sampling=WHOLE) for graphs in (True, False)
    )
    for lease in ([3, 9, 9, 17, 30], [40, 2, 21]):
        asked = requests(lease, copies=3)
        pairs += zip(replaying.generate(asked), computing.generate(asked), strict=True)
    if next(decoder.parameters()).is_cuda:
        forward = replaying.cached.implementation
        assert isinstance(forward, TorchForward)
        if forward.graphs is None or not forward.graphs.replayed:
            return 1.0
    if any(one.response_ids != other.response_ids for one, other in pairs):
        return 1.0
    return max(
        float((torch.tensor(one.logprobs) - torch.tensor(other.logprobs)).abs().max())
        for one, other in pairs
    )


def _phases(workspace: RunConfig, root: Path, device: str, build: Build) -> Iterator[Check]:
    """A policy phase, an auxiliary one and a publication."""
    config = run_copy(workspace, root / "run", learner={"ranks": 1, "zero_stage": 0})
    found: list[dict[str, float]] = []
    for engine in (build, plain("cpu", torch.float64)):
        with mock.patch.object(actor_critic, "ZeroEngine", engine):
            learner = Learner(
                config,
                config.run_dir / "sft" / "policy.safetensors",
                config.run_dir / "reward_model" / "reward.safetensors",
                (0,),
            )
        metrics = learner.policy_phase(trajectories(), 0)
        if engine is build:  # a frozen copy has the dtypes of networks as they are trained
            metrics |= learner.auxiliary_phase(0)
        found.append({name: metric.read() for name, metric in metrics.items()})
        if engine is build:
            yield _published(config, learner, device)
    ours, exact = found
    for name in ("policy_loss", "value_loss", "gradient_norm", "kl"):
        off = abs(ours[name] - exact[name]) / max(1.0, abs(exact[name]))
        yield Check(name=f"learner: {name}", off=off, bound=1e-3)
    first = ours["auxiliary/clone_kl_first"]
    yield Check(name="learner: KL(pi_old, pi) as a phase begins", off=abs(first), bound=0.0)


def _published(config: RunConfig, learner: Learner, device: str) -> Check:
    """Whether an actor's device has, to the last bit, what the learner's has."""
    facts, payload = learner.networks.publish()
    manifest = Manifest(
        policy_version=1, total=facts.total, layout=facts.layout, slices=(facts.slice,)
    )
    held = build_policy(config.model).decoder.to(device)
    named = list(held.named_parameters())
    FlatBuffer(named, torch.float32, device=device).load(manifest, [payload])
    theirs: dict[str, Tensor] = dict(learner.policy.network.named_parameters())
    differ = sum(int((theirs[f"palm.{name}"].to(device) != tensor).sum()) for name, tensor in named)
    return Check(name="weights: numbers that differ after a publication", off=differ, bound=0.0)
