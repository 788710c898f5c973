"""Likelihoods of whole logits, for tests that have them: the product reads logits in pieces."""

from __future__ import annotations

import torch
from torch import Tensor

from common.logprobs import Sampling, logprobs_at, sampling_logits


def sampling_logprobs(logits: Tensor, sampling: Sampling) -> Tensor:
    """fp32 ``[..., V]`` of the distribution that tokens are drawn from."""
    return sampling_logits(logits, sampling).log_softmax(dim=-1)


def chosen_logprobs(logits: Tensor, chosen: Tensor, sampling: Sampling) -> Tensor:
    """fp32 ``[..., R]`` of the tokens of responses, from their first on."""
    return logprobs_at(logits, chosen, sampling, torch.arange(chosen.shape[-1]))
