"""Rollout actors and reward workers on a card, pretended: nothing is left on the processor.

What they compute there is what they compute on the processor: the same code, which other tests
hold to references. Here is that all of it is on the card, and how often the processor waits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from actors.generation import cached_decoder
from actors.generation.decoder_generator import DecoderGenerator
from actors.generation.engine import GenerationEngine
from common.batching import sequence_batch
from common.config.model import LoraConfig, PalmConfig
from common.config.recipe import load_config
from common.config.run import RunConfig
from common.devices import CARD, Compute, compute_of
from common.errors import ClusterError, ConfigError
from common.logprobs import Sampling
from common.models.adapters import add_adapter
from common.models.decoder import Decoder
from common.models.networks import PolicyNetwork, ScalarNetwork, compute_in
from common.models.palm import PaLM
from common.wire.trajectory import Rollout, RolloutRequest, extend
from common.wire.weights import CorruptSliceError, FlatBuffer, manifest_of
from reward_service.models import ReferencePolicy, RewardModel, frozen_pass
from tests.actors.generation.asked import requests
from tests.common.models.pretrained.tiny import loaded, reference
from tests.pretended import DEVICE, Card
from tests.recorder import Recorder

PRETENDED = Compute(device=DEVICE, threads=1, collectives="")
DRAWN = "actors/generation/torch_forward.py:_on_processor"
CHECKED = "common/models/lora.py:factors"
"""That an adapter is finite, when it is loaded."""
RECORDED = "actors/generation/graphs.py:_keep"
"""That a recording is that of its step: two numbers, once for each."""
READ = "reward_service/models.py:read"
FILTERED = Sampling(temperature=0.8, top_k=9, top_p=0.9, min_p=0.01, min_tokens=2, endings=(1,))
NAMES = ["palm", "qwen3", "gemma2"]


@pytest.fixture(params=NAMES)
def decoder(request: pytest.FixtureRequest, tmp_path: Path) -> Decoder:
    """Three layouts: parallel blocks, grouped heads with norms, windows with capped scores."""
    if request.param != "palm":
        return loaded(reference(request.param), tmp_path).eval().requires_grad_(False)
    palm = PaLM(PalmConfig(vocab_size=53, dim=32, layers=2, heads=4, head_dim=8, context=64))
    palm.initialise(0)
    return palm.eval().requires_grad_(False)


@pytest.mark.parametrize("sampling", [Sampling(), FILTERED], ids=["whole", "filtered"])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "adapters side by side"])
@pytest.mark.parametrize(
    ("dtype", "graphs"),
    [(torch.float32, False), (torch.bfloat16, True)],
    ids=["fp32, computed", "bf16, replayed"],
)
def test_the_engine_waits_once_for_each_token(
    decoder: Decoder,
    sampling: Sampling,
    beside: bool,
    dtype: torch.dtype,
    graphs: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts in chunks, shared prefixes, slots that are freed and taken."""
    adapters, steps = ("", "own") if beside else ("",), 0
    recorder = Recorder()
    monkeypatch.setattr(cached_decoder, "recorder_on", lambda device: recorder)
    if beside:
        add_adapter(decoder, "own", LoraConfig(rank=2), seed=0)
    with Card() as card:
        engine = GenerationEngine(
            decoder.to(DEVICE, dtype),
            eos_ids=(2,),
            sampling=sampling,
            max_tokens=6,
            slots=4,
            prefill_tokens=7,
            merged=None if beside else "",
            graphs=graphs,
        )
        asked, made = requests([3, 9, 9, 17], copies=2, adapters=adapters), []
        engine.submit(asked)
        while not engine.idle:
            made += engine.step()
            steps += 1
    assert [len(found.response_ids) for found in made] == [6] * len(asked)
    recordings = card.waits.pop(RECORDED, 0)
    assert recordings == 2 * recorder.recorded
    assert (recorder.replayed > 0) == graphs
    assert set(card.waits) == {DRAWN, CHECKED} if beside else {DRAWN}
    # Slots draw together; a step in the middle of a first prompt draws nothing.
    assert 6 * len(asked) / 4 <= card.waits[DRAWN] <= steps
    assert card.products > 0


