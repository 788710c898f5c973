"""The learner: the policy phase of PPO and the auxiliary phase of PPG, on ZeRO.

`policy_phase` and `auxiliary_phase` read as the papers' algorithm boxes. Both run on every rank
with the same whole batch; each rank computes its share of the rows (`experience.deal`).

Shape suffixes: N rows of the whole batch, B rows of a micro-batch, T positions, R response
positions, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from common.batching import SequenceBatch
from common.config import RunConfig
from common.errors import TrainingError
from common.logprobs import Sampling, chosen_logprobs
from common.metrics import Metrics, mean, require_finite
from common.palm import PolicyNetwork, ScalarNetwork
from common.trajectory import derive_seed
from common.weights import Bytes, load_weights
from learner import advantages, gae, ppg, ppo, rewards
from learner.engine import ZeroEngine, all_sum, rank, world_size
from learner.experience import Experience, Piece, deal, experience, rows_batch
from learner.memory import AuxiliaryMemory
from learner.publisher import Publication, publish
from learner.schedule import linear_to_zero


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What the epochs of one policy phase optimise; frozen before the first step."""

    proximal_NR: Tensor
    """float32 logprobs at the start of the phase."""
    values_NR: Tensor
    """float32 values at the start of the phase (zeros without a value function)."""
    advantages_NR: Tensor
    """float32, whitened for PPO."""
    returns_NR: Tensor
    """float32 value targets."""
    importance_NR: Tensor | None
    """float32 truncated proximal/behaviour weights; None in synchronous mode."""


