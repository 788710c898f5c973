from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.data.records import (
    Comparison,
    Demonstration,
    Prompt,
    read_comparisons,
    read_demonstrations,
    read_prompts,
    write_jsonl,
)
from common.errors import DataError, StorageError

GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}


def _jsonl(folder: Path, *lines: object) -> str:
    path = folder / "data.jsonl"
    raw = (line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    path.write_bytes(b"\n".join(raw))
    return str(path)


def _message(read: Callable[[Sequence[str]], Iterator[Any]], path: str) -> str:
    with pytest.raises(DataError) as caught:
        list(read([path]))
    text = str(caught.value)
    assert text.startswith(path) and "\n" not in text
    return text.removeprefix(path)


def test_uid_is_stable_and_depends_on_every_field() -> None:
    # Written down, so that a change of the hash (which would orphan old runs) fails.
    assert Prompt(prompt="é").uid == "782ed42ec93b0882fa381716cf1794a3"
    base = {"prompt": "p", "chosen": "a", "rejected": "b", "labeler": "x", "confidence": 0.9}
    changed = [{**base, k: (0.8 if k == "confidence" else "other")} for k in base]
    assert len({Comparison(**row).uid for row in [base, *changed]}) == 6  # type: ignore[arg-type]


def test_uid_does_not_confuse_where_one_field_ends() -> None:
    a = Demonstration(prompt="ab", response="c")
    assert a.uid != Demonstration(prompt="a", response="bc").uid


def test_jsonl_round_trip_of_every_kind(tmp_path: Path) -> None:
    path = str(tmp_path / "new" / "x.jsonl")
    prompts = [Prompt(prompt=text) for text in ("a", 'ü "\u2028\\', "line\nbreak")]
    write_jsonl(path, prompts)
    assert list(read_prompts([path, path])) == prompts * 2
    demonstrations = [Demonstration(prompt="p", response="r")]
    write_jsonl(path, demonstrations)
    assert list(read_demonstrations([path])) == demonstrations
    comparisons = [Comparison(prompt="p", chosen="a", rejected="b", labeler="me", confidence=0.7)]
    write_jsonl(path, comparisons)
    assert list(read_comparisons([path])) == comparisons
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["x.jsonl"]


def test_uri_is_read_like_a_path(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    write_jsonl(path.as_uri(), [Prompt(prompt="a")])
    assert list(read_prompts([path.as_uri()])) == list(read_prompts([str(path)]))


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    write_jsonl(path, [Prompt(prompt="old")])

    def torn() -> Iterator[Prompt]:
        yield Prompt(prompt="new")
        raise RuntimeError("the source died")

    with pytest.raises(RuntimeError, match="the source died"):
        write_jsonl(path, torn())
    assert [p.prompt for p in read_prompts([str(path)])] == ["old"]
    assert len(list(tmp_path.iterdir())) == 1


def test_write_below_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written"):
        write_jsonl(tmp_path / "file" / "x.jsonl", [])


def test_defaults_blank_lines_byte_order_mark_and_other_columns(tmp_path: Path) -> None:
    row = {**GOOD, "note": 3, "labeler": None}
    path = _jsonl(tmp_path, b"\xef\xbb\xbf" + json.dumps(row).encode() + b"\r", b"", GOOD, b"")
    first, second = read_comparisons([path])
    assert first == second
    assert (first.labeler, first.confidence) == ("unknown", 1.0)


def test_stale_uid_in_the_file_is_not_taken_over(tmp_path: Path) -> None:
    path = _jsonl(tmp_path, {"uid": "stale", "prompt": "a"})
    assert next(read_prompts([path])) == Prompt(prompt="a")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GOOD, "prompt": " "}, ":2: field 'prompt': is empty; "),
        ({**GOOD, "chosen": ""}, ":2: field 'chosen': is empty; "),
        ({**GOOD, "chosen": None}, ":2: field 'chosen': is null; write a text"),
        ({**GOOD, "chosen": 3}, ":2: field 'chosen': is of type int; write a text"),
        ({**GOOD, "chosen": "b"}, ":2: field 'rejected': equal to 'chosen'; "),
        ({**GOOD, "confidence": 0.4}, ":2: field 'confidence': is 0.4, outside 0.5 ... 1; "),
        ({**GOOD, "confidence": float("nan")}, ":2: field 'confidence': is nan, outside "),
        ({**GOOD, "confidence": True}, ":2: field 'confidence': is of type bool; "),
        ({**GOOD, "confidense": 0.9}, ":2: field 'confidense': unknown; rename it to 'confidence'"),
        (
            {"prompt": "p", "choosen": "a", "rejected": "b"},
            ":2: field 'chosen': missing; rename 'choosen' to 'chosen'",
        ),
        (
            {"prompt": "p"},
            ":2: field 'chosen': missing; add it, or rename the column that holds it (columns"
            + " found: 'prompt')",
        ),
        (["p"], ":2: is of type list; write an object"),
        (b'{"prompt": "p", "cho', ":2: torn JSON ("),
        (b"[" * 200_000, ":2: torn JSON ("),
        (b'{"prompt": "\xff"}', ":2: byte 13 of the line is not UTF-8; "),
        (
            b'{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}',
            ":2: field 'prompt': holds half",
        ),
    ],
)
def test_bad_line_is_named(tmp_path: Path, row: object, message: str) -> None:
    path = _jsonl(tmp_path, GOOD, row)
    assert _message(read_comparisons, path).startswith(message)


