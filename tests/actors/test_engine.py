from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.engine import Engine
from actors.prompts import EncodedPrompt, evaluation_requests
from common.batching import sequence_batch
from common.logprobs import Sampling, chosen_logprobs
from common.model_config import ModelConfig
from common.palm import PaLM
from common.trajectory import RolloutRequest

SHAPE = ModelConfig(vocab_size=53, dim=32, layers=2, heads=4, head_dim=8, context=64)
EOS = 1


def palm(xpos: bool = False) -> PaLM:
    made = PaLM(SHAPE.model_copy(update={"xpos": xpos}))
    made.initialise(0)
    return made.eval().requires_grad_(False)


def requests(lengths: list[int], seed: int = 0) -> list[RolloutRequest]:
    generator = torch.Generator().manual_seed(seed)
    prompts = [
        EncodedPrompt(
            uid=f"p{i}", text="", ids=torch.randint(2, 53, (n,), generator=generator).tolist()
        )
        for i, n in enumerate(lengths)
    ]
    return evaluation_requests(prompts, seed=seed, label="t")


def engine(sampling: Sampling, max_tokens: int = 10, xpos: bool = False) -> Engine:
    return Engine(palm(xpos), eos_id=EOS, sampling=sampling, max_tokens=max_tokens)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=7),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.7]),
    top_p=st.sampled_from([0.5, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 100]),
    xpos=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_behavior_logprobs_are_those_of_an_uncached_forward(
    lengths: list[int], temperature: float, top_p: float, top_k: int, xpos: bool, seed: int
) -> None:
    """Invariant I1: the ratio of the first minibatch is 1 within 1e-4."""
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
    asked = requests(lengths, seed)
    made = engine(sampling, xpos=xpos)
    found = made.generate(asked)
    batch = sequence_batch([r.prompt_ids for r in asked], [g.response_ids for g in found])
    logits = made.palm(batch.tokens_BT)
    index = batch.predict_BR[..., None].expand(-1, -1, 53)
    now = chosen_logprobs(logits.gather(1, index), batch.response_BR, sampling)
    for row, generated in enumerate(found):
        then = torch.tensor(generated.logprobs)
        ratio = (now[row, : len(then)] - then).exp()
        assert float((ratio - 1).abs().max()) < 1e-4


def test_a_sample_does_not_depend_on_its_batch() -> None:
    asked = requests([3, 17, 8, 1, 25, 9])
    made = engine(Sampling())
    together = made.generate(asked)
    alone = [made.generate([request])[0] for request in asked]
    backwards = made.generate(asked[::-1])[::-1]
    ids = [g.response_ids for g in together]
    assert ids == [g.response_ids for g in alone] == [g.response_ids for g in backwards]
    assert len({tuple(i) for i in ids}) > 1


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
    logits = made.palm(torch.tensor([asked[0].prompt_ids]))[0, -1]
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
