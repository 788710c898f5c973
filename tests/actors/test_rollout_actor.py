from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pytest

from actors.generation.decoder_generator import DecoderGenerator
from actors.rollout_actor import RolloutActor
from common.config.run import RunConfig
from common.data.prompts import EncodedPrompt, evaluation_requests
from common.devices import compute_of
from common.errors import TrainingError
from common.models.palm import PaLM
from common.wire.trajectory import Rollout, RolloutRequest, from_table, to_table
from common.wire.weights import manifest_of


def actor(config: RunConfig) -> RolloutActor:
    tokenizer = str(config.run_dir / "tokenizer.json")
    build = partial(DecoderGenerator, config.model, tokenizer, config.rollout, None)
    return RolloutActor("rollout-0", build, compute_of(cpus=1))


def lease() -> list[RolloutRequest]:
    prompts = [EncodedPrompt(uid=f"{i}", text="x", ids=[40 + i, 50]) for i in range(3)]
    return evaluation_requests(prompts, seed=0, label="t")


def weights(config: RunConfig, seed: int) -> dict[str, object]:
    palm = PaLM(config.model)
    palm.initialise(seed)
    return dict(palm.state_dict())


def test_rollouts_carry_the_version_and_fingerprint_that_sampled_them(
    workspace: RunConfig,
) -> None:
    made = actor(workspace)
    table = to_table(lease(), RolloutRequest)
    fingerprints = []
    for version, seed in ((1, 0), (2, 1), (3, 0)):
        manifest, payload = manifest_of(weights(workspace, seed), version)
        facts, rollouts = made.generate(table, manifest, payload)
        rows = from_table(rollouts, Rollout)
        assert {r.policy_version for r in rows} == {facts.policy_version} == {version}
        assert {r.weights_fingerprint for r in rows} == {manifest.fingerprint}
        assert facts.rollout_ids == tuple(r.rollout_id for r in lease())
        assert facts.response_tokens == sum(len(r.response_ids) for r in rows)
        fingerprints.append(manifest.fingerprint)
    assert fingerprints[0] == fingerprints[2] != fingerprints[1], "it is a hash of content"


def test_what_is_sampled_is_of_the_version_that_is_held_and_of_no_other(
    workspace: RunConfig,
) -> None:
    """The engine has the only copy of the weights, whatever came before and was asked between."""
    made, asked = actor(workspace), lease()
    table, greedy = (
        to_table([replace(request, greedy=g) for request in asked], RolloutRequest)
        for g in (False, True)
    )

    def sampled(by: RolloutActor, requests: pa.Table, seed: int) -> list[list[int]]:
        manifest, payload = manifest_of(weights(workspace, seed), seed)
        _, rollouts = by.generate(requests, manifest, payload)
        return [row.response_ids for row in from_table(rollouts, Rollout)]

    for seed in (1, 2, 1):
        assert sampled(made, table, seed) == sampled(actor(workspace), table, seed)
        assert sampled(made, greedy, seed) == sampled(actor(workspace), greedy, seed)
        assert sampled(made, table, seed) == sampled(actor(workspace), table, seed)
    other = to_table([replace(request, adapter="other") for request in asked], RolloutRequest)
    with pytest.raises(ValueError, match="no adapter 'other'"):
        sampled(made, other, 1)
    assert sampled(made, table, 1) == sampled(actor(workspace), table, 1)


def test_a_generator_says_whether_it_is_exact_and_deterministic(workspace: RunConfig) -> None:
    for precision, exact in (("fp32", True), ("bf16", False)):
        changed = {"rollout": workspace.rollout.model_copy(update={"precision": precision})}
        generator = actor(workspace.model_copy(update=changed)).generator
        assert (generator.exact, generator.deterministic) == (exact, True)


def test_weights_held_already_are_not_loaded_again(workspace: RunConfig) -> None:
    made = actor(workspace)
    manifest, payload = manifest_of(weights(workspace, 0), 1)
    table = to_table(lease(), RolloutRequest)
    first, _ = made.generate(table, manifest, payload)
    again, _ = made.generate(table, manifest, payload)
    assert first.weights_fingerprint == again.weights_fingerprint
    assert again.load_seconds < first.load_seconds


def test_a_flipped_byte_is_found_before_a_token_is_sampled(workspace: RunConfig) -> None:
    made = actor(workspace)
    manifest, payload = manifest_of(weights(workspace, 0), 1)
    damaged = [np.array(payload[0])]
    damaged[0][1000] ^= 1
    with pytest.raises(TrainingError, match="corrupted"):
        made.generate(to_table(lease(), RolloutRequest), manifest, damaged)
    assert made.policy_version == -1, "it holds no version it could claim"
    facts, _ = made.generate(to_table(lease(), RolloutRequest), manifest, payload)
    assert facts.weights_fingerprint == manifest.fingerprint
