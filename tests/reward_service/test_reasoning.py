"""The verifier as a reward function, called as the service calls any."""

from __future__ import annotations

import pytest

from common.data.records import read_prompts
from common.errors import RewardError
from reward_service.samples import Sample
from reward_service.scorers import FunctionScorer

NAME = "reasoning_gym:chain_sum?size=4&max_terms=2"


def samples(*answers: str) -> list[Sample]:
    """Of the tasks in their order, each answered so; ``{}`` stands for what is right."""
    asked = read_prompts([NAME], columns=("task", "index", "question", "answer"))
    return [
        Sample(
            prompt=prompt.prompt,
            response=answer.format(prompt.columns["answer"]),
            columns=prompt.columns,
            rollout_id=prompt.uid,
        )
        for prompt, answer in zip(asked, answers, strict=False)
    ]


def test_right_answers_score_one_and_parts_say_why() -> None:
    scorer = FunctionScorer("reward_service.reasoning:score")
    results = scorer.score(
        samples("<answer>{}</answer>", "{}", "<answer>123456</answer>", "<answer>{}.0</answer>")
    )
    assert [result.score == 1.0 for result in results] == [True, False, False, True]
    assert results[1].score == 0.0
    assert [result.parts["form"] for result in results] == [1.0, 0.0, 1.0, 1.0]
    assert [result.parts["right"] for result in results] == [1.0, 0.0, 0.0, 1.0]


def test_prompts_from_elsewhere_are_one_line() -> None:
    scorer = FunctionScorer("reward_service.reasoning:score")
    with pytest.raises(RewardError, match="its prompt has no columns task, index, question; take"):
        scorer.score([Sample(prompt="1 + 1", response="2", rollout_id="7")])
