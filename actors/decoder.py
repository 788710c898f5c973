"""PaLM's cached forward for generation: one call advances every slot.

The rows of a call are flat tokens of many sequences, so that no product is spent on padding:
first the newest token of each slot, then the earlier tokens of prompts that are being prefilled.

Two implementations, `actors.native_forward` for processors and `actors.torch_forward` for any
device, of the forward that `common.palm` has for training; a property test holds the three
together (invariant I1).

Shape suffixes: N flat tokens, S slots in use, D width, K head width, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from actors.native_forward import NativeForward
from actors.step import Chunk, Copy, Forward, Layer, lay_out
from actors.torch_forward import TorchForward
from common.errors import ClusterError, ConfigError
from common.logprobs import Sampling
from common.model_config import ModelConfig
from common.palm import Block, PaLM

Choice = Literal["auto", "native", "torch"]


class Decoder:
    """Weights, keys and values of all slots."""

    def __init__(self, palm: PaLM, *, slots: int, kernels: Choice = "auto") -> None:
        """Products run in the dtype of `palm`; norms, softmax and the residual stream in fp32.

        Raises:
            ClusterError: native kernels were asked for and cannot be had.
        """
        self.palm = palm
        self.config = palm.config
        self.device = palm.embedding.weight.device
        self.dtype = palm.embedding.weight.dtype
        self.implementation = self._choose(kernels, slots)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the weights that `palm` holds now."""
        layers = []
        for block in self.palm.blocks:
            assert isinstance(block, Block)
            outward = torch.cat((block.attn_out.weight, block.ff_out.weight), dim=1)
            layers.append(
                Layer(
                    norm=block.norm.weight.float(),
                    inward=block.fused_in.weight.detach(),
                    outward=outward,
                )
            )
        scale = self.config.dim**-0.5 if self.config.scale_logits else 1.0
        norm = self.palm.norm.weight.float() * scale
        self.implementation.take(layers, norm, self.palm.embedding.weight.detach())

    @torch.no_grad()
    def forward(
        self,
        newest: Sequence[int] | np.ndarray,
        positions: Sequence[int] | np.ndarray,
        chunks: Sequence[Chunk] = (),
        copies: Sequence[Copy] = (),
    ) -> Tensor:
        """Logits ``[S, V]`` after the newest token of each slot, good until the next call.

        Args:
            newest, positions: one entry per slot in use. All earlier positions of a slot are in
                the cache, in `chunks`, or come by `copies`.
        """
        return self.implementation.run(lay_out(newest, positions, chunks, copies))

    def draw(self, logits: Tensor, sampling: Sampling, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """As `common.logprobs.draw`, for logits ``[B, V]`` without a filter."""
        return self.implementation.draw(logits, sampling, uniforms)

    def move(self, source: int, target: int, positions: int) -> None:
        """Give a slot another slot's keys and values."""
        self.implementation.move(source, target, positions)

    def _choose(self, choice: Choice, slots: int) -> Forward:
        if choice == "torch" or (choice == "auto" and self.device.type != "cpu"):
            return TorchForward(self.config, self.dtype, slots, self.device)
        try:
            return NativeForward(self.config, self.dtype, slots)
        except ClusterError as error:
            if choice == "native":
                raise
            logging.getLogger(__name__).warning("%s; generation is slower without", error)
            return TorchForward(self.config, self.dtype, slots, self.device)


def slots_within(config: ModelConfig, budget_mb: float, dtype: torch.dtype) -> int:
    """How many sequences of a full context a cache of `budget_mb` holds.

    Raises:
        ConfigError: not even one; the error names the number needed.
    """
    values = 2 * config.layers * config.context * config.head_dim
    each = values * dtype.itemsize / 2**20
    slots = int(budget_mb / each)
    if slots < 1:
        raise ConfigError(
            f"rollout.cache_mb={budget_mb:g} holds no sequence of model.context={config.context} "
            f"tokens; at least {each:.3g} are needed"
        )
    return slots
