"""How tokens attend to each other: what a block is given, and attention of whole sequences.

A block does not know whether it trains on whole sequences or generates with a cache: it is given
an `Attention`. Those of whole sequences are here, the one with a cache is
`actors.generation.torch_forward`'s.

Shape suffixes: B sequences, T queries, L keys, N flat tokens of all sequences, H query heads,
G key and value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from common.devices import onto


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixing:
    """What is special in how a layer mixes values."""

    scale: float | None = None
    """Factor of the products of queries and keys; None is ``1 / sqrt(K)``."""
    window: int | None = None
    """Positions that can be attended to, the token's own included; None is all."""
    softcap: float | None = None
    """The scores s become ``softcap tanh(s / softcap)`` (Gemma 2)."""


PLAIN = Mixing()
_FEW, _MANY = 128, 1024
"""Tokens of responses to one prompt that are computed together, whatever the prompt's length."""
_SHORT, _STEP = 64, 16
"""Sequences of up to so many tokens are computed several at once, filled up to a multiple of the
other: a call for each takes longer than its products."""


class Attention(Protocol):
    """How new tokens attend, given to every block."""

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mixing: Mixing = PLAIN
    ) -> Tensor:
        """Mix values: queries ``[..., H, K]``, keys and values ``[..., G, K]`` to ``[..., H, K]``.

        Rotary positions are in queries and keys already. Query head h reads head ``h G / H`` of
        keys and values.
        """


def causal_attention() -> Attention:
    """Attention of whole rows ``[B, T]``, each position to itself and those before it.

    Sequences are left-aligned, so causality alone keeps padding out of every real position.
    """

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, mixing: Mixing = PLAIN) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return _whole(q, k, v, mixing).transpose(1, 2)

    return attend


@dataclass(frozen=True, slots=True)
class Family:
    """Flat tokens of a sequence, or of a prompt and, behind it, all responses to it."""

    prompt: int
    """Tokens of the prompt, or of the sequence."""
    responses: tuple[int, ...] = ()
    """Tokens of each response, which attends to the prompt and to itself. None is empty."""


def family_attention(families: Sequence[Family]) -> Attention:
    """Attention of flat tokens ``[N]`` of families one after another, each on its own.

    No product is spent on padding or on pairs of different families, and what a sequence becomes
    does not depend on the others.
    """
    sizes = [family.prompt + sum(family.responses) for family in families]
    begins = list(accumulate(sizes, initial=0))
    chunks = [_chunks(family) for family in families]

    @cache  # all layers of a kind have the same
    def masks(window: int | None, device: torch.device) -> list[list[Tensor]]:
        return [
            [onto(chunk.mask(family.prompt, window), device) for chunk in behind]
            for family, behind in zip(families, chunks, strict=True)
        ]

    short = _alike(families, begins)
    apart = [i for i, family in enumerate(families) if not _is_short(family)]
    # Flat positions in the order in which they are computed: short sequences, then the others.
    made = [batch.places.flatten()[batch.real] for batch in short]
    made += [torch.arange(begins[i], begins[i + 1]) for i in apart]
    back = torch.cat(made).argsort()

    @cache
    def here(device: torch.device) -> tuple[list[_Alike], Tensor]:
        return [batch.to(device) for batch in short], onto(back, device)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, mixing: Mixing = PLAIN) -> Tensor:
        behind = masks(mixing.window, q.device)
        batches, back = here(q.device)
        out = [batch.attend(q, k, v, mixing) for batch in batches]
        for i in apart:
            begin, family, own_masks = begins[i], families[i], behind[i]
            middle = begin + family.prompt
            own_q, own_k, own_v = (_headed(t[begin:middle]) for t in (q, k, v))
            out.append(_flat(_whole(own_q, own_k, own_v, mixing)))
            for mask in own_masks:
                end = middle + len(mask)
                keys, values = (
                    torch.cat((first, _headed(t[middle:end])), dim=-2)
                    for first, t in ((own_k, k), (own_v, v))
                )
                out.append(_flat(_mixed(_headed(q[middle:end]), keys, values, mixing, mask)))
                middle = end
        return torch.cat(out)[back] if batches else torch.cat(out)

    return attend


@dataclass(frozen=True, slots=True)
class _Alike:
    """Short sequences that are computed at once, each filled up to the same length."""

    places: Tensor
    """int64 ``[D, L]``: flat positions. Behind a sequence its last one is repeated, which nothing
    that is real attends to."""
    real: Tensor
    """int64: which of the rows' ``D L`` positions are not filling."""

    def to(self, device: torch.device) -> _Alike:
        return _Alike(onto(self.places, device), onto(self.real, device))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mixing: Mixing) -> Tensor:
        """Mix values of what is real, sequence by sequence: ``[real, H, K]``."""
        q, k, v = (t[self.places].transpose(1, 2) for t in (q, k, v))
        return _whole(q, k, v, mixing).transpose(1, 2).flatten(0, 1)[self.real]


def _is_short(family: Family) -> bool:
    return not family.responses and family.prompt <= _SHORT


