"""What else a line of the data holds goes with its prompt to whoever scores the response."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.data.prompts import PromptStream, encode_prompts
from common.data.records import Prompt, read_demonstrations, read_prompts
from common.data.tokenizer import load_tokenizer
from common.errors import DataError
from common.wire.trajectory import RolloutRequest, from_table, to_table
from tests.common.data.tokenizers import byte_level

LINE: dict[str, Any] = {
    "prompt": "6 x 7",
    "answer": 42,
    "share": 0.5,
    "sure": True,
    "source": "times table ä",
    "tests": [{"in": "6,7", "out": ["42"]}, None],
    "nothing": None,
}
FURTHER = {name: value for name, value in LINE.items() if name != "prompt"}


def jsonl(folder: Path, *lines: dict[str, Any]) -> str:
    path = folder / "p.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf8")
    return str(path)


def test_columns_go_from_the_file_to_the_request(tmp_path: Path) -> None:
    (prompt,) = read_prompts([jsonl(tmp_path, LINE)], columns=None)
    assert prompt.columns == FURTHER
    encoded, _ = encode_prompts(
        [prompt], load_tokenizer(byte_level(tmp_path / "t")), max_tokens=50, too_long="error"
    )
    requests = PromptStream(encoded, seed=0).requests(0, 1, 2)
    arrived = from_table(to_table(requests, RolloutRequest), RolloutRequest)
    assert [json.loads(request.columns or "") for request in arrived] == [FURTHER, FURTHER]


def test_they_are_no_part_of_a_prompts_name(tmp_path: Path) -> None:
    plain, _ = read_prompts([jsonl(tmp_path, LINE, LINE)])
    assert plain.columns == {}
    assert plain.uid == Prompt(prompt="6 x 7").uid
    (known, _) = read_prompts([jsonl(tmp_path, LINE, LINE)], columns=("answer",))
    assert (known.columns, known.uid) == ({"answer": 42}, plain.uid)


def test_held_out_answers_keep_theirs(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {**LINE, "response": "42"})
    (shown,) = read_demonstrations([path], columns=None)
    assert shown.asked().columns == FURTHER


def test_of_a_conversation_too(tmp_path: Path) -> None:
    line = {"messages": [{"role": "user", "content": "6 x 7"}], "answer": "42"}
    (prompt,) = read_prompts([jsonl(tmp_path, line)], columns=None)
    assert prompt.columns == {"answer": "42"}


def test_parquet_has_every_type(tmp_path: Path) -> None:
    day = datetime.date(2026, 1, 2)
    at = datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC)
    table = pa.table(
        {
            "prompt": ["6 x 7"],
            "answer": pa.array([42], pa.int8()),
            "share": pa.array([0.5], pa.float32()),
            "exact": pa.array([Decimal("0.25")]),
            "sure": [True],
            "source": pa.array(["s"]).dictionary_encode(),
            "tests": [[{"in": "6,7", "out": ["42"]}]],
            "marks": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
            "day": pa.array([day]),
            "at": pa.array([at]),
            "nothing": pa.nulls(1),
            "image": pa.array([b"\xff\x00"], pa.binary()),
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    (prompt,) = read_prompts([str(tmp_path / "p.parquet")], columns=None)
    assert json.loads(json.dumps(prompt.columns)) == {
        "answer": 42,
        "share": 0.5,
        "exact": 0.25,
        "sure": True,
        "source": "s",
        "tests": [{"in": "6,7", "out": ["42"]}],
        "marks": [["a", 1]],
        "day": "2026-01-02",
        "at": "2026-01-02T03:04:00+00:00",
        "nothing": None,
    }


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_column_that_is_asked_for_has_to_be_there(tmp_path: Path, kind: str) -> None:
    path = jsonl(tmp_path, LINE, {"prompt": "1 + 1"})
    place = f"{path}:2"
    if kind == "parquet":
        place = path = str(tmp_path / "p.parquet")
        pq.write_table(pa.table({"prompt": ["1 + 1"], "reply": ["2"]}), path)
    with pytest.raises(DataError) as error:
        list(read_prompts([path], columns=("answer",)))
    assert str(error.value) == (
        f"{place}: field 'answer': missing; data.columns asks for it: add it, or take it out there"
    )


def test_what_json_has_no_form_for_is_refused_by_name(tmp_path: Path) -> None:
    path = str(tmp_path / "p.parquet")
    table = pa.table({"prompt": ["a"], "image": pa.array([b"\xff"], pa.binary())})
    pq.write_table(table, path)
    with pytest.raises(DataError, match="row 1: field 'image': is of type bytes, which JSON has"):
        list(read_prompts([path], columns=("image",)))
    with pytest.raises(DataError, match=r"p\.jsonl:1: field 'x': is nan, which JSON has no form"):
        list(read_prompts([jsonl(tmp_path, {"prompt": "a", "x": float("nan")})], columns=None))
