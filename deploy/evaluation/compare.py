"""Comparison of two policies on held-out prompts: win rate, KL, length, variety and likelihood."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from common.errors import RewardError
from deploy.evaluation.intervals import win_rate
from deploy.evaluation.results import PolicyComparison, PolicyFigures
from deploy.evaluation.sampling import Sampled

Judge = Callable[[Sequence[str], Sequence[str]], Sequence[float | None]]
"""(prompts, responses) -> one number each, higher is better; None where it has no opinion."""

_TIE_MARGIN = 1e-6


def compare(
    prompts: Sequence[str], before: Sampled, after: Sampled, judge: Judge | None
) -> PolicyComparison:
    """Compare the supervised policy's responses with the trained one's, prompt by prompt.

    All figures are of the same prompts: those of which both policies' responses have a score, and
    the judge an opinion. Without a judge the run's own reward decides, which the policy was trained
    on.

    Raises:
        RewardError: no pair is left.
    """
    before, after = paired(before, after)
    opinions = zip(*(_opinions(prompts, side, judge) for side in (before, after)), strict=True)
    judged = [
        (row, old, new)
        for row, (old, new) in enumerate(opinions)
        if old is not None and new is not None
    ]
    if not judged:
        raise RewardError(
            f"evaluation: nothing to compare; evaluate.judge has an opinion of both responses of "
            f"none of {len(before.prompts)} prompts"
        )
    rows, old, new = zip(*judged, strict=True)
    before, after = before.pick(rows), after.pick(rows)
    wins = win_rate(new, old, tie_margin=_TIE_MARGIN)
    return PolicyComparison(
        pairs_judged=len(judged),
        pairs_asked=len(prompts),
        win_rate=wins.rate,
        ties_share=wins.ties_share,
        kl=fmean(after.kl),
        sft=_figures(before, old),
        policy=_figures(after, new),
    )


def paired(before: Sampled, after: Sampled) -> tuple[Sampled, Sampled]:
    """Keep both sides' responses to the prompts that both have one to.

    Raises:
        RewardError: there is no such prompt.
        ValueError: a side has several responses to a prompt (`best_of` chooses one).
    """
    old, new = ({prompt: row for row, prompt in enumerate(s.prompts)} for s in (before, after))
    if (len(old), len(new)) != (len(before.prompts), len(after.prompts)):
        raise ValueError("responses are compared one to one, and a prompt has several")
    common = sorted(old.keys() & new.keys())
    if not common:
        raise RewardError(
            f"evaluation: nothing to compare; {len(old)} responses of the supervised policy and "
            f"{len(new)} of the trained one have a score, and no two of the same prompt"
        )
    return before.pick([old[p] for p in common]), after.pick([new[p] for p in common])


def _opinions(
    prompts: Sequence[str], sampled: Sampled, judge: Judge | None
) -> Sequence[float | None]:
    """Return the judge's number for each response, or its score."""
    if judge is None:
        return sampled.scores
    return judge([prompts[i] for i in sampled.prompts], sampled.responses)


def _figures(sampled: Sampled, opinions: Sequence[float]) -> PolicyFigures:
    return PolicyFigures(
        judge_score=fmean(opinions),
        score=fmean(sampled.scores),
        nll=fmean(sampled.nll),
        response_length=fmean(sampled.lengths),
        distinct=len(set(sampled.responses)) / len(sampled.responses),
    )
