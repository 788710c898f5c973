from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.generation.engine import GenerationEngine
from actors.generation.interface import Generated
from actors.generation.stops import Stops
from common.batching import sequence_batch
from common.config.model import PalmConfig
from common.data.prompts import EncodedPrompt, evaluation_requests
from common.logprobs import Sampling
from common.models.lora import OFF
from common.models.palm import PaLM
from tests.actors.generation.adapters import carry
from tests.actors.generation.asked import requests
from tests.actors.generation.calls import rows_of_calls
from tests.likelihoods import chosen_logprobs

SHAPE = PalmConfig(vocab_size=53, dim=32, layers=2, heads=4, head_dim=8, context=64)
EOS = 1


def palm(xpos: bool = False) -> PaLM:
    made = PaLM(SHAPE.model_copy(update={"xpos": xpos}))
    made.initialise(0)
    return made.eval().requires_grad_(False)


def engine(
    sampling: Sampling, max_tokens: int = 10, xpos: bool = False, **more: Any
) -> GenerationEngine:
    return GenerationEngine(
        palm(xpos), eos_ids=(EOS,), sampling=sampling, max_tokens=max_tokens, **more
    )


def ids(found: list[Generated]) -> list[list[int]]:
    return [made.response_ids for made in found]


def letters(tokens: Sequence[int]) -> str:
    """A tokenizer of single letters: token 2 is "a"."""
    return "".join(chr(95 + token) for token in tokens if token > 1)


def test_each_of_several_eos_tokens_ends_a_response() -> None:
    ends = set(range(1, 53, 4))
    several = GenerationEngine(palm(), eos_ids=tuple(ends), sampling=Sampling(), max_tokens=10)
    found = several.generate(requests([3, 4, 5], copies=8))
    ended = [made for made in found if made.finish_reason == "eos"]
    assert len({made.response_ids[-1] for made in ended}) > 1 and len(ended) < len(found)
    for made in found:
        *before, last = made.response_ids
        assert not ends & set(before)
        assert (last in ends) == (made.finish_reason == "eos")


SERVED: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "off": (OFF, (OFF,)),
    "merged": ("one", ("one",)),
    "unmerged": (None, ("one",)),
    "mixed": (None, (OFF, "one", "two")),
}
"""What an engine merges, and what its requests name."""


@pytest.mark.slow
@settings(max_examples=160, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=9),
    copies=st.integers(1, 3),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.7]),
    top_p=st.sampled_from([0.5, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 100]),
    min_p=st.sampled_from([0.0, 0.1]),
    min_tokens=st.sampled_from([0, 4]),
    xpos=st.booleans(),
    slots=st.integers(1, 12),
    prefill_tokens=st.sampled_from([1, 5, 16, 1024]),
    kernels_served=st.sampled_from(
        [("native", "off"), ("native", "merged"), *(("torch", served) for served in SERVED)]
    ),
    seed=st.integers(0, 2**20),
)
def test_behavior_logprobs_are_those_of_an_uncached_forward(
    lengths: list[int],
    copies: int,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    min_tokens: int,
    xpos: bool,
    slots: int,
    prefill_tokens: int,
    kernels_served: tuple[str, str],
    seed: int,
) -> None:
    """Invariant I1: the ratio of the first minibatch is 1 within 1e-4."""
    kernels, served = kernels_served
    merged, adapters = SERVED[served]
    sampling = Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        min_tokens=min_tokens,
        endings=(EOS,),
    )
    asked = requests(lengths, seed, copies, adapters)
    made = GenerationEngine(
        carry(palm(xpos), "one", "two"),
        eos_ids=(EOS,),
        sampling=sampling,
        max_tokens=10,
        slots=slots,
        prefill_tokens=prefill_tokens,
        kernels=kernels,  # type: ignore[arg-type]
        merged=merged,
    )
    found = made.generate(asked)
    batch = sequence_batch([r.prompt_ids for r in asked], [g.response_ids for g in found])
    hidden = made.decoder.hidden(batch.tokens_BT, adapter=[r.adapter for r in asked])
    index = batch.predict_BR.clamp(min=0)[..., None].expand(-1, -1, 53)
    logits = made.decoder.logits(hidden).gather(1, index)
    now = chosen_logprobs(logits, batch.response_BR, sampling)
    for row, generated in enumerate(found):
        then = torch.tensor(generated.logprobs)
        ratio = (now[row, : len(then)] - then).exp()
        assert float((ratio - 1).abs().max()) < 1e-4


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=9),
    slots=st.integers(1, 12),
    prefill_tokens=st.sampled_from([1, 7, 1024]),
    order=st.randoms(use_true_random=False),
    top_p=st.sampled_from([0.9, 1.0]),
    seed=st.integers(0, 2**20),
)
def test_a_sample_does_not_depend_on_its_batch(
    lengths: list[int], slots: int, prefill_tokens: int, order: Random, top_p: float, seed: int
) -> None:
    """A pure function of weights, seed and rollout_id (fp32)."""
    asked = requests(lengths, seed, copies=2)
    alone = engine(Sampling(top_p=top_p), slots=1)
    expected = {r.rollout_id: alone.generate([r])[0].response_ids for r in asked}
    order.shuffle(asked)
    made = engine(Sampling(top_p=top_p), slots=slots, prefill_tokens=prefill_tokens)
    assert {g.rollout_id: g.response_ids for g in made.generate(asked)} == expected


