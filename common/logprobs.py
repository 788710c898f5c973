"""The sampling distribution: the one place that defines what `behavior_logprobs` mean.

Engine and learner both call `sampling_logprobs`, so that the probability ratio of a rollout
under the weights it was sampled from is 1 (invariant I1), whatever temperature, top-k and top-p.

Shape suffixes: B sequences, R response positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a token is drawn: temperature first, then top-k, then top-p."""

    temperature: float = 1.0
    """0 is greedy: all probability on the most probable token."""
    top_p: float = 1.0
    """Keep the smallest set of most probable tokens that reaches this probability."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""


def sampling_logprobs(logits: Tensor, sampling: Sampling, chosen: Tensor | None = None) -> Tensor:
    """Log-probabilities ``[..., V]`` (fp32) of the distribution that tokens are drawn from.

    Tokens filtered out have -inf. `chosen` (int64 ``[...]``) names tokens that were drawn: they
    are kept whatever the filter says now, because a last-bit difference in the logits may put a
    token at the very border of the nucleus on its other side.
    """
    logits = logits.float()
    if sampling.temperature == 0.0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.full_like(logits, float("-inf")).scatter(-1, best, 0.0)
    logits = logits / sampling.temperature
    drop = _filtered(logits.detach(), sampling)
    if drop is not None:
        if chosen is not None:
            drop = drop.scatter(-1, chosen[..., None], False)
        logits = logits.masked_fill(drop, float("-inf"))
    return logits.log_softmax(dim=-1)


def chosen_logprobs(logits: Tensor, chosen: Tensor, sampling: Sampling) -> Tensor:
    """Log-probability (fp32 ``[...]``) of each chosen token (int64 ``[...]``)."""
    logprobs = sampling_logprobs(logits, sampling, chosen)
    return logprobs.gather(-1, chosen[..., None]).squeeze(-1)


def draw(logprobs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """Inverse-CDF sampling: int64 ``[B]`` from one uniform (float64, [0, 1)) per row."""
    cdf = logprobs_BV.exp().double().cumsum(dim=-1)
    # Scaling by the total keeps rounding from ever asking for more than the last token.
    target = uniforms_B[:, None].to(cdf.device) * cdf[:, -1:]
    return torch.searchsorted(cdf, target, right=True).squeeze(-1).clamp(max=cdf.shape[-1] - 1)


def uniforms(seeds_B: np.ndarray, positions_B: np.ndarray) -> Tensor:
    """Counter-based uniforms (float64 ``[B]``): a pure function of (seed, position).

    SplitMix64 (Steele 2014): the sample does not depend on the actor, slot or batch it ran in.
    """
    with np.errstate(over="ignore"):
        z = seeds_B.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15) * (
            positions_B.astype(np.uint64) + np.uint64(1)
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return torch.from_numpy((z >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _filtered(logits: Tensor, sampling: Sampling) -> Tensor | None:
    """True where top-k or top-p removes a token; None when neither is on."""
    vocabulary = logits.shape[-1]
    top_k = sampling.top_k if 0 < sampling.top_k < vocabulary else 0
    if not top_k and sampling.top_p >= 1.0:
        return None
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    drop = torch.zeros_like(ordered, dtype=torch.bool)
    if top_k:
        drop[..., top_k:] = True
    if sampling.top_p < 1.0:
        probabilities = ordered.masked_fill(drop, float("-inf")).softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        drop = drop | (before >= sampling.top_p)
        drop[..., 0] = False
    return torch.zeros_like(drop).scatter(-1, order, drop)
