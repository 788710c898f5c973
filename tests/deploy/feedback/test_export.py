"""From pairs and answers to comparisons, and back through the readers of every other stage."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import pytest

from common.config.feedback import RoundConfig
from common.data.records import Comparison, read_comparisons, write_jsonl
from common.errors import ConfigError, DataError, StorageError
from common.run_folder import RunFolder
from deploy.feedback.answers import Answer
from deploy.feedback.export import comparisons, split_of
from deploy.feedback.pairs import Pair, Response, read_pairs, write_pairs
from deploy.feedback.propose import alike, known_pairs
from deploy.feedback.rounds import export_round, read_settings, round_of, rounds_of
from deploy.feedback.standing import lines_of, standing_of
from deploy.feedback.store import Store
from tests.deploy.feedback.rounds import pairs_of, plain, round_in

ODD = ("ünï\u202e\n\ttext", "a\x00b", "x" * 1_000_000)


def said(pair: Pair, labeler: str, preference: int | None, occasion: int = 0) -> Answer:
    kind = "skip" if preference is None else "answer"
    return Answer(
        pair_uid=pair.uid,
        labeler=labeler,
        kind=kind,
        preference=preference,
        occasion=occasion,
        seconds=2.5,
    )


def test_answers_become_rows_or_their_mean() -> None:
    one, two, three, known = plain(4)
    known = Pair(prompt=known.prompt, first=known.first, second=known.second, gold=-3)
    answers = [
        said(one, "ann", 3),
        said(one, "bob", -1),
        said(two, "ann", 0),
        said(three, "ann", None),
        said(known, "ann", 3),
        said(two, "ann", -3, occasion=1),
    ]
    rows = list(comparisons([one, two, three, known], answers, number=4))
    assert [(r.chosen, r.rejected, r.labeler, r.confidence) for r in rows] == [
        (one.first.text, one.second.text, "ann", 0.95),
        (one.second.text, one.first.text, "bob", 0.65),
        (two.first.text, two.second.text, "ann", 0.5),
    ]
    assert {(r.pair_uid, r.round, r.seconds) for r in rows} == {
        (one.uid, 4, 2.5),
        (two.uid, 4, 2.5),
    }
    assert {r.split for r in rows} <= {"train", "valid1", "valid2"}
    mean = list(comparisons([one, two], answers, how="mean"))
    assert [(r.chosen, r.labeler, r.confidence) for r in mean] == [
        (one.first.text, "ann+bob", pytest.approx((0.95 + 0.35) / 2)),
        (two.first.text, "ann", 0.5),
    ]
    assert [r.labeler for r in comparisons([one, two], answers, without={"ann"})] == ["bob"]


def test_a_prompt_is_for_one_thing_in_every_round() -> None:
    splits = [split_of(f"prompt {i}") for i in range(10_000)]
    assert splits == [split_of(f"prompt {i}") for i in range(10_000)]
    counts = Counter(splits)
    for split, share in (("train", 0.8), ("valid1", 0.1), ("valid2", 0.1)):
        sigma = (10_000 * share * (1 - share)) ** 0.5
        assert abs(counts[split] - 10_000 * share) < 4 * sigma
    asked = {"role": "user", "content": "prompt"}
    assert {split_of("prompt", [asked, {**asked, "content": str(i)}]) for i in range(99)} == {
        *counts
    }


def test_a_round_trip_of_any_text(tmp_path: Path) -> None:
    pairs = pairs_of([(text, f"{text} one", f"{text} two") for text in ODD])
    write_pairs(tmp_path / "pairs.parquet", pairs)
    assert read_pairs(tmp_path / "pairs.parquet") == pairs
    rows = list(comparisons(pairs, [said(pair, "ann", 2) for pair in pairs], number=1))
    write_jsonl(tmp_path / "c.jsonl", rows)
    assert list(read_comparisons([str(tmp_path / "c.jsonl")])) == rows


def test_a_conversation_stays_one(tmp_path: Path) -> None:
    messages = ({"role": "user", "content": "hello"},)
    pair = Pair(
        prompt="hello",
        messages=messages,
        first=Response(text="hi"),
        second=Response(text="good day"),
    )
    write_pairs(tmp_path / "p.parquet", [pair])
    assert read_pairs(tmp_path / "p.parquet") == [pair]
    write_jsonl(tmp_path / "c.jsonl", comparisons([pair], [said(pair, "ann", -3)], number=2))
    (read,) = read_comparisons([str(tmp_path / "c.jsonl")])
    assert (read.chosen, read.messages, read.round) == ("good day", messages, 2)


def test_what_rounds_add_is_checked_and_not_written_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    write_jsonl(path, [Comparison(prompt="p", chosen="a", rejected="b")])
    assert json.loads(path.read_text()).keys() == {
        "uid",
        "prompt",
        "chosen",
        "rejected",
        "labeler",
        "confidence",
    }
    for field, value in (
        *(("round", -1), ("round", "one"), ("round", 1.5), ("round", True)),
        *(("seconds", "long"), ("seconds", -2.0), ("pair_uid", 7)),
        *(("pair_id", "x"), ("second", "y"), ("split", "")),
    ):
        row = {"prompt": "p", "chosen": "a", "rejected": "b", field: value}
        path.write_text(json.dumps(row) + "\n")
        (read,) = read_comparisons([str(path)])
        assert (read.pair_uid, read.round, read.seconds) == ("", 0, 0.0), "of other people"


def test_a_round_is_exported_and_looked_at(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    gold = known_pairs([Comparison(prompt="q", chosen="good", rejected="bad")], 0, "gold")
    made = round_in(tmp_path, plain(5), gold, guidelines="be kind")
    assert rounds_of(folder) == [1]
    with pytest.raises(ConfigError, match="nothing is answered"):
        export_round(made, read_settings(made.settings))
    store = Store(made.answers)
    store.welcome("ann")
    pairs = {pair.uid: pair for pair in read_pairs(made.pairs)}
    while (task := store.next_task("ann")) is not None:
        first_better = pairs[task.pair_uid].gold != -3
        store.submit("ann", task.key, step=1 if task.first_is_left == first_better else 5)
    store.close()
    chosen, settings = round_of(folder, None)
    assert export_round(chosen, settings) == 5
    assert {c.confidence for c in read_comparisons([str(chosen.comparisons)])} == {0.85}
    assert len(chosen.raw.read_text().splitlines()) >= 6
    standing = standing_of(chosen, settings)
    assert (standing.pairs, standing.answered, standing.labelers[0].gold.hits) == (6, 6, 1)
    assert standing.concerns == [] and standing.alpha is None
    # The model prefers the second response of each pair, ann the first; all was a moment ago.
    assert (standing.model.hits, standing.model.of) == (0, 5)
    assert standing.per_hour is not None and standing.per_hour > 5 * 60, "all within a minute"
    later = standing_of(chosen, settings, time.time() + 1000)
    assert later.per_hour == pytest.approx(5 * 3600 / 1000, rel=0.01), "without gold and repeats"
    assert standing_of(chosen, settings, time.time() + 3600).per_hour is None
    assert "6 of 6 pairs answered" in "".join(
        part if isinstance(part, str) else part[0] for part in lines_of(standing)[0]
    )
    assert json.loads(json.dumps(standing.facts()))["round"] == 1
    with pytest.raises(ConfigError, match="--without cid: has answered nothing; ann have"):
        export_round(chosen, settings, without=["cid"])
    with pytest.raises(ConfigError, match="no round 7; there are 1"):
        round_of(folder, 7)
    made.settings.write_text("number: many")
    with pytest.raises(DataError, match=r"round\.yaml: damaged"):
        round_of(folder, 1)
    with pytest.raises(ConfigError, match="feedback propose"):
        round_of(RunFolder(tmp_path / "none"), None)


def test_shares_are_exact(tmp_path: Path) -> None:
    gold = [
        Pair(prompt=f"g{i}", first=Response(text="a"), second=Response(text="b"), gold=3)
        for i in range(20)
    ]
    made = round_in(tmp_path, plain(80), gold, overlap_share=0.5)
    assert sum(pair.gold is not None for pair in read_pairs(made.pairs)) == 20
    store = Store(made.answers)
    assert store.left() == 80 + 40, "exactly half of the pairs goes to two"
    store.close()
    assert read_settings(made.settings) == RoundConfig(number=1, pairs=80, overlap_share=0.5)


def test_a_round_is_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "ask", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full")))
        with pytest.raises(StorageError, match="round-001: cannot be written"):
            round_in(tmp_path, plain(2))
    assert rounds_of(folder) == [] and list(folder.feedback.iterdir()) == []
    round_in(tmp_path, plain(2))
    with pytest.raises(StorageError, match="round-001"):
        round_in(tmp_path, plain(2))
    assert rounds_of(folder) == [1]


def test_what_looks_alike_is_no_pair() -> None:
    assert alike("The pond.", " the  POND. ")
    assert alike("a " * 200, "a " * 199 + "b")
    assert not alike("The pond is deep.", "A lake of salt water.")
    with pytest.raises(ValueError, match="two different"):
        Pair(prompt="p", first=Response(text="a"), second=Response(text="a"))
    with pytest.raises(ValueError, match="say something"):
        Pair(prompt="p", first=Response(text=""), second=Response(text="a"))
    unsure = Comparison(prompt="q", chosen="good", rejected="bad", confidence=0.6, place="g:1")
    with pytest.raises(ConfigError, match="g:1: is not known for certain"):
        known_pairs([unsure], 0, "gold")
    with pytest.raises(ValueError, match="gold 5"):
        Pair(prompt="p", first=Response(text="a"), second=Response(text="b"), gold=5)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"text"])
def test_a_damaged_file_of_pairs_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pairs.parquet"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"pairs\.parquet: damaged"):
        read_pairs(path)
    path.unlink()
    with pytest.raises(DataError, match="no such round"):
        read_pairs(path)
