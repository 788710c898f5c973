"""How far people agree: with each other, with what is known, with themselves.

Pure functions over standing answers. Krippendorff's alpha for ordinal values (Krippendorff 2011,
"Computing Krippendorff's Alpha-Reliability"): 1 is perfect agreement, 0 what chance would give.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import Final

import numpy as np
import numpy.typing as npt

from deploy.evaluation.intervals import Interval, wilson_interval
from deploy.feedback.answers import MOST, Answer, of_kind

LEAST_AGREEMENT: Final = 0.75
"""A labeler who is right on less of the known pairs is reported: who guesses is right on 43 %.

Agreement with others is shown and not judged: of honest people it is 63 to 73 %, and who guesses
pulls down that of a good partner."""
_SIGMAS: Final = 4.0
_VALUES: Final = 2 * MOST + 1

Counts = npt.NDArray[np.float64]


def alpha(units: Sequence[Sequence[int]]) -> float | None:
    """Return Krippendorff's alpha for ordinal values.

    Args:
        units: of each pair the preferences that it was given, -3 ... 3, by any people; those with
            less than two say nothing.

    Returns:
        None where nothing can be said: no pair has two answers, or all answers are alike.
    """
    return _alpha(_counts(units))


def alpha_interval(
    units: Sequence[Sequence[int]], seed: int, n: int = 1000, confidence: float = 0.95
) -> Interval | None:
    """Return alpha and its percentile-bootstrap interval over pairs; None where alpha is none."""
    counts = _counts(units)
    whole = _alpha(counts)
    if whole is None:
        return None
    rng = np.random.default_rng(seed)
    drawn = (_alpha(counts[rng.integers(0, len(counts), len(counts))]) for _ in range(n))
    found = [value for value in drawn if value is not None]
    tail = (1 - confidence) / 2
    low, high = np.quantile(found or [whole], [tail, 1 - tail])
    return Interval(mean=whole, low=float(low), high=float(high))


def _counts(units: Sequence[Sequence[int]]) -> Counts:
    """Return how often each pair was given each value, [U, 7]; of those with two answers at least.

    Raises:
        ValueError: a value is none of -3 ... 3.
    """
    shared = [unit for unit in units if len(unit) > 1]
    counts = np.zeros((len(shared), _VALUES))
    for row, unit in enumerate(shared):
        for value in unit:
            if not -MOST <= value <= MOST:
                raise ValueError(f"preference {value}: should be {-MOST} ... {MOST}")
            counts[row, value + MOST] += 1
    return counts


def _alpha(counts: Counts) -> float | None:
    """Compute alpha by the matrix of coincidences."""
    if not len(counts):
        return None
    answers = counts.sum(1)
    # o_ck: pairs of answers within a unit, each unit weighing as many answers as it has.
    weighted = counts / (answers - 1)[:, None]
    coincidences = weighted.T @ counts - np.diag(weighted.sum(0))
    totals = coincidences.sum(1)
    n = totals.sum()
    # Ordinal distance: answers from one value to the other, both ends counted half.
    upto = np.cumsum(totals)
    between = upto[None, :] - upto[:, None] + totals[:, None]
    distance = (between - (totals[:, None] + totals[None, :]) / 2) ** 2
    upper = np.triu_indices(_VALUES, 1)
    expected = (np.outer(totals, totals) * distance)[upper].sum()
    if expected == 0:
        return None
    observed = (coincidences * distance)[upper].sum()
    return float(1 - (n - 1) * observed / expected)


# ------------------------------------------------------------------ of one person


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """So many of so many."""

    hits: int
    of: int

    @property
    def interval(self) -> Interval | None:
        """The share with Wilson's interval; None of nothing."""
        if not self.of:
            return None
        low, high = wilson_interval(self.hits, self.of)
        return Interval(mean=self.hits / self.of, low=low, high=high)


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelerFigures:
    """What can be said of one labeler."""

    labeler: str
    answers: int
    skips: int
    flags: int
    seconds: float | None
    """Median of an answer."""
    ties: Share
    left: Share
    """Preferences for the left side, of all preferences."""
    gold: Share
    """Same preference (first, tie, second) as is known of gold pairs."""
    others: Share
    """Same preference as another labeler, over all pairs of answers to one pair."""
    again: Share
    """Same preference as the time before, of pairs that were shown again."""

    @property
    def concerns(self) -> list[str]:
        """What somebody should look at; nothing is left out by it."""
        found = []
        interval = self.gold.interval
        if interval is not None and interval.high < LEAST_AGREEMENT:
            found.append(
                f"is right on {interval.mean:.0%} of {self.gold.of} known pairs: below "
                f"{LEAST_AGREEMENT:.0%}, by more than chance"
            )
        if self.left.of and abs(self.left.hits - self.left.of / 2) > _SIGMAS * (
            self.left.of**0.5 / 2
        ):
            found.append(
                f"prefers the left side in {self.left.hits / self.left.of:.0%} of {self.left.of}"
            )
        return found


