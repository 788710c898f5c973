"""Adapters that change what a model says."""

from __future__ import annotations

import torch

from common.config.model import LoraConfig
from common.models.adapters import adapter_tensors, add_adapter
from common.models.palm import PaLM

SETTINGS = {
    "one": LoraConfig(rank=3),
    "two": LoraConfig(rank=5, alpha=4.0, scaling="rank_stabilised", targets=("v", "ff_out")),
    "policy": LoraConfig(rank=4),
}


def carry(palm: PaLM, *names: str) -> PaLM:
    """Put some of `SETTINGS` on a model, with numbers as training would leave them."""
    for seed, name in enumerate(names):
        add_adapter(palm, name, SETTINGS[name], seed)
        stir(palm, name, seed)
    return palm.requires_grad_(False)


@torch.no_grad()
def stir(palm: PaLM, name: str, seed: int) -> None:
    """Change an adapter's tensors."""
    generator = torch.Generator().manual_seed(seed)
    for _, tensor in adapter_tensors(palm, name):
        tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
