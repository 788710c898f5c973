from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.data import (
    Comparison,
    Demonstration,
    IndexedDataset,
    Prompt,
    ShuffledIndex,
    read_comparisons,
    read_demonstrations,
    read_prompts,
    shuffled_order,
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
        ({"prompt": "p"}, ":2: field 'chosen': missing; add it (columns found: 'prompt')"),
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
    dataset = IndexedDataset([path], Comparison)
    assert dataset[0].chosen == "a"
    with pytest.raises(DataError) as caught:
        dataset[1]
    assert str(caught.value).removeprefix(path).startswith(message)


def test_good_lines_before_a_bad_one_are_streamed(tmp_path: Path) -> None:
    stream = read_prompts([_jsonl(tmp_path, {"prompt": "a"}, b"{")])
    assert next(stream).prompt == "a"
    with pytest.raises(DataError, match=":2: torn JSON"):
        next(stream)


def test_missing_files_are_found_at_the_call(tmp_path: Path) -> None:
    good = _jsonl(tmp_path, {"prompt": "a"})
    with pytest.raises(DataError, match="no such file; check the path"):
        read_prompts([good, str(tmp_path / "absent.jsonl")])
    with pytest.raises(DataError, match=r"extension '\.csv' is unknown; use \.jsonl or \.parquet"):
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
    with pytest.raises(DataError, match="holds no records"):
        IndexedDataset([path], Prompt)


def _parquet(folder: Path, columns: dict[str, Any], group: int = 2) -> str:
    path = str(folder / "data.parquet")
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def test_parquet_streams_and_indexes_the_same_records(tmp_path: Path) -> None:
    texts = [f"t{i}" for i in range(5)]
    path = _parquet(tmp_path, {"prompt": texts, "response": texts, "extra": [1.0] * 5})
    expected = [Demonstration(prompt=t, response=t) for t in texts]
    assert list(read_demonstrations([path])) == expected
    dataset = IndexedDataset([path, path], Demonstration)
    assert len(dataset) == 10
    assert [dataset[i] for i in (9, 0, 4, 5, 2)] == [expected[i] for i in (4, 0, 4, 0, 2)]
    with pytest.raises(IndexError):
        dataset[10]


def test_parquet_errors_name_the_row(tmp_path: Path) -> None:
    path = _parquet(tmp_path, {"prompt": ["a", "b", ""]})
    assert _message(read_prompts, path).startswith(":row 3: field 'prompt': is empty; ")
    with pytest.raises(DataError, match=":row 3: field 'prompt': is empty"):
        IndexedDataset([path], Prompt)[2]
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
    with pytest.raises(DataError, match="torn or not Parquet"):
        IndexedDataset([str(path)], Prompt)


def test_indexed_jsonl_over_several_files(tmp_path: Path) -> None:
    first = _jsonl(tmp_path, {"prompt": "é"}, b"", {"prompt": "b"})
    second = str(tmp_path / "second.jsonl")
    write_jsonl(second, [Prompt(prompt="c\u2028")])
    dataset = IndexedDataset([first, second], Prompt)
    assert [dataset[i].prompt for i in (2, 1, 0)] == ["c\u2028", "b", "é"]
    assert [dataset[i].prompt for i in range(len(dataset))] == ["é", "b", "c\u2028"]


@given(st.integers(1, 200), st.integers(0, 2**63), st.integers(0, 1000))
def test_shuffled_order_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    order = shuffled_order(n, seed, epoch)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))
    assert order.tolist() == shuffled_order(n, seed, epoch).tolist()


def test_shuffled_order_is_the_same_everywhere_and_differs_by_seed_and_epoch() -> None:
    assert shuffled_order(8, 1, 0).tolist() == [2, 0, 1, 4, 5, 6, 7, 3]
    orders = {tuple(shuffled_order(50, s, e).tolist()) for s in range(4) for e in range(4)}
    assert len(orders) == 16


@given(st.integers(1, 12), st.integers(0, 60), st.lists(st.integers(0, 30), max_size=6))
def test_stream_resumes_at_any_position(n: int, start: int, sizes: list[int]) -> None:
    whole = ShuffledIndex(n, 7).next_batch(start + sum(sizes))
    resumed = ShuffledIndex(n, 7, position=start)
    assert [i for size in sizes for i in resumed.next_batch(size)] == whole[start:]
    assert resumed.position == start + sum(sizes)


def test_every_epoch_holds_every_index_once() -> None:
    stream = ShuffledIndex(5, 0)
    drawn = [i for _ in range(5) for i in stream.next_batch(3)]
    assert [Counter(drawn[k : k + 5]) for k in (0, 5, 10)] == [Counter(range(5))] * 3
    with pytest.raises(ValueError, match="n >= 1"):
        ShuffledIndex(0, 0)