def test_samples_differ_from_each_other() -> None:
    found = ids(engine(Sampling()).generate(requests([5], copies=20)))
    assert len({tuple(response) for response in found}) > 10


def test_bf16_stays_within_its_bound_of_fp32() -> None:
    """Stated bound: 0.1 nats per token between behavior_logprobs and a forward in fp32."""
    asked = requests([3, 17, 8, 1, 25, 9] * 4)
    exact = palm()
    made = GenerationEngine(
        palm().bfloat16(), eos_ids=(EOS,), sampling=Sampling(), max_tokens=20, prefill_tokens=16
    )
    found = made.generate(asked)
    batch = sequence_batch([r.prompt_ids for r in asked], ids(found))
    index = batch.predict_BR.clamp(min=0)[..., None].expand(-1, -1, 53)
    now = chosen_logprobs(exact(batch.tokens_BT).gather(1, index), batch.response_BR, Sampling())
    for row, generated in enumerate(found):
        then = torch.tensor(generated.logprobs)
        assert float((now[row, : len(then)] - then).abs().max()) < 0.1


def test_a_long_prompt_does_not_stall_the_others() -> None:
    made = engine(Sampling(), max_tokens=20, prefill_tokens=4)
    short, long = requests([4], seed=5)[0], requests([40], seed=6, copies=2)[1]
    made.submit([short, long], [20, 5])
    first = []
    for _ in range(6):
        first += made.step()
    assert made._slots.counts[:2].tolist() == [6, 0], "the long one is not through"
    while not made.idle:
        first += made.step()
    assert {g.rollout_id for g in first} == {short.rollout_id, long.rollout_id}


def test_samples_of_one_prompt_prefill_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(Sampling(), max_tokens=2)
    seen = rows_of_calls(made, monkeypatch)
    made.generate(requests([30], copies=5))
    assert seen[0] == 30 + 4, "four samples compute their last prompt token only"


@pytest.mark.parametrize("slots", [1, 2, 64])
def test_requests_have_limits_of_their_own(slots: int) -> None:
    asked = requests([4, 9, 2, 30, 7])
    never = engine(Sampling(min_tokens=30, endings=(EOS,)), slots=slots)
    found = never.generate(asked, [3, 1, 20, 7, 7])
    assert [len(g.response_ids) for g in found] == [3, 1, 20, 7, 7]
    assert {g.finish_reason for g in found} == {"length"}


def test_a_stop_token_is_kept_and_ends_the_response() -> None:
    free = engine(Sampling()).generate(requests([5] * 30))
    token = free[0].response_ids[3]
    stopped = engine(Sampling(), stops=Stops(ids=(token,))).generate(requests([5] * 30))
    for before, after in zip(free, stopped, strict=True):
        if token in before.response_ids:
            cut = before.response_ids.index(token) + 1
            assert after.response_ids == before.response_ids[:cut]
            assert after.finish_reason == "stop"
        else:
            assert after == before


