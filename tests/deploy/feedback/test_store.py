"""What people are asked and said: nothing is lost, doubled or asked of too many, whoever dies."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import sqlite3
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError
from deploy.feedback.answers import REASONS
from deploy.feedback.asking import Refused, first_is_left
from deploy.feedback.store import Asked, Store
from tests.deploy.feedback.rounds import plain, round_in


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Store:
    made = Store(tmp_path / "answers.sqlite", make=True, lease_s=60.0, clock=clock)
    for name in ("ann", "bob", "cid"):
        made.welcome(name)
    return made


def answer(store: Store, labeler: str, step: int = 0) -> str:
    """Answer what is asked; return the pair."""
    task = store.next_task(labeler)
    assert task is not None
    store.submit(labeler, task.key, step=step)
    return task.pair_uid


def test_each_pair_goes_to_as_many_as_wanted(store: Store) -> None:
    store.ask([Asked(uid="a"), Asked(uid="b", wanted=2), Asked(uid="c")])
    assert store.left() == 4
    said = {name: [answer(store, name)] for name in ("ann", "bob")}
    assert said == {"ann": ["a"], "bob": ["b"]}
    assert answer(store, "ann") == "b"
    assert answer(store, "bob") == "c"
    assert store.next_task("ann") is None and store.next_task("cid") is None
    assert store.left() == 0
    assert [a.pair_uid for a in store.standing()] == ["a", "b", "b", "c"]


def test_a_task_stays_until_it_is_answered_and_goes_to_others_when_it_is_not(
    store: Store, clock: Clock
) -> None:
    store.ask([Asked(uid="a"), Asked(uid="b")])
    first = store.next_task("ann")
    assert first is not None and first.pair_uid == "a"
    clock.now += 50
    again = store.next_task("ann")
    assert again is not None and again.key == first.key, "who comes back finds it, and has time"
    assert again.until == clock.now + 60
    clock.now += 61
    assert answer(store, "bob") == "a"
    with pytest.raises(Refused, match="others have answered"):
        store.submit("ann", first.key, step=1)
    assert answer(store, "ann") == "b"
    assert Counter(a.pair_uid for a in store.standing()) == {"a": 1, "b": 1}


def test_who_answers_late_is_heard_while_nobody_else_has(store: Store, clock: Clock) -> None:
    store.ask([Asked(uid="a", wanted=2), Asked(uid="b")])
    late = store.next_task("ann")
    assert late is not None
    clock.now += 100
    assert answer(store, "bob") == "a", "others are asked meanwhile"
    clock.now += 100
    store.submit("ann", late.key, step=0, seconds=1000.0)
    assert [(a.labeler, a.pair_uid) for a in store.standing()] == [("bob", "a"), ("ann", "a")]
    assert store.left() == 1
    slow = store.next_task("ann")
    assert slow is not None and slow.pair_uid == "b"
    clock.now += 100
    again = store.next_task("ann")
    assert again is not None and again.key == slow.key, "nobody was asked in her place"


def test_the_same_answer_twice_counts_once(store: Store) -> None:
    store.ask([Asked(uid="a"), Asked(uid="b")])
    task = store.next_task("ann")
    assert task is not None
    store.submit("ann", task.key, step=0, why="shorter", flagged=True, seconds=-5)
    store.submit("ann", task.key, step=0)
    with pytest.raises(Refused, match="undo that answer"):
        store.submit("ann", task.key, step=6)
    (standing,) = store.standing()
    assert (standing.why, standing.flagged, standing.seconds) == ("shorter", True, 0.0)
    assert standing.preference == (3 if task.first_is_left else -3)
    with pytest.raises(Refused, match="somebody else"):
        store.submit("bob", task.key, step=0)


def test_time_is_at_most_what_has_passed(store: Store, clock: Clock) -> None:
    store.ask(Asked(uid=uid) for uid in "abcd")
    cases = ((7.5, 30.0, 7.5), (99.0, 30.0, 30.0), (float("nan"), 3.0, 0.0), (5.0, -9.0, 0.0))
    for told, passed, kept in cases:
        task = store.next_task("ann")
        assert task is not None
        clock.now += passed
        store.submit("ann", task.key, step=0, seconds=told)
        assert store.last_of("ann", 1)[0].seconds == kept


def test_what_is_skipped_goes_to_others(store: Store) -> None:
    store.ask([Asked(uid="a"), Asked(uid="b")])
    task = store.next_task("ann")
    assert task is not None
    for reason in ("", "no reason"):
        with pytest.raises(Refused, match="a skip needs a reason"):
            store.submit("ann", task.key, step=None, why=reason)
    with pytest.raises(Refused, match="no such answer"):
        store.submit("ann", task.key, step=7)
    store.submit("ann", task.key, step=None, why=f"{REASONS[0]}: no idea")
    assert answer(store, "ann") == "b", "not again to the same"
    assert store.next_task("ann") is None
    assert answer(store, "bob") == "a"
    undone = store.undo("ann")
    assert undone is not None and undone.pair_uid == "b"
    store.submit("ann", undone.key, step=2)
    undone = store.undo("ann")
    assert undone is not None and undone.pair_uid == "b", "what others have taken is passed over"


def test_a_pair_to_practise_with_counts_once_and_in_its_turn(store: Store) -> None:
    store.welcome("ann")
    for number in (1, 0, 0, 2):
        store.note_practised("ann", number)
    assert store.practised("ann") == 1 and store.practised("bob") == 0


def test_what_is_sent_twice_undoes_one(store: Store) -> None:
    store.ask([Asked(uid="a"), Asked(uid="b"), Asked(uid="c")])
    for _ in range(3):
        answer(store, "ann")
    last = store.last_number("ann")
    assert store.undo("ann", last) is not None
    assert store.undo("ann", last) is None
    assert len(store.standing()) == 2


def test_a_pair_is_shown_again_with_its_sides_swapped(store: Store) -> None:
    store.ask([Asked(uid="x", again=True), *(Asked(uid=f"{n}") for n in range(20))])
    said = [answer(store, "ann") for _ in range(21)]
    assert said[0] == "x" and said.count("x") == 2 and said.index("x", 1) >= 9
    first, second = (a for a in store.standing() if a.pair_uid == "x")
    assert (first.occasion, second.occasion) == (0, 1)
    assert first.first_is_left != second.first_is_left
    assert answer(store, "ann") == "19"
    assert store.next_task("ann") is None


def test_known_pairs_go_to_everybody_now_and_then(store: Store) -> None:
    known = [Asked(uid=f"g{i}", wanted=None) for i in range(3)]
    store.ask([*known, *(Asked(uid=f"{i:02}", wanted=3) for i in range(20))])
    assert store.left() == 60
    for name in ("ann", "bob", "cid"):
        said = []
        while store.next_task(name) is not None:
            said.append(answer(store, name))
        places = [place for place, pair in enumerate(said) if pair.startswith("g")]
        assert len(said) == 23 and len(places) == 3
        assert places[0] >= 6 and all(b - a >= 6 for a, b in itertools.pairwise(places))
    assert store.left() == 0


def test_undo_goes_back_step_by_step_over_a_restart(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "answers.sqlite"
    store = Store(path, make=True, clock=clock)
    store.welcome("ann")
    store.ask(Asked(uid=f"{n:02}") for n in range(30))
    said = [answer(store, "ann", step=0) for _ in range(30)]
    for place, pair in enumerate(reversed(said[-20:])):
        if place == 7:
            store.close()
            store = Store(path, clock=clock)
        task = store.undo("ann")
        assert task is not None and task.pair_uid == pair
    assert [a.pair_uid for a in store.standing()] == said[:10]
    assert store.left() == 20
    for pair in said[10:]:
        assert answer(store, "ann", step=6) == pair
    assert len(store.standing()) == 30
    assert len(store.history()) == 30 + 20 + 20, "nothing is ever taken out"
    assert store.undo("bob") is None
    by_pair = {a.pair_uid: a for a in store.standing()}
    assert all((by_pair[p].chose_left is True) == (p in said[:10]) for p in said)


def test_sides_are_even_and_fixed() -> None:
    left = sum(first_is_left(f"pair-{i}", f"labeler-{i % 7}", 0) for i in range(10_000))
    assert abs(left - 5000) < 3 * 50
    assert all(
        first_is_left(f"{i}", "ann", 0) != first_is_left(f"{i}", "ann", 1) for i in range(50)
    )


Move = tuple[str, str]
moves = st.lists(
    st.tuples(
        st.sampled_from(["ann", "bob", "cid"]),
        st.sampled_from(["ask", "answer", "skip", "twice", "undo", "wait", "late"]),
    ),
    max_size=60,
)


@settings(max_examples=60)
@given(moves, st.lists(st.sampled_from([1, 2, 3, None]), min_size=1, max_size=6))
def test_whatever_people_do_no_pair_is_asked_of_too_many(
    tmp_path_factory: pytest.TempPathFactory, done: list[Move], wanted: list[int | None]
) -> None:
    clock = Clock()
    path = tmp_path_factory.mktemp("store") / "a.sqlite"
    store = Store(path, make=True, lease_s=60.0, clock=clock)
    for name in ("ann", "bob", "cid"):
        store.welcome(name)
    store.ask(Asked(uid=f"{i}", wanted=n, again=i % 2 == 0) for i, n in enumerate(wanted))
    for name, move in done:
        clock.now += 1
        if move == "wait":
            clock.now += 61
        elif move == "undo":
            store.undo(name)
        elif move == "late" and (task := store.next_task(name)) is not None:
            clock.now += 100
            store.next_task("cid" if name != "cid" else "ann")
            with suppress(Refused):
                store.submit(name, task.key, step=1)
        elif (task := store.next_task(name)) is not None and move != "ask":
            step = None if move == "skip" else 2
            for _ in range(2 if move == "twice" else 1):
                store.submit(name, task.key, step=step, why=REASONS[1])
    standing = store.standing()
    for name in ("ann", "bob", "cid"):
        own = [a for a in standing if a.labeler == name]
        assert store.answered(name) == sum(a.kind == "answer" for a in own)
        assert store.last_of(name, 99) == own[::-1]
        assert (store.last_number(name) > 0) >= any(a.kind == "answer" for a in own)
    words = Counter((a.pair_uid, a.labeler, a.occasion) for a in standing)
    assert set(words.values()) <= {1}, "one word of each on each"
    answered = Counter(a.pair_uid for a in standing if a.kind == "answer" and a.occasion == 0)
    assert all(n is None or answered[f"{i}"] <= n for i, n in enumerate(wanted)), (
        "not more than wanted"
    )
    # What is left, three people can do, as far as each may answer a pair once.
    clock.now += 61
    for name in ("ann", "bob", "cid"):
        while (task := store.next_task(name)) is not None:
            store.submit(name, task.key, step=3)
    skipped = Counter(a.pair_uid for a in store.standing() if a.kind == "skip" and a.occasion == 0)
    answered = Counter(
        a.pair_uid for a in store.standing() if a.kind == "answer" and a.occasion == 0
    )
    for i, n in enumerate(wanted):
        assert answered[f"{i}"] == min(3 if n is None else n, 3 - skipped[f"{i}"])
    store.close()


def _labels(path: str, name: str, seed: int, pairs: int) -> None:
    """One labeler's process: answers, sometimes twice, until nothing is left or it is killed."""
    rng = random.Random(seed)
    while True:
        store = Store(Path(path), lease_s=2.0)
        store.welcome(name)
        for _ in range(rng.randrange(5, 40)):
            task = store.next_task(name)
            if task is None:
                if store.left() == 0:
                    return
                time.sleep(0.02)
                continue
            step = rng.randrange(7)
            for _ in range(rng.choice((1, 1, 1, 2))):
                store.submit(name, task.key, step=step)
        store.close()


