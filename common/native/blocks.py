"""What the native forward computes of a decoder: the shape of its blocks, and their weights.

Two kinds of block are one description: PaLM's, whose attention and SwiGLU read one norm side by
side, and Llama's, in which SwiGLU follows attention behind a norm of its own. Qwen, Mistral and
SmolLM are Llama's with biases, norms of heads, windows or layers without positions.

Shape suffixes: D width, H query heads, G key and value heads, K head width, F width of SwiGLU,
V vocabulary, L positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from common.models.decoder import Decoder, Sizes
from common.models.lora import Adapted
from common.models.palm import Block, PaLM
from common.models.pretrained.decoder import PretrainedDecoder
from common.models.pretrained.families import LogitsRule
from common.models.rotary import rotary

LLAMAS = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""Families of Llama's block, by `model_type`."""
_SILU = ("silu", "swish")

Kernels = Literal["auto", "native", "torch"]
"""What a decoder is computed by: these kernels, PyTorch, or these where they can."""

Tables = tuple[Tensor, Tensor, Tensor, Tensor]
"""Cosines and sines of queries, then of keys: fp32 ``[L, rotary / 2]`` of every position."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockWeights:
    """A block's weights with its adapter merged; norms and biases are fp32."""

    norm_D: Tensor
    second_D: Tensor | None = None
    """Before SwiGLU; None where that reads the first norm, beside attention."""
    query: Tensor
    """``[H K, D]``."""
    key: Tensor
    """``[G K, D]``."""
    value: Tensor
    """``[G K, D]``."""
    bias: Tensor | None = None
    """Of queries, keys and values: ``[(H + 2 G) K]``."""
    norm_q_K: Tensor | None = None
    norm_k_K: Tensor | None = None
    out: Tensor
    """``[D, H K]``."""
    up: Tensor
    """``[F, D]``."""
    gate: Tensor
    """``[F, D]``."""
    down: Tensor
    """``[D, F]``."""


class Description(Protocol):
    """What the native forward has to know of a decoder."""

    sizes: Sizes
    vocabulary: int
    """Tokens that have logits."""
    ff: int
    rotary: int
    """Dimensions of a head that positions turn, the first ones."""
    sequential: bool
    """Whether SwiGLU follows attention, or stands beside it."""
    centred: bool
    """Whether norms are LayerNorms; else they are RMSNorms."""
    eps: float
    """Of norms."""
    windows: list[int]
    """Positions that each layer attends to; 0 is all."""
    tables: list[Tables]
    """Of each layer."""

    def blocks(self, decoder: Decoder, adapter: str) -> Iterator[BlockWeights]:
        """Yield the weights that a decoder of this shape has now."""

    logits_scale: float
    """What the head's products are multiplied by."""
    logits_rows: int
    """Rows whose logits are made at once."""

    def ends(self, decoder: Decoder) -> tuple[Tensor, Tensor, Tensor]:
        """Return embedding and head ``[V, D]``, and between them the last norm ``[D]``, fp32."""


def why_not(decoder: Decoder) -> str:
    """Say why the native forward does not run a decoder where it is; empty where it does."""
    device = next(decoder.parameters()).device
    if device.type != "cpu":
        return f"they are for processors, and it is on {device}"
    return lacking(decoder)


def lacking(decoder: Decoder) -> str:
    """Say which part of a decoder the native forward lacks; empty where it computes it."""
    if isinstance(decoder, PaLM):
        return ""
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


def describe(decoder: Decoder) -> Description:
    """Describe a decoder that nothing is lacking for (`why_not`)."""
    if isinstance(decoder, PaLM):
        return _Palm(decoder)
    assert isinstance(decoder, PretrainedDecoder)
    return _Llama(decoder)


class _Palm:
    """PaLM's blocks."""

    sequential, centred, eps = False, True, 1e-5

    def __init__(self, decoder: PaLM) -> None:
        config = decoder.config
        self.sizes, self.vocabulary = decoder.sizes, config.vocab_size
        self.ff, self.rotary = config.ff_mult * config.dim, config.head_dim
        self.windows = [0] * config.layers
        self.logits_scale = config.dim**-0.5 if config.scale_logits else 1.0
        self.logits_rows = config.logits_rows(config.vocab_size)
        whole = rotary(
            torch.arange(config.context),
            config.head_dim,
            xpos=config.xpos,
            centre=config.context // 2,
        )
        cos_q, sin_q, cos_k, sin_k = (_first_half(table) for table in whole)
        self.tables = [(cos_q, sin_q, cos_k, sin_k)] * config.layers

    def blocks(self, decoder: Decoder, adapter: str) -> Iterator[BlockWeights]:
        assert isinstance(decoder, PaLM)
        for block in decoder.blocks:
            assert isinstance(block, Block)
            query, key, value, up, gate = block.fused_in.merged(adapter).split(block.splits)
            yield BlockWeights(
                norm_D=block.norm.weight.float(),
                query=query,
                key=key,
                value=value,
                up=up,
                gate=gate,
                out=block.attn_out.merged(adapter),
                down=block.ff_out.merged(adapter),
            )

    def ends(self, decoder: Decoder) -> tuple[Tensor, Tensor, Tensor]:
        assert isinstance(decoder, PaLM)
        embedding = decoder.embedding.weight.detach()
        return embedding, decoder.norm.weight.float(), embedding


class _Llama:
    """Blocks of Llama and of its relatives."""

    sequential, centred, logits_scale = True, False, 1.0

    def __init__(self, decoder: PretrainedDecoder) -> None:
        shape, layers = decoder.shape, _layers(decoder)
        self.sizes, self.eps = decoder.sizes, float(shape.rms_norm_eps)
        self.vocabulary = decoder.config.vocab_size or decoder.embedding.num_embeddings
        self.logits_rows = decoder.config.logits_rows(self.vocabulary)
        self.ff = int(shape.intermediate_size)
        places = torch.arange(self.sizes.context)[None]
        # The library's own, of whatever kind: they do not depend on the length of a text.
        cosine, sine = decoder.base.rotary_emb(torch.zeros(1), places)
        self.rotary = int(cosine.shape[-1])
        cosine, sine = (_first_half(table[0]) for table in (cosine, sine))
        turned = cosine, sine, cosine, sine
        same = torch.ones_like(cosine), torch.zeros_like(sine)
        self.tables = [
            turned if getattr(layer.self_attn, "use_rope", True) else (*same, *same)
            for layer in layers
        ]
        self.windows = [_window(layer, shape) for layer in layers]

    def blocks(self, decoder: Decoder, adapter: str) -> Iterator[BlockWeights]:
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


def _first_half(table: Tensor) -> Tensor:
    """``[L, K] -> [L, K / 2]``: both halves are the same."""
    return table[:, : table.shape[-1] // 2].float().contiguous()
