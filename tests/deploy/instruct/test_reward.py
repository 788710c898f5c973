"""The reward: right on constructed answers, higher for what comes closer, closed to cheap texts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config.quickstart import InstructConfig
from deploy.instruct.instructions import KINDS, Instruction, say
from deploy.instruct.reward import NEARLY, credit, score, substance
from deploy.instruct.task import make_task
from reward_service.scorers import FunctionScorer
from tests.deploy.instruct.test_judge import CASES

_TASK = make_task(InstructConfig(prompts=60, held_out_prompts=21), 0)
ASKS = [*_TASK.train, *_TASK.held_out["kinds"]]
TEXT = "The old boat came home late at night and everybody was glad to see it again."
PROMPT = "Write about an old boat."


@pytest.mark.parametrize(("instruction", "answer", "followed"), CASES, ids=repr)
def test_a_credit_is_one_where_the_instruction_is_followed(
    instruction: Instruction, answer: str, followed: bool
) -> None:
    found = credit(instruction, answer)
    assert (found == 1.0) is followed
    assert followed or 0.0 <= found < NEARLY


@pytest.mark.parametrize(
    ("instruction", "worse", "better"),
    [
        (Instruction("lowercase"), "The Old Boat Came", "The old boat came"),
        (Instruction("capitals"), "the old boat CAME", "THE OLD BOAT came"),
        (Instruction("no_comma"), "a, b, c", "a, b and c"),
        (Instruction("quotes"), "a boat", '"a boat'),
        (Instruction("title"), "a boat", "<<a boat"),
        (Instruction("title"), "<<a boat", "<<my title>> a boat"),
        (Instruction("bullets", 3), "a boat", "* a boat\n* a home"),
        (Instruction("paragraphs", 3), "a", "a\n***\nb"),
        (Instruction("json"), "a boat", '{"a boat": "'),
        (Instruction("fewer_words", 3), "a b c d e f", "a b c d"),
        (Instruction("at_least_words", 9), "a b", "a b c"),
        (Instruction("ends", text="That is all."), "A boat.", "That is all. A boat."),
        (Instruction("word_times", 3, "boat"), "a boat", "boat boat"),
        (Instruction("without", text="the"), "the the", "the"),
    ],
    ids=repr,
)
def test_coming_closer_is_worth_more(instruction: Instruction, worse: str, better: str) -> None:
    assert credit(instruction, worse) < credit(instruction, better) < NEARLY


def test_a_combination_gives_part_and_more_for_all() -> None:
    prompt = f"{PROMPT} {say(Instruction('no_comma'), 0)} {say(Instruction('lowercase'), 0)}"
    none, one, both = score([prompt] * 3, [TEXT.replace(" ", ", "), TEXT, TEXT.lower()])
    assert 0.0 < none < one < 0.9
    assert both == 1.0


@pytest.mark.parametrize(
    "cheap",
    [
        "",
        " \n",
        "ok",
        "boat boat boat boat boat boat boat boat boat boat boat boat",
        "do not use commas. i like the old boat and i do not use commas. fine by me.",
        "the boat is old. the boat is old. the boat is old. the boat is old.",
    ],
)
def test_cheap_answers_are_worth_little(cheap: str) -> None:
    prompt = f"{PROMPT} Do not use commas."
    (found,) = score([prompt], [cheap])
    assert found <= 0.55
    assert score([prompt], [TEXT]) == [1.0]


def test_a_text_about_something_else_is_worth_less() -> None:
    assert substance(PROMPT, TEXT) == 1.0
    assert substance(PROMPT, TEXT.replace("boat", "cat")) == pytest.approx(0.9)


def test_a_prompt_without_instructions_is_an_error() -> None:
    with pytest.raises(ValueError, match="no instruction is known in the prompt 'Write about"):
        score([PROMPT], [TEXT])


@given(answer=st.text(max_size=200), number=st.integers(0, 10_000))
def test_every_text_has_a_score(answer: str, number: int) -> None:
    assert {i.kind for ask in ASKS for i in ask.instructions} == {*KINDS}
    ask = ASKS[number % len(ASKS)]
    (found,) = score([ask.text], [answer])
    assert 0.0 <= found <= 1.0


def test_deeply_nested_json_has_a_score() -> None:
    assert credit(Instruction("json"), "[" * 100_000) < NEARLY


def test_the_recipe_finds_it() -> None:
    scorer = FunctionScorer("deploy.instruct.reward:score")
    assert scorer.numbers([f"{PROMPT} Do not use commas."], [TEXT]) == [1.0]
