from __future__ import annotations

import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deploy.quickstart.harvest import Pair, harvest
from deploy.quickstart.labeler import (
    LABELER,
    MARGIN,
    aboutness,
    form,
    label,
    naturalness,
    quality,
    third_persons,
    verb_lexicon,
)

VERBS = frozenset({"return", "create", "check", "convert", "compute"})
USER = Pair(
    name="create_user",
    params=("email", "password"),
    signature="def create_user(email, password):",
    docstring="unseen by the labeler",
)
HUMAN = "Create a user account for an address."


def test_lexicon_is_learned_from_the_lines() -> None:
    lines = [
        "Return the path.",
        "Return a list.",
        "Returns paths.",
        "Copy the file.",
        "Copy a file.",
        "Copies files.",
        "Name of the file.",  # a noun with its plural
        "Name of the path.",
        "Names of files.",
        "The file.",
        "The path.",
        "Freeze the weights.",  # only once before an object
        "Freezes weights.",
        "Sort the list.",  # never in the third person
        "Sort a list.",
        "In the file.",
        "In a file.",
        "Ins and outs.",
        "In",
        "",
    ]
    assert verb_lexicon(lines) == {"return", "copy"}


@pytest.mark.parametrize(
    ("verb", "third"), [("copy", "copies"), ("display", "displays"), ("pass", "passes"),
                        ("fetch", "fetches"), ("do", "does"), ("make", "makes")]
)  # fmt: skip
def test_third_person(verb: str, third: str) -> None:
    assert third_persons(verb) == (third,)


@pytest.mark.parametrize(
    ("line", "points"),
    [
        ("Create a user.", 1.0),
        ("Creates a user.", 0.5),
        ("This creates a user.", 0.5),
        ("A user.", 0.5),
        ("create a user.", 0.75),
        ("CREATE a user.", 0.75),
        ("Create a user", 0.75),
        ("Create a user...", 0.75),
        ("creates a user", 0.0),
        ("Create create_user(email).", 0.5),
        ("Create\na user.", 0.0),
        ("", 0.0),
    ],
)
def test_form(line: str, points: float) -> None:
    assert form(line, USER, VERBS) == points


def test_line_about_the_function_beats_a_line_about_another() -> None:
    assert aboutness(HUMAN, USER, VERBS) == 1.0
    assert aboutness("Return the shape of a matrix.", USER, VERBS) == 0.0
    assert 0 < aboutness("Return the user and a matrix.", USER, VERBS) < 1


def test_words_are_matched_by_stem_and_abbreviation() -> None:
    pair = replace(USER, name="initConfigDir", params=())
    assert aboutness("Initialize configured directories for use.", pair, VERBS) == 1.0
    getter = replace(USER, name="get_path", params=())
    assert aboutness("Return the path of this thing.", getter, VERBS) == 1.0


def test_empty_name_is_neutral() -> None:
    pair = replace(USER, name="f", params=("x", "args"))
    assert aboutness(HUMAN, pair, VERBS) == aboutness("Return it now.", pair, VERBS) == 0.5


@pytest.mark.parametrize(
    "trick",
    [
        "",
        "Create.",
        "Create user.",  # restates
        "Return the create user.",  # pastes the name
        "Create user email password.",  # lists every word
        "Create the user the user the user the user.",
        "Create user user user user user user.",
        "Create create create a user user user.",
        "create user email password create user email password",
        "Return the value of the object.",  # says nothing
        "Create a user matrix shape table value list file data type index.",  # padding
        "Create a user " + "of the account " * 12 + "now.",
        "Create a user account.\nCreate a user account.",
        "This method creates a user account.",
        "create_user(email, password).",
    ],
)
def test_tricks_score_below_a_human_line(trick: str) -> None:
    assert quality(HUMAN, USER, VERBS) == 1.0
    assert quality(trick, USER, VERBS) < 1.0 - MARGIN


