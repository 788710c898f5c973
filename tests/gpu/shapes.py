"""Models with random weights, by shape alone: nothing is downloaded, and no weights are written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from common.config.model import PretrainedConfig
from common.models.build import build_decoder
from common.models.decoder import Decoder
from common.models.filling import Source

_LLAMA: dict[str, Any] = {"vocab_size": 128_256, "rms_norm_eps": 1e-5}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "tie_word_embeddings": True,
    },
    "0.1B": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49_152,
        "tie_word_embeddings": True,
    },
    "1B": {
        **_LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "8B": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
"""Of SmolLM2-135M, Llama-3.2-1B and Llama-3.1-8B."""


def folder_of(shape: str, root: Path) -> Path:
    """Write a checkpoint's folder without weights."""
    path = root / shape
    LlamaConfig(max_position_embeddings=4096, **SHAPES[shape]).save_pretrained(path)
    return path


@torch.no_grad()
def fill(network: nn.Module) -> None:
    """Draw weights, the same for every device."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        elif parameter.device.type == "cpu":
            parameter.normal_(0.0, 0.02, generator=generator)
        else:  # large ones are drawn where they are
            parameter.normal_(0.0, 0.02)


def drawn(network: nn.Module) -> Iterator[tuple[str, Source]]:
    """Draw weights of a network that has no memory for them, when they are read."""

    def source(name: str) -> Source:
        def read(begin: int, end: int) -> Tensor:
            return torch.ones(end) if "norm" in name else torch.randn(end).mul_(0.02)

        return read

    return ((name, source(name)) for name, _ in network.named_parameters())


def decoder_of(shape: str, root: Path, device: str, context: int) -> Decoder:
    """Build a decoder in bf16 on a device."""
    config = PretrainedConfig(start=str(folder_of(shape, root)), context=context)
    with torch.device(device):
        decoder = build_decoder(config)
    fill(decoder)
    return decoder.eval().requires_grad_(False).to(torch.bfloat16)
