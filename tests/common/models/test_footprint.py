"""What a pass is said to keep, against what it keeps on the processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.config.model import LoraConfig, ModelConfig, PalmConfig, PretrainedConfig
from common.models.adapters import attach_adapter
from common.models.build import build_decoder
from common.models.footprint import kept_per_token
from common.models.networks import DecoderNetwork, compute_in
from tests.common.models.pretrained.tiny import reference, saved

TOKENS = 64
LORA = LoraConfig(rank=4)


def palm(_: Path) -> ModelConfig:
    return PalmConfig(vocab_size=64, dim=64, layers=3, heads=2, head_dim=32)


def llama(folder: Path) -> ModelConfig:
    return PretrainedConfig(start=str(saved(reference("llama"), folder)), context=TOKENS)


def really_kept(model: ModelConfig, lora: LoraConfig | None, dtype: torch.dtype) -> float:
    """Bytes for each token of what autograd keeps, weights left out."""
    network = DecoderNetwork(build_decoder(model))
    network.decoder.initialise(0)
    if lora is not None:
        attach_adapter(network, "policy", lora, 0)
    compute_in(network, dtype)
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network.decoder.hidden(torch.arange(TOKENS)[None] % 60, adapter=network.adapter)
    return sum(storage.nbytes() for storage in kept.values()) / TOKENS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "adapters"])
@pytest.mark.parametrize("shape", [palm, llama])
def test_a_pass_keeps_what_is_said(
    shape: Any, lora: LoraConfig | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = shape(tmp_path / "model")
    said = kept_per_token(model, lora, dtype)
    assert said == pytest.approx(really_kept(model, lora, dtype), rel=0.15)


def test_activations_that_are_computed_again_are_few() -> None:
    model = palm(Path()).model_copy(update={"layers": 12})
    again = model.model_copy(update={"activation_checkpointing": True})
    assert (
        kept_per_token(again, None, torch.float32) < kept_per_token(model, None, torch.float32) / 3
    )