def rollouts() -> list[Rollout]:
    drawn = torch.Generator().manual_seed(0)
    return [
        extend(
            request,
            Rollout,
            response_ids=torch.randint(3, 50, (1 + i % 5,), generator=drawn).tolist(),
            response_text="",
            behavior_logprobs=[0.0] * (1 + i % 5),
            unfiltered_logprobs=None,
            finish_reason="eos",
            policy_version=0,
            weights_fingerprint="",
            actor_id="",
        )
        for i, request in enumerate(requests([3, 9, 9, 17], copies=3))
    ]


def worker(decoder: Decoder, bf16: bool = False) -> tuple[RewardModel, ReferencePolicy]:
    """Reward model and reference policy of a worker, on the card."""
    reward, policy = RewardModel.__new__(RewardModel), ReferencePolicy.__new__(ReferencePolicy)
    reward.tokenizer, reward.context = None, decoder.sizes.context
    reward.network, policy.network = ScalarNetwork(decoder), PolicyNetwork(decoder)
    policy.sampling = Sampling(temperature=0.7)
    for network in (reward.network, policy.network):
        network.eval().requires_grad_(False).to(DEVICE)
        if bf16:
            compute_in(network, torch.bfloat16)
    return reward, policy


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_frozen_passes_wait_once_for_all_micro_batches(decoder: Decoder, bf16: bool) -> None:
    made, records = worker(decoder, bf16), rollouts()
    with Card() as card:
        scores, logprobs = frozen_pass(records, 40, *made)
    assert [len(row) for row in logprobs] == [len(record.response_ids) for record in records]
    assert len(scores) == len(records)
    assert card.waits == {READ: 2}, "scores, and log-probabilities"


