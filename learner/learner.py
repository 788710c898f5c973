"""The learner: the policy phase of PPO and the auxiliary phase of PPG, on ZeRO.

`policy_phase` and `auxiliary_phase` read as the papers' algorithm boxes. Both run on every rank
with the same whole batch; each rank computes its share of the rows (`learner.batch.shards`).

Shape suffixes: N rows of the whole batch, B rows of a micro-batch, R response positions, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from common.config.run import RunConfig
from common.errors import CheckpointError, StorageError
from common.files import one_line
from common.logprobs import chosen_reader, sampling_of
from common.metric_catalogue import Logged
from common.metrics import Metrics, mean
from learner import targets
from learner.actor_critic import ActorCritic
from learner.algorithms import ppo, rewards
from learner.algorithms.schedule import linear_to_zero
from learner.batch.experience import Experience, experience
from learner.batch.memory import AuxiliaryMemory
from learner.batch.shards import MicroBatch, Shards
from learner.batch.trajectory_log import write_log
from learner.checkpointing import CheckpointWriter
from learner.objectives.auxiliary import JointObjective, auxiliary_metrics, frozen_policy
from learner.objectives.policy import PolicyObjective, PolicyTargets
from learner.objectives.value import ValueObjective, ValueTargets, value_metrics, values_at
from learner.optimisation import Plan, optimise
from learner.zero.process_group import rank


class Learner:
    """One rank's share of policy and value training."""

    def __init__(
        self,
        config: RunConfig,
        policy_weights: Path,
        reward_weights: Path | None,
        eos_ids: Sequence[int],
    ) -> None:
        """Begin with the weights of earlier stages (a collective).

        Args:
            config: the run's.
            policy_weights: the supervised policy.
            reward_weights: the reward model, which the value network starts as; None: functions or
                endpoints score.
            eos_ids: the tokens that end a response.
        """
        self.config, self.settings = config, config.train
        self.sampling = sampling_of(config.rollout, eos_ids)
        self.networks = ActorCritic(config, policy_weights, reward_weights)
        self.policy, self.value = self.networks.policy, self.networks.value
        self.shards = Shards(
            seed=config.seed,
            budget=config.learner.micro_batch_tokens,
            device=self.policy.device,
            shares_prompts=self.networks.shares_prompts,
        )
        self.kl = rewards.kl_controller(
            config.train.kl_coef, config.train.kl_target, config.train.kl_horizon
        )
        self.memory = AuxiliaryMemory()
        self.writer = CheckpointWriter()

    # ------------------------------------------------------------------ the algorithm boxes

    def policy_phase(
        self, tables: Sequence[pa.Table], iteration: int, log: Path | None = None
    ) -> Metrics:
        """Train on one iteration's trajectories (a collective).

        Args:
            tables: ScoredTrajectory.
            iteration: its number, from 0.
            log: Parquet file to write them to before the first step; None writes none.

        Raises:
            TrainingError: a loss or gradient is not finite, or other weights sampled.
            StorageError: the log cannot be written.
        """
        batch = experience(tables, self.settings.adapter)
        proximal = self._proximal(batch)
        shaped = targets.rewards_of(batch, proximal, self.config, self.kl.coef)
        estimate = targets.estimate_of(batch, proximal, shaped, self.settings)
        value_targets = targets.value_targets(batch, proximal, estimate, self.settings)
        policy_targets = targets.policy_targets(
            batch, proximal, estimate, value_targets, self.config
        )
        if log is not None:
            learnt = targets.learnt(batch, proximal, shaped, policy_targets, self.settings)
            write_log(log, pa.concat_tables(tables), learnt, iteration, self.config)

        kl = targets.kl_of(batch, proximal)
        metrics: Metrics = {Logged.KL: mean(kl, len(batch)), Logged.KL_COEF: mean(self.kl.coef, 1)}
        self.kl.update(kl / len(batch), len(batch))

        metrics |= targets.batch_metrics(batch, proximal, value_targets)
        if iteration >= self.settings.value_warmup:
            metrics |= self._optimise_policy(batch, policy_targets, iteration)
        if value_targets is not None:
            metrics |= self._optimise_values(batch, value_targets, iteration)
            self._remember(batch, proximal, value_targets)
        return metrics

    def auxiliary_phase(self, iteration: int) -> Metrics:
        """Run E_aux epochs of L_joint on the policy and of the value loss; empty the memory.

        Raises:
            TrainingError: a loss or gradient is not finite, or KL(pi_old, pi) is not 0 before the
                first step.
        """
        settings, memory = self.settings.ppg, self.memory
        assert settings is not None, "no auxiliary phase without ppg settings"
        targets_NR = memory.targets_NR
        plan = Plan(
            phase="auxiliary",
            iteration=iteration,
            epochs=settings.e_aux,
            minibatches=settings.minibatches * memory.iterations,
            lr=settings.lr * self._anneal(iteration),
        )
        with self.policy.auxiliary_moments(), frozen_policy(self.policy, self.config.model) as old:
            objective = JointObjective(
                engine=self.policy,
                old=old,
                targets_NR=targets_NR,
                value_unit=memory.value_unit,
                beta_clone=settings.beta_clone,
            )
            steps = optimise(self.policy, objective, memory.sequences, self.shards, plan)
        metrics = auxiliary_metrics(steps)
        if self.value is not None:
            lr = self.settings.value_lr * self._anneal(iteration)
            plan = replace(plan, phase="auxiliary value", lr=lr)
            values = ValueObjective(self.value, ValueTargets(returns_NR=targets_NR))
            with self.value.auxiliary_moments():
                steps = optimise(self.value, values, memory.sequences, self.shards, plan)
            metrics[Logged.AUXILIARY_SEPARATE_VALUE_LOSS] = value_metrics(steps)[Logged.VALUE_LOSS]
        self.memory = AuxiliaryMemory()
        return metrics

    # ------------------------------------------------------------------ parts of a policy phase

    def _proximal(self, batch: Experience) -> targets.Proximal:
        """One pass of policy and value function as they stand."""
        filters = self.sampling.filters

        def columns_BRC(micro: MicroBatch) -> Tensor:
            data = micro.data
            read = chosen_reader(micro.response_BR, self.sampling, ppo.entropy, unfiltered=filters)
            read_BRC, head_BR = self.policy(
                data.tokens_BT,
                lengths_B=data.lengths_B,
                prompts_B=data.prompts_B,
                predict_BR=data.predict_BR,
                read=read,
            )
            return torch.cat((head_BR[..., None], read_BRC), dim=-1)

        columns_NRC = self.shards.gather(batch.sequences, columns_BRC)
        head_NR, logprobs_NR, entropy_NR = (x.contiguous() for x in columns_NRC.unbind(-1)[:3])
        values_NR = head_NR if self.settings.needs.values else torch.zeros_like(head_NR)
        if self.value is not None:
            values_NR = self.shards.gather(batch.sequences, partial(values_at, self.value))
        return targets.Proximal(
            logprobs_NR=logprobs_NR,
            unfiltered_NR=columns_NRC[..., 3].contiguous() if filters else logprobs_NR,
            entropy_NR=entropy_NR,
            head_values_NR=head_NR,
            values_NR=values_NR,
        )

    def _optimise_policy(self, batch: Experience, policy: PolicyTargets, iteration: int) -> Metrics:
        """E_pi epochs of the clipped objective, left early once the policy has moved `stop_kl`."""
        settings = self.settings
        plan = Plan(
            phase="policy",
            iteration=iteration,
            epochs=settings.e_pi,
            minibatches=settings.minibatches,
            lr=settings.lr * self._anneal(iteration),
        )
        longest = self.config.rollout.max_response_tokens
        objective = PolicyObjective(self.policy, policy, settings, self.sampling, longest)
        steps = optimise(self.policy, objective, batch.sequences, self.shards, plan)
        return objective.metrics(steps, plan.lr)

    def _optimise_values(self, batch: Experience, values: ValueTargets, iteration: int) -> Metrics:
        """E_V epochs of the clipped value loss on the value network, where there is one."""
        if self.value is None:
            return {}
        plan = Plan(
            phase="value",
            iteration=iteration,
            epochs=self.settings.e_v,
            minibatches=self.settings.minibatches,
            lr=self.settings.value_lr * self._anneal(iteration),
        )
        objective = ValueObjective(self.value, values)
        return value_metrics(optimise(self.value, objective, batch.sequences, self.shards, plan))

    def _remember(
        self, batch: Experience, proximal: targets.Proximal, values: ValueTargets
    ) -> None:
        """Keep states and value targets for the auxiliary phase."""
        if self.settings.ppg is None:
            return
        missed_NR = (values.returns_NR - proximal.head_values_NR) * batch.mask_NR
        missed = float(missed_NR.square().sum(dtype=torch.float64))
        self.memory.add(batch.sequences, values.returns_NR, batch.versions, missed=missed)

    def _anneal(self, iteration: int) -> float:
        return linear_to_zero(iteration, self.settings.iterations)

    # ------------------------------------------------------------------ checkpoints

    def state(self) -> dict[str, object]:
        """Return what a resumed learner needs beside the files of `begin_save`.

        That is the KL controller, and which base the adapters belong to.
        """
        return {**self.kl.state_dict(), "base": self.networks.base_fingerprint}

    def begin_save(self, folder: Path) -> None:
        """Copy this rank's part of both engines, which `writer` writes, and write the memory.

        Raises:
            StorageError: that before it, or the memory, could not be written.
        """
        others = []
        if rank() == 0:
            others = [folder / "memory.parquet"]
            try:
                self.memory.save(others[0])
            except OSError as error:
                raise StorageError(f"{folder}: cannot be written ({one_line(error)})") from None
        self.writer.begin(folder, self.networks.snapshots(), others)

    def load(self, folder: Path, state: dict[str, object]) -> None:
        """Read what `begin_save` and `state` gave (a collective).

        Raises:
            CheckpointError: of another shape, or adapters of another base.
        """
        self.networks.load(folder, str(state.get("base", "")))
        self.memory = AuxiliaryMemory.load(folder / "memory.parquet")
        try:
            self.kl.load_state_dict(state)
        except ValueError as error:
            raise CheckpointError(
                f"{folder}: its {error}; put another checkpoint in its place, or start the run anew"
            ) from None
