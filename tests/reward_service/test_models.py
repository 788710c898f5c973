from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common.batching import SequenceBatch, sequence_batch
from common.config.model import PalmConfig
from common.errors import CheckpointError
from common.logprobs import Sampling
from common.models.build import build_policy, build_scalar
from common.models.networks import PolicyNetwork, ScalarNetwork
from common.models.weight_files import save_weights
from common.wire.trajectory import Rollout
from reward_service.models import ReferencePolicy, RewardModel, frozen_pass
from tests.reward_service.samples import rollouts

CONFIG = PalmConfig(vocab_size=200, dim=32, layers=2, heads=2, head_dim=16, context=64)
BUDGETS = [1, 17, 40, 100_000]


@pytest.fixture(scope="module")
def scalar() -> ScalarNetwork:
    """Seeded weights with an offset and a bias that a reader could forget."""
    network = build_scalar(CONFIG)
    network.initialise(2)
    with torch.no_grad():
        network.head.offset.fill_(0.75)
        network.head.bias.fill_(0.25)
    return network


@pytest.fixture(scope="module")
def policy() -> PolicyNetwork:
    network = build_policy(CONFIG)
    network.initialise(1)
    return network


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, scalar: ScalarNetwork, policy: PolicyNetwork
) -> Path:
    root = tmp_path_factory.mktemp("weights")
    save_weights(scalar.state_dict(), root / "reward.safetensors", {})
    save_weights(policy.state_dict(), root / "policy.safetensors", {})
    return root


@pytest.fixture(scope="module")
def reward_model(folder: Path) -> RewardModel:
    base = build_policy(CONFIG).decoder
    return RewardModel(CONFIG, folder / "reward.safetensors", base)


def reference(folder: Path, sampling: Sampling | None = None) -> ReferencePolicy:
    return ReferencePolicy(CONFIG, folder / "policy.safetensors", sampling or Sampling())


def batch_of(records: list[Rollout]) -> SequenceBatch:
    return sequence_batch([r.prompt_ids for r in records], [r.response_ids for r in records])


def assert_close(found: Sequence[float] | Tensor, expected: Sequence[float] | Tensor) -> None:
    """Equal but for the order of summation, which differs with the shape of the batch."""
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, check_dtype=False)


@torch.no_grad()
def literal_score(network: ScalarNetwork, record: Rollout) -> float:
    """One row by itself, no padding anywhere: what stands at its last token."""
    return float(network(torch.tensor([record.prompt_ids + record.response_ids]))[0, -1])


@torch.no_grad()
def literal_logprobs(network: PolicyNetwork, record: Rollout, temperature: float) -> list[float]:
    """One row by itself: log softmax(logits / temperature) of each token after the prompt."""
    logits_TV = network.decoder(torch.tensor([record.prompt_ids + record.response_ids]))[0].double()
    found = []
    for step, token in enumerate(record.response_ids):
        scaled = logits_TV[len(record.prompt_ids) + step - 1] / temperature
        found.append(float(scaled[token] - scaled.logsumexp(dim=0)))
    return found


@pytest.mark.parametrize("budget", BUDGETS)
def test_scores_are_those_of_single_unpadded_rows(
    folder: Path, reward_model: RewardModel, scalar: ScalarNetwork, budget: int
) -> None:
    records = rollouts(13)
    assert len({len(r.prompt_ids) + len(r.response_ids) for r in records}) > 5, "mixed lengths"
    scores, _ = frozen_pass(records, budget, reward_model, reference(folder))
    assert_close(scores, [literal_score(scalar, r) for r in records])


def test_a_score_is_never_read_on_padding(reward_model: RewardModel, scalar: ScalarNetwork) -> None:
    records = [r for r in rollouts(20) if len(r.prompt_ids) + len(r.response_ids) < 15]
    longest = replace(records[0], prompt_ids=[5] * 9, response_ids=[7] * 8)
    batch = batch_of([*records, longest])
    scores = reward_model(batch)[:-1]
    with torch.no_grad():
        trap = scalar(batch.tokens_BT)[:-1, -1]
    assert float((scores - trap).abs().min()) > 1e-3, "the trap would show in every row"
    assert_close(scores, [literal_score(scalar, r) for r in records])


