"""Conversations in ids: those of `transformers` for ordinary text, and no others for any text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from common.data.chat import ChatTemplate
from common.data.pretrained_tokenizer import PretrainedTokenizer
from common.errors import DataError
from tests.common.data.tokenizers import CHATML, THINKING, byte_level, sentencepiece

USER = {"role": "user", "content": "the ship?"}
KINDS: dict[str, Any] = {
    "byte level": byte_level,
    "sentencepiece": sentencepiece,
    "legacy": lambda folder: sentencepiece(folder, legacy=True),
    "thinking": lambda folder: byte_level(folder, template=THINKING),
}
CONTENT = st.text(st.sampled_from("the ship, 1\n é名."), min_size=1, max_size=16).filter(str.strip)
HOSTILE = st.lists(
    st.sampled_from(
        [
            *("<|im_end|>", "<|im_", "end|>", "<|im_start|>system", "<|IM_END|>", "</s>", "<s>"),
            *("<think>", "</think>", "<", ">", "|", " ", "\n", "ship"),
            *("\ue000", "\ue001", "\\ue000"),
        ]
    ),
    min_size=1,
    max_size=8,
).map("".join)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[PretrainedTokenizer, Any]]:
    root = tmp_path_factory.mktemp("chat")
    folders = {kind: make(root / kind.replace(" ", "_")) for kind, make in KINDS.items()}
    return {
        kind: (
            PretrainedTokenizer.load(folder),
            PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True),
        )
        for kind, folder in folders.items()
    }


def chat_of(tokenizer: PretrainedTokenizer) -> ChatTemplate:
    assert tokenizer.chat is not None
    return tokenizer.chat


def said(*contents: str) -> list[dict[str, str]]:
    """User and assistant by turns."""
    return [
        {"role": "assistant" if index % 2 else "user", "content": content}
        for index, content in enumerate(contents)
    ]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(contents=st.lists(CONTENT, min_size=1, max_size=5).filter(lambda c: len(c) % 2 == 1))
def test_prompts_are_those_of_transformers(
    pairs: dict[str, tuple[PretrainedTokenizer, Any]], kind: str, contents: list[str]
) -> None:
    ours, theirs = pairs[kind]
    messages = said(*contents)
    rendered = chat_of(ours).prompt(messages)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert rendered.ids == expected
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert rendered.text == text


def test_the_library_returns_a_mapping_and_adds_bos_a_second_time(
    pairs: dict[str, tuple[PretrainedTokenizer, Any]],
) -> None:
    """The traps that ids once, from the template, do not meet."""
    ours, theirs = pairs["sentencepiece"]
    whole = theirs.apply_chat_template([USER])
    assert list(whole) == ["input_ids", "attention_mask"]
    text = theirs.apply_chat_template([USER], tokenize=False)
    assert theirs(text)["input_ids"][:2] == [1, 1]
    ids = chat_of(ours).prompt([USER]).ids
    assert ids == whole["input_ids"] and ids.count(1) == 1


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(content=HOSTILE.filter(str.strip), role=st.sampled_from(["user", "system", "tool"]))
def test_nothing_that_others_write_becomes_a_control_token(
    pairs: dict[str, tuple[PretrainedTokenizer, Any]], kind: str, content: str, role: str
) -> None:
    ours, theirs = pairs[kind]
    role = "user" if kind in ("sentencepiece", "legacy") else role
    added = set(theirs.all_special_ids) - {theirs.unk_token_id}
    if kind == "thinking":  # the other templates do not write them: text as any other
        added |= set(theirs.convert_tokens_to_ids(["<think>", "</think>"]))

    def controls(text: str) -> list[int]:
        messages = [{"role": role, "content": text}]
        return [i for i in chat_of(ours).prompt(messages).ids if i in added]

    assert controls(content) == controls("x")
    ids = chat_of(ours).prompt([{"role": role, "content": content}]).ids
    shown = theirs.decode(ids, skip_special_tokens=False)
    kept = content.strip() if kind == "byte level" else content  # its template trims
    assert kept in shown, "and stays the text that it is"


def test_tools_are_text_too(pairs: dict[str, tuple[PretrainedTokenizer, Any]]) -> None:
    ours, theirs = pairs["byte level"]
    tools = [{"type": "function", "function": {"name": "find", "description": "finds <|im_end|>"}}]
    plain = [{"type": "function", "function": {"name": "find", "description": "finds it"}}]
    expected = theirs.apply_chat_template([USER], tools=plain, add_generation_prompt=True)
    assert chat_of(ours).prompt([USER], plain).ids == expected["input_ids"]
    rendered = chat_of(ours).prompt([USER], tools)
    assert rendered.ids.count(2) == 1 and "finds <|im_end|>" in ours.decode(rendered.ids)


def test_the_assistant_may_think_but_not_end_its_turn(
    pairs: dict[str, tuple[PretrainedTokenizer, Any]],
) -> None:
    ours, theirs = pairs["thinking"]
    think = theirs.convert_tokens_to_ids("<think>")
    turn = chat_of(ours).answer([USER], "<think>a<|im_end|>\n</think>yes")
    assert turn.learnt[0] == think and turn.learnt.count(2) == 1 and turn.learnt[-1] == 2
    assert ours.decode(turn.learnt) == "<think>a<|im_end|>\n</think>yes"
    asked = chat_of(ours).prompt([{"role": "user", "content": "<think>"}])
    assert think not in asked.ids, "a user does not think for it"


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece", "legacy"])
@settings(deadline=None)
@given(contents=st.lists(CONTENT, min_size=2, max_size=6).filter(lambda c: len(c) % 2 == 0))
def test_what_is_learnt_is_every_turn_with_its_end(
    pairs: dict[str, tuple[PretrainedTokenizer, Any]], kind: str, contents: list[str]
) -> None:
    ours, theirs = pairs[kind]
    messages = said(*contents)
    [row] = chat_of(ours).rows(messages)
    assert len(row) == len(contents) // 2
    assert row[0].before == chat_of(ours).prompt(messages[:1]).ids
    answers = contents[1::2]
    for turn, answer in zip(row, answers, strict=True):
        assert turn.learnt[-1] == ours.eos_id and turn.learnt.count(ours.eos_id) == 1
        assert ours.decode(turn.learnt).strip() == answer.strip()
    whole = theirs.apply_chat_template(messages, tokenize=False)
    ids = [i for turn in row for i in (*turn.before, *turn.learnt)]
    assert (
        theirs.decode(ids, skip_special_tokens=False).strip()
        == theirs.decode(
            theirs.apply_chat_template(messages)["input_ids"], skip_special_tokens=False
        ).strip()
    ), whole


@settings(deadline=None)
@given(contents=st.lists(CONTENT, min_size=2, max_size=6).filter(lambda c: len(c) % 2 == 0))
def test_without_blanks_at_the_border_a_row_is_the_librarys(
    pairs: dict[str, tuple[PretrainedTokenizer, Any]], contents: list[str]
) -> None:
    ours, theirs = pairs["byte level"]
    messages = said(*(content.strip() for content in contents))
    [row] = chat_of(ours).rows(messages)
    ids = [i for turn in row for i in (*turn.before, *turn.learnt)]
    expected = theirs.apply_chat_template(messages)["input_ids"]
    assert ids == expected[: len(ids)], "but for the line's end behind the last turn"
    assert ours.decode(expected[len(ids) :]) == "\n"


def test_a_history_that_is_written_again_otherwise_begins_a_row(
    pairs: dict[str, tuple[PretrainedTokenizer, Any]],
) -> None:
    ours, _ = pairs["thinking"]
    messages = said("a?", "<think>\nb\n</think>\n\nc", "d?", "<think>\ne\n</think>\n\nf")
    first, second = chat_of(ours).rows(messages)
    assert [len(first), len(second)] == [1, 1]
    assert ours.decode(first[0].learnt) == "<think>\nb\n</think>\n\nc"
    assert second[0].before == chat_of(ours).prompt(messages[:3]).ids
    assert "b" not in ours.decode(second[0].before), "what was thought is not read again"
    [together] = chat_of(ours).rows(said("a?", "c", "d?", "f"))
    assert len(together) == 2, "where nothing is dropped one row is enough"


def test_a_template_without_an_end_of_turn_gets_eos(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    ours = PretrainedTokenizer.load(byte_level(tmp_path, template=template))
    assert chat_of(ours).end_of_turn is None
    first, second = chat_of(ours).rows(said("a", "b", "c", "d"))
    assert [ours.decode(turn.learnt) for [turn] in (first, second)] == ["b\n", "d\n"]
    assert all(turn.learnt[-1] == ours.eos_id for [turn] in (first, second))


def test_a_prompt_that_no_answer_begins_with_is_refused(tmp_path: Path) -> None:
    template = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
    ours = PretrainedTokenizer.load(byte_level(tmp_path, template=template))
    assert chat_of(ours).prompt([USER]).text.endswith("<think>\n")
    with pytest.raises(DataError, match=r"turn 2 does not begin with the generation prompt of"):
        chat_of(ours).rows(said("a", "b"))


def test_an_end_of_turn_that_is_no_special_token_is_still_closed_to_the_assistant(
    tmp_path: Path,
) -> None:
    template = CHATML.replace("<|im_end|>", "</think>")
    ours = PretrainedTokenizer.load(byte_level(tmp_path, template=template))
    end = ours.stop_ids[1]
    assert ours.stop_ids == (2, end)
    turn = chat_of(ours).answer([USER], "a</think>b")
    assert turn.learnt.count(end) == 1 and turn.learnt[-1] == end


REFUSED: dict[str, tuple[list[dict[str, str]], str]] = {
    "system": ([{"role": "system", "content": "be brief"}, USER], "it takes no system prompt"),
    "twice": ([USER, USER], "let user and assistant alternate"),
    "role": ([*said("a", "b"), {"role": "tool", "content": "x"}], "give another template"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_template_refuses_is_one_line(
    pairs: dict[str, tuple[PretrainedTokenizer, Any]], name: str
) -> None:
    messages, advice = REFUSED[name]
    with pytest.raises(DataError) as refused:
        chat_of(pairs["sentencepiece"][0]).prompt(messages)
    text = str(refused.value)
    assert text.startswith("field 'messages': refused by ") and advice in text and "\n" not in text
