"""Weights of the palm-rlhf-pytorch package (0.8.0) in this model's names.

Departures of that package from PaLM: logits are not scaled, and the rotary embedding has xpos; so
the shape must have ``scale_logits=False, xpos=True``. Its LayerNorm holds the scale minus 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from common.errors import CheckpointError

_NAMES = {
    "norm.gamma": "norm.weight",
    "fused_attn_ff_proj.weight": "fused_in.weight",
    "attn_out.weight": "attn_out.weight",
    "ff_out.2.weight": "ff_out.weight",
}
_LAYER = re.compile(r"layers\.(\d+)\.fn\.(.+)")
_DERIVED = ("beta", "inv_freq", "rotary_emb.scale", "to_logits.weight", "pos_emb", "pos_emb_scale")
"""Buffers, and the output embedding, which is the input's."""


def from_palm_rlhf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A `PaLM` state dict. The fused projection has the same order of rows: q, k, v, up, gate.

    Raises:
        CheckpointError: a name that is not of this package's plain decoder (LoRA, for instance).
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(_DERIVED):
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
