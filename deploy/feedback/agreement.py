"""How far people agree: with each other, with what is known, with themselves.

Pure functions over standing answers. Krippendorff's alpha for ordinal values (Krippendorff 2011,
"Computing Krippendorff's Alpha-Reliability"): 1 is perfect agreement, 0 what chance would give.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import NormalDist, median
from typing import Final

import numpy as np
import numpy.typing as npt

from deploy.evaluation.intervals import Interval, wilson_interval
from deploy.feedback.answers import MOST, Answer, of_kind

LEAST_AGREEMENT: Final = 0.75
"""A labeler who is right on less of the known pairs is reported: who guesses is right on 43 %."""
_SIGMAS: Final = 4.0
_BY_CHANCE: Final = 0.05
"""How likely it may be that anybody of a round is reported for agreement, where all are honest."""
_FEW: Final = 20
"""Pairs, below which agreement with others is not judged."""
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
    rest: Share
    """Likewise among the others, without this labeler.

    It is what agreement with others is judged by: honest people agree on 63 to 73 % where the
    responses are alike and on more where they are not, and who guesses pulls down that of a good
    partner, but not that of the partners' among themselves."""
    agrees_less: bool
    """Others agree more among themselves than with this labeler, by more than chance."""
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
        if self.agrees_less:
            found.append(
                f"agrees with others on {self.others.hits / self.others.of:.0%} of "
                f"{self.others.of} pairs, and they among themselves on "
                f"{self.rest.hits / self.rest.of:.0%} of {self.rest.of}: more than chance"
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
    shared = [said for said in of_pair.values() if len(said) > 1]
    names = sorted({answer.labeler for answer in answers})
    found = []
    for name in names:
        own = [answer for answer in answers if answer.labeler == name]
        found.append(_figures(name, own, gold, _Agreement(name, shared), len(names)))
    return found


class _Agreement:
    """How often a labeler and others, and these others among themselves, said the same.

    What several people say of one pair goes together, so pairs are what is drawn, not answers.
    """

    def __init__(self, name: str, shared: Sequence[Mapping[str, int]]) -> None:
        self._others = [_same_as(name, said) for said in shared if name in said]
        without = [{who: v for who, v in said.items() if who != name} for said in shared]
        self._rest = [_same_in(said) for said in without if len(said) > 1]
        self.others, self.rest = _sum(self._others), _sum(self._rest)

    def is_less(self, labelers: int) -> bool:
        """Whether the labeler agrees less, at a level that holds for all labelers together."""
        if min(len(self._others), len(self._rest)) < _FEW:
            return False
        differ = self.rest.hits / self.rest.of - self.others.hits / self.others.of
        error = math.sqrt(_variance(self._others) + _variance(self._rest))
        return differ > NormalDist().inv_cdf(1 - _BY_CHANCE / labelers) * error


def _same_as(name: str, said: Mapping[str, int]) -> Share:
    return _share([value == said[name] for who, value in said.items() if who != name])


def _same_in(said: Mapping[str, int]) -> Share:
    return _share([one == two for one, two in combinations(said.values(), 2)])


def _sum(shares: Sequence[Share]) -> Share:
    return Share(hits=sum(s.hits for s in shares), of=sum(s.of for s in shares))


def _variance(shares: Sequence[Share]) -> float:
    """Return that of their sum's share, with one success and one failure more than there were.

    By the residuals of a ratio of sums; without these two a share of 1 would have none.
    """
    drawn = [*shares, Share(hits=1, of=1), Share(hits=0, of=1)]
    total = _sum(drawn)
    mean = total.hits / total.of
    return sum((s.hits - mean * s.of) ** 2 for s in drawn) / total.of**2


def _figures(
    name: str,
    own: Sequence[Answer],
    gold: Mapping[str, int],
    agreement: _Agreement,
    labelers: int,
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
        left=_share(sides),
        gold=_share(known),
        others=agreement.others,
        rest=agreement.rest,
        agrees_less=agreement.is_less(labelers),
        again=_share(twice),
    )


def _share(hits: Sequence[bool]) -> Share:
    return Share(hits=sum(hits), of=len(hits))


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
