"""Agreement of people: against the package `krippendorff`, and tables computed by hand."""

from __future__ import annotations

import krippendorff
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.feedback.agreement import LEAST_AGREEMENT, alpha, alpha_interval, figures_of, units_of
from deploy.feedback.answers import CONFIDENCE, MOST, STEPS, Answer, preference_of


def said(pair: str, labeler: str, preference: int | None, **more: object) -> Answer:
    kind = "skip" if preference is None else "answer"
    values = {"pair_uid": pair, "labeler": labeler, "preference": preference, "kind": kind}
    return Answer(**(values | more))  # type: ignore[arg-type]


@given(
    st.lists(st.lists(st.integers(-MOST, MOST), min_size=0, max_size=5), min_size=1, max_size=12)
)
def test_alpha_is_that_of_the_package(units: list[list[int]]) -> None:
    """Its `reliability_data` is a row for each coder, with gaps."""
    table = np.full((5, len(units)), np.nan)
    for column, unit in enumerate(units):
        table[: len(unit), column] = unit
    shared = [unit for unit in units if len(unit) > 1]
    found = alpha(units)
    if len({value for unit in shared for value in unit}) < 2:
        assert found is None
        return
    domain = list(range(-MOST, MOST + 1))
    expected = krippendorff.alpha(table, level_of_measurement="ordinal", value_domain=domain)
    assert found == pytest.approx(expected, abs=1e-12)


def test_alpha_by_hand() -> None:
    """Two people, four pairs, two values: o = [[4, 1], [1, 2]], n = (5, 3).

    One distance alone, so it cancels: alpha = 1 - (8 - 1) * 1 / (5 * 3).
    """
    assert alpha([[1, 1], [1, 1], [1, 2], [2, 2]]) == pytest.approx(1 - 7 / 15, abs=1e-12)
    assert alpha([[3, 3], [-3, -3]]) == 1.0
    # o = [[0, 2], [2, 0]], n = (2, 2): 1 - (4 - 1) * 2 / 4.
    assert alpha([[3, -3], [-3, 3]]) == pytest.approx(-0.5, abs=1e-12)
    assert alpha([[1], [2]]) is None, "nobody answered the same"
    assert alpha([[1, 1], [1, 1]]) is None, "nothing could have differed"
    with pytest.raises(ValueError, match="preference 4"):
        alpha([[4, 1]])


def test_its_interval_covers_what_many_rounds_give() -> None:
    rng = np.random.default_rng(0)

    def draw() -> list[list[int]]:
        truth = rng.integers(-MOST, MOST + 1, 60)
        return [
            [int(np.clip(t + rng.integers(-2, 3), -MOST, MOST)) for _ in range(2)] for t in truth
        ]

    many = [alpha(draw()) for _ in range(200)]
    true = float(np.mean([a for a in many if a is not None]))
    intervals = [alpha_interval(draw(), seed) for seed in range(60)]
    inside = [i.low <= true <= i.high for i in intervals if i is not None]
    assert len(inside) == 60
    assert 0.85 <= np.mean(inside) <= 1.0
    assert alpha_interval([[1]], 0) is None


def test_steps_become_preferences() -> None:
    assert [preference_of(step, first_is_left=True) for step in range(7)] == [
        3,
        2,
        1,
        0,
        -1,
        -2,
        -3,
    ]
    assert [preference_of(step, first_is_left=False) for step in range(7)] == list(range(-3, 4))
    assert len(STEPS) == 7 and CONFIDENCE == {0: 0.5, 1: 0.65, 2: 0.85, 3: 0.95}
    with pytest.raises(ValueError, match="step 7"):
        preference_of(7, first_is_left=True)
    assert said("p", "a", 2, first_is_left=False).chose_left is False
    assert said("p", "a", -2, first_is_left=False).chose_left is True
    assert said("p", "a", 0).chose_left is None


def test_figures_of_people_by_hand() -> None:
    answers = [
        said("1", "ann", 3, seconds=4.0),
        said("2", "ann", -1, seconds=6.0, first_is_left=False, flagged=True),
        said("3", "ann", 0, seconds=8.0),
        said("4", "ann", None),
        said("1", "ann", 1, occasion=1, first_is_left=False, seconds=2.0),
        said("3", "ann", 2, occasion=1, first_is_left=False, seconds=2.0),
        said("1", "bob", 1),
        said("2", "bob", 2),
    ]
    ann, bob = figures_of(answers, gold={"1": 2, "9": -1})
    assert (ann.labeler, ann.answers, ann.skips, ann.flags, ann.seconds) == ("ann", 5, 1, 1, 4.0)
    assert (ann.ties.hits, ann.ties.of) == (1, 5)
    # 1: left; 2: the second, which was left; 1 again: right; 3 again: right.
    assert (ann.left.hits, ann.left.of) == (2, 4)
    assert (ann.gold.hits, ann.gold.of) == (1, 1)
    assert (ann.others.hits, ann.others.of) == (0, 1), "known pairs say nothing of others"
    assert (ann.rest.hits, ann.rest.of) == (0, 0), "there is one other only"
    assert (ann.again.hits, ann.again.of) == (1, 2)
    assert (bob.gold.hits, bob.gold.of, bob.again.of) == (1, 1, 0)
    assert bob.again.interval is None
    assert units_of(answers, {}) == [[3, 1], [-1, 2], [0]]
    assert units_of(answers, {"1": 2}) == [[-1, 2], [0]]