@pytest.mark.parametrize("fill", [1, 99])
def test_what_the_padding_holds_does_not_matter(
    folder: Path, reward_model: RewardModel, fill: int
) -> None:
    batch = batch_of(rollouts(9))
    steps = torch.arange(batch.tokens_BT.shape[1])[None]
    tokens = torch.where(steps > batch.last_B[:, None], fill, batch.tokens_BT)
    other = replace(batch, tokens_BT=tokens)
    assert not torch.equal(tokens, batch.tokens_BT)
    assert_close(reward_model(other), reward_model(batch))
    policy = reference(folder)
    assert_close(policy(other), policy(batch))


def test_the_score_includes_the_last_token(
    reward_model: RewardModel, scalar: ScalarNetwork
) -> None:
    record = replace(rollouts(1)[0], response_ids=[8, 9, 1])
    other = replace(record, response_ids=[8, 9, 2])
    scores = reward_model(batch_of([record, other]))
    assert abs(float(scores[0] - scores[1])) > 1e-3


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.7), Sampling(temperature=1.9, top_p=0.3, top_k=2)],
)
def test_ref_logprobs_are_those_of_a_literal_forward(
    folder: Path, policy: PolicyNetwork, sampling: Sampling, budget: int
) -> None:
    records = rollouts(11, seed=4)
    scores, logprobs = frozen_pass(records, budget, None, reference(folder, sampling))
    assert scores == [0.0] * len(records), "without a reward model"
    for record, found in zip(records, logprobs, strict=True):
        literal = literal_logprobs(policy, record, sampling.temperature)
        assert_close(found, literal)


def test_temperature_changes_ref_logprobs(folder: Path) -> None:
    batch = batch_of(rollouts(4))
    plain, warm = reference(folder)(batch), reference(folder, Sampling(temperature=2.0))(batch)
    assert not torch.allclose(plain, warm, atol=0.1)


def test_a_filter_never_makes_a_token_impossible(folder: Path) -> None:
    logprobs = reference(folder, Sampling(top_p=0.01, top_k=1))(batch_of(rollouts(8)))
    assert bool(logprobs.isfinite().all())
    assert float(logprobs.min()) < -2


def test_ref_logprobs_are_zero_outside_the_mask(folder: Path) -> None:
    batch = batch_of(rollouts(6))
    logprobs = reference(folder)(batch)
    assert logprobs.shape == batch.response_mask_BR.shape
    assert not bool(batch.response_mask_BR.all())
    assert bool((logprobs[~batch.response_mask_BR] == 0).all())
    assert bool((logprobs[batch.response_mask_BR] < 0).all())


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_batch_does_not_matter(
    folder: Path, reward_model: RewardModel, seed: int
) -> None:
    records = rollouts(12, seed=seed)
    order = np.random.default_rng(seed).permutation(len(records)).tolist()
    policy = reference(folder)
    scores, logprobs = frozen_pass(records, 40, reward_model, policy)
    moved, moved_logprobs = frozen_pass([records[i] for i in order], 40, reward_model, policy)
    assert_close(moved, [scores[i] for i in order])
    for found, i in zip(moved_logprobs, order, strict=True):
        assert_close(found, logprobs[i])


def test_nothing_gives_nothing(folder: Path, reward_model: RewardModel) -> None:
    assert frozen_pass([], 40, reward_model, reference(folder)) == ([], [])


def test_frozen_models_have_nothing_to_train(folder: Path, reward_model: RewardModel) -> None:
    for network in (reward_model.network, reference(folder).network):
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())


def test_weights_of_another_network_are_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"policy\.safetensors"):
        RewardModel(CONFIG, folder / "policy.safetensors", build_policy(CONFIG).decoder)
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors"):
        ReferencePolicy(CONFIG, folder / "nowhere.safetensors", Sampling())
