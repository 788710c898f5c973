"""The task's prompts: the same for a seed, and what is held out is held out."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from common.config.quickstart import InstructConfig
from deploy.instruct.instructions import HELD_OUT, TRAINED, compatible, read
from deploy.instruct.task import SPLITS, Ask, Task, make_task, split_pairs, write_prompts
from deploy.instruct.topics import FORMS, THINGS, split_things

SETTINGS = InstructConfig(prompts=1500, held_out_prompts=200)


@pytest.fixture(scope="module")
def task() -> Task:
    return make_task(SETTINGS, 0)


def things(ask: Ask) -> set[str]:
    return {*THINGS} & {*re.findall(r"\w+", ask.text)}


def kinds(ask: Ask) -> set[str]:
    return {instruction.kind for instruction in ask.instructions}


def pairs(ask: Ask) -> set[tuple[str, ...]]:
    return {pair for pair in itertools.combinations(TRAINED, 2) if {*pair} <= kinds(ask)}


def test_a_seed_is_a_task(task: Task) -> None:
    assert make_task(SETTINGS, 0) == task
    assert make_task(SETTINGS, 1) != task
    assert len(task.train) == 1500
    assert {len(task.held_out[split]) for split in SPLITS} == {200}


def test_no_prompt_is_there_twice(task: Task) -> None:
    texts = [ask.text for ask in itertools.chain(task.train, *task.held_out.values())]
    assert len({*texts}) == len(texts)


def test_the_text_says_what_is_asked_for(task: Task) -> None:
    for ask in itertools.chain(task.train, *task.held_out.values()):
        assert read(ask.text) == ask.instructions
        assert all(compatible(*pair) for pair in pairs(ask))
        assert len(kinds(ask)) == len(ask.instructions) in (1, 2, 3)


def test_things_of_training_and_of_the_judge_differ(task: Task) -> None:
    known, new = split_things(0, 0.3)
    assert {*known} | {*new} == {*THINGS}
    assert not {*known} & {*new}
    assert {thing for ask in task.train for thing in things(ask)} == {*known}
    for split in SPLITS:
        assert all(things(ask) and things(ask) <= {*new} for ask in task.held_out[split])


def test_held_out_kinds_and_combinations_are_never_trained(task: Task) -> None:
    seen, unseen = split_pairs(0)
    trained = {pair for ask in task.train for pair in pairs(ask)}
    assert trained <= {*seen}
    assert not trained & {*unseen}
    assert {kind for ask in task.train for kind in kinds(ask)} == {*TRAINED}
    assert {kind for ask in task.held_out["kinds"] for kind in kinds(ask)} == {*HELD_OUT}
    assert {p for ask in task.held_out["combinations"] for p in pairs(ask)} == {*unseen}
    assert {p for ask in task.held_out["topics"] for p in pairs(ask)} <= {*seen}


def test_single_instructions_are_spread_evenly(task: Task) -> None:
    singles = Counter(next(iter(kinds(a))) for a in task.train if len(a.instructions) == 1)
    assert max(singles.values()) - min(singles.values()) <= 1
    sizes = Counter(len(ask.instructions) for ask in task.train)
    assert sizes[1] > sizes[2] > sizes[3] > 100


def test_every_form_is_a_sentence() -> None:
    assert all(form.count("{}") == 1 and form[-1] in ".?" for form in FORMS)
    assert len({*THINGS}) == len(THINGS)


def test_the_prompts_are_chat_data(task: Task, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    write_prompts(path, [ask.text for ask in task.train[:3]])
    rows = [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]
    assert rows == [{"messages": [{"role": "user", "content": a.text}]} for a in task.train[:3]]