class Learner:
    """One rank's share of policy and value training."""

    def __init__(
        self, config: RunConfig, policy_weights: Path, reward_weights: Path | None
    ) -> None:
        self.config = config
        self.train = config.train
        rollout = config.rollout
        self.sampling = Sampling(
            temperature=rollout.temperature, top_p=rollout.top_p, top_k=rollout.top_k
        )
        policy = PolicyNetwork(config.model)
        load_weights(policy, policy_weights)
        # The auxiliary head starts fresh: SFT never trained it.
        policy.value.initialise(derive_seed(config.seed, "auxiliary head") >> 1)
        self.policy = self._engine(policy)
        self.value: ZeroEngine | None = None
        if self.train.algorithm == "ppo" and self.train.value_network == "separate":
            value = ScalarNetwork(config.model)
            if reward_weights is not None:
                load_weights(value, reward_weights)
            else:
                load_weights(value.palm, policy_weights.parent / "palm.safetensors")
                value.head.initialise(derive_seed(config.seed, "value head") >> 1)
            self.value = self._engine(value)
        self.kl: rewards.FixedKL | rewards.AdaptiveKL = (
            rewards.FixedKL(self.train.kl_coef)
            if self.train.kl_target is None
            else rewards.AdaptiveKL(
                self.train.kl_coef, self.train.kl_target, self.train.kl_horizon
            )
        )
        self.memory = AuxiliaryMemory()

    # ------------------------------------------------------------------ the algorithm boxes

    def policy_phase(self, tables: Sequence[pa.Table], iteration: int) -> Metrics:
        """One iteration: values and proximal logprobs, rewards, advantages, epochs.

        Raises:
            TrainingError: a loss or gradient is not finite.
        """
        batch = experience(tables)
        proximal_NR, entropy = self._proximal(batch)
        values_NR = self._values(batch)
        rewards_NR, metrics = self._rewards(batch, proximal_NR)
        advantages_NR, returns_NR = self._advantages(
            batch, rewards_NR, values_NR, proximal_NR
        )
        importance_NR = None
        if self.train.max_staleness > 0:
            importance_NR = ppo.importance_weights(
                proximal_NR, batch.behavior_NR, cap=self.train.behavior_cap
            )
        targets = Targets(
            proximal_NR=proximal_NR,
            values_NR=values_NR,
            advantages_NR=advantages_NR,
            returns_NR=returns_NR,
            importance_NR=importance_NR,
        )
        metrics |= {"entropy": entropy}
        metrics |= self._policy_epochs(batch, targets, iteration)
        metrics |= self._value_epochs(batch, targets, iteration)
        if self.train.ppg is not None:
            self.memory.add(batch.prompts, batch.responses, returns_NR, batch.versions)
        return metrics

    def auxiliary_phase(self, iteration: int) -> Metrics:
        """E_aux epochs of L_joint on the policy and of the value loss, then an empty memory.

        pi_old is recomputed from a frozen copy of the policy as it is now, so KL(pi_old, pi) is
        exactly 0 at the first micro-batch (invariant I8).
        """
        settings = self.train.ppg
        assert settings is not None, "no auxiliary phase without ppg settings"
        old = self._frozen_policy()
        lr = settings.lr * linear_to_zero(iteration, self.train.iterations)
        memory, minibatches = self.memory, settings.minibatches * self.memory.iterations
        metrics: Metrics = {}
        kl_first = kl_last = 0.0
        for epoch in range(settings.e_aux):
            clone_total = value_total = count_total = 0.0
            for step, rows in enumerate(
                self._minibatches(
                    len(memory), min(minibatches, len(memory)), "aux", iteration, epoch
                )
            ):
                sums = self._auxiliary_step(
                    old, rows, lr, f"auxiliary phase, step {step}"
                )
                if epoch == 0 and step == 0:
                    kl_first = sums[1] / sums[2]
                value_total, clone_total, count_total = (
                    value_total + sums[0],
                    clone_total + sums[1],
                    count_total + sums[2],
                )
            kl_last = clone_total / count_total
            metrics["auxiliary/value_loss"] = mean(value_total, count_total)
        if self.config.learner.precision == "fp32" and kl_first != 0.0:
            raise TrainingError(
                f"KL(pi_old, pi) starts at {kl_first}, not 0: pi_old is not pi"
            )
        if self.value is not None:
            metrics |= self._auxiliary_values(iteration)
        metrics["auxiliary/clone_kl_first"] = mean(kl_first, 1)
        metrics["auxiliary/clone_kl"] = mean(kl_last, 1)
        self.memory = AuxiliaryMemory()
        return metrics

    # ------------------------------------------------------------------ targets of a phase

    def _proximal(self, batch: Experience) -> tuple[Tensor, object]:
        """Log-probabilities ``[N, R]`` under the policy as it stands, and the mean entropy."""
        entropy = torch.zeros(1)

        def run(piece: SequenceBatch) -> Tensor:
            logits, _ = self.policy(piece.tokens_BT, predict_BR=piece.predict_BR)
            entropy.add_((ppo.entropy(logits) * piece.response_mask_BR).sum().cpu())
            return chosen_logprobs(logits, piece.response_BR, self.sampling)

        proximal = self._sharded(batch, run)
        total = float(all_sum(entropy))
        return proximal, mean(total, float(batch.mask_NR.sum()))

    def _values(self, batch: Experience) -> Tensor:
        """Values ``[N, R]`` of the states that response tokens were sampled in."""
        if self.train.algorithm != "ppo":
            return torch.zeros_like(batch.reference_NR)
        return self._sharded(batch, self._value_forward)

    def _value_forward(self, piece: SequenceBatch) -> Tensor:
        if self.value is None:
            shared: Tensor = self.policy(piece.tokens_BT, predict_BR=piece.predict_BR)[
                1
            ]
            return shared
        values_BT: Tensor = self.value(piece.tokens_BT)
        return values_BT.gather(1, piece.predict_BR)

    @torch.no_grad()
    def _sharded(
        self, batch: Experience, run: Callable[[SequenceBatch], Tensor]
    ) -> Tensor:
        """Run each row on one rank and sum over ranks: ``[N, R]`` on every rank, masked."""
        out = torch.zeros_like(batch.reference_NR)
        for piece in self._deal(range(len(batch)), batch.lengths):
            data = rows_batch(batch.prompts, batch.responses, piece.rows)
            result = run(self._to_device(data)).float().cpu()
            if piece.real:
                result = result.masked_fill(~data.response_mask_BR, 0.0)
                out[piece.rows, : result.shape[1]] = result
        return all_sum(out)

    def _rewards(
        self, batch: Experience, proximal_NR: Tensor
    ) -> tuple[Tensor, Metrics]:
        """KL-shaped rewards per token, the controller's update, and the batch's statistics."""
        scores_N = batch.scores_N
        if self.train.missing_eos_penalty is not None:
            scores_N = rewards.apply_eos_trick(
                scores_N, batch.ended_N, penalty=self.train.missing_eos_penalty
            )
        rewards_NR = rewards.shape_rewards(
            scores_N,
            proximal_NR,
            batch.reference_NR,
            batch.mask_NR,
            kl_coef=self.kl.coef,
        )
        tokens, rows = float(batch.mask_NR.sum()), float(len(batch))
        kl_N = ((proximal_NR - batch.reference_NR) * batch.mask_NR).sum(1)
        drift_NR = ((proximal_NR - batch.behavior_NR) * batch.mask_NR).exp() - 1.0
        metrics = {
            "score": mean(float(batch.scores_N.sum()), rows),
            "kl": mean(float(kl_N.sum()), rows),
            "kl_coef": mean(self.kl.coef, 1),
            "response_length": mean(tokens, rows),
            "eos_share": mean(float(batch.ended_N.sum()), rows),
            "ratio_deviation": mean(float(drift_NR.abs().max()), 1),
        }
        self.kl.update(float(kl_N.mean()), len(batch))
        return rewards_NR, metrics

    def _advantages(
        self,
        batch: Experience,
        rewards_NR: Tensor,
        values_NR: Tensor,
        proximal_NR: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Advantages and value targets by the algorithm's estimator."""
        mask = batch.mask_NR
        none = torch.zeros_like(rewards_NR)
        if self.train.algorithm == "rloo":
            return advantages.rloo(rewards_NR.sum(1), batch.groups_N, mask), none
        if self.train.algorithm == "grpo":
            return advantages.grpo(rewards_NR.sum(1), batch.groups_N, mask), none
        if self.train.algorithm == "reinforce_pp":
            return advantages.reinforce_pp(
                rewards_NR, mask, gamma=self.train.gamma
            ), none
        raw, returns = gae.gae(
            rewards_NR,
            values_NR,
            mask,
            gamma=self.train.gamma,
            gae_lambda=self.train.gae_lambda,
        )
        return gae.whiten(raw, mask), returns

    # ------------------------------------------------------------------ epochs

    def _policy_epochs(
        self, batch: Experience, targets: Targets, iteration: int
    ) -> Metrics:
        """E_pi epochs of the clipped objective, left early once the policy has moved enough."""
        lr = self.train.lr * linear_to_zero(iteration, self.train.iterations)
        totals = torch.zeros(5, dtype=torch.float64)
        steps, norm_sum, stopped = 0, 0.0, 0.0
        for epoch in range(self.train.e_pi):
            for rows in self._minibatches(
                len(batch), self.train.minibatches, "policy", iteration, epoch
            ):
                where = f"policy phase of iteration {iteration}, step {steps}"
                sums, norm = self._policy_step(batch, targets, rows, lr, where)
                totals, norm_sum, steps = totals + sums, norm_sum + norm, steps + 1
                if (
                    self.train.stop_kl is not None
                    and sums[2] / sums[4] > self.train.stop_kl
                ):
                    stopped = 1.0
                    break
            if stopped:
                break
        loss, clipped, k3, entropy, tokens = totals.tolist()
        return {
            "policy_loss": mean(loss, steps),
            "clip_fraction": mean(clipped, tokens),
            "update_kl": mean(k3, tokens),
            "gradient_norm": mean(norm_sum, steps),
            "policy_steps": mean(steps, 1),
            "stopped_by_kl": mean(stopped, 1),
            "lr": mean(lr, 1),
        }

    def _policy_step(
        self,
        batch: Experience,
        targets: Targets,
        rows: list[int],
        lr: float,
        where: str,
    ) -> tuple[Tensor, float]:
        """One optimizer step on a minibatch.

        Returns global sums (loss, clipped tokens, k3, entropy, tokens) and the gradient norm.
        """
        normalizer = float(batch.mask_NR[rows].sum())
        sums = torch.zeros(5, dtype=torch.float64)
        for piece, last in self._pieces(rows, batch.lengths):
            data = rows_batch(batch.prompts, batch.responses, piece.rows)
            logits, values = self.policy(
                self._move(data.tokens_BT), predict_BR=self._move(data.predict_BR)
            )
            reach = data.response_mask_BR.shape[1]
            cut = [
                self._move(t[piece.rows, :reach])
                for t in (
                    targets.proximal_NR,
                    targets.advantages_NR,
                    targets.values_NR,
                    targets.returns_NR,
                )
            ]
            mask = self._move(data.response_mask_BR & piece.real)
            logprobs = chosen_logprobs(
                logits, self._move(data.response_BR), self.sampling
            )
            weights = targets.importance_NR
            found = ppo.policy_loss(
                logprobs,
                cut[0],
                cut[1],
                mask,
                clip_range=self.train.clip_range,
                normalizer=normalizer,
                importance_weights=(
                    None if weights is None else self._move(weights[piece.rows, :reach])
                ),
            )
            entropy = (ppo.entropy(logits) * mask).sum()
            loss = found.loss - self.train.entropy_coef * entropy / normalizer
            if self.train.value_network == "shared" and self.train.algorithm == "ppo":
                loss = (
                    loss
                    + _SHARED_VALUE_COEF
                    * ppo.value_loss(
                        values,
                        cut[2],
                        cut[3],
                        mask,
                        value_clip_range=self.train.value_clip_range,
                        normalizer=normalizer,
                    ).loss
                )
            require_finite("policy loss", float(loss), where)
            self.policy.backward(loss, last=last)
            sums += torch.tensor(
                [
                    float(loss),
                    float(found.clipped),
                    float(found.k3),
                    float(entropy),
                    float(mask.sum()),
                ],
                dtype=torch.float64,
            )
        return all_sum(sums), self.policy.step(lr, where)

    def _value_epochs(
        self, batch: Experience, targets: Targets, iteration: int
    ) -> Metrics:
        """E_V epochs of the clipped value loss on the value network."""
        if self.value is None:
            return {}
        lr = self.train.value_lr * linear_to_zero(iteration, self.train.iterations)
        total = torch.zeros(2, dtype=torch.float64)
        steps = 0
        for epoch in range(self.train.e_v):
            for rows in self._minibatches(
                len(batch), self.train.minibatches, "value", iteration, epoch
            ):
                where = f"value phase of iteration {iteration}, step {steps}"
                normalizer = float(batch.mask_NR[rows].sum())
                for piece, last in self._pieces(rows, batch.lengths):
                    data = rows_batch(batch.prompts, batch.responses, piece.rows)
                    values = self._value_forward(self._to_device(data))
                    reach = data.response_mask_BR.shape[1]
                    found = ppo.value_loss(
                        values,
                        self._move(targets.values_NR[piece.rows, :reach]),
                        self._move(targets.returns_NR[piece.rows, :reach]),
                        self._move(data.response_mask_BR & piece.real),
                        value_clip_range=self.train.value_clip_range,
                        normalizer=normalizer,
                    )
                    require_finite("value loss", float(found.loss), where)
                    self.value.backward(found.loss, last=last)
                    total += torch.tensor([float(found.loss), float(found.clipped)])
                self.value.step(lr, where)
                steps += 1
        tokens = float(batch.mask_NR.sum()) * self.train.e_v
        loss, clipped = all_sum(total).tolist()
        mask = batch.mask_NR
        residual = (targets.returns_NR - targets.values_NR)[mask].var(correction=0)
        spread = targets.returns_NR[mask].var(correction=0).clamp(min=1e-8)
        return {
            "value_loss": mean(loss, steps),
            "value_clip_fraction": mean(clipped, tokens),
            "explained_variance": mean(float(1.0 - residual / spread), 1),
        }

    # ------------------------------------------------------------------ auxiliary phase

    def _auxiliary_step(
        self, old: PolicyNetwork, rows: list[int], lr: float, where: str
    ) -> tuple[float, float, float]:
        """One step of L_joint; global sums of value loss, clone KL, and tokens."""
        settings, memory = self.train.ppg, self.memory
        assert settings is not None
        normalizer = float(sum(len(memory.responses[i]) for i in rows))
        sums = torch.zeros(2, dtype=torch.float64)
        lengths = self._memory_lengths()
        for piece, last in self._pieces(rows, lengths):
            data = rows_batch(memory.prompts, memory.responses, piece.rows)
            tokens, predict = self._move(data.tokens_BT), self._move(data.predict_BR)
            with torch.no_grad():
                old_logits, _ = old(tokens, predict_BR=predict)
            logits, values = self.policy(tokens, predict_BR=predict)
            mask = self._move(data.response_mask_BR & piece.real)
            found = ppg.joint_loss(
                values,
                self._targets(piece.rows, values),
                old_logits,
                logits,
                mask,
                beta_clone=settings.beta_clone,
                normalizer=normalizer,
            )
            require_finite("auxiliary loss", float(found.total), where)
            self.policy.backward(found.total, last=last)
            sums += (
                torch.tensor([float(found.aux_value), float(found.clone_kl)])
                * normalizer
            )
        value, clone = all_sum(sums).tolist()
        self.policy.step(lr, where)
        return value, clone, normalizer

    def _auxiliary_values(self, iteration: int) -> Metrics:
        """E_aux epochs of the value loss on the value network, towards the same targets."""
        settings, memory, engine = self.train.ppg, self.memory, self.value
        assert settings is not None and engine is not None
        lr = self.train.value_lr * linear_to_zero(iteration, self.train.iterations)
        total, count, lengths = (
            torch.zeros(1, dtype=torch.float64),
            0.0,
            self._memory_lengths(),
        )
        minibatches = min(settings.minibatches * memory.iterations, len(memory))
        for epoch in range(settings.e_aux):
            for step, rows in enumerate(
                self._minibatches(
                    len(memory), minibatches, "aux value", iteration, epoch
                )
            ):
                normalizer = float(sum(len(memory.responses[i]) for i in rows))
                where = f"auxiliary value phase, step {step}"
                for piece, last in self._pieces(rows, lengths):
                    data = rows_batch(memory.prompts, memory.responses, piece.rows)
                    values = self._value_forward(self._to_device(data))
                    loss = ppg.auxiliary_value_loss(
                        values,
                        self._targets(piece.rows, values),
                        self._move(data.response_mask_BR & piece.real),
                        normalizer=normalizer,
                    )
                    require_finite("auxiliary value loss", float(loss), where)
                    engine.backward(loss, last=last)
                    total += float(loss) * normalizer
                engine.step(lr, where)
                count += normalizer
        return {"auxiliary/separate_value_loss": mean(float(all_sum(total)), count)}

    def _frozen_policy(self) -> PolicyNetwork:
        """A copy of the policy as it is now, on this rank, whole whatever the ZeRO stage."""
        if self.policy.zero_stage < 3:
            old = copy.deepcopy(self.policy.network)
            assert isinstance(old, PolicyNetwork)
        else:
            old = PolicyNetwork(self.config.model)
            old.load_state_dict(self.policy.full_state())
            old.to(
                self.policy.device, next(iter(self.policy.network.parameters())).dtype
            )
        return old.eval().requires_grad_(False)

    def _targets(self, rows: list[int], like: Tensor) -> Tensor:
        """value_targets of some rows of the memory, padded like a tensor."""
        out = torch.zeros(like.shape)
        for row, index in enumerate(rows):
            targets = self.memory.value_targets[index]
            out[row, : len(targets)] = torch.tensor(targets)
        return self._move(out)

    def _memory_lengths(self) -> list[int]:
        pairs = zip(self.memory.prompts, self.memory.responses, strict=True)
        return [len(prompt) + len(response) for prompt, response in pairs]

    # ------------------------------------------------------------------ shared mechanics

    def _engine(self, network: torch.nn.Module) -> ZeroEngine:
        return ZeroEngine(
            network,
            zero_stage=self.config.learner.zero_stage,
            precision=self.config.learner.precision,
            weight_decay=self.train.weight_decay,
            clip=self.train.clip,
        )

    def _minibatches(
        self, rows: int, minibatches: int, purpose: str, iteration: int, epoch: int
    ) -> Iterator[list[int]]:
        """Rows in an order that is a function of (seed, purpose, iteration, epoch)."""
        seed = derive_seed(self.config.seed, purpose, iteration, epoch)
        order = np.random.default_rng(seed).permutation(rows)
        for part in np.array_split(order, minibatches):
            yield part.tolist()

    def _deal(self, rows: Sequence[int], lengths: Sequence[int]) -> list[Piece]:
        return deal(
            rows,
            lengths,
            ranks=world_size(),
            rank=rank(),
            budget=self.config.learner.micro_batch_tokens,
        )

    def _pieces(
        self, rows: Sequence[int], lengths: Sequence[int]
    ) -> Iterator[tuple[Piece, bool]]:
        """This rank's micro-batches of a minibatch, each with "is the last before the step"."""
        pieces = self._deal(rows, lengths)
        for index, piece in enumerate(pieces):
            yield piece, index == len(pieces) - 1

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.policy.device)

    def _to_device(self, data: SequenceBatch) -> SequenceBatch:
        return SequenceBatch(
            tokens_BT=self._move(data.tokens_BT),
            predict_BR=self._move(data.predict_BR),
            response_BR=self._move(data.response_BR),
            response_mask_BR=self._move(data.response_mask_BR),
            last_B=self._move(data.last_B),
        )

    # ------------------------------------------------------------------ weights and state

    def publish(self) -> tuple[Publication, Bytes]:
        """This rank's slice of the policy's decoder: facts and bytes."""
        return publish(self.policy, prefix="palm.")

    def state(self) -> dict[str, object]:
        """What a resumed learner needs beside the engines: the KL controller."""
        return self.kl.state_dict()

    def save(self, folder: Path) -> None:
        """Write both engines (a collective) and the memory."""
        self.policy.save(folder / "policy")
        if self.value is not None:
            self.value.save(folder / "value")
        if rank() == 0:
            self.memory.save(folder / "memory.parquet")

    def load(self, folder: Path, state: dict[str, object]) -> None:
        """Read what `save` and `state` gave (a collective)."""
        self.policy.load(folder / "policy")
        if self.value is not None:
            self.value.load(folder / "value")
        self.memory = AuxiliaryMemory.load(folder / "memory.parquet")
        self.kl.load_state_dict(state)


_SHARED_VALUE_COEF = 0.1
"""Stiennon 2020 and its implementation details: value loss coefficient of one network."""
