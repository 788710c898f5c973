"""Which rows this rank computes: seeded minibatches, dealt to ranks, cut into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.batching import SequenceBatch
from common.randomness import derive_seed
from learner.batch.experience import Sequences, deal
from learner.zero.process_group import all_sum, rank, world_size


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Some rows of a batch, padded, on the learner's device."""

    data: SequenceBatch
    rows: list[int]
    """Row numbers in the whole batch."""
    mask_BR: Tensor
    """bool response_mask; all False in a filler that only keeps ranks in step."""
    last: bool
    """No other micro-batch of this rank comes before the optimizer step."""

    def cut(self, tensor_NR: Tensor) -> Tensor:
        """These rows of a tensor of the whole batch, ``[B, R]``, R the longest of these."""
        return tensor_NR[self.rows, : self.mask_BR.shape[1]].to(self.mask_BR.device)


class Shards:
    """Deals rows to this rank. Every rank gets the same number of micro-batches."""

    def __init__(self, *, seed: int, budget: int, device: torch.device) -> None:
        """`budget` is padded tokens per micro-batch."""
        self.seed = seed
        self.budget = budget
        self.device = device

    def minibatches(self, rows: int, parts: int, *purpose: int | str) -> Iterator[list[int]]:
        """All rows in `parts` parts, in an order that is a function of (seed, purpose)."""
        order = np.random.default_rng(derive_seed(self.seed, *purpose)).permutation(rows)
        for part in np.array_split(order, min(parts, rows)):
            yield part.tolist()

    def micro_batches(self, sequences: Sequences, rows: Sequence[int]) -> Iterator[MicroBatch]:
        """This rank's share of some rows."""
        pieces = deal(rows, sequences.lengths, ranks=world_size(), rank=rank(), budget=self.budget)
        for index, piece in enumerate(pieces):
            data = self._move(sequences.batch(piece.rows))
            yield MicroBatch(
                data=data,
                rows=piece.rows,
                mask_BR=data.response_mask_BR & piece.real,
                last=index == len(pieces) - 1,
            )

    @torch.no_grad()
    def gather(self, sequences: Sequences, run: Callable[[MicroBatch], Tensor]) -> Tensor:
        """Run each row on one rank; fp32 ``[N, R, ...]`` on every rank, zeros outside the mask.

        `run` gives ``[B, R, ...]``.
        """
        out = torch.zeros(0)
        for micro in self.micro_batches(sequences, range(len(sequences))):
            found = run(micro).float().cpu()
            if not len(out):
                out = torch.zeros(*sequences.mask_NR.shape, *found.shape[2:])
            hidden = ~micro.mask_BR.cpu().view(*micro.mask_BR.shape, *[1] * (found.dim() - 2))
            if not bool(hidden.all()):
                out[micro.rows, : found.shape[1]] = found.masked_fill(hidden, 0.0)
        return all_sum(out)

    def _move(self, data: SequenceBatch) -> SequenceBatch:
        return SequenceBatch(
            tokens_BT=data.tokens_BT.to(self.device),
            predict_BR=data.predict_BR.to(self.device),
            response_BR=data.response_BR.to(self.device),
            response_mask_BR=data.response_mask_BR.to(self.device),
            last_B=data.last_B.to(self.device),
        )
