"""Networks from a model's configuration: the one place that chooses an architecture."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from common.config.model import ModelConfig, PalmConfig, PretrainedConfig
from common.models.decoder import Decoder
from common.models.filling import without_memory
from common.models.networks import PolicyNetwork, ScalarNetwork
from common.models.palm import PaLM


def _pretrained(config: PretrainedConfig) -> Decoder:
    # The library takes seconds to import, which models of our own do without.
    from common.models.pretrained.decoder import PretrainedDecoder

    return PretrainedDecoder(config)


DECODERS: dict[type[ModelConfig], Callable[[Any], Decoder]] = {
    PalmConfig: PaLM,
    PretrainedConfig: _pretrained,
}
"""What computes a model, by its kind."""


def build_decoder(config: ModelConfig) -> Decoder:
    """Build a decoder whose weights are not drawn or loaded yet."""
    return DECODERS[type(config)](config)


def build_policy(config: ModelConfig, *, empty: bool = False) -> PolicyNetwork:
    """Build a policy over the decoder that `config` describes.

    Args:
        config: the decoder's.
        empty: leave the decoder's parameters on the meta device (`common.models.filling`).
    """
    return PolicyNetwork(_decoder(config, empty))


def build_scalar(config: ModelConfig, *, empty: bool = False) -> ScalarNetwork:
    """Build a reward model or value network; the arguments are those of `build_policy`."""
    return ScalarNetwork(_decoder(config, empty))


def _decoder(config: ModelConfig, empty: bool) -> Decoder:
    with without_memory() if empty else nullcontext():
        return build_decoder(config)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCount:
    """Parameters of a shape: `kernels` as PaLM's table 1 counts them, `total` with the norms."""

    kernels: int
    total: int


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count on the meta device: nothing is allocated, whatever the size."""
    with torch.device("meta"):
        model = build_decoder(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    return ParameterCount(kernels=total - norms, total=total)
