"""Frozen forward passes: scores from the reward model, ref_logprobs from the reference policy.

Shape suffixes: B sequences, T positions, R response positions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from common.batching import (
    SequenceBatch,
    micro_batches,
    sequence_batch,
    shared_micro_batches,
)
from common.config.model import ModelConfig
from common.data.chat import Turn
from common.data.encoding import rows_in_ids
from common.data.records import Demonstration
from common.data.tokenizer import Tokenizer
from common.logprobs import Sampling, chosen_reader
from common.models.adapter_files import load_scalar
from common.models.build import build_policy, build_scalar
from common.models.decoder import Decoder
from common.models.weight_files import load_weights
from common.wire.trajectory import Rollout


class RewardModel:
    """One number per response, read at its last token (EOS included), before any padding."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Path,
        base: Decoder,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Load the weights; those of an adapter share `base` in memory.

        With a tokenizer of its own the model reads texts, and not the policy's tokens.
        """
        self.tokenizer, self.context = tokenizer, config.context
        self.network = build_scalar(config)
        load_scalar(self.network, weights, base, "reward")
        _freeze(self.network)

    def __call__(self, batch: SequenceBatch) -> Tensor:
        """Score the sequences of a batch, fp32 ``[B]``."""
        values_BT = self.network(
            batch.tokens_BT, lengths_B=batch.lengths_B, prompts_B=batch.prompts_B
        )
        return read_last(values_BT, batch)

    def tokens_of(self, rollouts: Sequence[Rollout]) -> list[tuple[list[int], list[int]]]:
        """Return prompts and responses in tokens of this model's own.

        A conversation is written by its own template. What is longer than its context loses the
        beginning of the prompt.
        """
        assert self.tokenizer is not None, "it reads the policy's tokens"
        rows = rows_in_ids([_as_demonstration(rollout) for rollout in rollouts], self.tokenizer)
        return [
            _fitted(turn, rollout, self.context)
            for rollout, [[turn]] in zip(rollouts, rows, strict=True)
        ]


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
        device = next(self.network.parameters()).device
        read = chosen_reader(batch.response_BR.to(device), self.sampling.unfiltered)
        columns, _ = self.network(
            batch.tokens_BT,
            lengths_B=batch.lengths_B,
            prompts_B=batch.prompts_B,
            predict_BR=batch.predict_BR,
            read=read,
        )
        logprobs_BR: Tensor = columns[..., 0]
        return logprobs_BR.masked_fill(~batch.response_mask_BR.to(device), 0.0)


def _as_demonstration(rollout: Rollout) -> Demonstration:
    if rollout.conversation is None:
        return Demonstration(prompt=rollout.prompt_text, response=rollout.response_text)
    conversation = json.loads(rollout.conversation)
    return Demonstration(
        prompt=rollout.prompt_text,
        messages=conversation["messages"],
        tools=conversation["tools"],
        response=rollout.response_text,
    )


def _fitted(turn: Turn, rollout: Rollout, context: int) -> tuple[list[int], list[int]]:
    """Cut a turn to the context; a response that never ended has no end here either."""
    cut = rollout.finish_reason == "length" and len(turn.learnt) > 1
    response = (turn.learnt[:-1] if cut else turn.learnt)[: context - 1]
    return turn.before[-(context - len(response)) :], response


def read_last(values_BT: Tensor, batch: SequenceBatch) -> Tensor:
    """Read the value at each sequence's last response token, ``[B]``."""
    return values_BT.gather(1, batch.last_B[:, None].to(values_BT.device)).squeeze(1)


@torch.no_grad()
def frozen_pass(
    rollouts: Sequence[Rollout],
    budget: int,
    reward_model: RewardModel | None,
    reference: ReferencePolicy,
) -> tuple[list[float], list[list[float]]]:
    """Scores (zeros without a reward model) and ref_logprobs, in the rollouts' order.

    Micro-batches have at most `budget` tokens, padded where the model does not share prompts. All
    are computed before the first result is looked at, so that a device need not be waited for.
    """
    # A model that reads the same tokens is run on the same batches.
    own = reward_model if reward_model and reward_model.tokenizer is not None else None
    same = reward_model if own is None else None
    read = [(rollout.prompt_ids, rollout.response_ids) for rollout in rollouts]
    of_tokens, of_rows = _Results(), _Results()
    for rows, batch in _batches(read, budget, reference.network.decoder):
        of_tokens.add(rows, reference(batch))
        if same is not None:
            of_rows.add(rows, same(batch)[:, None])
    if own is not None:
        for rows, batch in _batches(own.tokens_of(rollouts), budget, own.network.decoder):
            of_rows.add(rows, own(batch)[:, None])
    logprobs, scores = of_tokens.read(), of_rows.read()
    return (
        [scores[index][0] if scores else 0.0 for index in range(len(rollouts))],
        [logprobs[index][: len(r.response_ids)] for index, r in enumerate(rollouts)],
    )


class _Results:
    """What micro-batches came to, on the device that computed it."""

    def __init__(self) -> None:
        self._rows: list[list[int]] = []
        self._values: list[Tensor] = []

    def add(self, rows: list[int], values_BR: Tensor) -> None:
        """Keep values of these rows."""
        self._rows.append(rows)
        self._values.append(values_BR)

    def read(self) -> dict[int, list[float]]:
        """Copy all of them to the processor at once, by row."""
        if not self._values:
            return {}
        flat = torch.cat([values_BR.flatten() for values_BR in self._values]).cpu()
        found, begin = dict[int, list[float]](), 0
        for rows, values_BR in zip(self._rows, self._values, strict=True):
            end = begin + values_BR.numel()
            found |= zip(rows, flat[begin:end].view(values_BR.shape).tolist(), strict=True)
            begin = end
        return found


def _batches(
    sequences: Sequence[tuple[list[int], list[int]]], budget: int, decoder: Decoder
) -> Iterator[tuple[list[int], SequenceBatch]]:
    """Yield micro-batches: the numbers of their rows, and prompts with responses laid out."""
    prompts, responses = [p for p, _ in sequences], [r for _, r in sequences]
    if decoder.shares_prompts:
        [groups] = shared_micro_batches(prompts, responses, budget)
    else:
        groups = micro_batches([len(p) + len(r) for p, r in sequences], budget)
    for rows in groups:
        yield rows, sequence_batch([prompts[i] for i in rows], [responses[i] for i in rows])


def _freeze(module: nn.Module) -> None:
    module.eval().requires_grad_(False)