def test_good_lines_before_a_bad_one_are_streamed(tmp_path: Path) -> None:
    stream = read_prompts([_jsonl(tmp_path, {"prompt": "a"}, b"{")])
    assert next(stream).prompt == "a"
    with pytest.raises(DataError, match=":2: torn JSON"):
        next(stream)


def test_missing_files_are_found_at_the_call(tmp_path: Path) -> None:
    good = _jsonl(tmp_path, {"prompt": "a"})
    with pytest.raises(DataError, match="no such file; check the path"):
        read_prompts([good, str(tmp_path / "absent.jsonl")])
    (tmp_path / "x.csv").touch()
    with pytest.raises(DataError, match=r"extension '\.csv' is unknown; use \.jsonl or \.json"):
        read_prompts([good, str(tmp_path / "x.csv")])
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        read_prompts([str(tmp_path / "folder.jsonl")])
    with pytest.raises(DataError, match="not a URI that can be read"):
        read_prompts(["nowhere://x/y.jsonl"])
    with pytest.raises(DataError, match="no data files"):
        read_prompts([])
    with pytest.raises(TypeError, match="sequence of paths"):
        read_prompts(good)


def test_file_without_records_is_an_error(tmp_path: Path) -> None:
    path = _jsonl(tmp_path, b"", b"  ")
    assert _message(read_prompts, path).startswith(": holds no records; ")


def _parquet(folder: Path, columns: dict[str, Any], group: int = 2) -> str:
    path = str(folder / "data.parquet")
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def test_parquet_streams_over_row_groups_and_files(tmp_path: Path) -> None:
    texts = [f"t{i}" for i in range(5)]
    path = _parquet(tmp_path, {"prompt": texts, "response": texts, "extra": [1.0] * 5})
    expected = [Demonstration(prompt=t, response=t) for t in texts]
    assert list(read_demonstrations([path, path])) == expected * 2


