"""PaLM's cached forward for generation: one call advances every slot.

The rows of a call are flat tokens of many sequences, so that no product is spent on padding:
first the newest token of each slot, then the earlier tokens of prompts that are being prefilled.

Two implementations, `actors.generation.native_forward` for processors and
`actors.generation.torch_forward` for any device, of the forward that `common.models.palm` has for
training; a property test holds the three together (invariant I1).

Shape suffixes: N flat tokens, S slots in use, D width, K head width, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from actors.generation.forward import Chunk, Copy, Delta, Forward, Layer, Product, lay_out
from actors.generation.native_forward import NativeForward
from actors.generation.torch_forward import TorchForward
from common.errors import ClusterError, ConfigError
from common.logprobs import Sampling
from common.models.decoder import Decoder, Sizes
from common.models.lora import OFF, Adapted, adapter_names
from common.models.palm import Block, PaLM

Choice = Literal["auto", "native", "torch"]


class CachedDecoder:
    """Weights, keys and values of all slots."""

    def __init__(
        self, decoder: Decoder, *, slots: int, kernels: Choice = "auto", merged: str | None = OFF
    ) -> None:
        """Products run in the dtype of `decoder`; norms, softmax and the residual stream in fp32.

        Args:
            merged: the adapter to put into the weights, where it costs nothing at a token, and to
                run every slot with. None merges none: each slot runs with an adapter of its own,
                or with none, over the one copy of the weights that `decoder` holds.

        Raises:
            ClusterError: native kernels were asked for and cannot be had.
            ConfigError: they were asked for and nothing is to be merged.
            ValueError: `decoder` has no such adapter.
        """
        assert isinstance(decoder, PaLM)
        self.decoder = decoder
        self.merged = merged
        self.adapters: list[str] = []
        """What slots can run with; a slot names its adapter by its index here."""
        self.config = decoder.config
        self.device = decoder.embedding.weight.device
        self.dtype = decoder.embedding.weight.dtype
        self.implementation = self._choose(kernels, slots)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the weights that `decoder` holds now.

        Raises:
            TrainingError: an adapter is not finite.
        """
        names = [OFF, *adapter_names(self.decoder)]
        if self.merged not in (None, *names):
            raise ValueError(f"no adapter '{self.merged}' among {names}")
        self.adapters = names if self.merged is None else [self.merged]
        layers = []
        for block in self.decoder.blocks:
            assert isinstance(block, Block)
            layers.append(
                Layer(
                    norm=block.norm.weight.float(),
                    inward=self._product(block.fused_in),
                    attn_out=self._product(block.attn_out),
                    ff_out=self._product(block.ff_out),
                )
            )
        scale = self.config.dim**-0.5 if self.config.scale_logits else 1.0
        norm = self.decoder.norm.weight.float() * scale
        self.implementation.take(layers, norm, self.decoder.embedding.weight.detach())

    def forward(
        self,
        newest: Sequence[int] | np.ndarray,
        positions: Sequence[int] | np.ndarray,
        chunks: Sequence[Chunk] = (),
        copies: Sequence[Copy] = (),
        adapters: Sequence[int] | np.ndarray | int = 0,
    ) -> Tensor:
        """Logits ``[S, V]`` after the newest token of each slot, good until the next call.

        Args:
            newest, positions: one entry per slot in use. All earlier positions of a slot are in
                the cache, in `chunks`, or come by `copies`.
            adapters: likewise, or one index for all.
        """
        return self.implementation.run(lay_out(newest, positions, chunks, copies, adapters))

    def draw(
        self, logits: Tensor, sampling: Sampling, uniforms: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `common.logprobs.draw`, for logits ``[B, V]`` without a filter: int64 tokens and
        float32 log-probabilities ``[B]`` from float64 uniforms."""
        return self.implementation.draw(logits, sampling, uniforms)

    def move(self, source: int, target: int, positions: int) -> None:
        """Give a slot another slot's keys and values."""
        self.implementation.move(source, target, positions)

    def _product(self, module: Adapted) -> Product:
        """A projection, with the adapter in its weights or the adapters beside them."""
        if self.merged is not None:
            return Product(weight=module.merged(self.merged))
        carried = [(i, n) for i, n in enumerate(self.adapters) if n in module.settings]
        if not carried:
            return Product(weight=module.weight.detach())
        As, Bs = zip(*(module.factors(name) for _, name in carried), strict=True)
        owners = [torch.full((len(A),), i) for (i, _), A in zip(carried, As, strict=True)]
        delta = Delta(
            A=torch.cat(As), B=torch.cat(Bs, dim=1), owners=torch.cat(owners).to(self.device)
        )
        return Product(weight=module.weight.detach(), delta=delta)

    def _choose(self, choice: Choice, slots: int) -> Forward:
        if self.merged is None and choice == "native":
            raise ConfigError(
                "native kernels compute no adapter beside the weights: set rollout.lora=merged, or "
                "rollout.kernels to auto or torch"
            )
        anywhere = self.merged is None or self.device.type != "cpu"
        if choice == "torch" or (choice == "auto" and anywhere):
            return TorchForward(self.config, self.dtype, slots, self.device)
        try:
            return NativeForward(self.config, self.dtype, slots)
        except ClusterError as error:
            if choice == "native":
                raise
            logging.getLogger(__name__).warning("%s; generation is slower without", error)
            return TorchForward(self.config, self.dtype, slots, self.device)


def slots_within(sizes: Sizes, budget_mb: float, dtype: torch.dtype) -> int:
    """Count the sequences of a full context that a cache of `budget_mb` holds.

    Raises:
        ConfigError: not even one; the error names the number needed.
    """
    values = 2 * sizes.layers * sizes.context * sizes.kv_heads * sizes.head_dim
    each = values * dtype.itemsize / 2**20
    slots = int(budget_mb / each)
    if slots < 1:
        raise ConfigError(
            f"rollout.cache_mb={budget_mb:g} holds no sequence of model.context={sizes.context} "
            f"tokens; at least {each:.3g} are needed"
        )
    return slots
