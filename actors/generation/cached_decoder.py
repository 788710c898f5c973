"""A decoder with keys and values of all slots: one call advances every slot by a token.

The rows of a call are flat tokens of many sequences, so that no product is spent on padding:
first the newest token of each slot, then the earlier tokens of prompts that are being prefilled.

`actors.generation.torch_forward` runs any decoder's own blocks; `actors.generation.native_forward`
is for processors and some shapes of block. A property test holds both to the forward of
training (invariant I1).

Shape suffixes: S slots in use, B rows, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from actors.generation.forward import Chunk, Copy, Forward, lay_out
from actors.generation.native_forward import NativeForward
from actors.generation.torch_forward import TorchForward
from common.devices import recorder_on
from common.errors import ClusterError, ConfigError
from common.logprobs import Sampling
from common.models.decoder import Decoder, Sizes
from common.models.lora import OFF, adapter_names
from common.native.coverage import Kernels, why_not
from common.native.model import BLOCK
from common.native.panels import Spent


class CachedDecoder:
    """Weights, keys and values of all slots."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        slots: int,
        kernels: Kernels = "auto",
        merged: str | None = OFF,
        cache_mb: float | None = None,
        block: int = BLOCK,
        spent: Spent | None = None,
        graphs: bool = True,
    ) -> None:
        """Products run in the dtype of `decoder`; norms, softmax and the residual stream in fp32.

        Args:
            decoder: whose weights are used, on their device.
            slots: sequences that are computed at once.
            kernels: which forward; auto takes the native one where it can run.
            merged: the adapter to merge into the weights, where it costs nothing at a token, and to
                run every slot with. None merges none: each slot runs with an adapter of its own,
                or with none, and `decoder` holds the only copy of the weights.
            cache_mb: MiB of all keys and values, at least those of a full context; default what
                `slots` full contexts take.
            block: positions by which a native slot's memory grows.
            spent: told of those of the decoder's weights that it keeps in another layout, and that
                nothing reads any more.
            graphs: replay steps from CUDA graphs, on a GPU.

        Raises:
            ClusterError: native kernels were asked for and cannot be compiled.
            ConfigError: they were asked for and cannot run this, or the cache does not hold one
                sequence.
            ValueError: `decoder` has no such adapter.
        """
        self.decoder = decoder
        self.merged = merged
        self.adapters: list[str] = []
        """What slots can run with; a slot names its adapter by its index here."""
        self._spent = spent
        self.implementation = _choose(decoder, slots, kernels, merged, cache_mb, block, graphs)
        self.refresh()

    def refresh(self) -> None:
        """Run with the weights that the decoder has now.

        Raises:
            TrainingError: an adapter is not finite.
        """
        names = [OFF, *adapter_names(self.decoder)]
        if self.merged not in (None, *names):
            raise ValueError(f"no adapter '{self.merged}' among {names}")
        self.adapters = names if self.merged is None else [self.merged]
        self.implementation.take(self.decoder, self.adapters, self._spent)

    def forward(
        self,
        newest: Sequence[int] | np.ndarray,
        positions: Sequence[int] | np.ndarray,
        chunks: Sequence[Chunk] = (),
        copies: Sequence[Copy] = (),
        adapters: Sequence[int] | np.ndarray | int = 0,
    ) -> Tensor:
        """Logits ``[S, V]`` after the newest token of each slot, valid until the next call.

        Args:
            newest: tokens, one per slot in use.
            positions: likewise. All earlier positions of a slot are in the cache, in `chunks`, or
                come by `copies`.
            chunks: earlier tokens of prompts.
            copies: prefixes to copy from other slots.
            adapters: indices, one per slot in use or one for all.
        """
        return self.implementation.run(lay_out(newest, positions, chunks, copies, adapters))

    def draw(
        self, logits_BV: Tensor, sampling: Sampling, positions_B: np.ndarray, uniforms_B: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw one token per row, as `Forward.draw`."""
        return self.implementation.draw(logits_BV, sampling, positions_B, uniforms_B)

    @property
    def slots(self) -> int:
        """Sequences that are computed at once: as many as were asked for, where they fit."""
        return self.implementation.slots

    def rest(self) -> None:
        """No slot is in use: give back what can be taken again at the next step."""
        self.implementation.rest()


def _choose(
    decoder: Decoder,
    slots: int,
    kernels: Kernels,
    merged: str | None,
    cache_mb: float | None,
    block: int,
    graphs: bool,
) -> Forward:
    if kernels == "native" and merged is None:
        raise ConfigError(
            "native kernels compute no adapter beside the weights: set rollout.lora=merged, or "
            "rollout.kernels to auto or torch"
        )
    lacking = why_not(decoder)
    if kernels == "native" and lacking:
        raise ConfigError(
            f"native kernels do not run this model: {lacking}; set rollout.kernels to auto or torch"
        )
    whole = slots  # That many contexts fit into the cache, of those that can be in use.
    if cache_mb is not None:
        dtype = next(decoder.parameters()).dtype
        whole = min(slots, slots_within(decoder.sizes, cache_mb, dtype))
    if kernels == "torch" or merged is None or lacking:
        recorder = recorder_on(next(decoder.parameters()).device) if graphs else None
        return TorchForward(decoder, whole, recorder)
    budget = None if cache_mb is None else cache_mb * 2**20
    try:
        return NativeForward(decoder, slots, cache_bytes=budget, block=block)
    except ClusterError as error:
        if kernels == "native":
            raise
        logging.getLogger(__name__).warning("%s; generation is slower without", error)
        return TorchForward(decoder, whole)


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
