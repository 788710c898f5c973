"""KL and likelihood are of whole distributions: what the filter of sampling leaves out is no
distance. From engine to evaluation without a cluster, against a literal forward."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from actors.generation.engine import GenerationEngine
from common.config.model import PalmConfig
from common.logprobs import Sampling
from common.models.build import build_policy
from common.models.palm import PaLM
from common.models.weight_files import load_decoder, save_weights
from common.wire.trajectory import ScoredTrajectory
from deploy.evaluation.sampling import Sampled, _sampled
from reward_service.models import ReferencePolicy
from tests.actors.generation.asked import requests
from tests.sampled import sampled_trajectories

SHAPE = PalmConfig(vocab_size=53, dim=32, layers=2, heads=4, head_dim=8, context=64)
EOS = 1
SAMPLINGS = {
    "all": Sampling(),
    "warm": Sampling(temperature=1.7),
    "top-p": Sampling(top_p=0.9),
    "top-k": Sampling(top_k=5),
    "min-p": Sampling(min_p=0.3),
    "everything": Sampling(
        temperature=0.7, top_p=0.8, top_k=20, min_p=0.05, min_tokens=4, endings=(EOS,)
    ),
    "greedy": Sampling(temperature=0.0),
}


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two that differ."""
    made = []
    for seed in (0, 1):
        network = build_policy(SHAPE)
        network.initialise(seed)
        made.append(tmp_path_factory.mktemp("policies") / f"{seed}.safetensors")
        save_weights(network.state_dict(), made[-1], {})
    return made


def decoder(path: Path) -> PaLM:
    palm = PaLM(SHAPE)
    load_decoder(palm, path)
    return palm.eval().requires_grad_(False)


def sampled(
    policy: Path, reference: Path, sampling: Sampling, kernels: str
) -> tuple[list[ScoredTrajectory], Sampled]:
    """Responses through the records of the wire, and what evaluation makes of them."""
    engine = GenerationEngine(
        decoder(policy),
        eos_ids=(EOS,),
        sampling=sampling,
        max_tokens=12,
        slots=5,
        kernels=kernels,  # type: ignore[arg-type]
    )
    asked = requests([3, 9, 1, 17, 5, 2], seed=3, copies=3)
    rows = sampled_trajectories(engine, asked, ReferencePolicy(SHAPE, reference, sampling))
    return rows, _sampled(rows)


def literal(path: Path, row: ScoredTrajectory, sampling: Sampling) -> list[float]:
    """Log-probabilities of a response, position by position, in plain numbers: temperature and
    the endings that come too early, and no filter."""
    palm, found = decoder(path), []
    temperature = sampling.temperature or 1.0
    for t, token in enumerate(row.response_ids):
        context = torch.tensor([[*row.prompt_ids, *row.response_ids[:t]]])
        logits = [x / temperature for x in palm(context)[0, -1].tolist()]
        if t < sampling.min_tokens:
            logits = [-math.inf if i in sampling.endings else x for i, x in enumerate(logits)]
        top = max(logits)
        found.append(logits[token] - top - math.log(sum(math.exp(x - top) for x in logits)))
    return found


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_equal_policies_are_no_nats_apart(policies: list[Path], name: str, kernels: str) -> None:
    """At top_p 0.9 a filtered policy read 0.105 nats a token above its own reference."""
    rows, found = sampled(policies[0], policies[0], SAMPLINGS[name], kernels)
    assert found.kl == pytest.approx([0.0] * len(rows), abs=1e-4)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_kl_and_likelihood_are_of_the_whole_distributions(policies: list[Path], name: str) -> None:
    sampling = SAMPLINGS[name]
    rows, found = sampled(policies[0], policies[1], sampling, "auto")
    for row, kl, nll in list(zip(rows, found.kl, found.nll, strict=True))[::4]:
        policy, reference = (literal(path, row, sampling) for path in policies)
        assert row.policy_logprobs == pytest.approx(policy, abs=1e-4)
        assert row.ref_logprobs == pytest.approx(reference, abs=1e-4)
        assert kl == pytest.approx(sum(policy) - sum(reference), abs=1e-3)
        assert nll == pytest.approx(-sum(reference) / len(reference), abs=1e-4)
    assert all(math.isfinite(x) for x in (*found.kl, *found.nll))
    filtered = name not in ("all", "warm")
    assert all((row.unfiltered_logprobs is not None) == filtered for row in rows)
    if name == "greedy":
        assert all(x == 0.0 for row in rows for x in row.behavior_logprobs), "it was certain"
