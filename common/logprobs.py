"""The sampling distribution: the one place that defines what `behavior_logprobs` mean.

Engine and learner both call `sampling_logits`, so that the probability ratio of a rollout
under the weights it was sampled from is 1 (invariant I1), whatever temperature, top-k and top-p.
Distances from the reference are measured between whole distributions (`Sampling.unfiltered`).

Shape suffixes: B sequences, R response positions, V vocabulary, K blocks of C tokens, 1 an axis of
one. Tensors without a suffix may have any leading axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config.workers import RolloutConfig

_BLOCK = 64
"""Tokens summed as one in the first of the two searches of `draw`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a token is drawn: temperature first, then top-k, top-p and min-p."""

    temperature: float = 1.0
    """0 is greedy: all probability on the most probable token."""
    top_p: float = 1.0
    """Keep the smallest set of most probable tokens that reaches this probability."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this share as probable as the most probable one."""
    min_tokens: int = 0
    """No token of `endings` is drawn before a response has so many tokens."""
    endings: tuple[int, ...] = ()
    """Tokens that end a response; EOS is one of them."""

    @property
    def unfiltered(self) -> Sampling:
        """The whole distribution, of which KL and likelihood are taken.

        It has no top-k, top-p or min-p, and temperature 1 where sampling is greedy. The KL of a
        filtered policy to a whole reference is positive even where both are equal; to a reference
        that is filtered too, it is infinite for a token outside that one's nucleus.
        """
        return replace(self, temperature=self.temperature or 1.0, top_p=1.0, top_k=0, min_p=0.0)

    @property
    def filters(self) -> bool:
        """Whether tokens are drawn from less than the whole distribution."""
        return self != self.unfiltered


def sampling_of(rollout: RolloutConfig, eos_ids: Sequence[int]) -> Sampling:
    """Return the sampling distribution of the rollouts; `eos_ids` all end a response."""
    return Sampling(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        min_p=rollout.min_p,
        min_tokens=rollout.min_response_tokens,
        endings=(*eos_ids, *rollout.stop_ids) if rollout.min_response_tokens else (),
    )


