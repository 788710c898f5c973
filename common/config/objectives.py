"""Settings of the policy's objective, beside those that PPO itself has.

The equations are in `learner.algorithms.surrogates`, `learner.algorithms.kl` and
`learner.algorithms.rewards`, each with its paper.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from common.config.base import Float, PositiveFloat, PositiveInt, Section


class KlLossConfig(Section):
    """A KL to the reference policy as a term of the loss, beside or instead of that in rewards."""

    coef: PositiveFloat = 1e-3
    """Weight of the term, per unit of the advantage."""
    estimator: Literal["k2", "k3", "unbiased"] = "k3"
    """k3 is GRPO's, with the gradient of KL(ref || policy); k2 and unbiased have that of
    KL(policy || ref)."""


class OverlongConfig(Section):
    """A penalty on responses that come near the limit (DAPO, Yu 2025, equation 13)."""

    buffer: PositiveInt
    """Tokens before `rollout.max_response_tokens` over which the penalty grows from 0."""
    penalty: PositiveFloat = 1.0
    """What a response at the limit loses of its score."""


class ObjectiveConfig(Section):
    """What is maximised; the defaults are PPO's clipped objective (Schulman 2017)."""

    ratio: Literal["token", "sequence"] = "token"
    """What is clipped: the ratio of each token, or one of the whole response (GSPO)."""
    clip: Literal["objective", "weight"] = "objective"
    """What the clip holds: the objective, or the weight of the gradient, so that no token loses its
    own (CISPO)."""
    clip_high: PositiveFloat | None = None
    """How far above 1 a ratio may rise (DAPO: 0.28); null is `train.clip_range`, as below."""
    dual_clip: Annotated[Float, Field(gt=1)] | None = None
    """Bound of a token that counts against the policy, in advantages (3 in Ye 2020); null: none."""
    aggregation: Literal["tokens", "sequences", "constant"] = "tokens"
    """What counts alike: tokens of the whole minibatch, responses by the mean of their tokens
    (GRPO), or tokens over a constant, the limit of a response (Dr. GRPO)."""
    kl_loss: KlLossConfig | None = None
    """A KL term in the loss; null: none."""
    overlong: OverlongConfig | None = None
    """A penalty on long responses; null: none."""
