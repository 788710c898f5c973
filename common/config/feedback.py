"""Settings of a round in which people compare responses."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from common.config.base import (
    Float,
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)


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
    """Share of pairs of the policy and the one that its training began with. What the three shares
    leave are two responses of the policy."""
    best_share: Fraction = 0.0
    """Share of pairs of a response of the policy and the best of `best_of` more, by the reward
    model."""
    best_of: Annotated[int, Field(ge=2)] = 8
    """Responses that the best is taken of."""
    human_share: Fraction = 0.0
    """Share of pairs of a response of the policy and the demonstration of the same prompt."""
    active_share: Annotated[Float, Field(ge=0, le=0.7)] = 0.0
    """Share of pairs that are chosen where the reward models of several seeds disagree most. The
    others are random, so that accuracy is estimated without bias: 30 % at least."""
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

    @model_validator(mode="after")
    def _whole(self) -> RoundConfig:
        if self.supervised_share + self.best_share + self.human_share > 1 + 1e-9:
            raise ValueError(
                "supervised_share, best_share and human_share are more than all pairs together"
            )
        return self
