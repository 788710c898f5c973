"""A generator that exists only here, in the rollout actor."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from actors.generation.interface import Generated, Generator
from actors.rollout_actor import RolloutActor
from common.data.prompts import EncodedPrompt, evaluation_requests
from common.devices import compute_of
from common.wire.trajectory import Rollout, RolloutRequest, from_table, to_table
from common.wire.weights import CorruptSliceError, Manifest, Payload


class Echo:
    """Answers with the prompt; the first reading of any weights arrives corrupted."""

    exact = deterministic = True
    readings = 0

    def hold(self, manifest: Manifest, payloads: Sequence[Payload]) -> str:
        self.readings += 1
        if self.readings == 1:
            raise CorruptSliceError("slice of rank 0 arrived corrupted")
        return manifest.fingerprint

    def memory(self) -> dict[str, int]:
        return {}

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Generated]:
        return [
            Generated(
                rollout_id=request.rollout_id,
                response_ids=request.prompt_ids,
                logprobs=[0.0] * len(request.prompt_ids),
                unfiltered=None,
                finish_reason="length",
            )
            for request in requests
        ]

    def text(self, generated: Generated) -> str:
        return " ".join(map(str, generated.response_ids))


def test_an_actor_works_with_any_generator() -> None:
    generator: Generator = Echo()
    actor = RolloutActor("rollout-0", lambda compute: generator, compute_of(cpus=1))
    manifest = Manifest(policy_version=4, total=0, layout="", slices=())
    prompts = [EncodedPrompt(uid="a", text="x", ids=[5, 6])]
    requests = evaluation_requests(prompts, seed=0, label="t")
    facts, table = actor.generate(to_table(requests, RolloutRequest), manifest)
    (rollout,) = from_table(table, Rollout)
    assert (facts.policy_version, facts.reloads, facts.response_tokens) == (4, 1, 2)
    assert rollout.response_ids == [5, 6] and rollout.response_text == "5 6"
    assert rollout.weights_fingerprint == manifest.fingerprint


def test_weights_that_stay_corrupted_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def corrupted(self: Echo, manifest: Manifest, payloads: Sequence[Payload]) -> str:
        raise CorruptSliceError("slice of rank 0 arrived corrupted")

    monkeypatch.setattr(Echo, "hold", corrupted)
    actor = RolloutActor("rollout-0", lambda compute: Echo(), compute_of(cpus=1))
    manifest = Manifest(policy_version=4, total=0, layout="", slices=())
    with pytest.raises(CorruptSliceError, match="rank 0 arrived corrupted at rollout-0, 3 times"):
        actor.load(manifest, ())
    assert actor.policy_version == -1 and actor.fingerprint == ""
