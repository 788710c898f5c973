"""The learner: the policy phase of PPO and the auxiliary phase of PPG, on ZeRO.

`policy_phase` and `auxiliary_phase` read as the papers' algorithm boxes. Both run on every rank
with the same whole batch; each rank computes its share of the rows (`learner.batch.shards`).

Shape suffixes: N rows of the whole batch, B rows of a micro-batch, T positions, R response
positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor, nn

from common.config.model import ModelConfig
from common.config.run import RunConfig
from common.errors import CheckpointError
from common.logprobs import chosen_reader, sampling_of
from common.metrics import Metrics, mean
from common.models.adapter_files import load_scalar
from common.models.adapters import (
    adapter_tensors,
    attach_adapter,
    base_fingerprint,
    freeze_base,
    merged_state,
    share_base,
)
from common.models.build import build_policy, build_scalar
from common.models.networks import PolicyNetwork, ScalarNetwork
from common.models.weight_files import load_weights
from common.randomness import derive_seed
from common.wire.weights import Payload, torch_dtype
from learner.algorithms import gae, ppo, rewards
from learner.algorithms.estimators import ESTIMATORS, Outcomes
from learner.algorithms.schedule import linear_to_zero
from learner.auxiliary import joint_epochs
from learner.batch.experience import Experience, experience
from learner.batch.memory import AuxiliaryMemory
from learner.batch.shards import MicroBatch, Shards
from learner.epochs import Targets, policy_epochs, value_epochs
from learner.zero import state_files
from learner.zero.engine import ZeroEngine
from learner.zero.process_group import rank
from learner.zero.publisher import Publication, publisher


@dataclass(frozen=True, slots=True, kw_only=True)
class Proximal:
    """What the policy says of a batch before the first step, float32 ``[N, R]``."""

    logprobs_NR: Tensor
    """Of the distribution that tokens are sampled from: what ratios are taken to."""
    unfiltered_NR: Tensor
    """Before the filter: what the KL to the reference is taken from."""
    entropy_NR: Tensor
    values_NR: Tensor
    """By the policy's own head."""


