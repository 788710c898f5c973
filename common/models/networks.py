"""Networks over a decoder: the policy with its value head, and the scalar network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.devices import onto
from common.models.decoder import DECODER, Decoder
from common.models.embedding import HeadReader, OutputHead, Reader, TiedEmbedding
from common.models.filling import Weights
from common.models.lora import OFF, Adapted, Selection
from common.models.precision import wide


class ScalarHead(nn.Linear):
    """A linear read-out to one number per position, initialised N(0, 1/sqrt(d + 1)), bias 0.

    (Stiennon 2020, appendix B.) `offset` shifts reward scores to mean 0 on reference responses.
    """

    offset: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 1)
        self.register_buffer("offset", torch.zeros(1))

    def initialise(self, seed: int) -> None:
        """Draw the weights from a seed."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            scale = (self.in_features + 1) ** -0.5
            self.weight.copy_(torch.randn(self.weight.shape, generator=generator) * scale)
            self.bias.zero_()
            self.offset.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., D] -> [...]``, in fp32: bf16 cannot tell close scores apart."""
        values = F.linear(wide(hidden), wide(self.weight), wide(self.bias))
        return (values.float() - self.offset.float()).squeeze(-1)


class DecoderNetwork(nn.Module):
    """A decoder, to which subclasses add a head."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.add_module(DECODER, decoder)
        self.adapter = OFF
        """Name of the adapter that a forward runs with when it is told no other."""

    @property
    def decoder(self) -> Decoder:
        """The decoder; its tensors' names begin with `DECODER`."""
        decoder = self.get_submodule(DECODER)
        assert isinstance(decoder, Decoder)
        return decoder


class PolicyNetwork(DecoderNetwork):
    """Language model with an auxiliary value head on the same trunk (PPG, section 2)."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        self.value = ScalarHead(decoder.sizes.dim)

    def initialise(self, seed: int) -> None:
        """Draw all weights from a seed."""
        self.decoder.initialise(seed)
        self.value.initialise(seed + 1)

    def first_weights(self, seed: int) -> Weights:
        """Draw the head from a seed; return the first values of the decoder's weights."""
        self.value.initialise(seed + 1)
        return ((f"{DECODER}.{n}", source) for n, source in self.decoder.first_weights(seed))

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        lengths_B: Tensor | None = None,
        prompts_B: Tensor | None = None,
        predict_BR: Tensor | None = None,
        predict_BT: Tensor | None = None,
        read: Reader | HeadReader | None = None,
        states: bool = False,
        adapter: Selection | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits and auxiliary values at some positions.

        Args:
            tokens_BT: as in `Decoder.hidden`.
            positions_BT: as in `Decoder.hidden`.
            segments_BT: as in `Decoder.hidden`.
            lengths_B: as in `Decoder.hidden`.
            prompts_B: as in `Decoder.hidden`.
            predict_BR: int64 positions to read, -1 for none; default all. Logits of a vocabulary
                are large: asking only for the positions that predict a response token saves the
                others. What `read` made of none is 0.
            predict_BT: bool, the same selection as a mask (packed rows); the result is flat. It and
                predict_BR are best left on the processor, as what `Decoder.hidden` takes is.
            read: what is wanted of the logits. They are then made in pieces of
                `ModelConfig.logits_mb` and never stand in memory as a whole.
            states: make no logits: return the states that they would be made of.
            adapter: as in `Decoder.hidden`; default the network's own.

        Returns:
            fp32 logits ``[B, R, V]``, what `read` made of them ``[B, R, C]`` or states
            ``[B, R, D]``, and values ``[B, R]``; ``[N, V]`` and ``[N]`` by a mask of N positions.
        """
        hidden = self.decoder.hidden(
            tokens_BT,
            positions_BT=positions_BT,
            segments_BT=segments_BT,
            lengths_B=lengths_B,
            prompts_B=prompts_B,
            adapter=self.adapter if adapter is None else adapter,
        )
        if predict_BT is not None:
            hidden = hidden.flatten(0, 1)[_places(predict_BT, hidden.device)]
        if predict_BR is not None:
            index = onto(predict_BR.clamp(min=0), hidden.device)[..., None]
            hidden = hidden.gather(1, index.expand(-1, -1, hidden.shape[-1]))
        if states:
            return hidden, self.value(hidden)
        if read is None:
            return self.decoder.logits(hidden), self.value(hidden)
        if predict_BR is not None:
            return self._read_where(predict_BR >= 0, hidden, read), self.value(hidden)
        return self.decoder.read(hidden, read), self.value(hidden)

    def _read_where(
        self, wanted_BR: Tensor, hidden_BRD: Tensor, read: Reader | HeadReader
    ) -> Tensor:
        """Return what `read` makes of the logits at some positions, and 0 at the others."""
        places_N = _places(wanted_BR, hidden_BRD.device)
        hidden_ND = hidden_BRD.flatten(0, 1)[places_N]
        if isinstance(read, HeadReader):
            read_NC = self.decoder.read(hidden_ND, read.at(places_N))
        else:
            reader = read  # a name that is given once, as mypy wants it in a lambda
            read_NC = self.decoder.read(
                hidden_ND, lambda logits, part: reader(logits, places_N[part])
            )
        columns = read_NC.new_zeros(wanted_BR.numel(), read_NC.shape[-1])
        return columns.index_copy(0, places_N, read_NC).view(*wanted_BR.shape, -1)


def _places(wanted: Tensor, device: torch.device) -> Tensor:
    """Return where a mask is True among its flat elements, int64 ``[N]``, on a device."""
    return onto(wanted.flatten().nonzero()[:, 0], device)


class ScalarNetwork(DecoderNetwork):
    """A network that reads one number per position: the reward model and the value network.

    One shape for both, because the value network starts as the reward model (Stiennon 2020).
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        self.head = ScalarHead(decoder.sizes.dim)

    def initialise(self, seed: int) -> None:
        """Draw all weights from a seed."""
        self.decoder.initialise(seed)
        self.head.initialise(seed + 1)

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        lengths_B: Tensor | None = None,
        prompts_B: Tensor | None = None,
    ) -> Tensor:
        """fp32 ``[B, T]``; arguments are as in `Decoder.hidden`."""
        hidden = self.decoder.hidden(
            tokens_BT, lengths_B=lengths_B, prompts_B=prompts_B, adapter=self.adapter
        )
        values: Tensor = self.head(hidden)
        return values


def compute_in(network: nn.Module, dtype: torch.dtype) -> None:
    """Run a network's products in this dtype.

    Trained weights stay in fp32 and are rounded where they are used, so that their gradients are
    summed in fp32, over micro-batches and over ranks. Frozen weights are kept rounded, in half the
    memory. Norms and scalar heads stay in fp32.
    """
    for module in network.modules():
        if isinstance(module, (Adapted, OutputHead, TiedEmbedding)):
            module.precision = dtype
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad and parameter.dtype != dtype:
                    parameter.data = parameter.data.to(dtype)
