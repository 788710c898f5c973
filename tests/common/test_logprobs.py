"""The sampling distribution against a literal transcription, and draws against the distribution."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.logprobs import Sampling, chosen_reader, draw, sampling_logits
from common.randomness import uniforms
from tests.likelihoods import chosen_logprobs, sampling_logprobs

LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12)


def literal(logits: list[float], sampling: Sampling) -> list[float]:
    """Probabilities, token by token, as the definition reads."""
    scaled = [x / sampling.temperature for x in logits]
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    kept = order[: sampling.top_k] if sampling.top_k else order
    weights = {i: math.exp(scaled[i] - max(scaled)) for i in kept}
    total = sum(weights.values())
    nucleus, reached = [], 0.0
    for i in kept:
        if reached >= sampling.top_p and nucleus:
            break
        nucleus.append(i)
        reached += weights[i] / total
    floor = sampling.min_p * max(weights.values())
    nucleus = [i for i in nucleus if weights[i] >= floor]
    total = sum(weights[i] for i in nucleus)
    return [weights[i] / total if i in nucleus else 0.0 for i in range(len(logits))]


@given(
    LOGITS,
    st.floats(0.25, 4),
    st.sampled_from([0, 1, 2, 5]),
    st.sampled_from([0.31, 0.83, 1.0]),
    st.sampled_from([0.0, 0.07, 0.6]),
)
@settings(max_examples=300)
def test_the_distribution_is_the_definition(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    scaled = sorted((x / temperature for x in logits), reverse=True)
    if any(abs(a - b) < 1e-4 for a, b in itertools.pairwise(scaled)):
        return  # ties may be kept in either order
    if any(abs(math.exp(x - scaled[0]) - min_p) < 1e-4 for x in scaled) and min_p:
        return  # rounding decides
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = literal(logits, sampling)
    cumulated = np.cumsum(sorted(expected, reverse=True))
    if np.any(np.abs(cumulated - top_p) < 1e-4) and top_p < 1:
        return  # rounding decides at the nucleus's very border
    found = sampling_logprobs(torch.tensor([logits]), sampling).exp()[0].tolist()
    assert found == pytest.approx(expected, abs=1e-5)


def test_greedy_is_certain() -> None:
    logprobs = sampling_logprobs(torch.tensor([[0.0, 3.0, 1.0]]), Sampling(temperature=0.0))
    assert logprobs.tolist() == [[-math.inf, 0.0, -math.inf]]


@pytest.mark.parametrize(
    ("sampling", "filters"),
    [
        (Sampling(), False),
        (Sampling(temperature=0.5, min_tokens=3, endings=(1,)), False),
        (Sampling(top_p=0.99), True),
        (Sampling(top_k=7), True),
        (Sampling(min_p=0.01), True),
        (Sampling(temperature=0.0), True),
    ],
)
def test_the_whole_distribution_keeps_temperature_and_length(
    sampling: Sampling, filters: bool
) -> None:
    whole = sampling.unfiltered
    assert sampling.filters == filters
    assert (whole.top_p, whole.top_k, whole.min_p) == (1.0, 0, 0.0)
    assert whole.temperature == (sampling.temperature or 1.0)
    assert (whole.min_tokens, whole.endings) == (sampling.min_tokens, sampling.endings)
    assert not whole.filters


def test_the_reader_adds_what_the_filter_leaves_out() -> None:
    """Of probabilities 0.6, 0.3 and 0.1, top-k 2 keeps two thirds and a third."""
    logits = torch.tensor([0.6, 0.3, 0.1]).log().expand(3, 3)
    chosen = torch.tensor([[0, 1, 1]])
    read = chosen_reader(chosen, Sampling(top_k=2), lambda x: x[:, 2], unfiltered=True)
    found = read(logits, slice(3)).exp()
    expected = [[2 / 3, 0.1, 0.6], [1 / 3, 0.1, 0.3], [1 / 3, 0.1, 0.3]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_a_drawn_token_outside_the_filter_keeps_a_finite_logprob() -> None:
    logits = torch.tensor([[5.0, 0.0, -5.0]])
    sampling = Sampling(top_k=1)
    assert chosen_logprobs(logits, torch.tensor([2]), sampling).isfinite().all()
    assert sampling_logprobs(logits, sampling)[0, 2] == -math.inf


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    n = 40_000
    seeds = np.arange(n, dtype=np.uint64)
    u = torch.from_numpy(uniforms(seeds, np.full(n, 3, dtype=np.uint64)))
    drawn, logprobs = draw(probabilities.log().expand(n, -1), u)
    torch.testing.assert_close(logprobs, probabilities.log()[drawn])
    counts = torch.bincount(drawn, minlength=5).double()
    assert counts[1] == 0
    keep = probabilities > 0
    expected = probabilities[keep].double() * n
    chi_square = float(((counts[keep] - expected) ** 2 / expected).sum())
    assert chi_square < 16.3  # 99.9 % with 3 degrees of freedom


@given(st.floats(0, 1, exclude_max=True))
def test_a_draw_never_hits_a_filtered_token(u: float) -> None:
    logits = torch.tensor([[-30.0, 2.0, 1.0, -30.0]])
    kept = sampling_logits(logits, Sampling(top_k=2))
    assert int(draw(kept, torch.tensor([u], dtype=torch.float64))[0]) in (1, 2)


@given(st.integers(1, 200), st.floats(0, 1, exclude_max=True), st.integers(0, 2**31))
def test_a_draw_is_the_first_token_whose_cumulated_probability_passes_the_uniform(
    vocabulary: int, u: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, vocabulary, generator=generator) * 3
    if seed % 2 and vocabulary > 1:
        logits[0, ::2] = -math.inf
    token = int(draw(logits, torch.tensor([u], dtype=torch.float64))[0])
    cumulated = logits.double().softmax(-1)[0].cumsum(0)
    before = float(cumulated[token - 1]) if token else 0.0
    assert logits[0, token] > -math.inf
    assert before - 1e-6 <= u <= float(cumulated[token]) + 1e-6


def test_endings_wait_for_the_minimum_length_in_engine_and_learner_alike() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.5], [3.0, 1.0, 0.5]])
    sampling = Sampling(min_tokens=1, endings=(0,))
    kept = sampling_logits(logits, sampling, positions=torch.tensor([0, 1]))
    assert kept[0, 0] == -math.inf and kept[1, 0] == 3.0
    found = chosen_logprobs(logits, torch.tensor([1, 0]), sampling)
    expected = torch.stack((kept[0].log_softmax(-1)[1], kept[1].log_softmax(-1)[0]))
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="positions"):
        sampling_logits(logits, sampling)