def figures_of(answers: Sequence[Answer], gold: Mapping[str, int]) -> list[LabelerFigures]:
    """Return the figures of each labeler, by name.

    Args:
        answers: standing ones, of all labelers, skips included.
        gold: what is known of pairs, by uid: -3 ... 3, above 0 where the first is the better.
    """
    of_pair: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for answer in of_kind(answers):
        assert answer.preference is not None
        if answer.pair_uid not in gold:  # they are easy, and everybody answers them
            of_pair[answer.pair_uid][answer.labeler] = _sign(answer.preference)
    agreed: defaultdict[str, list[bool]] = defaultdict(list)
    for said in of_pair.values():
        for one, two in combinations(sorted(said), 2):
            agreed[one].append(said[one] == said[two])
            agreed[two].append(said[one] == said[two])
    return [
        _figures(name, [a for a in answers if a.labeler == name], gold, agreed[name])
        for name in sorted({answer.labeler for answer in answers})
    ]


def _figures(
    name: str, own: Sequence[Answer], gold: Mapping[str, int], agreed: Sequence[bool]
) -> LabelerFigures:
    first = {a.pair_uid: a for a in of_kind(own)}
    again = {a.pair_uid: a for a in of_kind(own, occasion=1)}
    known = [_same(first[uid], gold[uid]) for uid in first.keys() & gold.keys()]
    twice = [_same(first[uid], again[uid].preference) for uid in first.keys() & again.keys()]
    said = [a for a in own if a.kind == "answer"]
    sides = [a.chose_left for a in said if a.chose_left is not None]
    return LabelerFigures(
        labeler=name,
        answers=len(said),
        skips=sum(a.kind == "skip" for a in own),
        flags=sum(a.flagged for a in own),
        seconds=median(a.seconds for a in said) if said else None,
        ties=Share(hits=sum(a.preference == 0 for a in said), of=len(said)),
        left=Share(hits=sum(sides), of=len(sides)),
        gold=Share(hits=sum(known), of=len(known)),
        others=Share(hits=sum(agreed), of=len(agreed)),
        again=Share(hits=sum(twice), of=len(twice)),
    )


def _same(answer: Answer, preference: int | None) -> bool:
    assert answer.preference is not None and preference is not None
    return _sign(answer.preference) == _sign(preference)


def _sign(preference: int) -> int:
    return (preference > 0) - (preference < 0)


def units_of(answers: Sequence[Answer], gold: Mapping[str, int]) -> list[list[int]]:
    """Return the preferences that each pair was given, for `alpha`; known pairs are left out."""
    found: defaultdict[str, list[int]] = defaultdict(list)
    for answer in of_kind(answers):
        assert answer.preference is not None
        if answer.pair_uid not in gold:
            found[answer.pair_uid].append(answer.preference)
    return list(found.values())
