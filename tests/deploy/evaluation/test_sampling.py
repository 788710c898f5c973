"""Evaluation of base and adapter side by side gives what one after the other does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from common.config.run import RunConfig
from common.config.workers import RewardServiceConfig
from common.data.prompts import EncodedPrompt
from common.data.tokenizer import load_tokenizer
from common.errors import RewardError
from common.models.adapter_files import adapter_of, export_merged
from common.models.adapters import base_fingerprint
from common.models.build import build_policy
from common.models.lora import OFF
from common.models.weight_files import load_weights
from deploy.evaluation.compare import compare
from deploy.evaluation.results import figures_of
from deploy.evaluation.sampling import Sampled, policy_weights, sample_both, sample_scored
from deploy.stages.encoding import read_encoded_prompts
from deploy.workers.placement import reward_pool, rollout_pool
from deploy.workers.pool import Pool
from tests.actors.generation.adapters import SETTINGS, carry
from tests.reward_service.endpoint import Endpoint, Reply, Rows, always, scores
from tests.workspaces import run_copy

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def trained(workspace: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run whose policy is an adapter on its supervised one."""
    lora = SETTINGS["policy"]
    config = run_copy(workspace, tmp_path_factory.mktemp("trained"), train={"lora": lora})
    network = build_policy(config.model)
    load_weights(network, sft(config))
    base = base_fingerprint(network.state_dict())
    carry(network.decoder, "policy")
    state = network.state_dict()
    adapter = adapter_of(state, "policy", lora, base)
    export_merged(adapter, state, sft(config), policy(config).parent, config.model)
    return config


def sft(config: RunConfig) -> Path:
    return config.run_dir / "sft" / "policy.safetensors"


def policy(config: RunConfig) -> Path:
    return config.run_dir / "policy" / "policy.safetensors"


@pytest.fixture(scope="module")
def pools(trained: RunConfig, cluster: None) -> Iterator[tuple[Pool, Pool]]:
    folder = trained.run_dir
    reward = folder / "reward_model" / "reward.safetensors"
    made = (
        rollout_pool(trained, "evaluated", folder / "tokenizer.json", sft(trained)),
        reward_pool(trained, "evaluated", folder / "tokenizer.json", sft(trained), reward),
    )
    yield made
    for pool in made:
        pool.stop()


@pytest.fixture(scope="module")
def prompts(trained: RunConfig) -> list[EncodedPrompt]:
    tokenizer = load_tokenizer(trained.run_dir / "tokenizer.json")
    return read_encoded_prompts(trained.data.prompts, tokenizer, trained)[0][:25]


@pytest.mark.parametrize("kernels", ["auto", "native"])
def test_side_by_side_equals_one_after_the_other(
    trained: RunConfig, pools: tuple[Pool, Pool], prompts: list[EncodedPrompt], kernels: str
) -> None:
    """With native kernels the policies do take turns; the seeds are the same."""
    turns = [
        sample_scored(trained, policy_weights(trained, path, 0), prompts, *pools, label="eval")
        for path in (sft(trained), policy(trained))
    ]
    rollout = trained.rollout.model_copy(update={"kernels": kernels})
    config = trained.model_copy(update={"rollout": rollout})
    both = sample_both(config, sft(config), policy(config), prompts, *pools, label="eval")
    for found, expected in zip(both, turns, strict=True):
        assert len(found.responses) == 25
        assert found.responses == expected.responses
        for name in ("scores", "kl", "nll", "lengths"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-4), name
    assert both[0].kl == pytest.approx([0.0] * 25, abs=1e-4), "the base is the reference"
    assert both[0].responses != both[1].responses
    texts = [prompt.text for prompt in prompts]
    side_by_side, one_by_one = (figures_of(compare(texts, *s, None)) for s in (both, turns))
    assert side_by_side == pytest.approx(one_by_one, abs=1e-4)


def test_whole_weights_take_turns(
    workspace: RunConfig,
    trained: RunConfig,
    pools: tuple[Pool, Pool],
    prompts: list[EncodedPrompt],
) -> None:
    folder = workspace.run_dir
    rollout = rollout_pool(workspace, "whole", folder / "tokenizer.json", sft(workspace))
    before, after = sample_both(
        workspace, sft(workspace), policy(trained), prompts, rollout, pools[1], label="eval"
    )
    rollout.stop()
    adapters: tuple[Sampled, Sampled] = sample_both(
        trained, sft(trained), policy(trained), prompts, *pools, label="eval"
    )
    assert workspace.train.adapter == OFF
    assert before.responses == adapters[0].responses
    assert after.responses == adapters[1].responses, "the exported policy is the adapter, merged"


def test_equal_policies_tie_whatever_an_endpoint_refuses(
    trained: RunConfig, pools: tuple[Pool, Pool], prompts: list[EncodedPrompt]
) -> None:
    """Every fifth response gets no score; of the two sides they are of different prompts."""

    def answer(number: int, rows: Rows) -> Reply:
        (row,) = rows
        at, side = divmod(int(row["rollout_id"][-6:]), 2)
        if (at + 2 * side) % 5 == 0:
            return Reply(status=400)
        return scores([(row["rollout_id"], len(row["prompt"]))])

    with Endpoint(answer) as endpoint:
        judge = {"kind": "http", "target": endpoint.url, "batch_size": 1}
        service = RewardServiceConfig.model_validate({"components": {"judge": judge}})
        config = trained.model_copy(update={"reward_service": service})
        folder = trained.run_dir
        refusing = reward_pool(config, "refusing", folder / "tokenizer.json", sft(trained), None)
        weights = sft(config), sft(config)
        before, after = sample_both(config, *weights, prompts, pools[0], refusing, label="eval")
        endpoint.behave = always(Reply(status=400))
        with pytest.raises(RewardError, match=r"every one of 50 responses.*judge: HTTP 400"):
            sample_both(config, *weights, prompts, pools[0], refusing, label="eval")
        refusing.stop()
    assert before.prompts == [i for i in range(25) if i % 5]
    assert after.prompts == [i for i in range(25) if (i + 2) % 5]
    compared = compare([prompt.text for prompt in prompts], before, after, None)
    assert (compared.win_rate.mean, compared.ties_share) == (0.5, 1.0)
    assert (compared.pairs_judged, compared.pairs_asked) == (15, 25)
    assert compared.sft.score == compared.policy.score