def test_parquet_errors_name_the_row(tmp_path: Path) -> None:
    path = _parquet(tmp_path, {"prompt": ["a", "b", ""]})
    assert _message(read_prompts, path).startswith(":row 3: field 'prompt': is empty; ")
    path = _parquet(tmp_path, {"prompt": [1, 2]})
    assert _message(read_prompts, path).startswith(":row 1: field 'prompt': is of type int; ")
    path = _parquet(tmp_path, {"promt": ["a"]})
    assert (
        _message(read_prompts, path)
        == ":row 1: field 'prompt': missing; rename 'promt' to 'prompt'"
    )
    torn = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"a\xff")]
    )
    path = _parquet(tmp_path, {"prompt": torn})
    assert _message(read_prompts, path).startswith(":row 1: field 'prompt': byte 2 is not UTF-8; ")


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_torn_parquet(tmp_path: Path, keep: int) -> None:
    path = Path(_parquet(tmp_path, {"prompt": [str(i) for i in range(1000)]}, group=1000))
    path.write_bytes(path.read_bytes()[:keep])
    assert _message(read_prompts, str(path)).startswith(": torn or not Parquet (")


# ------------------------------------------------------------------ what rides along unread

_HUGE = 2**60


@pytest.mark.parametrize(
    "column",
    [
        pytest.param(pa.array([1700000000123456789], pa.timestamp("ns")), id="timestamp[ns]"),
        pytest.param(pa.array([1], pa.duration("ns")), id="duration[ns]"),
        pytest.param(pa.array([_HUGE], pa.timestamp("us")), id="year 38000"),
        pytest.param(pa.array([1], pa.timestamp("us", tz="Mars/Base")), id="zone"),
        pytest.param(pa.array([_HUGE // 10**6], pa.date64()), id="date of year 38000"),
        pytest.param(
            pa.array([{"at": [_HUGE]}], pa.struct({"at": pa.list_(pa.timestamp("ns"))})),
            id="nested",
        ),
        pytest.param(
            pa.StringArray.from_buffers(
                1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")
            ),
            id="bytes",
        ),
    ],
)
def test_a_column_that_nobody_reads_may_be_anything(tmp_path: Path, column: pa.Array) -> None:
    path = _parquet(tmp_path, {"extra": column, "prompt": ["a"]})
    assert list(read_prompts([path])) == [Prompt(prompt="a")]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["é", "é", None]).dictionary_encode(),
        pa.array(["é", "é", None], pa.large_string()),
        pa.array(["é", "é", None], pa.string_view()),
        pa.array(["é".encode(), "é".encode(), None], pa.binary()),
        pa.array(["é".encode(), "é".encode(), None], pa.large_binary()),
    ],
    ids=lambda column: str(column.type),
)
def test_text_is_text_however_it_is_stored(tmp_path: Path, column: pa.Array) -> None:
    names = {"chosen": ["a"] * 3, "rejected": ["b"] * 3}
    path = _parquet(tmp_path, {"prompt": ["p"] * 3, "labeler": column, **names})
    assert [c.labeler for c in read_comparisons([path])] == ["é", "é", "unknown"]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        (pa.array([1], pa.int8()), 1.0),
        (pa.array([0.75], pa.float16()), 0.75),
        (pa.array([0.75], pa.float32()), 0.75),
        (pa.array(["0.75"]).cast(pa.decimal128(5, 2)), 0.75),
        (pa.array([None]), 1.0),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_a_confidence_is_a_number_of_any_type(
    tmp_path: Path, column: pa.Array, value: float
) -> None:
    path = _parquet(tmp_path, {**{k: [v] for k, v in GOOD.items()}, "confidence": column})
    (found,) = read_comparisons([path])
    assert found.confidence == value and type(found.confidence) is float


