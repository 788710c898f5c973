"""`talipot plan`: what follows from a recipe and the limits of hardware, against arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from common.config.recipe import load_config
from common.config.run import RunConfig
from common.models.build import count_parameters
from deploy.planning.hardware import CARDS, Device, this_processor
from deploy.planning.plan import Plan, plan_of
from deploy.workers.memory import needs
from tests.deploy.commands import Run, refused

CARD = Device(
    name="a card",
    memory=80.0 * 2**30,
    products=1e15,
    reads=2e12,
    link=1e11,
    network=5e10,
    per_node=8,
)
SMALL = [
    "model.vocab_size=512",
    "model.context=96",
    "rollout.max_response_tokens=32",
    "rollout.actors=2",
    "rollout.lease_size=8",
    "learner.ranks=2",
    "learner.zero_stage=1",
    "train.prompts_per_iteration=64",
    "train.minibatches=4",
]


def recipe(*overrides: str) -> RunConfig:
    return load_config(None, [*SMALL, *overrides])


def planned(*overrides: str, **more: Any) -> Plan:
    return plan_of(recipe(*overrides), CARD, **more)


def test_the_parts_of_an_iteration_by_hand() -> None:
    config = recipe()
    train, ppg = config.train, config.train.ppg
    assert ppg is not None and train.separate_values
    n = count_parameters(config.model).total
    rows, tokens = 64, 64 * 96
    found = planned().seconds
    # Two actors of 8 slots: 4 rounds of 32 steps, each of which reads weights and keys and values.
    kept = 8 * (2 * 2 * config.model.layers * config.model.head_dim) * (64 + 16)  # type: ignore[attr-defined]
    step = (2 * n + kept) / (0.6 * 2e12)
    prompts = 2 * n * (rows / 2) * 64 / (0.5 * 1e15)
    assert found.generate == pytest.approx(prompts + 4 * 32 * step)
    networks = 2  # reference and reward model
    assert found.score == pytest.approx(2 * networks * n * tokens / (0.5 * 1e15))
    passes = (2 + 6 * train.e_pi) * n + (2 + 6 * train.e_v) * n
    # ZeRO 1, 2 ranks: half of fp32 gradients there and half back, in every step.
    sent = 2 * 4 * 0.5 * (2 * n) * train.e_pi * 4 / (0.7 * 1e11)
    assert found.learn == pytest.approx(tokens * passes / (2 * 0.4 * 1e15) + sent)
    assert found.auxiliary == pytest.approx(ppg.e_aux * tokens * 14 * n / (2 * 0.4 * 1e15))
    assert found.publish == pytest.approx(2 * n / (0.7 * 5e10))
    whole = found.generate + found.score + found.learn + found.auxiliary + found.publish
    assert found.iteration == pytest.approx(whole)


def test_rollouts_beside_the_learner_hide_the_shorter_of_both() -> None:
    apart, beside = planned().seconds, planned("train.max_staleness=1").seconds
    rollouts, learner = apart.generate + apart.score, apart.learn + apart.auxiliary
    assert beside.iteration == pytest.approx(max(rollouts, learner) + apart.publish)
    assert beside.iteration < apart.iteration


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("rollout.actors=4", "generate"),
        ("reward_service.replicas=2", "score"),
        ("learner.ranks=4", "auxiliary"),
        ("train.e_pi=1", "learn"),
        ("train.lora.rank=4", "publish"),
    ],
)
def test_what_shortens_a_part(override: str, part: str) -> None:
    before, after = planned("train.e_pi=2").seconds, planned("train.e_pi=2", override).seconds
    assert getattr(after, part) < getattr(before, part)


def test_computing_activations_again_costs_a_third_more_of_the_backward() -> None:
    plain, again = planned().seconds, planned("model.activation_checkpointing=true").seconds
    assert again.auxiliary == pytest.approx(plain.auxiliary * (10 + 8) / (8 + 6))


def test_no_weight_of_a_base_has_a_gradient() -> None:
    whole, adapters = planned().seconds, planned("train.lora.rank=4").seconds
    assert adapters.auxiliary == pytest.approx(whole.auxiliary * (6 + 4) / (8 + 6))


def test_a_pretrained_model_computes_a_prompt_of_several_responses_once(large: str) -> None:
    few = ["train.prompts_per_iteration=8", "rollout.lease_size=8", "train.minibatches=4"]
    settings = [large, "model.vocab_size=128256", *few]
    one, eight = (
        plan_of(
            load_config(None, [*settings, f"train.samples_per_prompt={samples}"]),
            CARD,
            prompt=100,
            response=20,
        ).seconds
        for samples in (1, 8)
    )
    assert eight.score == pytest.approx(one.score * (100 + 8 * 20) / (100 + 20))


def test_ranks_of_several_nodes_send_over_the_network() -> None:
    """8 on a node: of twice as many, each computes half, and sends over what is half as fast."""
    eight, sixteen = (
        planned(f"learner.ranks={n}", "rollout.lease_size=4").seconds.learn for n in (8, 16)
    )
    n = count_parameters(recipe().model).total
    ours = [2 * 4 * (r - 1) / r * 2 * n * 4 * recipe().train.e_pi / 0.7 for r in (8, 16)]
    computed = eight - ours[0] / 1e11
    assert sixteen == pytest.approx(computed / 2 + ours[1] / 5e10)


def test_memory_is_what_a_stage_asks_for() -> None:
    made = planned()
    reserved = recipe(
        "learner.gpus_per_rank=1", "rollout.gpus_per_actor=1", "reward_service.gpus_per_replica=1"
    )
    assert made.memory == needs(reserved, "train")
    assert made.devices == 5
    for need in made.memory:
        assert need.beside is not None, "the node's memory is another one"


@pytest.fixture
def large(tmp_path: Path) -> str:
    """A checkpoint of 60 billion parameters in few layers, which are counted fast; no weights."""
    LlamaConfig(
        vocab_size=128_256,
        hidden_size=24_576,
        intermediate_size=86_016,
        num_hidden_layers=8,
        num_attention_heads=192,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    ).save_pretrained(tmp_path)
    return f"model.start={tmp_path}"


def test_what_does_not_fit_is_said_with_what_fills_it(large: str) -> None:
    overrides = [large, "model.vocab_size=128256", "learner.ranks=8", "learner.zero_stage=3"]
    made = plan_of(load_config(None, overrides), CARDS["h100"])
    said = "\n".join(made.advice)
    assert "one of learner ranks takes" in said
    assert "of it for weights, gradients, moments; " in said
    assert "train adapters (train.lora)" in said
    assert "one of rollout actors takes" in said
    assert "set rollout.precision to bf16" in said


@pytest.mark.parametrize(
    ("done", "says"),
    [
        ((), "raise learner.zero_stage to 3"),
        (("learner.zero_stage=3",), "train adapters (train.lora), or take more learner.ranks"),
        (
            ("learner.zero_stage=3", "train.lora.rank=8", "learner.micro_batch_tokens=100000"),
            "set model.activation_checkpointing",
        ),
        (
            (
                "learner.zero_stage=3",
                "train.lora.rank=8",
                "learner.micro_batch_tokens=1000000",
                "model.activation_checkpointing=true",
            ),
            "lower learner.micro_batch_tokens",
        ),
        (("rollout.precision=bf16",), "no worker computes on several"),
        (("train.lora.rank=8",), "rollout.lora=unmerged"),
    ],
)
def test_no_advice_is_to_do_what_is_done(large: str, done: tuple[str, ...], says: str) -> None:
    settings = [large, "model.vocab_size=128256", "learner.ranks=8", *done]
    advice = "\n".join(plan_of(load_config(None, settings), CARDS["h100"]).advice)
    assert says in advice
    for setting in done:
        assert f"set {setting.partition('=')[0]} " not in advice


def test_a_processor_is_measured_and_shared() -> None:
    device = this_processor()
    assert device.shared
    assert device.products > 1e9
    made = plan_of(recipe(), device)
    assert made.devices == 0
    assert all(need.beside is None for need in made.memory)
    total = sum(need.count * need.each for need in made.memory)
    small = plan_of(recipe(), Device(**{**vars_of(device), "memory": total - 1.0}))
    assert any("all workers take" in line for line in small.advice)


def vars_of(device: Device) -> dict[str, Any]:
    return {name: getattr(device, name) for name in Device.__dataclass_fields__}


def test_the_command(run: Run) -> None:
    done = run("plan", "--gpu", "h100", "--json", *SMALL)
    assert done.code == 0, done
    said = json.loads(done.out)
    assert [each["role"] for each in said["memory"]] == [
        "learner ranks",
        "rollout actors",
        "reward workers",
    ]
    assert said["seconds"]["iteration"] > 0
    assert said["devices"] == 5
    done = run("plan", *SMALL)
    assert "an iteration of" in done.out + done.error
    assert "this machine's processor" in done.out + done.error
    refused(run("plan", "--gpu", "h1000"), 2, "--gpu h1000", "h100")
