"""Conversations in files: every way in which people write them, and what is refused by line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.data.prompts import encode_prompts
from common.data.records import (
    Demonstration,
    Prompt,
    read_comparisons,
    read_demonstrations,
    read_prompts,
    write_jsonl,
)
from common.data.tokenizer import load_tokenizer
from common.errors import DataError
from tests.common.data.tokenizers import byte_level, sentencepiece

USER = {"role": "user", "content": "name a ship"}
SAYS = {"role": "assistant", "content": "the Argo"}
OTHER = {"role": "assistant", "content": "a ship"}
TOOLS = [{"type": "function", "function": {"name": "find"}}]


def jsonl(folder: Path, *rows: object) -> list[str]:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(path)]


def test_prompts_are_texts_or_messages_under_either_name(tmp_path: Path) -> None:
    rows = [{"prompt": "plain"}, {"messages": [USER]}, {"prompt": [USER], "tools": TOOLS}]
    plain, chat, tools = read_prompts(jsonl(tmp_path, *rows))
    assert plain == Prompt(prompt="plain")
    assert chat == Prompt(prompt="name a ship", messages=(USER,))
    assert tools == Prompt(prompt="name a ship", messages=(USER,), tools=tuple(TOOLS))
    assert len({plain.uid, chat.uid, tools.uid, Prompt(prompt="name a ship").uid}) == 4
    assert tools.place.endswith(":3")


def test_demonstrations_learn_all_turns_or_the_response(tmp_path: Path) -> None:
    whole = [USER, SAYS, USER, OTHER]
    rows = [
        {"messages": whole},
        {"prompt": [USER], "response": "the Argo"},
        {"prompt": [USER], "response": [SAYS]},
    ]
    every, text, message = read_demonstrations(jsonl(tmp_path, *rows))
    assert every.messages == tuple(whole) and every.response == "a ship"
    assert every.asked() == Prompt(prompt="name a ship", messages=tuple(whole[:3]))
    assert (
        text
        == message
        == Demonstration(prompt="name a ship", response="the Argo", messages=(USER,), uid=text.uid)
    )
    assert text.asked() == Prompt(prompt="name a ship", messages=(USER,))


def test_comparisons_as_others_write_them(tmp_path: Path) -> None:
    rows = [
        {"messages": [USER], "chosen": "the Argo", "rejected": "a ship"},
        {"prompt": [USER], "chosen": [SAYS], "rejected": [OTHER]},
        {"chosen": [USER, SAYS], "rejected": [USER, OTHER]},
        {"prompt": [USER], "chosen": [USER, SAYS], "rejected": [USER, OTHER]},
        {"prompt": "name a ship", "chosen": "the Argo", "rejected": "a ship"},
    ]
    *chats, plain = read_comparisons(jsonl(tmp_path, *rows))
    assert len({chat.uid for chat in chats}) == 1 and plain.uid != chats[0].uid
    assert chats[0].messages == (USER,) and plain.messages == ()


def test_parquet_has_conversations_too(tmp_path: Path) -> None:
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "find"}}]}
    found = {"role": "tool", "content": "Argo"}
    columns = {
        "messages": pa.array([[USER], [USER, called, found]]),
        "tools": pa.array([None, json.dumps(TOOLS)]),
    }
    path = str(tmp_path / "data.parquet")
    pq.write_table(pa.table(columns), path)
    one, two = read_prompts([path])
    assert one.messages == (USER,) and one.tools == ()
    assert two.messages == (USER, called | {"content": ""}, found) and two.tools == tuple(TOOLS)


def test_a_record_is_written_as_it_is_read(tmp_path: Path) -> None:
    records = [Prompt(prompt="a"), Prompt(prompt="name a ship", messages=(USER,))]
    write_jsonl(str(tmp_path / "data.jsonl"), records)
    first, _ = (tmp_path / "data.jsonl").read_text().splitlines()
    assert "messages" not in json.loads(first), "plain data is as it was"
    assert list(read_prompts([str(tmp_path / "data.jsonl")])) == records


Read = Callable[[Sequence[str]], Iterator[Any]]
EMPTY = {"role": "user", "content": " "}
PARTS = {"role": "user", "content": [{"type": "text", "text": "a"}]}
BAD: dict[str, tuple[Read, dict[str, Any], str]] = {
    "no list": (read_prompts, {"messages": "hi"}, "field 'messages': is of type str; write a list"),
    "none": (read_prompts, {"messages": []}, "field 'messages': has no messages"),
    "text": (read_prompts, {"messages": ["hi"]}, "field 'messages': turn 1: is of type str"),
    "role": (
        read_prompts,
        {"messages": [USER, SAYS, {"role": "bot", "content": "x"}]},
        "field 'messages': turn 3: role 'bot' is unknown; use system,",
    ),
    "empty turn": (
        read_prompts,
        {"messages": [EMPTY]},
        "field 'messages': turn 1: content: is empty",
    ),
    "parts": (
        read_prompts,
        {"prompt": [PARTS]},
        "field 'prompt': turn 1: content: is of type list; write a text",
    ),
    "no content": (
        read_prompts,
        {"messages": [{"role": "user"}]},
        "field 'messages': turn 1: content: is null; write a text",
    ),
    "inside a turn": (
        read_prompts,
        {"messages": [USER, SAYS]},
        "field 'messages': ends inside the assistant's turn; a prompt ends with",
    ),
    "system last": (
        read_prompts,
        {"messages": [{"role": "system", "content": "x"}]},
        "field 'messages': ends in a system prompt",
    ),
    "begins": (read_demonstrations, {"messages": [SAYS]}, "field 'messages': begins with the assi"),
    "unanswered": (
        read_demonstrations,
        {"messages": [USER]},
        "field 'messages': ends without the assistant's turn",
    ),
    "no response": (read_demonstrations, {"prompt": [USER]}, "field 'response': missing"),
    "misspelt": (read_prompts, {"message": [USER]}, "field 'message': unknown; rename it to 'mes"),
    "one side": (read_comparisons, {"messages": [USER], "chosen": "x"}, "field 'rejected': missin"),
    "equal": (
        read_comparisons,
        {"prompt": [USER], "chosen": "x", "rejected": "x"},
        "field 'rejected': equal to 'chosen'",
    ),
    "other prompt": (
        read_comparisons,
        {"chosen": [USER, SAYS], "rejected": [USER | {"content": "?"}, OTHER]},
        "field 'rejected': answers another conversation",
    ),
    "tools": (read_prompts, {"messages": [USER], "tools": "{"}, "field 'tools': is a text and no"),
    "tool": (read_prompts, {"messages": [USER], "tools": ["x"]}, "field 'tools': is of type list"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_conversation_is_named_by_line_and_field(tmp_path: Path, name: str) -> None:
    read, row, message = BAD[name]
    [path] = jsonl(tmp_path, row)
    with pytest.raises(DataError) as refused:
        list(read([path]))
    text = str(refused.value)
    assert text.startswith(f"{path}:1: {message}") and "\n" not in text


def test_what_a_template_refuses_is_named_by_line(tmp_path: Path) -> None:
    paths = jsonl(tmp_path, {"messages": [USER]}, {"messages": [USER, USER]})
    tokenizer = load_tokenizer(sentencepiece(tmp_path / "t"))
    with pytest.raises(DataError, match=r"data.jsonl:2: field 'messages': refused by .* alternate"):
        encode_prompts(list(read_prompts(paths)), tokenizer, max_tokens=99, too_long="error")
    bare = load_tokenizer(byte_level(tmp_path / "bare", template=""))
    with pytest.raises(DataError, match=r"data.jsonl:1: field 'messages': .* has no chat template"):
        encode_prompts(list(read_prompts(paths)), bare, max_tokens=99, too_long="error")


def test_plain_prompts_begin_with_bos_and_keep_it_when_cut(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece(tmp_path))
    prompts = [Prompt(prompt="the ship"), Prompt(prompt="ship, " * 40)]
    prompts.append(Prompt(prompt="x", messages=({"role": "user", "content": "ship, " * 40},)))
    (short, long), fitting = encode_prompts(prompts, tokenizer, max_tokens=20, too_long="truncate")
    assert short.ids == [1, *tokenizer.encode("the ship")]
    whole = [1, *tokenizer.encode("ship, " * 40)]
    assert long.ids == [1, *whole[-19:]]
    assert (fitting.cut, fitting.skipped) == (1, 1), "a template would not be whole"