def test_naming_more_than_enough_gains_nothing() -> None:
    more = "Create a user account with an email and a password."
    assert quality(more, USER, VERBS) == quality(HUMAN, USER, VERBS)


def test_naturalness_of_length_and_repeats() -> None:
    assert naturalness("Return a string as a byte string.") == 1.0
    assert naturalness("Close it.") == pytest.approx(2 / 3)
    assert naturalness("word the " * 16) < 0.01
    assert naturalness("the of a") == naturalness("...") == 0.0
    words = [naturalness(" ".join(f"w{chr(97 + i)}x of" for i in range(n))) for n in (8, 9, 13)]
    assert words == [1.0, pytest.approx(16 / 18), pytest.approx(16 / 26)]


def test_quality_never_reads_the_docstring() -> None:
    other = replace(USER, docstring=HUMAN)
    assert quality(HUMAN, USER, VERBS) == quality(HUMAN, other, VERBS)


def test_label_prefers_the_better_in_either_order() -> None:
    bad = "returns a matrix"
    rng = np.random.default_rng(0)
    first = label(USER, HUMAN, bad, verbs=VERBS, rng=rng)
    second = label(USER, bad, HUMAN, verbs=VERBS, rng=rng)
    assert first is not None and first == second
    assert (first.chosen, first.rejected, first.labeler) == (HUMAN, bad, LABELER)
    assert first.prompt == 'def create_user(email, password):\n    """'
    assert first.confidence > 0.99


def test_confidence_grows_with_the_difference_and_close_lines_tie() -> None:
    rng = np.random.default_rng(0)
    lines = ["Create a user account", "Creates a user account.", "create"]
    labels = [label(USER, HUMAN, line, verbs=VERBS, rng=rng) for line in lines]
    confidences = [found.confidence for found in labels if found is not None]
    assert len(confidences) == 3 and confidences == sorted(set(confidences))
    assert all(0.5 < c <= 1 for c in confidences)
    assert label(USER, HUMAN, HUMAN + " ", verbs=VERBS, rng=rng) is None
    assert label(USER, HUMAN, lines[0], verbs=VERBS, rng=rng, margin=0.5) is None


def test_noise_turns_its_share_of_labels_and_is_seeded() -> None:
    def turned(noise: float, seed: int) -> list[bool]:
        rng = np.random.default_rng(seed)
        made = [label(USER, HUMAN, "a", verbs=VERBS, rng=rng, noise=noise) for _ in range(2000)]
        return [found is not None and found.chosen == "a" for found in made]

    assert sum(turned(0.0, 0)) == 0
    assert sum(turned(0.2, 0)) == pytest.approx(400, abs=70)
    assert turned(0.2, 0) == turned(0.2, 0) != turned(0.2, 1)


def test_ties_do_not_shift_the_noise() -> None:
    ones, other = np.random.default_rng(3), np.random.default_rng(3)
    label(USER, HUMAN, HUMAN, verbs=VERBS, rng=ones)
    label(USER, HUMAN, "a", verbs=VERBS, rng=other)
    assert ones.random() == other.random()


def test_people_agree_with_the_labeler_on_real_lines() -> None:
    stdlib = Path(sysconfig.get_path("stdlib"))
    roots = [stdlib / name for name in ("asyncio", "email", "importlib", "unittest", "tkinter")]
    pairs = harvest(roots, workers=1)
    verbs = verb_lexicon([pair.docstring for pair in pairs])
    assert {"return", "set", "get"} <= verbs
    assert not verbs & {"a", "the", "this", "returns", "if", "name"}
    order = np.random.default_rng(0).permutation(len(pairs))
    own = np.array([quality(pair.docstring, pair, verbs) for pair in pairs])
    foreign = [quality(pairs[k].docstring, p, verbs) for k, p in zip(order, pairs, strict=True)]
    difference = own - np.array(foreign)
    wins, losses = (difference > MARGIN).sum(), (difference < -MARGIN).sum()
    assert wins / (wins + losses) > 0.75
