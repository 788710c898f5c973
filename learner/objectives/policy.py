"""The clipped objective of a policy phase, with the entropy bonus and a shared value head's loss.

Shape suffixes: N rows of the whole batch, B rows of a micro-batch, R response positions, C columns
read of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from common.config.stages import TrainConfig
from common.logprobs import Sampling, chosen_reader
from common.metric_catalogue import Logged
from common.metrics import Metrics, mean
from learner.algorithms import kl, ppo, surrogates
from learner.batch.shards import MicroBatch
from learner.objectives.value import ValueTargets
from learner.optimisation import Loss, Objective, Step, Whole
from learner.zero.engine import ZeroEngine

SHARED_VALUE_COEF = 0.1
"""Weight of the value loss, in units of values, when one network does both (Stiennon 2020,
implementation)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTargets:
    """What the policy is optimised for; frozen before the first step."""

    proximal_NR: Tensor
    """float32 logprobs at the start of the phase."""
    advantages_NR: Tensor
    """float32, by the algorithm's estimator."""
    importance_NR: Tensor | None = None
    """float32 truncated proximal/behaviour weights; None where the two are the same policy in the
    same precision (`RunConfig.corrects_mismatch`)."""
    reference_NR: Tensor | None = None
    """float32 ref_logprobs, of the whole distribution; None where the loss has no KL term."""
    shared_values: ValueTargets | None = None
    """Of the policy's own head, where it is the value function."""


@dataclass(frozen=True, slots=True)
class PolicyObjective(Objective):
    """PPO's loss of the policy network."""

    engine: ZeroEngine
    targets: PolicyTargets
    settings: TrainConfig
    sampling: Sampling
    longest: int
    """Most tokens of a response."""
    name: str = "policy loss"

    @property
    def surrogate(self) -> surrogates.Surrogate:
        """What stands for the policy's improvement."""
        chosen = self.settings.objective
        return surrogates.Surrogate(
            ratio=chosen.ratio,
            clip=chosen.clip,
            clip_high=chosen.clip_high,
            dual_clip=chosen.dual_clip,
            aggregation=chosen.aggregation,
        )

    def matters(self, rows: list[int]) -> list[int]:
        """Leave out the responses of groups with one score, where advantages are all there is."""
        targets = self.targets
        if self.settings.entropy_coef or not (
            targets.reference_NR is None and targets.shared_values is None
        ):
            return rows
        advantages_NR = targets.advantages_NR
        return [row for row, any_of in zip(rows, advantages_NR[rows].any(1), strict=True) if any_of]

    def loss(self, micro: MicroBatch, whole: Whole) -> Loss:
        """Return the loss of a micro-batch."""
        data, settings, targets = micro.data, self.settings, self.targets
        more = ppo.entropy if settings.entropy_coef else None
        distant = targets.reference_NR is not None and self.sampling.filters
        read = chosen_reader(micro.response_BR, self.sampling, more, unfiltered=distant)
        columns_BRC, values_BR = self.engine(
            data.tokens_BT,
            lengths_B=data.lengths_B,
            prompts_B=data.prompts_B,
            predict_BR=data.predict_BR,
            read=read,
        )
        logprobs_BR, proximal_BR = columns_BRC[..., 0], micro.cut(targets.proximal_NR)
        weights_NR = targets.importance_NR
        policy = ppo.policy_loss(
            logprobs_BR,
            proximal_BR,
            micro.cut(targets.advantages_NR),
            micro.mask_BR,
            clip_range=settings.clip_range,
            normalizer=self._normalizer(whole),
            importance_weights_BR=None if weights_NR is None else micro.cut(weights_NR),
            surrogate=self.surrogate,
        )
        total = policy.loss
        if settings.entropy_coef:
            entropy = (columns_BRC[..., 1] * micro.mask_BR).sum() / whole.tokens
            total = total - settings.entropy_coef * entropy
        if targets.reference_NR is not None:
            whole_BR = columns_BRC[..., -1] if distant else logprobs_BR
            total = total + self._kl_loss(logprobs_BR - proximal_BR, whole_BR, micro, whole)
        if targets.shared_values is not None:
            value = targets.shared_values.loss(values_BR, micro, whole.tokens).loss
            total = total + SHARED_VALUE_COEF / targets.shared_values.unit**2 * value
        return Loss(total, {"clipped": policy.clipped, "k3": policy.k3})

    def _kl_loss(
        self, log_ratio_BR: Tensor, logprobs_BR: Tensor, micro: MicroBatch, whole: Whole
    ) -> Tensor:
        """Return the weighted KL to the reference, of the whole distributions."""
        settings, reference_NR = self.settings.objective.kl_loss, self.targets.reference_NR
        assert settings is not None and reference_NR is not None
        hidden_BR = ~micro.mask_BR
        reference_BR = micro.cut(reference_NR).masked_fill(hidden_BR, 0.0)
        terms_BR = kl.kl_terms(
            log_ratio_BR.masked_fill(hidden_BR, 0.0),
            logprobs_BR.masked_fill(hidden_BR, 0.0),
            reference_BR,
            settings.estimator,
        )
        weights_B1 = surrogates.row_weights(micro.mask_BR, self.surrogate.aggregation)
        if weights_B1 is not None:
            terms_BR = terms_BR * weights_B1
        return settings.coef * terms_BR.sum() / self._normalizer(whole)

    def _normalizer(self, whole: Whole) -> float:
        return surrogates.normalizer(
            self.surrogate.aggregation,
            tokens=whole.tokens,
            sequences=whole.sequences,
            longest=self.longest,
        )

    def enough(self, step: Step) -> bool:
        """Whether the policy has moved `stop_kl` from the proximal one."""
        limit = self.settings.stop_kl
        return limit is not None and step.sums["k3"] / step.tokens > limit

    def metrics(self, steps: Sequence[Step], lr: float) -> Metrics:
        """Return what a policy phase reports of its policy steps."""
        tokens, count = sum(step.tokens for step in steps), len(steps)
        return {
            Logged.POLICY_LOSS: mean(sum(step.loss for step in steps), count),
            Logged.CLIP_FRACTION: mean(sum(step.sums["clipped"] for step in steps), tokens),
            Logged.UPDATE_KL: mean(sum(step.sums["k3"] for step in steps), tokens),
            Logged.GRADIENT_NORM: mean(sum(step.gradient_norm for step in steps), count),
            Logged.POLICY_STEPS: mean(count, 1),
            Logged.STOPPED_BY_KL: mean(self.enough(steps[-1]), 1),
            Logged.LR: mean(lr, 1),
        }
