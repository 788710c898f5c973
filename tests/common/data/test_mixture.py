"""Prompts of several sources come in the shares that a recipe gives them, and can be resumed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config.run import DataConfig, SourceConfig
from common.data.mixture import MixedIndex, Part, parts_of, prompt_columns, source_of
from common.data.prompts import EncodedPrompt, PromptStream
from common.data.records import Prompt, read_prompts
from common.errors import DataError

weights = st.floats(0.01, 100.0)


def parts(*sizes: int, epochs: int | None = None, weight: float = 1.0) -> list[Part]:
    made, at = [], 0
    for number, size in enumerate(sizes):
        rows = tuple(range(at, at + size))
        made.append(Part(name=f"s{number}", weight=weight, rows=rows, epochs=epochs))
        at += size
    return made


@given(st.lists(weights, min_size=1, max_size=6), st.integers(1, 400))
def test_every_stretch_has_the_shares(of_parts: list[float], draws: int) -> None:
    mixed = [
        Part(name=str(at), weight=weight, rows=(at,), epochs=None)
        for at, weight in enumerate(of_parts)
    ]
    counts = Counter(MixedIndex(mixed, seed=0).next_batch(draws))
    for at, weight in enumerate(of_parts):
        share = draws * weight / sum(of_parts)
        assert abs(counts[at] - share) < len(of_parts), (at, counts[at], share)


def test_shares_hold_exactly_where_they_can() -> None:
    of_weight = zip(parts(5, 5, 5), (2.0, 1.0, 1.0), strict=True)
    mixed = [Part(name=p.name, weight=w, rows=p.rows, epochs=None) for p, w in of_weight]
    stream = MixedIndex(mixed, seed=1)
    for _ in range(20):
        assert Counter(place // 5 for place in stream.next_batch(8)) == {0: 4, 1: 2, 2: 2}


@given(st.integers(0, 60), st.integers(1, 20), st.booleans())
def test_one_integer_resumes_it(position: int, more: int, ends: bool) -> None:
    mixed = parts(3, 7, 11, epochs=4 if ends else None)
    whole = MixedIndex(mixed, seed=3)
    whole.next_batch(position)
    again = MixedIndex(mixed, seed=3, position=position)
    assert again.position == whole.position == position
    assert again.next_batch(more) == whole.next_batch(more)


def test_each_epoch_of_a_source_takes_all_of_it_in_another_order() -> None:
    drawn = MixedIndex(parts(9, 4), seed=0).next_batch(72)
    first = [place for place in drawn if place < 9]
    assert sorted(first[:9]) == sorted(first[9:18]) == list(range(9))
    assert first[:9] != first[9:18]


def test_a_source_that_is_used_up_leaves_its_part_to_the_others() -> None:
    few, many = parts(2, 50)
    limited = Part(name=few.name, weight=1.0, rows=few.rows, epochs=3)
    drawn = MixedIndex([limited, many], seed=0).next_batch(40)
    assert Counter(drawn)[0] == Counter(drawn)[1] == 3
    assert all(place < 2 for place in drawn[0:12:2]), "in turns until then"
    assert all(place >= 2 for place in drawn[12:])
    with pytest.raises(IndexError, match="used up after 6 prompts"):
        MixedIndex([limited], seed=0).next_batch(7)


def test_a_recipe_chooses_of_each_source() -> None:
    mixture = {"b": SourceConfig(weight=2.0, limit=1), "a": SourceConfig(epochs=2)}
    first, second = parts_of(["a", "b", "a", "b"], mixture, draws=10)
    assert first == Part(name="b", weight=2.0, rows=(1,), epochs=None)
    assert second == Part(name="a", weight=1.0, rows=(0, 2), epochs=2)


@pytest.mark.parametrize(
    ("mixture", "draws", "says"),
    [
        ({"a": {}}, 1, r"does not name the source 'b', of which there are 1 prompts"),
        ({"a": {}, "b": {}, "c": {}}, 1, r"data\.mixture\.c: no prompt .*; there are a, b$"),
        ({"a": {"epochs": 2}, "b": {"epochs": 1}}, 6, r"give 5 prompts .* takes 6 "),
        ({"a": {"epochs": 3, "limit": 1}, "b": {"epochs": 1}}, 5, r"give 4 prompts"),
    ],
)
def test_what_cannot_be_mixed_is_refused(
    mixture: dict[str, dict[str, int]], draws: int, says: str
) -> None:
    wanted = {name: SourceConfig.model_validate(values) for name, values in mixture.items()}
    with pytest.raises(DataError, match=says):
        parts_of(["a", "b", "a"], wanted, draws)


def test_a_source_is_a_file_or_what_a_column_says(tmp_path: Path) -> None:
    path = tmp_path / "times.table.jsonl"
    path.write_text(json.dumps({"prompt": "6 x 7", "of": "sums"}) + "\n", encoding="utf8")
    (prompt,) = read_prompts([str(path)], columns=("of",))
    assert source_of(prompt, None) == "times.table"
    assert source_of(prompt, "of") == "sums"
    with pytest.raises(DataError, match=r"times\.table\.jsonl:1: column 'from': should name"):
        source_of(prompt, "from")
    with pytest.raises(DataError, match="should name"):
        source_of(Prompt(prompt="p", columns={"of": 3}), "of")


def test_the_column_is_read_beside_those_of_scorers() -> None:
    assert prompt_columns(DataConfig()) is None
    assert prompt_columns(DataConfig(columns=("answer",))) == ("answer",)
    both = DataConfig(columns=("answer",), source_column="of")
    assert prompt_columns(both) == ("answer", "of")
    assert prompt_columns(DataConfig(columns=("of",), source_column="of")) == ("of",)


def test_requests_name_their_source() -> None:
    prompts = [EncodedPrompt(uid=s, text=s, ids=[1], source=s) for s in ("a", "b")]
    mixture = {"a": SourceConfig(weight=3.0), "b": SourceConfig()}
    drawn = parts_of([p.source or "" for p in prompts], mixture, draws=8)
    requests = PromptStream(prompts, seed=0, parts=drawn).requests(0, 8, 2)
    assert Counter(request.source for request in requests) == {"a": 12, "b": 4}