@pytest.mark.parametrize(
    ("column", "named"),
    [
        (pa.array([["a"]]), "field 'prompt': turn 1: is of type str; "),
        (pa.array([1], pa.timestamp("ns")), "field 'prompt': is of type timestamp[ns]; "),
        (pa.array([None], pa.timestamp("ns")), "field 'prompt': is null; "),
        (pa.array([b"\xff"]), "field 'prompt': byte 1 is not UTF-8; "),
        (pa.array([1.5]), "field 'prompt': is of type float; "),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_a_needed_column_of_another_type_is_one_line(
    tmp_path: Path, column: pa.Array, named: str
) -> None:
    path = _parquet(tmp_path, {"prompt": column})
    assert _message(read_prompts, path).startswith(f":row 1: {named}")


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "data.parquet")
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(table, path)
    assert _message(read_prompts, path) == ": column 'prompt' is there twice; keep one of them"


# columns of public preference data, none of which is a misspelt labeler or confidence
_COMMON: list[dict[str, Any]] = [
    {"label": 1},
    {"label": "chosen"},
    {"labels": [0, 1]},
    {"labeled": "yes"},
    {"labelled": True},
    {"labeller": 7},
    {"annotator": "ada"},
    {"confident": 1},
    {"confidence_level": 3},
    {"confidence_score": 0.9},
    {"chosen_score": 7.5, "rejected_score": 2.0},
    {"prompt_id": "p1", "score": 1, "rank": 2, "source": "web"},
]


@pytest.mark.parametrize("more", _COMMON, ids=lambda more: "-".join(more))
def test_a_stranger_is_no_misspelling(tmp_path: Path, more: dict[str, Any]) -> None:
    expected = [Comparison(**GOOD)]
    assert list(read_comparisons([_jsonl(tmp_path, {**GOOD, **more})])) == expected
    columns = {name: [value] for name, value in {**GOOD, **more}.items()}
    assert list(read_comparisons([_parquet(tmp_path, columns)])) == expected


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("labeller", "ada", "labeler"),
        ("Labeler", "ada", "labeler"),
        ("labler", "ada", "labeler"),
        ("lableer", "ada", "labeler"),
        ("confidance", 0.9, "confidence"),
        ("confidnce", 1, "confidence"),
        ("confedance", 0.9, "confidence"),
        ("confidence ", 0.9, "confidence"),
    ],
)
def test_a_misspelling_is_one(tmp_path: Path, name: str, value: object, meant: str) -> None:
    message = f"field {name!r}: unknown; rename it to {meant!r} or take it out"
    row = {**GOOD, name: value}
    assert _message(read_comparisons, _jsonl(tmp_path, row)) == f":1: {message}"
    path = _parquet(tmp_path, {key: [value] for key, value in row.items()})
    assert _message(read_comparisons, path) == f":row 1: {message}"


def test_no_column_of_another_meaning_is_proposed_for_a_missing_one(tmp_path: Path) -> None:
    path = _jsonl(tmp_path, {"prompt_id": "p1", "prompts": ["a"], "text": "a"})
    expected = (
        "field 'prompt': missing; add it, or rename the column that holds it (columns found: "
        "'prompt_id', 'prompts', 'text')"
    )
    assert _message(read_prompts, path) == f":1: {expected}"
    columns = {f"c{i}": ["x"] for i in range(500)}
    message = _message(read_prompts, _parquet(tmp_path, columns))
    assert message.endswith("'c10', 'c11', and 488 more)"), message


def test_a_number_of_any_length_may_ride_along(tmp_path: Path) -> None:
    path = _jsonl(tmp_path, b'{"prompt": "a", "n": %s}' % (b"9" * 5000))
    assert [p.prompt for p in read_prompts([path])] == ["a"]


def test_a_record_keeps_its_place(tmp_path: Path) -> None:
    rows = _jsonl(tmp_path, b"", {"prompt": "a"}, b"", {"prompt": "b"})
    table = _parquet(tmp_path, {"prompt": ["a", "b", "c"]})
    places = [p.place for p in read_prompts([rows, table])]
    assert places == [f"{rows}:2", f"{rows}:4", *(f"{table}:row {n}" for n in (1, 2, 3))]
    assert Prompt(prompt="a", place="here") == Prompt(prompt="a"), "no part of the data"
    write_jsonl(tmp_path / "copy.jsonl", read_prompts([rows]))
    assert "place" not in (tmp_path / "copy.jsonl").read_text()
