"""Which rows this rank computes: seeded minibatches, dealt to ranks, cut into micro-batches.

Shape suffixes: N rows of the whole batch, B rows of a micro-batch, T positions, R response
positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.batching import SequenceBatch, rows_by_prompt
from common.devices import onto
from common.randomness import derive_seed
from learner.batch.dealing import Lengths, Share, deal, deal_shared
from learner.batch.experience import Sequences
from learner.batch.pulse import beat
from learner.zero.process_group import all_sum, rank, world_size


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Some rows of a batch, padded."""

    data: SequenceBatch
    """On the processor: how rows are laid out is decided there, without waiting for a device."""
    rows: list[int]
    """Row numbers in the whole batch."""
    real: bool
    """Its results count; False in a filler that only keeps ranks in step."""
    last: bool
    """No other micro-batch of this rank comes before the optimizer step."""
    response_BR: Tensor
    """int64 response tokens, on the learner's device."""
    mask_BR: Tensor
    """bool response_mask, on the learner's device; all False in a filler."""

    def cut(self, tensor_NR: Tensor) -> Tensor:
        """Return these rows of a tensor of the whole batch, ``[B, R]``, R the longest of these."""
        return onto(tensor_NR[self.rows, : self.mask_BR.shape[1]], self.mask_BR.device)


class Shards:
    """Deals rows to this rank. Every rank gets the same number of micro-batches."""

    def __init__(
        self, *, seed: int, budget: int, device: torch.device, shares_prompts: bool = False
    ) -> None:
        """Deal for one run.

        Args:
            seed: of the run; the order of rows derives from it.
            budget: tokens of one micro-batch: padded, unless the model shares prompts.
            device: where micro-batches belong.
            shares_prompts: `Decoder.shares_prompts` of the model that is trained.
        """
        self.seed, self.budget, self.device = seed, budget, device
        self.shares_prompts = shares_prompts

    def minibatches(
        self, sequences: Sequences, parts: int, *purpose: int | str
    ) -> Iterator[list[int]]:
        """Yield all rows in `parts` parts, in an order that is a function of (seed, purpose).

        All responses to a prompt are in one part, so that the prompt is computed once in an epoch.
        Where there are fewer prompts than parts, or one has more than twice its share of the
        responses, rows are dealt one by one.
        """
        rows, parts = len(sequences), min(parts, len(sequences))
        groups = list(rows_by_prompt(sequences.prompts).values())
        if len(groups) < parts or max(map(len, groups)) * parts > 2 * rows:
            groups = [[row] for row in range(rows)]
        order = np.random.default_rng(derive_seed(self.seed, *purpose)).permutation(len(groups))
        for part in np.array_split(order, parts):
            yield [row for place in part.tolist() for row in groups[place]]

    def deal(self, rows: Sequence[int], lengths: Lengths) -> list[Share]:
        """Return this rank's micro-batches of some rows, as row numbers."""
        return deal(rows, lengths, ranks=world_size(), rank=rank(), budget=self.budget)

    def micro_batches(self, sequences: Sequences, rows: Sequence[int]) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches of some rows, padded.

        Each is laid out while a device still computes the one before.
        """
        for share in self._shares(sequences, rows):
            beat()
            data = sequences.batch(share.rows)
            yield MicroBatch(
                data=data,
                rows=share.rows,
                real=share.real,
                last=share.last,
                response_BR=onto(data.response_BR, self.device),
                mask_BR=onto(data.response_mask_BR & share.real, self.device),
            )

    def _shares(self, sequences: Sequences, rows: Sequence[int]) -> list[Share]:
        if not self.shares_prompts:
            return self.deal(rows, sequences.lengths)
        return deal_shared(
            rows,
            sequences.prompts,
            sequences.responses,
            ranks=world_size(),
            rank=rank(),
            budget=self.budget,
        )

    @torch.no_grad()
    def gather(self, sequences: Sequences, run: Callable[[MicroBatch], Tensor]) -> Tensor:
        """Run each row on one rank and hand the results to all.

        A device is waited for once, when it was given everything.

        Args:
            sequences: the whole batch.
            run: maps a micro-batch to ``[B, R, ...]``.

        Returns:
            fp32 ``[N, R, ...]`` on every rank, zeros outside the mask.
        """
        ran: list[tuple[MicroBatch, Tensor]] = []
        for micro in self.micro_batches(sequences, range(len(sequences))):
            ran.append((micro, run(micro).float()))
        sizes = [result.numel() for _, result in ran]
        found = torch.cat([result.flatten() for _, result in ran]).cpu().split(sizes)
        out = torch.zeros(*sequences.mask_NR.shape, *ran[0][1].shape[2:])
        for (micro, result), flat in zip(ran, found, strict=True):
            if micro.real:
                hidden = ~micro.data.response_mask_BR.view(
                    *result.shape[:2], *[1] * (result.dim() - 2)
                )
                out[micro.rows, : result.shape[1]] = flat.view(result.shape).masked_fill(
                    hidden, 0.0
                )
        return all_sum(out)
