"""Llama's blocks, as the native forward has them described (`common.native.blocks`).

Qwen, Mistral and SmolLM are Llama's with biases, norms of heads, windows or layers without
positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from common.models.decoder import Decoder
from common.models.lora import Adapted
from common.models.pretrained.decoder import PretrainedDecoder
from common.models.pretrained.families import LogitsRule
from common.native.blocks import BlockWeights, first_half

LLAMAS = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""Families of Llama's block, by `model_type`."""
_SILU = ("silu", "swish")


def lacking(decoder: Decoder) -> str:
    """Say which part of a decoder is not described here; empty where all is."""
    if not isinstance(decoder, PretrainedDecoder):
        return f"a {type(decoder).__name__} is described nowhere"
    shape = decoder.shape
    if shape.model_type not in LLAMAS:
        return f"'{shape.model_type}' has another block than {', '.join(LLAMAS)}"
    if shape.hidden_act not in _SILU:
        return f"its activation is {shape.hidden_act}, not silu"
    if decoder.rule != LogitsRule():
        return "its logits are scaled or capped"
    for layer in _layers(decoder):
        parts = (layer.self_attn.o_proj, *(_mlp(layer)))
        if any(part.bias is not None for part in parts):
            return "projections other than queries, keys and values have biases"
    return ""


class LlamaBlocks:
    """A description of Llama and of its relatives."""

    sequential, centred, logits_scale = True, False, 1.0

    def __init__(self, decoder: Decoder) -> None:
        assert isinstance(decoder, PretrainedDecoder)
        shape, layers = decoder.shape, _layers(decoder)
        self.sizes, self.eps = decoder.sizes, float(shape.rms_norm_eps)
        self.vocabulary = decoder.config.vocab_size or decoder.embedding.num_embeddings
        self.logits_rows = decoder.config.logits_rows(self.vocabulary)
        self.ff = int(shape.intermediate_size)
        places = torch.arange(self.sizes.context)[None]
        # The library's own, of whatever kind: they do not depend on the length of a text.
        cosine, sine = decoder.base.rotary_emb(torch.zeros(1), places)
        self.rotary = int(cosine.shape[-1])
        cosine, sine = (first_half(table[0]) for table in (cosine, sine))
        turned = cosine, sine, cosine, sine
        same = torch.ones_like(cosine), torch.zeros_like(sine)
        self.tables = [
            turned if getattr(layer.self_attn, "use_rope", True) else (*same, *same)
            for layer in layers
        ]
        self.windows = [_window(layer, shape) for layer in layers]

    def blocks(self, decoder: Decoder, adapter: str) -> Iterator[BlockWeights]:
        """See `Description`."""
        for layer in _layers(decoder):
            attention = layer.self_attn
            inward = [attention.q_proj, attention.k_proj, attention.v_proj]
            query, key, value = (part.merged(adapter) for part in inward)
            biases = [part.bias.float() for part in inward if part.bias is not None]
            gate, up, down = (part.merged(adapter) for part in _mlp(layer))
            yield BlockWeights(
                norm_D=layer.input_layernorm.weight.float(),
                second_D=layer.post_attention_layernorm.weight.float(),
                query=query,
                key=key,
                value=value,
                bias=torch.cat(biases) if biases else None,
                norm_q_K=_norm(attention, "q_norm"),
                norm_k_K=_norm(attention, "k_norm"),
                out=attention.o_proj.merged(adapter),
                up=up,
                gate=gate,
                down=down,
            )

    def ends(self, decoder: Decoder) -> tuple[Tensor, Tensor, Tensor]:
        """See `Description`."""
        assert isinstance(decoder, PretrainedDecoder)
        embedding, head = decoder.embedding.weight.detach(), decoder.head_weight.detach()
        return embedding, decoder.base.norm.weight.float(), head[: self.vocabulary]


def _layers(decoder: Decoder) -> list[Any]:
    assert isinstance(decoder, PretrainedDecoder)
    return list(decoder.base.layers)


def _mlp(layer: Any) -> tuple[Adapted, Adapted, Adapted]:
    return layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj


def _norm(attention: Any, name: str) -> Tensor | None:
    part = getattr(attention, name, None)
    return None if part is None else part.weight.float()


def _window(layer: Any, shape: Any) -> int:
    """Return the window of a layer as the library's module gives it to attention; 0 is all."""
    if shape.model_type == "mistral":
        return int(shape.sliding_window or 0)
    return int(getattr(layer.self_attn, "sliding_window", None) or 0)
