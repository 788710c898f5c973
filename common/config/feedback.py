"""Settings of a round in which people compare responses."""

from __future__ import annotations

from common.config.base import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Section


class RoundConfig(Section):
    """How a round was made, and how its pairs are asked; `round.yaml`."""

    number: NonNegativeInt
    """Of the round, from 1."""
    run: str = ""
    """Name of the run whose policies were sampled."""
    seed: NonNegativeInt = 0
    """Of what is drawn: prompts, responses, order, who is asked how often."""
    pairs: PositiveInt = 200
    """Pairs that people are asked, without those of which the better response is known."""
    supervised_share: Fraction = 0.5
    """Share of pairs of the policy and the one that its training began with; the others are two
    responses of the policy."""
    policy: str = ""
    """Which policy that was, in a line."""
    checkpoint: str = ""
    """Which policy: a checkpoint's iteration, latest, best or final; empty: as `talipot sample`."""
    overlap: PositiveInt = 2
    """People that the pairs of `overlap_share` are given to; the others go to one."""
    overlap_share: Fraction = 0.2
    """Share of pairs that several people are given."""
    repeat_share: Fraction = 0.05
    """Share of pairs that are shown to the same person once more, with sides swapped."""
    lease_s: PositiveFloat = 900.0
    """Seconds after which a pair that was shown and not answered goes to others."""
    guidelines: str = ""
    """What everybody reads before the first pair."""
    markdown: bool = False
    """Show texts as the Markdown that they are written in; without it as they stand."""