def test_a_stop_string_is_found_across_token_borders_and_cut_from_the_text() -> None:
    free = engine(Sampling()).generate(requests([5] * 30))
    string = letters(free[0].response_ids[2:5])
    assert len(string) == 3
    made = engine(Sampling(), stops=Stops(strings=("no such text", string), decode=letters))
    found = made.generate(requests([5] * 30))
    assert found[0].response_ids == free[0].response_ids[:5]
    assert found[0].finish_reason == "stop"
    assert made.text(found[0]) == letters(free[0].response_ids[:2])
    for before, after in zip(free, found, strict=True):
        if string not in letters(before.response_ids):
            assert after == before
            assert made.text(after) == letters(after.response_ids)


def test_a_minimum_length_withholds_every_ending() -> None:
    free = engine(Sampling(temperature=1.5)).generate(requests([5] * 40))
    assert min(len(g.response_ids) for g in free) < 6
    letter = letters([free[0].response_ids[1]])
    sampling = Sampling(temperature=1.5, min_tokens=6, endings=(EOS,))
    made = engine(sampling, stops=Stops(strings=(letter,), decode=letters))
    found = made.generate(requests([5] * 40))
    assert min(len(g.response_ids) for g in found) >= 6
    assert any(g.finish_reason == "stop" for g in found)
    for generated in found:
        if generated.finish_reason == "stop":
            assert made.text(generated) == letters(generated.response_ids)[:-1]


def test_all_may_end_at_once_and_the_engine_goes_on() -> None:
    made = engine(Sampling(), max_tokens=1, slots=4)
    assert [len(g.response_ids) for g in made.generate(requests([3] * 11))] == [1] * 11
    assert made.idle and made.step() == []
    assert len(made.generate(requests([3]))) == 1


def test_weights_do_not_change_under_responses() -> None:
    made = engine(Sampling())
    made.submit(requests([3]))
    with pytest.raises(ValueError, match="while responses"):
        made.refresh()
    with pytest.raises(ValueError, match="being sampled"):
        made.generate(requests([4], seed=1))


def test_sizes_and_requests_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        engine(Sampling(), slots=0)
    with pytest.raises(ValueError, match="at least 1"):
        engine(Sampling(), max_tokens=0)
    made = engine(Sampling())
    asked = requests([3, 4])
    with pytest.raises(ValueError, match="at least 1 token"):
        made.submit(asked, [2, 0])
    with pytest.raises(ValueError, match="here already"):
        made.submit([asked[0], asked[0]])
    assert made.idle, "nothing was queued"


def test_responses_end_with_eos_or_at_the_limit() -> None:
    found = engine(Sampling(temperature=2.0), max_tokens=20).generate(requests([4] * 64))
    reasons = {g.finish_reason for g in found}
    assert reasons == {"eos", "length"}, "the sample should show both"
    for generated in found:
        ended = generated.response_ids[-1] == EOS
        assert EOS not in generated.response_ids[:-1]
        assert (generated.finish_reason == "eos") == ended
        assert ended or len(generated.response_ids) == 20
        assert len(generated.logprobs) == len(generated.response_ids)


def test_other_seeds_give_other_samples() -> None:
    made = engine(Sampling())
    one, two = (made.generate(requests([5, 6], seed)) for seed in (1, 2))
    assert [g.response_ids for g in one] != [g.response_ids for g in two]


def test_greedy_takes_the_most_probable_token() -> None:
    asked = requests([6])
    made = engine(Sampling(temperature=0.0), max_tokens=3)
    found = made.generate(asked)[0]
    logits = made.decoder(torch.tensor([asked[0].prompt_ids]))[0, -1]
    assert found.response_ids[0] == int(logits.argmax())
    assert found.logprobs == [0.0] * len(found.logprobs)


@pytest.mark.parametrize("length", [0, 55])
def test_prompts_that_do_not_fit_are_refused(length: int) -> None:
    prompt = EncodedPrompt(uid="p", text="", ids=[3] * length)
    with pytest.raises(ValueError, match="1 to 54 fit"):
        engine(Sampling()).generate(evaluation_requests([prompt], seed=0, label="t"))


def test_no_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing to generate"):
        engine(Sampling()).generate([])
