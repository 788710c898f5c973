"""Weights of the palm-rlhf-pytorch package (0.8.0) in this model's names.

Departures of that package from PaLM: logits are not scaled, and the rotary embedding has xpos; so
the shape must have ``scale_logits=False, xpos=True``. Its LayerNorm holds the scale minus 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from common.config.model import LoraConfig
from common.errors import CheckpointError
from common.models.adapter_files import Adapter
from common.models.adapters import base_fingerprint

_NAMES = {
    "norm.gamma": "norm.weight",
    "fused_attn_ff_proj.weight": "fused_in.weight",
    "attn_out.weight": "attn_out.weight",
    "ff_out.2.weight": "ff_out.weight",
}
_LAYER = re.compile(r"layers\.(\d+)\.fn\.(.+)")
_ADAPTERS = "finetune_modules."
_DERIVED = ("beta", "inv_freq", "rotary_emb.scale", "to_logits.weight", "pos_emb", "pos_emb_scale")
"""Buffers, and the output embedding, which is the input's."""


def from_palm_rlhf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict to one of `PaLM`; `lora_from_palm_rlhf` reads the adapters.

    The fused projection has the same order of rows: q, k, v, up, gate.

    Raises:
        CheckpointError: a name that is not of this package's decoder.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(_DERIVED) or name.startswith(_ADAPTERS):
            continue
        layer = _LAYER.fullmatch(name)
        if name == "token_emb.weight":
            converted["embedding.weight"] = tensor
        elif name == "norm.gamma":
            converted["norm.weight"] = tensor + 1.0
        elif layer and layer[2] in _NAMES:
            ours = _NAMES[layer[2]]
            value = tensor + 1.0 if ours == "norm.weight" else tensor
            converted[f"blocks.{layer[1]}.{ours}"] = value
        else:
            raise CheckpointError(f"'{name}' is not a weight of a plain palm-rlhf-pytorch decoder")
    return converted


def lora_from_palm_rlhf(
    state: Mapping[str, Tensor], scope: str, *, alpha: float | None = None
) -> Adapter:
    """Convert the adapter of a fine-tuning scope: q, k, v and attention output of every layer.

    Args:
        state: a state dict of that package.
        scope: the adapter's name there.
        alpha: the setting of the adapters, which their weights do not tell; their default is the
            rank.

    Raises:
        CheckpointError: no such scope.
    """
    prefix = f"{_ADAPTERS}{scope}."
    factors = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if not factors:
        scopes = sorted({k.split(".")[1] for k in state if k.startswith(_ADAPTERS)})
        raise CheckpointError(
            f"no adapters of scope '{scope}'; there are {', '.join(scopes) or 'none'}"
        )
    rank = factors["0.0.A"].shape[1]
    tensors: dict[str, Tensor] = {}
    for layer in sorted({int(name.split(".")[0]) for name in factors}):
        block = f"blocks.{layer}"
        stacked = [factors[f"{layer}.{segment}.A"].T for segment in range(3)]
        tensors[f"{block}.fused_in.lora_A"] = torch.cat(stacked)
        for segment, name in enumerate(("q", "k", "v")):
            tensors[f"{block}.fused_in.lora_B_{name}"] = factors[f"{layer}.{segment}.B"].T
        tensors[f"{block}.attn_out.lora_A"] = factors[f"{layer}.3.A"].T
        tensors[f"{block}.attn_out.lora_B_attn_out"] = factors[f"{layer}.3.B"].T
    settings = LoraConfig(
        rank=rank,
        alpha=rank if alpha is None else alpha,
        targets=("q", "k", "v", "attn_out"),
    )
    base = base_fingerprint(from_palm_rlhf(state))
    return Adapter(settings=settings, base=base, tensors=tensors)
