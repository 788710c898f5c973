"""PaLM's blocks, as the native forward has them described (`common.native.blocks`)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from common.models.decoder import Decoder
from common.models.palm import Block, PaLM
from common.models.rotary import rotary
from common.native.blocks import BlockWeights, first_half


class PalmBlocks:
    """A description of PaLM."""

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
        cos_q, sin_q, cos_k, sin_k = (first_half(table) for table in whole)
        self.tables = [(cos_q, sin_q, cos_k, sin_k)] * config.layers

    def blocks(self, decoder: Decoder, adapter: str) -> Iterator[BlockWeights]:
        """See `Description`."""
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
        """See `Description`."""
        assert isinstance(decoder, PaLM)
        embedding = decoder.embedding.weight.detach()
        return embedding, decoder.norm.weight.float(), embedding
