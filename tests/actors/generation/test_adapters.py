"""Generation with adapters: several over one base in one batch, merged or not."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.generation.cached_decoder import CachedDecoder
from actors.generation.decoder_generator import AdapterOnWire, DecoderGenerator
from actors.generation.engine import GenerationEngine
from actors.generation.interface import Generated
from actors.generation.torch_forward import TorchForward
from actors.rollout_actor import RolloutActor
from common.batching import sequence_batch
from common.config.model import PalmConfig
from common.config.recipe import load_config
from common.config.run import RunConfig
from common.data.prompts import EncodedPrompt, evaluation_requests
from common.devices import compute_of
from common.errors import ConfigError, TrainingError
from common.logprobs import Sampling
from common.models.adapters import adapter_tensors, base_fingerprint
from common.models.lora import OFF
from common.models.palm import PaLM
from common.models.weight_files import load_decoder
from common.wire.trajectory import Rollout, RolloutRequest, from_table, to_table
from common.wire.weights import Manifest, Payload, manifest_of
from tests.actors.generation.adapters import SETTINGS, carry, stir
from tests.actors.generation.asked import requests as requests_of
from tests.actors.generation.calls import rows_of_calls
from tests.likelihoods import chosen_logprobs

SHAPE = PalmConfig(vocab_size=53, dim=32, layers=2, heads=4, head_dim=8, context=64)
ALL = (OFF, "one", "two")


def palm() -> PaLM:
    made = PaLM(SHAPE)
    made.initialise(0)
    return carry(made, "one", "two").eval()


requests = partial(requests_of, adapters=ALL)


def engine(merged: str | None = None, **more: Any) -> GenerationEngine:
    return GenerationEngine(
        more.pop("palm", None) or palm(),
        eos_ids=(1,),
        sampling=Sampling(),
        max_tokens=12,
        merged=merged,
        **more,
    )


@pytest.mark.slow
@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    samples=st.integers(1, 3),
    slots=st.integers(1, 12),
    prefill_tokens=st.sampled_from([1, 7, 1024]),
    order=st.randoms(use_true_random=False),
)
def test_a_sample_does_not_depend_on_the_adapters_beside_it(
    lengths: list[int], samples: int, slots: int, prefill_tokens: int, order: Random
) -> None:
    asked = requests(lengths, copies=samples)
    expected: dict[str, list[int]] = {}
    for name in ALL:
        mine = [request for request in asked if request.adapter == name]
        found = engine(slots=4).generate(mine)
        expected |= {made.rollout_id: made.response_ids for made in found}
    order.shuffle(asked)
    made = engine(slots=slots, prefill_tokens=prefill_tokens)
    assert {g.rollout_id: g.response_ids for g in made.generate(asked)} == expected


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_side_by_side_gives_what_merged_gives_one_after_the_other(kernels: str) -> None:
    asked = requests([5, 17, 2, 9, 30, 12], copies=3)
    mixed = {made.rollout_id: made for made in engine().generate(asked)}
    texts = []
    for name in ALL:
        mine = [request for request in asked if request.adapter == name]
        found = engine(name, kernels=kernels).generate(mine)
        for made in found:
            assert mixed[made.rollout_id].response_ids == made.response_ids
            torch.testing.assert_close(
                torch.tensor(mixed[made.rollout_id].logprobs),
                torch.tensor(made.logprobs),
                atol=1e-4,
                rtol=0,
            )
        texts.append([made.response_ids for made in found])
    assert texts[0] != texts[1] != texts[2] != texts[0], "adapters do change what is sampled"


def test_prefixes_are_shared_by_requests_of_one_adapter_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = engine()
    seen = rows_of_calls(made, monkeypatch)
    made.generate(requests([30], copies=4))
    assert seen[0] == 3 * (30 + 3), "three prefills; the other samples compute their last token"


def test_in_bf16_each_adapter_stays_within_its_bound_of_fp32() -> None:
    """As without adapters: 0.1 nats per token."""
    asked = requests([3, 17, 8, 1, 25, 9] * 2)
    found = engine(palm=palm().bfloat16(), prefill_tokens=16).generate(asked)
    assert worst(palm(), asked, found) < 0.1


def worst(network: PaLM, asked: Sequence[RolloutRequest], found: Sequence[Generated]) -> float:
    """Largest difference of log-probabilities from those of an uncached forward."""
    batch = sequence_batch([r.prompt_ids for r in asked], [g.response_ids for g in found])
    hidden = network.hidden(batch.tokens_BT, adapter=[r.adapter for r in asked])
    index = batch.predict_BR.clamp(min=0)[..., None].expand(-1, -1, network.config.vocab_size)
    now = chosen_logprobs(network.logits(hidden).gather(1, index), batch.response_BR, Sampling())
    return max(
        float((now[row, : len(made.logprobs)] - torch.tensor(made.logprobs)).abs().max())
        for row, made in enumerate(found)
    )


def test_new_numbers_of_an_adapter_count_after_a_refresh() -> None:
    made, asked = engine(), requests([5, 9], copies=4)
    before = made.generate(asked)
    stir(made.decoder, "one", 7)
    made.refresh()
    after = made.generate(asked)
    assert worst(made.decoder, asked, after) < 1e-4
    for request, old, new in zip(asked, before, after, strict=True):
        assert request.adapter == "one" or old == new
    assert before != after


def test_what_cannot_be_served_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"set rollout\.lora=merged, or rollout\.kernels to auto"):
        CachedDecoder(palm(), slots=1, kernels="native", merged=None)
    with pytest.raises(ValueError, match="no adapter 'three' among"):
        engine("three")
    asked = requests([4])
    with pytest.raises(ValueError, match="no adapter 'two' among"):
        engine("one").submit(asked[1:])
    made = engine()
    with pytest.raises(ValueError, match="no adapter 'three' among"):
        made.submit([asked[0], dataclasses.replace(asked[1], adapter="three")])
    assert made.idle, "nothing was queued"
    with pytest.raises(ConfigError, match=r"kernels=native.*set lora to merged, or kernels to"):
        load_config(None, ["rollout.lora=unmerged", "rollout.kernels=native"])


def test_an_adapter_that_is_not_finite_is_never_sampled_from() -> None:
    network = palm()
    with torch.no_grad():
        network.get_parameter("blocks.1.ff_out.lora_two_B_ff_out")[0, 0] = float("nan")
    for merged in (None, "two"):
        with pytest.raises(TrainingError, match="adapter 'two' is not finite"):
            engine(merged, palm=network)


# ------------------------------------------------------------------ rollout actors


def actor(config: RunConfig, **rollout: Any) -> RolloutActor:
    base = str(config.run_dir / "sft" / "policy.safetensors")
    build = partial(
        DecoderGenerator,
        config.model,
        str(config.run_dir / "tokenizer.json"),
        config.rollout.model_copy(update=rollout),
        AdapterOnWire(name="policy", lora=SETTINGS["policy"], base=base),
    )
    return RolloutActor("rollout-0", build, compute_of(cpus=1))


def engine_in(actor: RolloutActor) -> GenerationEngine:
    assert isinstance(actor.generator, DecoderGenerator)
    return actor.generator.engine


def published(config: RunConfig) -> tuple[Manifest, Payload]:
    """An adapter on the supervised policy, as a learner would publish it."""
    network = PaLM(config.model)
    load_decoder(network, config.run_dir / "sft" / "policy.safetensors")
    base = base_fingerprint(network.state_dict())
    carry(network, "policy")
    return manifest_of(dict(adapter_tensors(network, "policy")), 3, base=base)


def lease(*adapters: str) -> list[RolloutRequest]:
    prompts = [EncodedPrompt(uid=f"{i}", text="x", ids=[40 + i, 50, 60]) for i in range(6)]
    return evaluation_requests(prompts, seed=0, label="t", adapters=adapters)


def sampled(
    made: RolloutActor, asked: list[RolloutRequest], manifest: Manifest, payload: Payload
) -> list[Rollout]:
    facts, table = made.generate(to_table(asked, RolloutRequest), manifest, payload)
    assert facts.weights_fingerprint == manifest.fingerprint
    rows = from_table(table, Rollout)
    assert [row.adapter for row in rows] == [request.adapter for request in asked]
    return rows


def responses(rows: Sequence[Rollout], adapter: str) -> list[list[int]]:
    return [row.response_ids for row in rows if row.adapter == adapter]


def test_an_actor_serves_base_and_adapter_in_one_lease_over_one_base(
    workspace: RunConfig,
) -> None:
    made, wire = actor(workspace), published(workspace)
    old, new = (sampled(made, lease(name), *wire) for name in (OFF, "policy"))
    assert engine_in(made).merged == "policy", "a lease of one adapter has it merged"
    both = sampled(made, lease(OFF, "policy"), *wire)
    assert engine_in(made).merged is None
    assert responses(both, OFF) == responses(old, OFF)
    assert responses(both, "policy") == responses(new, "policy")
    assert responses(both, OFF) != responses(both, "policy")
    running, network = engine_in(made).cached.implementation, engine_in(made).decoder
    assert isinstance(running, TorchForward)
    copied = dict(running._decoder.named_modules())
    for path, module in network.named_modules():
        if isinstance(getattr(module, "weight", None), torch.Tensor):
            assert copied[path].weight.data_ptr() == module.weight.data_ptr(), path
    assert [row.response_ids for row in sampled(made, lease("policy"), *wire)] == responses(
        both, "policy"
    )
    assert engine_in(made).merged == "policy", "and training goes on with merged weights"


def test_an_actor_that_is_told_to_merges_nothing(workspace: RunConfig) -> None:
    made, wire = actor(workspace, lora="unmerged"), published(workspace)
    rows = sampled(made, lease("policy"), *wire)
    assert engine_in(made).merged is None
    idle = engine_in(made).cached.implementation
    assert isinstance(idle, TorchForward)
    assert not any(cache._flat.numel() for cache in idle._caches), "memory between leases"
    assert sampled(made, lease("policy"), *wire) == rows
    merged = sampled(actor(workspace, kernels="native"), lease("policy"), *wire)
    assert [row.response_ids for row in rows] == [row.response_ids for row in merged]


def test_native_kernels_serve_one_adapter_at_a_time(workspace: RunConfig) -> None:
    made, wire = actor(workspace, kernels="native"), published(workspace)
    for name in (OFF, "policy"):
        assert len(sampled(made, lease(name), *wire)) == 6
    with pytest.raises(ConfigError, match="native kernels compute no adapter beside the weights"):
        sampled(made, lease(OFF, "policy"), *wire)


def test_whole_weights_carry_no_adapter(workspace: RunConfig) -> None:
    tokenizer = str(Path(workspace.run_dir) / "tokenizer.json")
    rollout = workspace.rollout.model_copy(update={"lora": "unmerged"})
    build = partial(DecoderGenerator, workspace.model, tokenizer, rollout, None)
    made = RolloutActor("rollout-0", build, compute_of(cpus=1))
    assert engine_in(made).merged == OFF, "there is nothing to leave unmerged"
    network = PaLM(workspace.model)
    network.initialise(0)
    with pytest.raises(ValueError, match="no adapter 'policy' among"):
        sampled(made, lease("policy"), *manifest_of(dict(network.state_dict()), 0))