@pytest.mark.chaos
def test_eight_people_and_five_kills(tmp_path: Path) -> None:
    """Processes that write are killed at any moment: the file is whole, and the books balance."""
    path, pairs = tmp_path / "answers.sqlite", 300
    store = Store(path, make=True)
    store.ask(Asked(uid=f"{i:04}", wanted=2) for i in range(pairs))
    context = multiprocessing.get_context("spawn")
    rng = random.Random(0)

    def start(name: str, seed: int) -> Any:
        process = context.Process(target=_labels, args=(str(path), name, seed, pairs))
        process.start()
        return process

    people = {f"p{i}": start(f"p{i}", i) for i in range(8)}
    kills = 0
    deadline = time.monotonic() + 120
    while any(p.is_alive() for p in people.values()):
        assert time.monotonic() < deadline
        time.sleep(rng.uniform(0.2, 0.5))
        alive = sorted(name for name, p in people.items() if p.is_alive())
        if kills < 5 and alive:
            name = rng.choice(alive)
            os.kill(people[name].pid, signal.SIGKILL)
            people[name].join()
            kills += 1
            people[name] = start(name, 100 + kills)
    assert kills == 5
    standing = store.standing()
    assert len({(a.pair_uid, a.labeler) for a in standing}) == len(standing) == 2 * pairs
    assert set(Counter(a.pair_uid for a in standing).values()) == {2}
    assert store.left() == 0
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()
    store.close()


