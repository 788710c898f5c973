"""Networks over a decoder: the policy with its value head, and the scalar network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config.model import ModelConfig
from common.models.embedding import Reader, TiedEmbedding
from common.models.lora import OFF, Adapted, Selection
from common.models.palm import PaLM
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
        """``[..., D] -> [...]``, in fp32 throughout: bf16 knows no difference between close
        scores."""
        found = F.linear(wide(hidden), wide(self.weight), wide(self.bias))
        return (found.float() - self.offset.float()).squeeze(-1)


class PolicyNetwork(nn.Module):
    """Language model with an auxiliary value head on the same trunk (PPG, section 2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.palm = PaLM(config)
        self.value = ScalarHead(config.dim)
        self.adapter = OFF
        """What a forward runs with that names no adapter."""

    def initialise(self, seed: int) -> None:
        """Draw all weights from a seed."""
        self.palm.initialise(seed)
        self.value.initialise(seed + 1)

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        predict_BR: Tensor | None = None,
        predict_BT: Tensor | None = None,
        read: Reader | None = None,
        adapter: Selection | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits and auxiliary values at the positions asked for.

        Args:
            tokens_BT, positions_BT, segments_BT, adapter: as in `PaLM.hidden`; without `adapter`
                the network's own.
            predict_BR: int64 positions to read; default all. Logits of a vocabulary are large:
                asking only for the positions that predict a response token saves the others.
            predict_BT: bool, the same wish as a mask (packed rows); the result is flat.
            read: what is wanted of the logits. They are then made in pieces of
                `ModelConfig.logits_mb` and never stand in memory as a whole.

        Returns:
            fp32 logits ``[B, R, V]``, or what `read` made of them ``[B, R, C]``, and values
            ``[B, R]``; ``[N, V]`` and ``[N]`` by a mask of N positions.
        """
        hidden = self.palm.hidden(
            tokens_BT,
            positions_BT=positions_BT,
            segments_BT=segments_BT,
            adapter=self.adapter if adapter is None else adapter,
        )
        if predict_BT is not None:
            hidden = hidden[predict_BT]
        if predict_BR is not None:
            index = predict_BR[..., None].expand(-1, -1, hidden.shape[-1])
            hidden = hidden.gather(1, index)
        if read is None:
            return self.palm.logits(hidden), self.value(hidden)
        return self.palm.read(hidden, read), self.value(hidden)


class ScalarNetwork(nn.Module):
    """A decoder that reads one number per position: the reward model and the value network.

    One shape for both, because the value network starts as the reward model (Stiennon 2020).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.palm = PaLM(config)
        self.head = ScalarHead(config.dim)
        self.adapter = OFF
        """What its forward runs with."""

    def initialise(self, seed: int) -> None:
        """Draw all weights from a seed."""
        self.palm.initialise(seed)
        self.head.initialise(seed + 1)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """fp32 ``[B, T]``."""
        values: Tensor = self.head(self.palm.hidden(tokens_BT, adapter=self.adapter))
        return values


def compute_in(network: nn.Module, dtype: torch.dtype) -> None:
    """Run a network's products in this dtype.

    What is trained stays as it is, in fp32, and is rounded where it is used: so its gradients are
    summed in fp32, over micro-batches and over ranks. What is not trained is kept rounded, in half
    the memory. Norms and scalar heads stay in fp32.
    """
    for module in network.modules():
        if isinstance(module, (Adapted, TiedEmbedding)):
            module.precision = dtype
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad and parameter.dtype != dtype:
                    parameter.data = parameter.data.to(dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCount:
    """Parameters of a shape: `kernels` as PaLM's table 1 counts them, `total` with the norms."""

    kernels: int
    total: int


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count on the meta device: nothing is allocated, whatever the size."""
    with torch.device("meta"):
        model = PaLM(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    return ParameterCount(kernels=total - norms, total=total)