class Learner:
    """One rank's share of policy and value training."""

    def __init__(
        self,
        config: RunConfig,
        policy_weights: Path,
        reward_weights: Path | None,
        eos_id: int,
    ) -> None:
        self.config = config
        self.train = train = config.train
        self.start = policy_weights
        self.sampling = sampling_of(config.rollout, eos_id)
        policy = build_policy(config.model)
        load_weights(policy, policy_weights)
        self.base = base_fingerprint(policy.state_dict()) if train.lora else ""
        """Of the weights that adapters are trained on."""
        self.value: ZeroEngine | None = None
        if train.separate_values:
            self.value = self._engine(self._value_network(policy, reward_weights))
        # The auxiliary head starts fresh: SFT never trained it.
        policy.value.initialise(derive_seed(config.seed, "auxiliary head") >> 1)
        if train.lora is not None:
            attach_adapter(policy, train.adapter, train.lora, config.seed)
        self.policy = self._engine(policy)
        self._publisher = publisher(
            self.policy,
            adapter_tensors(policy.decoder, policy.adapter)
            if policy.adapter
            else policy.decoder.named_parameters(),
            dtype=torch_dtype(config.rollout.precision),
            base=self.base,
        )
        self.shards = Shards(
            seed=config.seed,
            budget=config.learner.micro_batch_tokens,
            device=self.policy.device,
        )
        self.kl: rewards.FixedKL = rewards.FixedKL(train.kl_coef)
        if train.kl_target is not None:
            self.kl = rewards.AdaptiveKL(train.kl_coef, train.kl_target, train.kl_horizon)
        self.memory = AuxiliaryMemory()

    # ------------------------------------------------------------------ the algorithm boxes

    def policy_phase(self, tables: Sequence[pa.Table], iteration: int) -> Metrics:
        """One iteration: values and proximal logprobs, rewards, advantages, epochs.

        Raises:
            TrainingError: a loss or gradient is not finite, or other weights sampled.
        """
        batch = experience(tables, self.train.adapter)
        proximal = self._proximal(batch)
        values_NR = self._values(batch, proximal.values_NR)
        shaped, metrics = self._rewards(batch, proximal.unfiltered_NR)
        metrics |= self._measures(batch, proximal)
        targets = self._targets(batch, shaped, values_NR, proximal.logprobs_NR)
        metrics |= policy_epochs(
            self.policy,
            self.shards,
            batch.sequences,
            targets,
            self.train,
            self.sampling,
            lr=self.train.lr * self._anneal(iteration),
            iteration=iteration,
        )
        metrics |= self._value_epochs(batch, targets, iteration)
        if self.train.ppg is not None:
            missed_NR = (targets.returns_NR - proximal.values_NR) * batch.mask_NR
            missed = float(missed_NR.square().sum(dtype=torch.float64))
            self.memory.add(batch.sequences, targets.returns_NR, batch.versions, missed=missed)
        return metrics

    def auxiliary_phase(self, iteration: int) -> Metrics:
        """E_aux epochs of L_joint on the policy and of the value loss, then an empty memory."""
        settings = self.train.ppg
        assert settings is not None, "no auxiliary phase without ppg settings"
        with self.policy.auxiliary_moments():
            metrics = joint_epochs(
                self.policy,
                self.shards,
                self.memory,
                settings,
                self.config.model,
                lr=settings.lr * self._anneal(iteration),
                iteration=iteration,
            )
        if self.value is not None:
            with self.value.auxiliary_moments():
                found = value_epochs(
                    self.value,
                    self._value_forward,
                    self.shards,
                    self.memory.sequences,
                    self.memory.targets_NR,
                    old_values_NR=None,
                    clip=None,
                    epochs=settings.e_aux,
                    minibatches=settings.minibatches * self.memory.iterations,
                    lr=self.train.value_lr * self._anneal(iteration),
                    purpose="auxiliary value",
                    iteration=iteration,
                )
            metrics["auxiliary/separate_value_loss"] = found["value_loss"]
        self.memory = AuxiliaryMemory()
        return metrics

    # ------------------------------------------------------------------ targets of a phase

    def _proximal(self, batch: Experience) -> Proximal:
        """One pass of the policy as it stands."""
        filters = self.sampling.filters

        def run(micro: MicroBatch) -> Tensor:
            data = micro.data
            read = chosen_reader(data.response_BR, self.sampling, ppo.entropy, unfiltered=filters)
            found, values = self.policy(data.tokens_BT, predict_BR=data.predict_BR, read=read)
            return torch.cat((values[..., None], found), dim=-1)

        found_NRC = self.shards.gather(batch.sequences, run)
        values_NR, logprobs_NR, entropy_NR = (x.contiguous() for x in found_NRC.unbind(-1)[:3])
        return Proximal(
            logprobs_NR=logprobs_NR,
            unfiltered_NR=found_NRC[..., 3].contiguous() if filters else logprobs_NR,
            entropy_NR=entropy_NR,
            values_NR=values_NR,
        )

    def _values(self, batch: Experience, shared_NR: Tensor) -> Tensor:
        """Values ``[N, R]`` of the states that response tokens were sampled in.

        `shared_NR` are those by the policy's head, already computed.
        """
        if not self.train.needs.values:
            return torch.zeros_like(batch.reference_NR)
        if self.value is None:
            return shared_NR
        return self.shards.gather(batch.sequences, self._value_forward)

    def _value_forward(self, micro: MicroBatch) -> Tensor:
        """Values ``[B, R]`` by the value network, or by the policy's head when they are one."""
        data = micro.data
        if self.value is None:
            shared: Tensor = self.policy(data.tokens_BT, predict_BR=data.predict_BR)[1]
            return shared
        values_BT: Tensor = self.value(data.tokens_BT)
        return values_BT.gather(1, data.predict_BR)

    def _rewards(self, batch: Experience, unfiltered_NR: Tensor) -> tuple[rewards.Rewards, Metrics]:
        """The parts of the rewards per token, and the KL controller's update.

        In float64: what a large score and a small penalty add up to must not be rounding.
        """
        scores_N, train = batch.scores_N.double(), self.train
        if train.missing_eos_penalty is not None:
            scores_N = rewards.apply_eos_trick(
                scores_N, batch.ended_N, penalty=train.missing_eos_penalty
            )
        unfiltered_NR, reference_NR = unfiltered_NR.double(), batch.reference_NR.double()
        shaped = rewards.reward_parts(
            scores_N, unfiltered_NR, reference_NR, batch.mask_NR, kl_coef=self.kl.coef
        )
        kl = float((ppo.kl_k1(unfiltered_NR - reference_NR) * batch.mask_NR).sum())
        metrics = {"kl": mean(kl, len(batch)), "kl_coef": mean(self.kl.coef, 1)}
        self.kl.update(kl / len(batch), len(batch))
        return shaped, metrics

    def _measures(self, batch: Experience, proximal: Proximal) -> Metrics:
        """Statistics of the batch, and how far who sampled is from who learns."""
        tokens, rows = float(batch.mask_NR.sum()), float(len(batch))
        apart = ppo.mismatch(proximal.logprobs_NR, batch.behavior_NR, batch.mask_NR)
        drift_NR = ((proximal.logprobs_NR - batch.behavior_NR) * batch.mask_NR).exp() - 1.0
        return {
            "score": mean(float(batch.scores_N.sum()), rows),
            "response_length": mean(tokens, rows),
            "eos_share": mean(float(batch.ended_N.sum()), rows),
            "entropy": mean(float(proximal.entropy_NR.sum(dtype=torch.float64)), tokens),
            "ratio_deviation": mean(float(drift_NR.abs().max()), 1),
            "mismatch_kl": mean(apart.kl, tokens),
            "mismatch_ratio": mean(apart.ratio, 1),
        }

    def _targets(
        self, batch: Experience, shaped: rewards.Rewards, values_NR: Tensor, proximal_NR: Tensor
    ) -> Targets:
        """Advantages and value targets by the algorithm's estimator."""
        mask, train = batch.mask_NR, self.train
        estimate = ESTIMATORS[train.algorithm](
            Outcomes(
                rewards=shaped,
                values_BR=values_NR,
                groups_B=batch.groups_N,
                mask_BR=mask,
                gamma=train.gamma,
                gae_lambda=train.gae_lambda,
            )
        )
        returns_NR = estimate.returns_BR
        if returns_NR is None:
            returns_NR = torch.zeros_like(values_NR)
        importance_NR = None
        if self.config.corrects_mismatch:
            importance_NR = ppo.importance_weights(
                proximal_NR, batch.behavior_NR, cap=train.behavior_cap
            )
        return Targets(
            proximal_NR=proximal_NR,
            values_NR=values_NR,
            advantages_NR=estimate.advantages_BR.float(),
            returns_NR=returns_NR.float(),
            value_unit=ppo.value_unit(values_NR, returns_NR, mask),
            importance_NR=importance_NR,
        )

    def _value_epochs(self, batch: Experience, targets: Targets, iteration: int) -> Metrics:
        """E_V epochs of the clipped value loss on the value network."""
        if not self.train.needs.values:
            return {}
        mask = batch.mask_NR
        explained = gae.explained_variance(targets.values_NR, targets.returns_NR, mask)
        metrics = {"explained_variance": mean(explained, 1)}
        if self.value is None:
            return metrics
        return metrics | value_epochs(
            self.value,
            self._value_forward,
            self.shards,
            batch.sequences,
            targets.returns_NR,
            old_values_NR=targets.values_NR,
            clip=targets.value_clip(self.train.value_clip_range),
            epochs=self.train.e_v,
            minibatches=self.train.minibatches,
            lr=self.train.value_lr * self._anneal(iteration),
            purpose="value",
            iteration=iteration,
        )

    # ------------------------------------------------------------------ networks and state

    def _value_network(self, policy: PolicyNetwork, reward_weights: Path | None) -> ScalarNetwork:
        """From the reward model; without one (functions, HTTP) from the supervised policy.

        With LoRA its base is the policy's own, unless the reward model has whole weights.
        """
        lora, seed = self.train.lora, self.config.seed
        value = build_scalar(self.config.model)
        if reward_weights is not None:
            adapted = load_scalar(value, reward_weights, policy.decoder, "value")
        else:
            adapted = None
            value.head.initialise(derive_seed(seed, "value head") >> 1)
            if lora is not None:
                share_base(value.decoder, policy.decoder)
            else:
                value.decoder.load_state_dict(policy.decoder.state_dict())
        if lora is not None and adapted is None:
            attach_adapter(value, "value", lora, seed)
        elif lora is not None:
            freeze_base(value.decoder)
        elif adapted is not None:
            return _whole(value, self.config.model)
        return value

    def _engine(self, network: nn.Module) -> ZeroEngine:
        return ZeroEngine(
            network,
            zero_stage=self.config.learner.zero_stage,
            precision=self.config.learner.precision,
            weight_decay=self.train.weight_decay,
            max_grad_norm=self.train.max_grad_norm,
            eps=self.train.adam_eps,
            auxiliary=self.train.ppg is not None,
        )

    def _anneal(self, iteration: int) -> float:
        return linear_to_zero(iteration, self.train.iterations)

    def publish(self) -> tuple[Publication, Payload]:
        """This rank's slice of the policy's decoder: facts and bytes."""
        return self._publisher.publish()

    def state(self) -> dict[str, object]:
        """What a resumed learner needs beside the engines: the KL controller, and which base the
        adapters belong to."""
        return {**self.kl.state_dict(), "base": self.base}

    def save(self, folder: Path) -> None:
        """Write both engines (a collective) and the memory."""
        state_files.save(self.policy, folder / "policy")
        if self.value is not None:
            state_files.save(self.value, folder / "value")
        if rank() == 0:
            self.memory.save(folder / "memory.parquet")

    def load(self, folder: Path, state: dict[str, object]) -> None:
        """Read what `save` and `state` gave (a collective).

        Raises:
            CheckpointError: of another shape, or adapters of another base.
        """
        if state.get("base", "") != self.base:
            raise CheckpointError(
                f"{folder}: its adapters were trained on base {state.get('base') or 'none'}, and "
                f"the supervised policy is {self.base or 'trained as a whole'}; put back the "
                "weights that they were trained on"
            )
        state_files.load(self.policy, folder / "policy")
        if self.value is not None:
            state_files.load(self.value, folder / "value")
        self.memory = AuxiliaryMemory.load(folder / "memory.parquet")
        try:
            self.kl.load_state_dict(state)
        except ValueError as error:
            raise CheckpointError(
                f"{folder}: its {error}; put another checkpoint in its place, or start the run anew"
            ) from None


def _whole(network: ScalarNetwork, model: ModelConfig) -> ScalarNetwork:
    """The same network with its adapter in its weights."""
    made = build_scalar(model)
    made.load_state_dict(merged_state(network, network.adapter))
    return made