def test_who_guesses_is_reported_and_who_is_good_is_not() -> None:
    """Within 40 gold pairs; a good labeler is right in 85 %."""
    rng = np.random.default_rng(1)
    reported, spared = 0, 0
    for _ in range(200):
        truth = [int(t) for t in rng.choice([-2, 2], 40)]
        guesses = [int(g) for g in rng.integers(-MOST, MOST + 1, 40)]
        good = [t if rng.random() < 0.85 else -t for t in truth]
        answers = [said(str(i), "guess", g) for i, g in enumerate(guesses)]
        answers += [said(str(i), "good", g, first_is_left=bool(i % 2)) for i, g in enumerate(good)]
        gold = {str(i): t for i, t in enumerate(truth)}
        by_good, by_guess = figures_of(answers, gold)
        reported += any("known pairs" in concern for concern in by_guess.concerns)
        spared += not by_good.concerns
    assert reported >= 195
    assert spared >= 195
    assert 0.5 < LEAST_AGREEMENT < 1


def answered(
    rng: np.random.Generator, people: int, pairs: int, each: int, right: float, *, guess: bool
) -> list[Answer]:
    """Each pair is answered by some people, honest ones but for the first, who may guess."""
    answers = []
    for i in range(pairs):
        truth = int(rng.choice([-2, 2]))
        for who in rng.permutation(people)[:each]:
            said_so = truth if rng.random() < right else -truth
            if guess and who == 0:
                said_so = int(rng.integers(-MOST, MOST + 1))
            answers.append(said(str(i), f"p{who}", said_so))
    return answers


@pytest.mark.parametrize(("people", "pairs", "shared"), [(3, 90, 60), (4, 80, 40), (8, 160, 40)])
def test_who_guesses_is_reported_without_known_pairs_too(
    people: int, pairs: int, shared: int
) -> None:
    """Within 40 shared pairs of theirs among four people, 60 among three; who is good errs in 10 %.

    Among three a third of the pairs is all that says how far the others agree.
    """
    rng, reported, wrongly = np.random.default_rng(2), 0, 0
    for _ in range(200):
        answers = answered(rng, people, pairs, 2, 0.9, guess=True)
        first, *honest = figures_of(answers, {})
        assert shared - 20 < first.others.of < shared + 20
        reported += any("agrees with others" in what for what in first.concerns)
        wrongly += any(who.concerns for who in honest)
    assert reported >= 180
    assert wrongly <= 10, "who is good suffers no more from a partner who guesses"


@pytest.mark.parametrize(
    ("people", "pairs", "each", "right"),
    [(3, 200, 2, 0.9), (3, 200, 3, 0.9), (8, 300, 2, 0.9), (8, 200, 8, 0.9), (4, 120, 2, 0.75)],
)
def test_honest_people_are_seldom_reported(
    people: int, pairs: int, each: int, right: float
) -> None:
    """Anybody of a round, in one of twenty rounds or not much more."""
    rng, alarms, rounds = np.random.default_rng(3), 0, 150
    for _ in range(rounds):
        found = figures_of(answered(rng, people, pairs, each, right, guess=False), {})
        assert all(who.rest.of >= 20 and who.others.of >= 20 for who in found), "all are judged"
        alarms += any(who.concerns for who in found)
    assert alarms <= 0.08 * rounds


def test_two_labelers_who_disagree_are_both_spared() -> None:
    """Nothing says which of them guesses; alpha tells that somebody does."""
    answers = [said(str(i), name, 2 if name == "ann" or i % 2 else -2) for i in range(40)
               for name in ("ann", "bob")]  # fmt: skip
    assert [who.others.hits for who in figures_of(answers, {})] == [20, 20]
    assert not any("agrees" in what for who in figures_of(answers, {}) for what in who.concerns)


def test_who_always_takes_one_side_is_reported() -> None:
    answers = [
        said(str(i), "left", 1 if i % 2 else -1, first_is_left=bool(i % 2)) for i in range(40)
    ]
    (found,) = figures_of(answers, {})
    assert found.concerns == ["prefers the left side in 100% of 40"]
