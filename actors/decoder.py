"""PaLM's cached forward for generation: one call advances every slot.

The rows of a call are flat tokens of many sequences, so that no product is spent on padding:
first the newest token of each slot, then the earlier tokens of prompts that are being prefilled.
Linear layers are one matrix product over all rows; what lies between two products (rotation,
cache, attention, SwiGLU, norms, sampling) is the kernels', native or PyTorch.

`Decoder` is a second implementation of the forward in `common.palm`; a property test holds the two
together (invariant I1).

Shape suffixes: N flat tokens, S slots in use, D width, K head width, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.kernels import NativeKernels
from actors.step import Chunk, Copy, Kernels, lay_out
from actors.torch_kernels import TorchKernels
from common.errors import ClusterError, ConfigError
from common.model_config import ModelConfig
from common.palm import Block, PaLM

Choice = Literal["auto", "native", "torch"]


@dataclass(frozen=True, slots=True)
class _Layer:
    """One block's weights in the precision of the products."""

    norm: Tensor
    """fp32 ``[D]``."""
    inward: Tensor
    """``[q + k + v + up + gate, D]``."""
    outward: Tensor
    """``[D, attention + feed-forward]``: both outputs in one product."""


class Decoder:
    """Weights, keys and values of all slots."""

    def __init__(self, palm: PaLM, *, slots: int, kernels: Choice = "auto") -> None:
        """Products run in the dtype of `palm`; norms, softmax and the residual stream in fp32.

        Raises:
            ClusterError: native kernels were asked for and cannot be had.
        """
        self.palm = palm
        self.config = config = palm.config
        self.device = palm.embedding.weight.device
        self.dtype = palm.embedding.weight.dtype
        shape = (config.layers, slots, config.context, config.head_dim)
        self.keys = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self.values = torch.zeros(shape, dtype=self.dtype, device=self.device)
        inner = config.heads * config.head_dim
        self._kv = slice(inner, inner + 2 * config.head_dim)
        """Rows of the input projection that make keys and values."""
        self.kernels = self._choose(kernels)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the weights that `palm` holds now."""
        self._layers = []
        for block in self.palm.blocks:
            assert isinstance(block, Block)
            outward = torch.cat((block.attn_out.weight, block.ff_out.weight), dim=1)
            self._layers.append(
                _Layer(block.norm.weight.float(), block.fused_in.weight.detach(), outward)
            )
        scale = self.config.dim**-0.5 if self.config.scale_logits else 1.0
        self._norm = self.palm.norm.weight.float() * scale
        self._embedding = self.palm.embedding.weight.detach()

    @torch.no_grad()
    def forward(
        self,
        newest: Sequence[int],
        positions: Sequence[int],
        chunks: Sequence[Chunk] = (),
        copies: Sequence[Copy] = (),
    ) -> Tensor:
        """Logits ``[S, V]``, in the dtype of the products, after the newest token of each slot.

        Args:
            newest, positions: one entry per slot in use. All earlier positions of a slot are in
                the cache, in `chunks`, or come by `copies`.
        """
        step = lay_out(newest, positions, chunks, copies, self.device)
        kernels = self.kernels
        kernels.begin(step)
        x = F.embedding(step.tokens, self._embedding).float()
        both = x.new_empty(len(x), self._layers[0].outward.shape[1], dtype=self.dtype)
        added: Tensor | None = None
        for index, layer in enumerate(self._layers):
            normed = kernels.add_norm(x, added, layer.norm)
            if index == len(self._layers) - 1 and step.used < len(x):
                # Of a prompt's earlier tokens the last layer owes later ones its keys and values,
                # and nothing else.
                kernels.store(index, F.linear(normed[step.used :], layer.inward[self._kv]))
                x, both = x[: step.used], both[: step.used]
                normed = normed[: step.used]
            fused = F.linear(normed, layer.inward)
            kernels.attend(index, fused, both)
            kernels.activate(fused, both)
            added = F.linear(both, layer.outward)
        assert added is not None
        last = kernels.add_norm(x, added, self._norm)
        return F.linear(last, self._embedding)

    def move(self, source: int, target: int, positions: int) -> None:
        """Give a slot another slot's keys and values."""
        self.keys[:, target, :positions] = self.keys[:, source, :positions]
        self.values[:, target, :positions] = self.values[:, source, :positions]

    def _choose(self, choice: Choice) -> Kernels:
        parts = (self.config, self.dtype, self.keys, self.values)
        if choice == "torch" or (choice == "auto" and self.device.type != "cpu"):
            return TorchKernels(*parts)
        try:
            return NativeKernels(*parts)
        except ClusterError as error:
            if choice == "native":
                raise
            logging.getLogger(__name__).warning("%s; generation is slower without", error)
            return TorchKernels(*parts)


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