def sampling_logits(
    logits: Tensor,
    sampling: Sampling,
    *,
    chosen: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """fp32 logits ``[..., V]`` of the distribution that tokens are drawn from; -inf = never.

    Args:
        logits: ``[..., V]``, of the network.
        sampling: the distribution.
        chosen: int64 ``[...]``, tokens that were drawn: they are kept whatever the filter says
            now, because a last-bit difference in the logits may put a token at the very border
            of the nucleus on its other side.
        positions: int64, broadcastable to ``[...]``: the place of each token in its response.
            Needed only with `min_tokens`.
    """
    logits = logits.float()
    if sampling.min_tokens and sampling.endings:
        if positions is None:
            raise ValueError("min_tokens needs the positions of the tokens")
        early = (positions < sampling.min_tokens)[..., None].expand_as(logits)
        ending = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        ending[list(sampling.endings)] = True
        logits = logits.masked_fill(early & ending, float("-inf"))
    if sampling.temperature == 0.0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.full_like(logits, float("-inf")).scatter(-1, best, 0.0)
    if sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    drop = _filtered(logits.detach(), sampling)
    if drop is not None:
        if chosen is not None:
            drop = drop.scatter(-1, chosen[..., None], False)
        logits = logits.masked_fill(drop, float("-inf"))
    return logits


def chosen_reader(
    chosen_BR: Tensor,
    sampling: Sampling,
    more: Callable[[Tensor], Tensor] | None = None,
    *,
    unfiltered: bool = False,
) -> Callable[[Tensor, slice | Tensor], Tensor]:
    """Return `logprobs_at` for logits that come in pieces (`PolicyNetwork.forward`).

    Args:
        chosen_BR: int64 tokens of responses.
        sampling: the distribution.
        more: maps logits ``[n, V]`` to a second column ``[n]``.
        unfiltered: add a last column, the log-probabilities before the filter.
    """
    chosen = chosen_BR.flatten()
    steps_R = torch.arange(chosen_BR.shape[1], device=chosen_BR.device)
    positions = steps_R.expand_as(chosen_BR).flatten()

    def read(logits: Tensor, part: slice | Tensor) -> Tensor:
        columns = [logprobs_at(logits, chosen[part], sampling, positions[part])]
        if more is not None:
            columns.append(more(logits))
        if unfiltered:
            whole = sampling.unfiltered
            columns.append(logprobs_at(logits, chosen[part], whole, positions[part]))
        return torch.stack(columns, dim=-1)

    return read


def logprobs_at(logits: Tensor, chosen: Tensor, sampling: Sampling, positions: Tensor) -> Tensor:
    """Log-probabilities (fp32 ``[...]``) of chosen tokens (int64 ``[...]``).

    `positions` are the places of the tokens in their responses, as in `sampling_logits`.
    """
    kept = sampling_logits(logits, sampling, chosen=chosen, positions=positions)
    # One number per token survives: a log-softmax would write the whole vocabulary once more.
    return kept.gather(-1, chosen[..., None]).squeeze(-1) - kept.logsumexp(dim=-1)


def draw(logits_BV: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """Draw by the inverse CDF from `sampling_logits`, one uniform (float64, [0, 1)) per row.

    Two searches, first among sums of 64 tokens, then within one: a cumulative sum over the whole
    vocabulary would cost more than everything else here.

    Returns:
        The tokens (int64 ``[B]``) and their log-probabilities (float32 ``[B]``).
    """
    vocabulary = logits_BV.shape[-1]
    peak_B1 = logits_BV.amax(dim=-1, keepdim=True)
    weights_BV = (logits_BV - peak_B1).exp_()
    if vocabulary % _BLOCK:
        weights_BV = F.pad(weights_BV, (0, -vocabulary % _BLOCK))
    blocks_BKC = weights_BV.view(len(weights_BV), -1, _BLOCK)
    cdf_BK = F.pad(blocks_BKC.sum(dim=-1).double().cumsum(dim=-1), (1, 0))
    total_B1 = cdf_BK[:, -1:]
    target_B1 = _below(uniforms_B[:, None].to(cdf_BK.device) * total_B1, total_B1)
    block_B1 = (cdf_BK[:, 1:] <= target_B1).sum(dim=-1, keepdim=True)
    within_BC = blocks_BKC.gather(1, block_B1[..., None].expand(-1, -1, _BLOCK)).squeeze(1)
    inner_BC = within_BC.double().cumsum(dim=-1)
    rest_B1 = _below(target_B1 - cdf_BK.gather(1, block_B1), inner_BC[:, -1:])
    tokens_B1 = block_B1 * _BLOCK + (inner_BC <= rest_B1).sum(dim=-1, keepdim=True)
    logprobs_B1 = logits_BV.gather(1, tokens_B1) - peak_B1 - total_B1.log().float()
    return tokens_B1.squeeze(1), logprobs_B1.squeeze(1)


def _below(target: Tensor, total: Tensor) -> Tensor:
    """Return `target`, or the largest number under `total` where rounding reached it.

    So a search ends on a token whose weight is not zero.
    """
    return torch.minimum(target, total.nextafter(torch.zeros_like(total)))


def _filtered(logits: Tensor, sampling: Sampling) -> Tensor | None:
    """Return True where top-k, top-p or min-p removes a token; None when all are off."""
    vocabulary = logits.shape[-1]
    top_k = sampling.top_k if 0 < sampling.top_k < vocabulary else 0
    improbable = None
    if sampling.min_p > 0.0:
        improbable = logits < logits.amax(dim=-1, keepdim=True) + math.log(sampling.min_p)
    if not top_k and sampling.top_p >= 1.0:
        return improbable
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    drop = torch.zeros_like(ordered, dtype=torch.bool)
    if top_k:
        drop[..., top_k:] = True
    if sampling.top_p < 1.0:
        probabilities = ordered.masked_fill(drop, float("-inf")).softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        drop = drop | (before >= sampling.top_p)
        drop[..., 0] = False
    drop = torch.zeros_like(drop).scatter(-1, order, drop)
    return drop if improbable is None else drop | improbable
