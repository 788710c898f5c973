"""How far a round is, and how far its labelers agree, for people and for programs."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from common.config.feedback import RoundConfig
from common.run_folder import RoundFolder
from deploy.evaluation.intervals import Interval
from deploy.feedback.agreement import LabelerFigures, Share, alpha_interval, figures_of, units_of
from deploy.feedback.answers import Answer, of_kind
from deploy.feedback.disagreement import preferred
from deploy.feedback.export import gold_of
from deploy.feedback.pairs import Pair, read_pairs
from deploy.feedback.store import Store
from deploy.screen import Part

COLUMNS: Final = (
    "labeler",
    "answers",
    "skipped",
    "seconds",
    "ties",
    "left",
    "gold",
    "others",
    "again",
)
_ALPHA_LEAST: Final = 0.2
_RECENT_S: Final = 1800.0
"""Of which answers say how fast people are."""
_FEW: Final = 5
_ENOUGH: Final = 20
"""Shared pairs from which on their agreement is judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundStanding:
    """What `talipot feedback status` shows."""

    round: int
    pairs: int
    """With those that are known."""
    answered: int
    """Pairs that have an answer."""
    answers: int
    """All first answers."""
    left: int
    """Answers that are wanted yet."""
    closed: bool
    """Whether nothing more is asked."""
    shared: int
    """Pairs that several people have answered, known ones left out."""
    alpha: Interval | None
    """Krippendorff's, over these; None where nothing can be said yet."""
    per_hour: float | None
    """Answers of the last half hour, as a rate; None where there were none."""
    seconds_left: float | None
    """Until all are there, at this rate."""
    model: Share
    """Pairs of which people together prefer the side that the reward model does, of those that were
    drawn at random, without a best one of several, and that people are not even about."""
    labelers: Sequence[LabelerFigures]

    @property
    def concerns(self) -> list[str]:
        """What somebody should look at."""
        found = [f"{who.labeler} {what}" for who in self.labelers for what in who.concerns]
        if self.alpha and self.shared >= _ENOUGH and self.alpha.high < _ALPHA_LEAST:
            found.append(
                f"labelers agree little more than by chance (alpha {self.alpha.mean:.2f}): look at "
                "flagged pairs, and say more in the guidelines"
            )
        return found

    def facts(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        return {**asdict(self), "concerns": self.concerns}

    def rows(self) -> list[tuple[str, ...]]:
        """Return a row for each labeler."""
        return [
            (
                who.labeler,
                str(who.answers),
                str(who.skips),
                "" if who.seconds is None else f"{who.seconds:.0f}",
                *map(_share, (who.ties, who.left, who.gold, who.others, who.again)),
            )
            for who in self.labelers
        ]


def standing_of(
    folder: RoundFolder, settings: RoundConfig, now: float | None = None
) -> RoundStanding:
    """Look at a round.

    Args:
        folder: of the round.
        settings: likewise.
        now: unix seconds; None is the clock's.

    Raises:
        DataError: a file of it is missing or damaged.
    """
    now = time.time() if now is None else now
    pairs = read_pairs(folder.pairs)
    store = Store(folder.answers)
    standing, left, closed = store.standing(), store.left(), store.is_closed()
    store.close()
    first, gold = of_kind(standing), gold_of(pairs)
    units = units_of(standing, gold)
    wanted = [answer.at for answer in first if answer.pair_uid not in gold]
    per_hour = None if closed else _per_hour([now - at for at in wanted if now - at < _RECENT_S])
    return RoundStanding(
        round=settings.number,
        pairs=len(pairs),
        answered=len({answer.pair_uid for answer in first}),
        answers=len(first),
        left=left,
        closed=closed,
        shared=sum(len(unit) > 1 for unit in units),
        alpha=alpha_interval(units, settings.seed),
        per_hour=per_hour,
        seconds_left=3600 * left / per_hour if per_hour else None,
        model=_of_the_model(pairs, first),
        labelers=figures_of(standing, gold),
    )


def lines_of(standing: RoundStanding) -> list[list[Part]]:
    """Write it out, without the table of labelers."""
    agree = ""
    if (alpha := standing.alpha) is not None:
        agree = f" · alpha {alpha.mean:.2f} ({alpha.low:.2f} to {alpha.high:.2f})"
    done = f"{standing.answered} of {standing.pairs} pairs answered · {standing.left} answers to go"
    if standing.closed:
        done += " · closed"
    if standing.per_hour and standing.seconds_left:
        minutes = standing.seconds_left / 60
        done += f" · {standing.per_hour:.0f} an hour, about {minutes:.0f} min left"
    lines: list[list[Part]] = [[(f"round {standing.round}", "italic"), f" · {done}{agree}"]]
    if (found := standing.model.interval) is not None:
        share = f"{found.mean:.0%} ({found.low:.0%} to {found.high:.0%})"
        of = f"{standing.model.of} random pairs"
        lines.append([f"the reward model agrees with {share} of {of}"])
    lines += [[(concern, "yellow")] for concern in standing.concerns]
    return lines


def _per_hour(ages: Sequence[float]) -> float | None:
    """Return a rate from the ages of answers in seconds; None of few."""
    if len(ages) < _FEW:
        return None
    return len(ages) * 3600 / max(1.0, *ages)


def _of_the_model(pairs: Sequence[Pair], answers: Sequence[Answer]) -> Share:
    """Count preferences that are the reward model's too, where nothing was chosen by it."""
    random = {
        pair.uid: preferred(pair) > 0.5
        for pair in pairs
        if pair.chosen_by == "random" and pair.first.scores and not pair.has_best
    }
    said: defaultdict[str, int] = defaultdict(int)
    for answer in answers:
        said[answer.pair_uid] += answer.preference or 0
    decided = {uid: total > 0 for uid, total in said.items() if total and uid in random}
    hits = sum(random[uid] == first for uid, first in decided.items())
    return Share(hits=hits, of=len(decided))


def _share(share: Share) -> str:
    interval = share.interval
    return "" if interval is None else f"{interval.mean:.0%} of {share.of}"
