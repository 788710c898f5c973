"""The outside judge: imported alone, strict, and of one mind with the reward on most answers."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from common.errors import ConfigError
from deploy.instruct import judge
from deploy.instruct.instructions import KINDS, Instruction
from tests.deploy.instruct.answers import answers, disagreements

needs_judge = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("langdetect") is None,
    reason=f"the judge is not installed: {judge.INSTALL}",
)
ANSWER = "The boat, an old one, came home."
CASES = [
    (Instruction("lowercase"), "the boat came home at night and we were happy.", True),
    (Instruction("lowercase"), "The boat came home.", False),
    (Instruction("capitals"), "THE BOAT CAME HOME AND EVERYBODY WAS HAPPY ABOUT IT.", True),
    (Instruction("capitals"), "THE BOAT came home.", False),
    (Instruction("no_comma"), "The boat came home.", True),
    (Instruction("no_comma"), ANSWER, False),
    (Instruction("quotes"), f'"{ANSWER}"', True),
    (Instruction("quotes"), f'"{ANSWER}', False),
    (Instruction("title"), f"<<home>>\n{ANSWER}", True),
    (Instruction("title"), f"home\n{ANSWER}", False),
    (Instruction("bullets", 2), "* a boat\n* a home", True),
    (Instruction("bullets", 3), "* a boat\n* a home", False),
    (Instruction("paragraphs", 2), "a boat\n***\na home", True),
    (Instruction("paragraphs", 3), "a boat\n***\na home", False),
    (Instruction("json"), '{"boat": "home"}', True),
    (Instruction("json"), "boat: home", False),
    (Instruction("fewer_words", 8), ANSWER, True),
    (Instruction("fewer_words", 7), ANSWER, False),
    (Instruction("at_least_words", 7), ANSWER, True),
    (Instruction("at_least_words", 8), ANSWER, False),
    (Instruction("ends", text="That is all."), f"{ANSWER} That is all.", True),
    (Instruction("ends", text="That is all."), f"That is all. {ANSWER}", False),
    (Instruction("word", text="home"), ANSWER, True),
    (Instruction("word", text="time"), ANSWER, False),
    (Instruction("word_times", 2, "home"), f"{ANSWER} Home!", True),
    (Instruction("word_times", 2, "home"), ANSWER, False),
    (Instruction("without", text="and"), ANSWER, True),
    (Instruction("without", text="the"), ANSWER, False),
    (Instruction("placeholders", 1), "Dear [name], hello.", True),
    (Instruction("placeholders", 2), "Dear [name], hello.", False),
    (Instruction("postscript"), f"{ANSWER}\nP.S. Write soon.", True),
    (Instruction("postscript"), ANSWER, False),
    (Instruction("highlights", 1), "A *boat* came.", True),
    (Instruction("highlights", 2), "A *boat* came.", False),
    (Instruction("sections", 2), "Section 1\na\nSection 2\nb", True),
    (Instruction("sections", 2), "Section 1\na", False),
    (Instruction("letter", 2, "b"), ANSWER, True),
    (Instruction("letter", 2, "b"), f"{ANSWER} Bob.", False),
    (Instruction("two_answers"), "one\n******\ntwo", True),
    (Instruction("two_answers"), "one\n******\none", False),
    (Instruction("first_word", text="home"), "Home is where the boat is.", True),
    (Instruction("first_word", text="home"), ANSWER, False),
]


def test_there_is_a_case_of_each_verdict_for_each_kind() -> None:
    assert {(i.kind, verdict) for i, _, verdict in CASES} == {
        (kind, verdict) for kind in KINDS for verdict in (True, False)
    }


@needs_judge
@pytest.mark.parametrize(("instruction", "answer", "verdict"), CASES, ids=repr)
def test_each_kind_asks_its_checker(instruction: Instruction, answer: str, verdict: bool) -> None:
    assert judge.follows(instruction, answer) is verdict
    assert judge.verdicts([[instruction, instruction]], [answer]) == [[verdict, verdict]]


@needs_judge
@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_answer_follows_nothing(kind: str) -> None:
    assert not judge.follows(Instruction(kind, 2, "x"), " \n")


@needs_judge
def test_reward_and_judge_agree_on_constructed_answers() -> None:
    count = 200
    assert len({*answers(count, 0)}) > 170
    for kind, rows in disagreements(count, 0).items():
        lenient = sum(verdict for _, _, verdict in rows)
        # IFEval takes a number for JSON, "lighthouse" for "light" and **bold** for *this*.
        assert lenient / count <= (0.1 if kind == "json" else 0.05), (kind, rows)
        # What the reward alone takes for followed is what langdetect does not take for English.
        assert (len(rows) - lenient) / count <= 0.03, (kind, rows)


@needs_judge
def test_every_checker_of_ifeval_is_asked_or_left_out_with_a_reason() -> None:
    asked = {name for name, _ in judge.CHECKERS.values()}
    assert asked | judge.LEFT_OUT.keys() == judge.registry().keys()
    assert not asked & judge.LEFT_OUT.keys()
    assert judge.CHECKERS.keys() == KINDS.keys()


@needs_judge
def test_the_judge_comes_alone_and_leaves_nothing_behind() -> None:
    code = (
        "import os, sys; from deploy.instruct.judge import registry; registry();"
        "print('lm_eval' in sys.modules, 'lm_eval.evaluator' in sys.modules,"
        " 'datasets' in sys.modules, os.environ.get('LOCAL_RANK'))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "LOCAL_RANK"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.split() == ["False", "False", "False", "None"]


def test_a_missing_judge_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    judge.registry.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"judge is not installed; run `pip install --no-deps"):
        judge.follows(CASES[0][0], "x")
    judge.registry.cache_clear()
