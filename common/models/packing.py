"""Rows of a batch as flat tokens: without padding, and a prompt of several rows only once.

All responses to a prompt read the same states of it. Computed once and read by all of them, they
give the same log-probabilities, and by the chain rule the same gradients, for a fraction of the
products: of eight responses as long as their prompt, 9 parts of 16.

Shape suffixes: B rows, T positions, N flat tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.batching import rows_by_prompt
from common.devices import onto
from common.models.attention import Attention, Family, family_attention

_BLOCK = 64
"""Flat tokens are filled up to a multiple of so many. oneDNN compiles its products for each number
of rows and keeps them: without filling a learner of SmolLM2's shape grew by 12 MB with each new
number, of which there are hundreds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A batch as flat tokens."""

    tokens_N: Tensor
    """int64."""
    positions_N: Tensor
    """int64: places of the tokens in their sequences."""
    attention: Attention
    """What each token attends to."""
    places_BT: Tensor
    """int64: where a position's token is among the flat ones; N for padding."""

    def to(self, device: torch.device) -> Packed:
        """Return the same on a device."""
        return Packed(
            tokens_N=onto(self.tokens_N, device),
            positions_N=onto(self.positions_N, device),
            attention=self.attention,
            places_BT=onto(self.places_BT, device),
        )

    def unpack(self, states_ND: Tensor) -> Tensor:
        """Return the states by rows, ``[B, T, D]``; those of padding are zeros."""
        padding = len(states_ND)
        # As an embedding: its backward adds up what the rows of a prompt ask of it.
        return F.embedding(self.places_BT, F.pad(states_ND, (0, 0, 0, 1)), padding_idx=padding)


def pack(
    tokens_BT: Tensor,
    *,
    positions_BT: Tensor | None = None,
    segments_BT: Tensor | None = None,
    lengths_B: Tensor | None = None,
    prompts_B: Tensor | None = None,
) -> Packed:
    """Lay out rows as flat tokens; the arguments are those of `Decoder.hidden`."""
    rows, length = tokens_BT.shape
    device = tokens_BT.device
    if positions_BT is None:
        positions_BT = torch.arange(length, device=device).expand(rows, length)
    if prompts_B is not None and lengths_B is not None and segments_BT is None:
        order, places_BT, families = _shared(tokens_BT, prompts_B, lengths_B)
    else:
        order, places_BT, families = _apart(tokens_BT, segments_BT, lengths_B)
    order = order.to(device)
    tokens_N, positions_N = tokens_BT.flatten()[order], positions_BT.flatten()[order]
    real = len(tokens_N)
    if filler := -real % _BLOCK:
        families.append(Family(filler))
        tokens_N, positions_N = (F.pad(t, (0, filler)) for t in (tokens_N, positions_N))
    return Packed(
        tokens_N=tokens_N,
        positions_N=positions_N,
        attention=family_attention(families),
        places_BT=places_BT.masked_fill(places_BT < 0, real + filler).to(device),
    )


def _apart(
    tokens_BT: Tensor, segments_BT: Tensor | None, lengths_B: Tensor | None
) -> tuple[Tensor, Tensor, list[Family]]:
    """Return flat positions in their order, the place of each (-1: padding), and the sequences."""
    rows, length = tokens_BT.shape
    device = tokens_BT.device
    sequences_BT = torch.arange(rows, device=device)[:, None].expand(rows, length)
    real_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    if segments_BT is not None:
        real_BT = segments_BT >= 0
        sequences_BT = sequences_BT * (int(segments_BT.max()) + 1) + segments_BT
    if lengths_B is not None:
        real_BT = real_BT & (torch.arange(length, device=device) < lengths_B[:, None])
    _, counts = sequences_BT[real_BT].unique_consecutive(return_counts=True)
    order = real_BT.flatten().nonzero()[:, 0]
    places = torch.full((rows * length,), -1, device=device)
    places[order] = torch.arange(len(order), device=device)
    return order, places.view(rows, length), [Family(n) for n in counts.tolist()]


def _shared(
    tokens_BT: Tensor, prompts_B: Tensor, lengths_B: Tensor
) -> tuple[Tensor, Tensor, list[Family]]:
    """As `_apart`, with every prompt once, before all responses to it."""
    rows, lengths, prompts = tokens_BT.tolist(), lengths_B.tolist(), prompts_B.tolist()
    by_prompt = rows_by_prompt(row[:own] for row, own in zip(rows, prompts, strict=True))
    width, end = tokens_BT.shape[1], 0
    places_BT = torch.full(tokens_BT.shape, -1)
    order: list[Tensor] = []
    families = []

    def take(row: int, begin: int, stop: int) -> Tensor:
        """Lay out a stretch of a row next; return where it is."""
        nonlocal end
        order.append(torch.arange(row * width + begin, row * width + stop))
        end += stop - begin
        return torch.arange(end - (stop - begin), end)

    for prompt, members in by_prompt.items():
        own = len(prompt)
        if len(members) == 1:
            [row] = members
            places_BT[row, : lengths[row]] = take(row, 0, lengths[row])
            families.append(Family(lengths[row]))
            continue
        places_BT[members, :own] = take(members[0], 0, own)
        for row in members:
            places_BT[row, own : lengths[row]] = take(row, own, lengths[row])
        families.append(Family(own, tuple(lengths[row] - own for row in members)))
    return torch.cat(order), places_BT, families