def test_results_of_many_micro_batches_go_to_the_rows_that_they_are_of(decoder: Decoder) -> None:
    """On the processor, where there are numbers: one batch against many."""
    records, policy = rollouts(), ReferencePolicy.__new__(ReferencePolicy)
    policy.network, policy.sampling = PolicyNetwork(decoder), Sampling()
    _, apart = frozen_pass(records, 20, None, policy)
    _, together = frozen_pass(records, 10_000, None, policy)
    for found, expected in zip(apart, together, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


def test_weights_are_loaded_onto_the_card_and_hashed_from_there(workspace: RunConfig) -> None:
    """What the card has is read back once for each slice; pretended, it reads as zeros."""
    palm = PaLM(workspace.model)
    zeros = {name: torch.zeros_like(value) for name, value in palm.state_dict().items()}
    generator = DecoderGenerator(
        workspace.model,
        str(workspace.run_dir / "tokenizer.json"),
        workspace.rollout.model_copy(update={"max_response_tokens": 4}),
        None,
        PRETENDED,
    )
    asked: list[RolloutRequest] = requests([3, 5])
    manifest, payload = manifest_of(zeros, 1)
    with Card() as card:
        assert generator.hold(manifest, [payload]) == manifest.fingerprint
        generator.generate(asked)
    assert card.waits["common/wire/weights.py:_by_way_of"] == len(manifest.slices) == 1
    assert set(card.waits) == {"common/wire/weights.py:_by_way_of", DRAWN}
    ones = {name: torch.ones_like(value) for name, value in zeros.items()}
    other, payload = manifest_of(ones, 2)
    with Card(), pytest.raises(CorruptSliceError, match="rank 0"):
        generator.hold(other, [payload])


def test_what_a_device_has_is_what_was_published() -> None:
    """The way onto a device, with numbers: on the processor, as if it were one."""
    tensors = {"b": torch.arange(5.0), "a": torch.ones(2, 3)}
    held = {name: torch.zeros_like(value) for name, value in tensors.items()}
    buffer = FlatBuffer(held.items(), torch.float32, device="cpu:0")
    manifest, payload = manifest_of(tensors, 3)
    assert buffer.load(manifest, [payload]) == manifest.fingerprint
    for name, value in tensors.items():
        assert torch.equal(held[name], value)
    buffer.give_back(held["a"])
    assert torch.equal(held["a"], tensors["a"]), "there are no pages of its own to give"


@pytest.mark.parametrize(
    "plant",
    [
        lambda hidden: hidden + torch.ones(hidden.shape[-1]),
        lambda hidden: hidden * hidden.amax().item(),
        lambda hidden: hidden if hidden.amax() > 0 else -hidden,
        lambda hidden: hidden + len(hidden.tolist()),
    ],
    ids=["a tensor on the processor", "item", "truth", "tolist"],
)
def test_what_does_not_belong_on_a_card_is_found(
    decoder: Decoder, plant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, records = worker(decoder), rollouts()
    states = type(decoder).states
    monkeypatch.setattr(type(decoder), "states", lambda self, *args: plant(states(self, *args)))
    card = Card()
    try:
        with card:
            frozen_pass(records, 40, *made)
    except (AssertionError, RuntimeError, NotImplementedError):
        return
    assert set(card.waits) > {READ}, "it waited where nobody waits"


def test_a_copy_to_the_processor_is_counted(decoder: Decoder) -> None:
    _, policy = worker(decoder)
    batch = sequence_batch([[3, 4]], [[5]])
    with Card() as card:
        policy(batch)
        assert not card.waits
        policy(batch).cpu()
    assert card.waits == {"a test": 1}


# ------------------------------------------------------------------ placement


def test_a_role_computes_on_what_it_reserved_and_not_on_what_it_sees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two cards are pretended to be visible, as Ray leaves them to whoever reserved none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    none = compute_of(cpus=1)
    assert (none.device, none.collectives) == ("cpu", "gloo")
    for part in (0.25, 1.0):
        one = compute_of(cpus=1, gpus=part)
        assert (one.device, one.collectives) == (CARD, "cpu:gloo,cuda:nccl")
        one.apply()


def test_a_reserved_card_that_torch_cannot_find_is_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    with pytest.raises(ClusterError, match=r"finds none on its node.*gpus_per_actor") as caught:
        compute_of(cpus=1, gpus=1).apply()
    assert "\n" not in str(caught.value)


def test_a_recipe_may_reserve_cards_for_actors_and_reward_workers() -> None:
    config = load_config(None, ["rollout.gpus_per_actor=0.5", "reward_service.gpus_per_replica=1"])
    assert config.rollout.gpus_per_actor == 0.5
    for reserved in ("rollout.gpus_per_actor", "reward_service.gpus_per_replica"):
        section = reserved.partition(".")[0]
        with pytest.raises(ConfigError, match=r"are for processors.*kernels to auto or torch"):
            load_config(None, [f"{reserved}=1", f"{section}.kernels=native"])
        with pytest.raises(ConfigError, match=r"less than or equal to 1|at most 1"):
            load_config(None, [f"{reserved}=2"])


def test_each_rank_has_a_card_of_its_own() -> None:
    for ranks, gpus in ((2, 1.0), (1, 0.5), (2, 0.0)):
        config = load_config(None, [f"learner.ranks={ranks}", f"learner.gpus_per_rank={gpus}"])
        assert config.learner.gpus_per_rank == gpus
    with pytest.raises(
        ConfigError, match=r"NCCL needs a GPU for each rank; set gpus_per_rank to 1"
    ):
        load_config(None, ["learner.ranks=2", "learner.gpus_per_rank=0.5"])
    with pytest.raises(ConfigError, match=r"learner\.gpus_per_rank"):
        load_config(None, ["learner.gpus_per_rank=2"])
