"""Two policies are compared prompt by prompt, whatever of either side has no score."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import RewardError
from deploy.evaluation.compare import compare, paired
from deploy.evaluation.sampling import Sampled, best_of

PROMPTS = [f"p{i}" for i in range(24)]


def side(kept: Sequence[int], better_by: float = 0.0) -> Sampled:
    """Responses to some of the prompts; what a response is depends on its prompt alone."""
    return Sampled(
        prompts=list(kept),
        responses=[f"answer to p{i}" for i in kept],
        scores=[float(i % 7) + better_by for i in kept],
        kl=[0.5 * i for i in kept],
        nll=[1.0 + i for i in kept],
        lengths=[8 + i for i in kept],
    )


def without(*refused: int) -> list[int]:
    return [i for i in range(24) if i not in refused]


def length(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """A judge that insists on being asked of pairs that belong together."""
    assert responses == [f"answer to {prompt}" for prompt in prompts]
    return [float(len(response)) for response in responses]


@pytest.mark.parametrize("judge", [None, length])
def test_equal_policies_are_all_ties_whichever_response_is_refused(judge: object) -> None:
    compared = compare(PROMPTS, side(without(3)), side(without(17)), judge)  # type: ignore[arg-type]
    assert (compared.win_rate.mean, compared.ties_share) == (0.5, 1.0)
    assert (compared.pairs_judged, compared.pairs_asked) == (22, 24)


@given(
    before=st.sets(st.integers(0, 23)), after=st.sets(st.integers(0, 23)), gain=st.sampled_from([1])
)
def test_figures_are_of_the_prompts_that_both_sides_have(
    before: set[int], after: set[int], gain: float
) -> None:
    sides = side(sorted(before)), side(sorted(after), gain)
    both = sorted(before & after)
    if not both:
        with pytest.raises(RewardError, match="nothing to compare"):
            compare(PROMPTS, *sides, None)
        return
    compared = compare(PROMPTS, *sides, None)
    assert (compared.pairs_judged, compared.pairs_asked) == (len(both), 24)
    assert (compared.win_rate.mean, compared.ties_share) == (1.0, 0.0), "every pair is a win by 1"
    mean = math.fsum(i % 7 for i in both) / len(both)
    assert compared.sft.score == pytest.approx(mean)
    assert compared.policy.score == compared.policy.judge_score == pytest.approx(mean + 1)
    assert compared.kl == pytest.approx(0.5 * sum(both) / len(both))
    assert compared.sft.response_length == compared.policy.response_length
    assert compared.sft.distinct == 1.0


def test_a_pair_that_the_judge_has_no_opinion_of_is_not_judged() -> None:
    def choosy(prompts: Sequence[str], responses: Sequence[str]) -> list[float | None]:
        return [None if prompt in ("p2", "p5") else 1.0 for prompt in prompts]

    def silent(prompts: Sequence[str], responses: Sequence[str]) -> list[float | None]:
        return [None] * len(prompts)

    compared = compare(PROMPTS, side(without(5)), side(without()), choosy)
    assert compared.pairs_judged == 22
    assert compared.sft.judge_score == 1.0, "a refusal is no 0"
    with pytest.raises(RewardError, match=r"no.*opinion|opinion.*none of 24 prompts"):
        compare(PROMPTS, side(without()), side(without()), silent)


def test_no_pair_left_is_one_line_with_the_numbers() -> None:
    with pytest.raises(RewardError, match=r"2 responses of the supervised.* 1 of the trained"):
        compare(PROMPTS, side([0, 1]), side([2]), None)
    with pytest.raises(RewardError, match="0 responses"):
        compare(PROMPTS, side([]), side([]), None)


def test_the_best_is_chosen_among_one_prompts_responses() -> None:
    """Of prompt 0 one of three was refused; of prompt 1 all."""
    scores = [1.0, 3.0, 9.0, 8.0, 7.0]
    many = side([0, 0, 2, 2, 2])
    many.scores[:] = scores
    many.responses[:] = ["a", "b", "c", "d", "e"]
    best = best_of(many)
    assert best.prompts == [0, 2]
    assert best.responses == ["b", "c"]
    assert best.scores == [3.0, 9.0]
    with pytest.raises(ValueError, match="several"):
        paired(many, best)
    assert paired(best, side([2]))[0].responses == ["c"]
