from __future__ import annotations

import inspect
import re

import pytest

from common.errors import ConfigError, RewardError
from reward_service.samples import Sample
from reward_service.scorers import FunctionScorer
from tests.reward_service import functions

MODULE = "tests.reward_service.functions"


def requests(*responses: str) -> list[Sample]:
    return [Sample(rollout_id=f"r{i}", prompt="p" * i, response=r) for i, r in enumerate(responses)]


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


def test_a_function_of_one_argument_is_given_samples() -> None:
    samples = [
        Sample(prompt="6 x 7", response=said, columns={"answer": "42"}, rollout_id=said)
        for said in ("42", "41")
    ]
    results = FunctionScorer(f"{MODULE}:knowing").score(samples)
    assert [(r.rollout_id, r.score) for r in results] == [("42", 1.0), ("41", 0.0)]


def test_a_function_may_be_async_and_say_more() -> None:
    samples = [Sample(prompt="p", response="r" * n, group=n) for n in (3, 1)]
    results = FunctionScorer(f"{MODULE}:awaited").score(samples)
    assert [r.score for r in results] == [3.0, 1.0]
    assert [dict(r.parts) for r in results] == [{"group": 3.0}, {"group": 1.0}]
    assert {r.reason for r in results} == {"its length"}
    judge = FunctionScorer(f"{MODULE}:awaited", role="evaluate.judge", command=True)
    assert judge.numbers(["p"], ["four"]) == [4.0]


def test_rewards_on_tokens_are_a_part_of_the_score() -> None:
    samples = [
        Sample(prompt="p", response="abc", tokens=(5, 6, 7), finished=finished)
        for finished in (True, False)
    ]
    results = FunctionScorer(f"{MODULE}:by_token").score(samples)
    assert [(r.score, r.tokens) for r in results] == [(3.0, (1, 0, 0)), (1.0, (1, 0, 0))]


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("a_token_short", "returned 2 rewards for the 3 tokens of rollout r0"),
        ("a_part_that_is_none", "returned nan for part 'form' of rollout r0"),
        ("a_part_with_a_slash", "returned 'form/case' as the name of a part of rollout r0"),
        ("knowing", "raised KeyError: 'answer'"),
    ],
)
def test_a_broken_function_of_samples_is_named(name: str, named: str) -> None:
    sample = Sample(prompt="p", response="abc", tokens=(5, 6, 7), rollout_id="r0")
    with pytest.raises(RewardError, match=re.escape(named)):
        FunctionScorer(f"{MODULE}:{name}").score([sample])


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
        ("tests.reward_service.broken_module:f", "ValueError: no reward model next to me (/"),
        ("tests.reward_service.exiting_module:f", "raised SystemExit: 2 (/"),
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
        ("nothing", "returned None for 3 responses; return a list of 3 numbers"),
        ("waiting", "returned a Future (wait for its result"),
        ("async_generator", "returned an async_generator (take 'async' out"),
        ("one_float", "returned one float for 3 responses; return a list of 3 numbers"),
        ("one_numpy_number", "returned one float64 for 3 responses; "),
        ("a_point", "returned one Tensor for 3 responses; "),
        ("a_column", "returned a ndarray of shape [3, 1] for 3 responses; "),
        ("a_dict", "returned a dict for 3 responses; "),
        ("a_text", "returned a str for 3 responses; "),
        ("digits", "returned '1' for rollout r0; a score is a finite number"),
        ("rows", "returned [0.5] for rollout r0; "),
        ("endless", "returned 4 scores for 3 responses; "),
        ("late", "raised ZeroDivisionError: "),
        ("of_one", "returned one float for 3 responses; return a list of 3 numbers"),
        ("of_three", "takes other arguments ("),
        ("wrong_inside", "raised TypeError: object of type 'NoneType' has no len() (/"),
        ("exits", "raised SystemExit: 0 (/"),
        ("interrupts", "raised KeyboardInterrupt (/"),
        ("out_of_memory", "raised MemoryError (/"),
        ("out_of_gpu_memory", "raised OutOfMemoryError: CUDA out of memory. Tried to allocate 2"),
        ("deep", "raised RecursionError: "),
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


@pytest.mark.parametrize("name", ["wrong_inside", "late", "exits", "deep"])
def test_what_was_raised_is_named_with_the_line_of_the_users_code(name: str) -> None:
    with pytest.raises(RewardError) as caught:
        FunctionScorer(f"{MODULE}:{name}").score(requests("1", "2", "3"))
    first = inspect.getsourcelines(getattr(functions, name))[1]
    found = re.search(r"\((\S+):(\d+)\)$", str(caught.value))
    assert found is not None and found[1] == functions.__file__
    assert first < int(found[2]) < first + 5


def test_arrays_and_numbers_of_any_type_are_scores() -> None:
    for name, expected in (
        ("an_array", [0.0, 1.0, 2.0]),
        ("a_tensor", [0.0, 1.0, 2.0]),
        ("mixed", [1.0, 0.5, 0.25, 3.0, 4.0, 5.0]),
    ):
        results = FunctionScorer(f"{MODULE}:{name}").score(requests(*"abcdef"[: len(expected)]))
        assert [r.score for r in results] == expected
        assert all(type(r.score) is float for r in results)


def test_a_judge_says_the_same_in_its_own_name() -> None:
    judge = FunctionScorer(f"{MODULE}:one_float", role="evaluate.judge", command=True)
    with pytest.raises(RewardError) as caught:
        judge.numbers(["p"], ["r"])
    assert str(caught.value) == (
        f"evaluate.judge {MODULE}:one_float returned one float for 1 response; "
        "return a list of 1 number"
    )
    with pytest.raises(RewardError, match="returned nan for response 2; "):
        FunctionScorer(f"{MODULE}:second_is_nan").numbers(["p", "p"], ["r", "r"])


def test_ctrl_c_in_a_command_stays_ctrl_c() -> None:
    judge = FunctionScorer(f"{MODULE}:interrupts", role="evaluate.judge", command=True)
    with pytest.raises(KeyboardInterrupt):
        judge.numbers(["p"], ["r"])


def test_the_cause_of_a_raise_is_kept() -> None:
    with pytest.raises(RewardError) as caught:
        FunctionScorer(f"{MODULE}:raising").score(requests("1"))
    assert isinstance(caught.value.__cause__, KeyError)
