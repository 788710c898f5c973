"""Answers rewritten by program keep to their instructions, and keep the model's own words."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from common.config.quickstart import InstructConfig
from deploy.instruct import judge
from deploy.instruct.instructions import TRAINED
from deploy.instruct.reward import score
from deploy.instruct.rewriting import rewritten
from deploy.instruct.task import make_task

ANSWERS = (
    "In the quiet town of Salem, there was an old {0} that many people loved. It stood near the "
    "river, and its light could be seen from far away. Every evening a small boy came and sat.",
    "Here is a short note:\n\n- The {0} is very old.\n- People say it is beautiful.\n- I went "
    'there, once, with my friend and we saw "the great lake',
    "<<My title>>\nA {0} in the world of today, as it happens, is a place of wonder and of joy for "
    "everyone who comes here to see it, with friends or without them, whatever the",
)
ASKS = make_task(InstructConfig(prompts=400, held_out_prompts=21), 3).train


def every_answer() -> list[tuple[int, str, str | None]]:
    made = []
    for at, ask in enumerate(ASKS):
        answer = ANSWERS[at % len(ANSWERS)].format(ask.about.split()[-1])
        made.append((at, answer, rewritten(ask, answer)))
    return made


MADE = every_answer()


def test_nearly_every_answer_can_be_rewritten_and_of_every_kind() -> None:
    done = [at for at, _, text in MADE if text is not None]
    assert len(done) > 0.9 * len(MADE)
    assert {i.kind for at in done for i in ASKS[at].instructions} == set(TRAINED)


def test_the_reward_is_full() -> None:
    done = [(ASKS[at].text, text) for at, _, text in MADE if text is not None]
    scores = score([prompt for prompt, _ in done], [text for _, text in done])
    assert min(scores) >= 0.9


def test_they_are_short_and_the_models_own() -> None:
    for _, answer, text in MADE:
        if text is None:
            continue
        words = text.lower().split()
        assert 3 < len(words) < 60
        own = set(answer.lower().replace(",", "").split())
        assert sum(word.strip('*<>{}",.:') in own or word in own for word in words) >= 2


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval (make run-instruct)")
def test_the_outside_judge_agrees_but_where_it_is_known_to_differ() -> None:
    done = [(ASKS[at], text) for at, _, text in MADE if text is not None]
    verdicts = judge.verdicts([ask.instructions for ask, _ in done], [text for _, text in done])
    assert sum(map(all, verdicts)) > 0.93 * len(done)


def test_what_says_nothing_is_left_out() -> None:
    assert rewritten(ASKS[0], "") is None
    assert rewritten(ASKS[0], "No.") is None