def test_a_file_that_is_none_is_one_line(tmp_path: Path) -> None:
    torn = tmp_path / "torn.sqlite"
    with pytest.raises(DataError, match="is not there"):
        Store(torn)
    store = Store(torn, make=True)
    store.welcome("ann")
    store.ask(Asked(uid=f"{i}") for i in range(2000))
    store.close()
    raw = torn.read_bytes()
    for name, content in (
        ("text", b"no database at all, but long enough to be looked at " * 4),
        ("cut", raw[: len(raw) // 2]),
        ("flipped", raw[:100] + bytes(200) + raw[300:]),
    ):
        path = tmp_path / f"{name}.sqlite"
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}\.sqlite: damaged"):
            made = Store(path)
            made.welcome("bob")
            made.next_task("bob")
            made.standing()
            made.left()
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE notes (text)")
    db.close()
    with pytest.raises(DataError, match="of this version"):
        Store(other)


@pytest.mark.parametrize("text", ["", "ünï\u202e", "a\x00b", "x" * 1_000_000])
def test_any_text_comes_back(store: Store, text: str) -> None:
    store.ask([Asked(uid="a")])
    task = store.next_task("ann")
    assert task is not None
    store.submit("ann", task.key, step=3, why=text)
    assert store.standing()[0].why == text


def test_known_pairs_are_found_without_reading_the_round(tmp_path: Path) -> None:
    """It is asked before every pair, while nobody else may write."""
    store = Store(round_in(tmp_path, plain(3)).answers)
    asked = "SELECT p.uid FROM pairs p WHERE p.wanted = 0 ORDER BY p.place LIMIT 1"
    (plan,) = store._file.rows(f"EXPLAIN QUERY PLAN {asked}")
    assert "known_pairs" in plan["detail"]
    store.close()
