"""Frozen forward passes: scores from the reward model, ref_logprobs from the reference policy.

Shape suffixes: B sequences, T positions, R response positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from common.batching import SequenceBatch, micro_batches, sequence_batch
from common.config.model import ModelConfig
from common.logprobs import Sampling, chosen_reader
from common.models.adapter_files import load_scalar
from common.models.build import build_policy, build_scalar
from common.models.decoder import Decoder
from common.models.weight_files import load_weights
from common.wire.trajectory import Rollout


class RewardModel:
    """One number per response, read at its last token (EOS included), before any padding."""

    def __init__(self, config: ModelConfig, weights: Path, base: Decoder) -> None:
        """Load the weights; those of an adapter share `base`, the supervised policy, in memory."""
        self.network = build_scalar(config)
        load_scalar(self.network, weights, base, "reward")
        _freeze(self.network)

    def __call__(self, batch: SequenceBatch) -> Tensor:
        """Score the sequences of a batch, fp32 ``[B]``."""
        values_BT = self.network(batch.tokens_BT, lengths_B=batch.lengths_B)
        return read_last(values_BT, batch)


class ReferencePolicy:
    """The supervised policy that the KL penalty measures against."""

    def __init__(self, config: ModelConfig, weights: Path, sampling: Sampling) -> None:
        self.network = build_policy(config)
        self.sampling = sampling
        load_weights(self.network, weights)
        _freeze(self.network)

    def __call__(self, batch: SequenceBatch) -> Tensor:
        """fp32 ``[B, R]`` log-probabilities of the response tokens, zeros outside the mask.

        They are of the whole distribution (`Sampling.unfiltered`).
        """
        read = chosen_reader(batch.response_BR, self.sampling.unfiltered)
        columns, _ = self.network(
            batch.tokens_BT, lengths_B=batch.lengths_B, predict_BR=batch.predict_BR, read=read
        )
        logprobs_BR: Tensor = columns[..., 0]
        return logprobs_BR.masked_fill(~batch.response_mask_BR, 0.0)


def read_last(values_BT: Tensor, batch: SequenceBatch) -> Tensor:
    """Read the value at each sequence's last response token, ``[B]``."""
    return values_BT.gather(1, batch.last_B[:, None]).squeeze(1)


@torch.no_grad()
def frozen_pass(
    rollouts: Sequence[Rollout],
    budget: int,
    reward_model: RewardModel | None,
    reference: ReferencePolicy,
) -> tuple[list[float], list[list[float]]]:
    """Scores (zeros without a reward model) and ref_logprobs, in the rollouts' order.

    Micro-batches are sorted by length within `budget` padded tokens.
    """
    scores = [0.0] * len(rollouts)
    logprobs: list[list[float]] = [[] for _ in rollouts]
    lengths = [len(r.prompt_ids) + len(r.response_ids) for r in rollouts]
    for rows in micro_batches(lengths, budget):
        batch = sequence_batch(
            [rollouts[i].prompt_ids for i in rows],
            [rollouts[i].response_ids for i in rows],
        )
        ref_BR = reference(batch)
        scores_B = reward_model(batch).tolist() if reward_model else [0.0] * len(rows)
        for row, index in enumerate(rows):
            scores[index] = scores_B[row]
            logprobs[index] = ref_BR[row, : len(rollouts[index].response_ids)].tolist()
    return scores, logprobs


def _freeze(module: nn.Module) -> None:
    module.eval().requires_grad_(False)
