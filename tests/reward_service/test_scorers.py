from __future__ import annotations

import pytest

from common.errors import ConfigError, RewardError
from reward_service.scorers import FunctionScorer, ScoreRequest
from tests.reward_service import functions

MODULE = "tests.reward_service.functions"


def requests(*responses: str) -> list[ScoreRequest]:
    return [
        ScoreRequest(rollout_id=f"r{i}", prompt_text="p" * i, response_text=r, finished=True)
        for i, r in enumerate(responses)
    ]


def test_scores_come_in_order_with_their_ids() -> None:
    results = FunctionScorer(f"{MODULE}:spelled").score(requests("3", "-1.5", "0"))
    assert [(r.rollout_id, r.score, r.error) for r in results] == [
        ("r0", 3.0, None),
        ("r1", -1.5, None),
        ("r2", 0.0, None),
    ]


def test_an_iterator_of_integers_becomes_floats_of_prompts_and_responses() -> None:
    results = FunctionScorer(f"{MODULE}:lengths").score(requests("a", "bc", ""))
    assert [r.score for r in results] == [1.0, 102.0, 200.0]
    assert all(type(r.score) is float for r in results)


def test_the_function_is_called_once_for_the_batch() -> None:
    functions.CALLS.clear()
    FunctionScorer(f"{MODULE}:recorded").score(requests("a", "b"))
    assert functions.CALLS == [(["", "p"], ["a", "b"])]


def test_nothing_to_score_is_no_error() -> None:
    assert FunctionScorer(f"{MODULE}:spelled").score([]) == []


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ("functions", "package.module:function"),
        (f"{MODULE}:", "package.module:function"),
        (":spelled", "package.module:function"),
        ("", "package.module:function"),
        ("tests.nowhere:spelled", "No module named 'tests.nowhere'"),
        (".functions:spelled", "TypeError"),
        (f"{MODULE}:speled", "did you mean 'spelled'?"),
        (f"{MODULE}:zzz", f"{MODULE} has no 'zzz'"),
        (f"{MODULE}:VALUE", "'VALUE' is not a function"),
        ("tests.reward_service.broken_module:f", "ValueError: no reward model next to me"),
    ],
)
def test_a_target_that_is_no_function_is_a_config_error(target: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FunctionScorer(target)
    message = str(caught.value)
    assert f"'{target}'" in message and named in message
    assert "\n" not in message


def test_nothing_is_suggested_that_is_not_near() -> None:
    with pytest.raises(ConfigError) as caught:
        FunctionScorer(f"{MODULE}:zzz")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("one_short", "returned 2 scores for 3 responses"),
        ("nothing", "TypeError: 'NoneType' object is not iterable"),
        ("raising", "raised KeyError: 'score'"),
        ("second_is_nan", "returned nan for rollout r1"),
        ("infinite", "returned inf for rollout r0"),
        ("none_each", "returned None for rollout r0"),
        ("words", "returned 'good' for rollout r0"),
        ("beyond_float", "for rollout r0; a score is a finite number"),
    ],
)
def test_a_broken_function_is_a_reward_error_that_names_it(name: str, named: str) -> None:
    scorer = FunctionScorer(f"{MODULE}:{name}")
    with pytest.raises(RewardError) as caught:
        scorer.score(requests("1", "2", "3"))
    message = str(caught.value)
    assert message.startswith(f"reward function {MODULE}:{name} ") and named in message
    assert "\n" not in message


def test_the_cause_of_a_raise_is_kept() -> None:
    with pytest.raises(RewardError) as caught:
        FunctionScorer(f"{MODULE}:raising").score(requests("1"))
    assert isinstance(caught.value.__cause__, KeyError)
