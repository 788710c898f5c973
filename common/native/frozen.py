"""A frozen decoder whose passes over whole sequences run by the native kernels.

Rows of tokens are computed alone, so their states and logits depend neither on what is computed
beside them nor on the number of threads; padding is not computed, and what several rows have in
common as their prompt is computed once.

Shape suffixes: B sequences, T positions, N rows, D width, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from common.batching import rows_by_prompt
from common.errors import ClusterError, ConfigError
from common.models.attention import Attention
from common.models.decoder import DECODER, Decoder
from common.models.embedding import HeadReader, Part, Reader
from common.models.filling import Weights
from common.models.lora import OFF, RowSelection, Selection
from common.models.networks import DecoderNetwork
from common.native.cache import Blocks
from common.native.coverage import Kernels, why_not
from common.native.model import BLOCK, NativeModel


class NativeDecoder(Decoder):
    """The weights of a decoder in the kernels' own layout, for passes without gradients."""

    shares_prompts = True

    def __init__(self, decoder: Decoder, adapter: str) -> None:
        """Copy the weights, with an adapter merged.

        Args:
            decoder: one that `coverage.why_not` says nothing of.
            adapter: its name, or `lora.OFF`.

        Raises:
            ClusterError: there is no C compiler, or it fails.
            TrainingError: the adapter is not finite.
        """
        super().__init__(decoder.sizes)
        self._model = NativeModel(decoder, 1, one_layer=True)
        self._model.take(decoder, adapter)
        self._rows = self._model.logits_rows

    def first_weights(self, seed: int) -> Weights:
        """Refuse: the weights are another decoder's."""
        raise TypeError("a frozen decoder is made of one that has weights")

    def states(
        self, tokens: Tensor, positions: Tensor, attention: Attention, adapter: RowSelection
    ) -> Tensor:
        """Refuse: the kernels mix values themselves."""
        raise TypeError("native kernels compute whole sequences: call `hidden`")

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits ``[..., V]`` of states ``[..., D]``."""
        return self._model.read(hidden.flatten(0, -2)).view(*hidden.shape[:-1], -1)

    def read(self, hidden: Tensor, read: Reader | HeadReader) -> Tensor:
        """Return what a reader makes of the logits, in pieces; as `Decoder.read`."""
        if isinstance(read, HeadReader):
            return super().read(hidden, read)
        flat = hidden.flatten(0, -2)
        parts: list[Part] = [
            slice(begin, min(begin + self._rows, len(flat)))
            for begin in range(0, len(flat), self._rows)
        ]
        values = torch.cat([read(self._model.read(flat[part]), part) for part in parts])
        return values.view(*hidden.shape[:-1], values.shape[-1])

    def hidden(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        lengths_B: Tensor | None = None,
        prompts_B: Tensor | None = None,
        adapter: Selection = OFF,
    ) -> Tensor:
        """Compute the final normalised states ``[B, T, D]``, zeros behind the rows' lengths.

        Args:
            tokens_BT: as in `Decoder.hidden`.
            positions_BT: None.
            segments_BT: None.
            lengths_B: as in `Decoder.hidden`.
            prompts_B: as in `Decoder.hidden`.
            adapter: `OFF`: the one that there was is merged.

        Raises:
            ValueError: packed rows, an adapter, or more tokens than the context were asked for.
        """
        if positions_BT is not None or segments_BT is not None or adapter != OFF:
            raise ValueError("native kernels take whole rows, and no adapter beside the weights")
        batch, longest = tokens_BT.shape
        lengths = [longest] * batch if lengths_B is None else lengths_B.tolist()
        prompts = [0] * batch if prompts_B is None else prompts_B.tolist()
        if max(lengths) > self.sizes.context:
            raise ValueError(f"{max(lengths)} tokens; {self.sizes.context} fit")
        tokens = tokens_BT.tolist()
        most = sum(-(-length // BLOCK) for length in lengths)
        blocks = Blocks(most, BLOCK, batch, self.sizes.context)
        copies, rows = [], []
        places_BT = np.full((batch, longest), -1)
        end = 0
        for source, row, shared in _in_turn(tokens, prompts):
            if shared and (copy := blocks.share(source, row, shared)):
                copies.append(copy)
            blocks.grow(row, lengths[row])
            count = lengths[row] - shared
            positions = np.arange(shared, lengths[row])
            rows.append([tokens[row][shared : lengths[row]], [row] * count, positions])
            places_BT[row, :shared] = places_BT[source, :shared]
            places_BT[row, shared : lengths[row]] = np.arange(end, end := end + count)
        states_ND = torch.zeros(end + 1, self.sizes.dim)
        self._model.have_blocks(blocks.peak)
        self._model.run(
            np.concatenate(rows, axis=1, dtype=np.int64),
            blocks.table,
            states_WD=states_ND[:end],
            copies=copies,
        )
        return states_ND[torch.from_numpy(places_BT)]


def _in_turn(
    tokens: Sequence[Sequence[int]], prompts: Sequence[int]
) -> Iterator[tuple[int, int, int]]:
    """Yield every row behind the one that begins with its prompt, and what they have in common."""
    by_prompt = rows_by_prompt(row[:own] for row, own in zip(tokens, prompts, strict=True))
    for prompt, members in by_prompt.items():
        for index, row in enumerate(members):
            yield members[0], row, len(prompt) if index else 0


def asked_for(kernels: Kernels, dtype: torch.dtype) -> bool:
    """Whether settings ask for native frozen passes of products in this dtype."""
    return kernels == "native" or (kernels == "auto" and dtype == torch.float32)


def run_natively(network: DecoderNetwork, kernels: Kernels) -> None:
    """Let a frozen network's decoder run by the native kernels, if settings say so.

    Its own weights are not kept. With auto they stay where they are if the kernels lack a part of
    the decoder, or there is no compiler, and in bf16: there the kernels round elsewhere than the
    learner, which the log-probabilities are compared with.

    Raises:
        ConfigError: native kernels were asked for and do not run this decoder.
        ClusterError: they were asked for and cannot be compiled.
    """
    rounded = any(p.dtype == torch.bfloat16 for p in network.decoder.parameters())
    if not asked_for(kernels, torch.bfloat16 if rounded else torch.float32):
        return
    if lacking := why_not(network.decoder):
        if kernels == "native":
            raise ConfigError(
                f"native kernels do not run this model: {lacking}; set reward_service.kernels to "
                "auto or torch"
            )
        return
    try:
        decoder = NativeDecoder(network.decoder, network.adapter)
    except ClusterError as error:
        if kernels == "native":
            raise
        logging.getLogger(__name__).warning("%s; frozen passes are slower without", error)
        return
    network.add_module(DECODER, decoder)
    network.adapter = OFF