def _alike(families: Sequence[Family], begins: Sequence[int]) -> list[_Alike]:
    """Put short sequences together by their length, rounded up.

    The length that one is filled up to depends on itself alone, and so does what it becomes.
    """
    together: dict[int, list[tuple[int, int]]] = {}
    for begin, family in zip(begins, families, strict=False):
        if _is_short(family):
            length = -(-family.prompt // _STEP) * _STEP
            together.setdefault(length, []).append((begin, family.prompt))
    batches = []
    for length, members in together.items():
        starts_D1, sizes_D1 = torch.tensor(members).unsqueeze(-1).unbind(1)
        columns = torch.arange(length)
        places = starts_D1 + columns.minimum(sizes_D1 - 1)
        batches.append(_Alike(places, (columns < sizes_D1).flatten().nonzero()[:, 0]))
    return batches


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Responses to one prompt that are computed together, their tokens one after another."""

    members: Tensor
    """int64: which response a token is of."""
    places: Tensor
    """int64: its place in that response."""

    def mask(self, prompt: int, window: int | None) -> Tensor:
        """Return what these tokens attend to, of the prompt's tokens and of these."""
        queries, keys = self.places[:, None] + prompt, self.places[None] + prompt
        own = (self.members[:, None] == self.members[None]) & (keys <= queries)
        whole = torch.cat((torch.ones(len(own), prompt, dtype=torch.bool), own), dim=1)
        if window is not None:
            every = torch.cat((torch.arange(prompt)[None], keys), dim=1)
            whole &= queries - every < window
        return whole


def _chunks(family: Family) -> list[_Chunk]:
    """Cut the responses of a family into what is computed together.

    A chunk has about as many tokens as its prompt: so products are at most about twice those of
    each response alone, and as many keys and values are copied as there are tokens.
    """
    most = min(max(family.prompt, _FEW), _MANY)
    chunks: list[_Chunk] = []
    part: list[int] = []
    for index, length in enumerate(family.responses):
        part.append(length)
        following = family.responses[index + 1 : index + 2]
        if not following or sum(part) + following[0] > most:
            lengths = torch.tensor(part)
            members = torch.arange(len(part)).repeat_interleave(lengths)
            chunks.append(_Chunk(members, torch.cat([torch.arange(n) for n in part])))
            part = []
    return chunks


def _headed(flat: Tensor) -> Tensor:
    """``[T, H, K]`` as ``[1, H, T, K]``."""
    return flat.transpose(0, 1).unsqueeze(0)


def _flat(headed: Tensor) -> Tensor:
    """``[1, H, T, K]`` as ``[T, H, K]``."""
    return headed.squeeze(0).transpose(0, 1)


def _whole(q: Tensor, k: Tensor, v: Tensor, mixing: Mixing) -> Tensor:
    """Attention ``[B, H, T, K]`` of whole sequences, each position to those before it."""
    length, mask = q.shape[-2], None
    if mixing.window is not None and mixing.window < length:
        ones = torch.ones(length, length, dtype=torch.bool, device=q.device)
        mask = ones.triu(1 - mixing.window).tril()
    return _mixed(q, k, v, mixing, mask)


def _mixed(q: Tensor, k: Tensor, v: Tensor, mixing: Mixing, mask: Tensor | None) -> Tensor:
    """As `masked_attention`, in the dtype of the values."""
    dtype = v.dtype
    if q.device.type == "cpu":
        # The backward of attention in bf16 takes three times as long there as in fp32.
        q, k, v = q.float(), k.float(), v.float()
    else:  # one dtype, of which norms and rotation in fp32 have made two
        q, k = q.to(dtype), k.to(dtype)
    return masked_attention(q, k, v, mixing, mask).to(dtype)


def masked_attention(
    q_BHTK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, mixing: Mixing, mask: Tensor | None
) -> Tensor:
    """Mix values: ``[B, H, T, K]``. Keys and values of a group of heads are not copied.

    Args:
        q_BHTK: queries.
        k_BGLK: keys.
        v_BGLK: values.
        mixing: how; its window is in the mask.
        mask: bool, broadcastable to ``[B, 1, T, L]``, True = attend; None is causal.
    """
    heads, groups = q_BHTK.shape[1], k_BGLK.shape[1]
    if mixing.softcap is None:
        if groups == 1:
            k_BGLK, v_BGLK = (t.expand(-1, heads, -1, -1) for t in (k_BGLK, v_BGLK))
        return F.scaled_dot_product_attention(
            q_BHTK,
            k_BGLK,
            v_BGLK,
            attn_mask=mask,
            is_causal=mask is None,
            scale=mixing.scale,
            enable_gqa=1 < groups < heads,
        )
    if mask is None:
        shape = q_BHTK.shape[-2], k_BGLK.shape[-2]
        mask = torch.ones(shape, dtype=torch.bool, device=q_BHTK.device).tril()
    scale = q_BHTK.shape[-1] ** -0.5 if mixing.scale is None else mixing.scale
    grouped = q_BHTK.unflatten(1, (groups, -1))
    scores = grouped @ k_BGLK.transpose(-1, -2).unsqueeze(2) * scale
    absent = ~(mask if mask.dim() == 2 else mask.unsqueeze(1))
    scores = capped(scores, mixing.softcap).masked_fill(absent, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(v_BGLK.dtype)
    return (weights @ v_BGLK.unsqueeze(2)).flatten(1, 2)


def capped(scores: Tensor, softcap: float) -> Tensor:
    """Hold scores between -softcap and softcap (Gemma 2, arXiv 2408.00118, section 2)."""
    return softcap * torch.tanh(scores / softcap)
