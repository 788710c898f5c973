"""Bytes that a pass of a decoder holds, counted on the meta device: nothing is computed."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from common.config.model import LoraConfig, ModelConfig
from common.models.adapters import attach_adapter
from common.models.attention import PLAIN, Mixing
from common.models.build import build_decoder
from common.models.networks import DecoderNetwork, compute_in

_TOKENS = 16
"""Enough that what a pass keeps once does not count."""


class _Attention(torch.autograd.Function):
    """Keeps what attention of whole sequences keeps on a processor: all in fp32, no scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q, dtype=torch.float32)
        ctx.save_for_backward(q.float(), k.float(), v.float(), out)
        return out.to(v.dtype)


def _attend(layer: int, q: Tensor, k: Tensor, v: Tensor, mixing: Mixing = PLAIN) -> Tensor:
    mixed: Tensor = _Attention.apply(q, k, v)  # type: ignore[no-untyped-call]
    return mixed


@cache
def kept_per_token(model: ModelConfig, lora: LoraConfig | None, dtype: torch.dtype) -> float:
    """Return the bytes that the forward pass of a token leaves for its backward pass.

    Of a model whose activations are computed again (`ModelConfig.activation_checkpointing`), it is
    what its blocks begin with, and what a single one of them leaves while it is computed again.

    Args:
        model: with its vocabulary.
        lora: adapters that are trained; None: all weights are.
        dtype: that products run in.
    """
    whole = _kept(model.model_copy(update={"activation_checkpointing": False}), lora, dtype)
    if not model.activation_checkpointing:
        return whole
    with torch.device("meta"):
        sizes = build_decoder(model).sizes
    return whole / sizes.layers + 4.0 * sizes.layers * sizes.dim


def _kept(model: ModelConfig, lora: LoraConfig | None, dtype: torch.dtype) -> float:
    with torch.device("meta"):
        network = DecoderNetwork(build_decoder(model))
    if lora is not None:
        attach_adapter(network, "policy", lora, 0)
        network.to("meta")  # adapters have memory wherever the base is
    compute_in(network, dtype)
    weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    tokens = torch.empty(_TOKENS, dtype=torch.int64, device="meta")
    places = torch.empty(_TOKENS, dtype=torch.int64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network.decoder.states(tokens, places, _attend, network.adapter)
    return sum(storage.nbytes() for storage in kept.values()) / _TOKENS
