"""Adapters on disk: our own file (adapter, head, base's fingerprint) and PEFT's layout.

Both name the base that they were trained on by its fingerprint; on another one they are refused.

PEFT (huggingface.co/docs/peft) knows one adapter per linear layer, we have one per segment of the
fused projection. Side by side they are one of a larger rank, whose B is block-diagonal: exact, and
readable by ``peft`` on a `common.models.decoder.Decoder`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from common.config.model import LoraConfig, ModelConfig
from common.errors import CheckpointError
from common.models.adapters import (
    add_adapter,
    base_fingerprint,
    load_adapter,
    merged_state,
    share_base,
)
from common.models.build import build_policy
from common.models.decoder import DECODER, Decoder
from common.models.lora import adapted
from common.models.networks import ScalarNetwork
from common.models.tensor_files import save_tensors
from common.models.weight_files import load_weights, save_policy, save_weights
from common.run_folder import PolicyFolder, writer_of

_PEFT = "base_model.model."


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter with all that is needed to use it elsewhere."""

    settings: LoraConfig
    base: str
    """Fingerprint of the decoder that it was trained on."""
    tensors: Mapping[str, Tensor]
    """By the names of `common.models.adapters.adapter_tensors`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalarAdapter:
    """A reward model that was trained as an adapter."""

    adapter: Adapter
    head: Mapping[str, Tensor]


def save_adapter(
    adapter: Adapter, head: Mapping[str, Tensor], path: Path, model: ModelConfig
) -> None:
    """Write an adapter and what was trained beside it (a head), as safetensors."""
    metadata = {
        "model": model.model_dump_json(),
        "lora": adapter.settings.model_dump_json(),
        "base": adapter.base,
    }
    save_weights({**adapter.tensors, **head}, path, metadata)


def adapter_of(state: Mapping[str, Tensor], name: str, settings: LoraConfig, base: str) -> Adapter:
    """Take the adapter `name` out of a network's state dict."""
    tensors = {
        key.removeprefix(f"{DECODER}.").replace(f".lora_{name}_", ".lora_"): tensor
        for key, tensor in state.items()
        if f".lora_{name}_" in key
    }
    return Adapter(settings=settings, base=base, tensors=tensors)


def export_merged(
    adapter: Adapter, state: Mapping[str, Tensor], base: Path, folder: Path, model: ModelConfig
) -> None:
    """Write a policy twice: as plain weights, and its adapter in PEFT's layout, in ``adapter/``.

    Args:
        adapter: what was trained.
        state: what was trained beside it; its ``value.`` head goes into the weights.
        base: the weights that the adapter was trained on, not rounded as a learner in bf16 holds
            them: a file, or a checkpoint's folder.
        folder: where to write.
        model: the decoder's shape.

    Raises:
        CheckpointError: `base` is missing, or another one.
        TrainingError: the adapter is not finite.
    """
    network = build_policy(model)
    load_weights(network, base)
    require_base(adapter, base_fingerprint(network.state_dict()), base)
    head = {k.removeprefix("value."): v for k, v in state.items() if k.startswith("value.")}
    network.value.load_state_dict(head)
    folder.mkdir(parents=True, exist_ok=True)
    target = PolicyFolder(folder)
    save_peft(adapter, network.decoder, target.adapter, base)
    put_adapter(network.decoder, "exported", adapter)
    save_policy(merged_state(network, "exported"), folder, model, base)


def load_scalar(network: ScalarNetwork, path: Path, base: Decoder, name: str) -> LoraConfig | None:
    """Load a reward model: whole weights, or an adapter on a base that is then shared.

    The adapter is put under `name`, and the network runs with it.

    Returns:
        The adapter's settings, or None for whole weights.

    Raises:
        CheckpointError: missing, torn, of another architecture, or trained on another base.
    """
    found = scalar_adapter(path)
    if found is None:
        load_weights(network, path)
        return None
    require_base(found.adapter, base_fingerprint(base.state_dict()), path)
    share_base(network.decoder, base)
    put_scalar(network, name, found)
    return found.adapter.settings


def scalar_adapter(path: Path) -> ScalarAdapter | None:
    """Read a reward model that is an adapter and a head; None: it is whole weights.

    Raises:
        CheckpointError: missing or torn.
    """
    metadata = None if path.is_dir() else _adapter_metadata(path)
    if metadata is None:
        return None
    state = load_file(path)
    settings = LoraConfig.model_validate_json(metadata["lora"])
    adapter = Adapter(
        settings=settings.model_copy(update={"dropout": 0.0}),
        base=metadata["base"],
        tensors={k: v for k, v in state.items() if not k.startswith("head.")},
    )
    head = {k.removeprefix("head."): v for k, v in state.items() if k.startswith("head.")}
    return ScalarAdapter(adapter=adapter, head=head)


def put_scalar(network: ScalarNetwork, name: str, found: ScalarAdapter) -> None:
    """Put a reward model's head and adapter on a network, which then runs with it.

    Raises:
        CheckpointError: its tensors are of other shapes.
    """
    put_adapter(network.decoder, name, found.adapter)
    network.head.load_state_dict(found.head)
    network.adapter = name


def put_adapter(decoder: Decoder, name: str, adapter: Adapter) -> None:
    """Add an adapter to a decoder.

    Raises:
        CheckpointError: its tensors are of other shapes.
    """
    add_adapter(decoder, name, adapter.settings, seed=0)
    load_adapter(decoder, name, adapter.tensors)


def require_base(adapter: Adapter, base: str, where: object) -> None:
    """Refuse an adapter of another base.

    Raises:
        CheckpointError: the fingerprints differ; the error names both.
    """
    if adapter.base != base:
        raise CheckpointError(
            f"{where}: the adapter was trained on base {adapter.base or 'unknown'}, and this one "
            f"is {base}; load the weights that it was trained on"
        )


# ------------------------------------------------------------------ PEFT's layout


def save_peft(adapter: Adapter, decoder: Decoder, folder: Path, base: Path | None = None) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        adapter: what to write.
        decoder: of the shape that it is on.
        folder: where to write.
        base: the weights under it. If they are a checkpoint's folder, `peft` reads the adapter on a
            model of `transformers`.
    """
    pretrained = base is not None and base.is_dir()
    settings, state = adapter.settings, dict[str, Tensor]()
    ranks: dict[str, int] = {}
    for path, module in adapted(decoder):
        reached = module.reached(settings)
        if not reached:
            continue
        A = adapter.tensors[f"{path}.lora_A"]
        out = torch.zeros(module.out_features, len(A))
        parts = torch.split(out, settings.rank, dim=1)
        for (segment, rows), part in zip(reached.items(), parts, strict=True):
            part[rows] = adapter.tensors[f"{path}.lora_B_{segment}"].float().cpu()
        state[f"{_PEFT}{path}.lora_A.weight"] = A.float().cpu().contiguous()
        state[f"{_PEFT}{path}.lora_B.weight"] = out
        ranks[path.rpartition(".")[2]] = len(A)
    # Their scale is alpha / rank (or its root) too: alpha grows as the rank does.
    power = 1.0 if settings.scaling == "plain" else 0.5
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if pretrained else None,
        "base_model_name_or_path": str(base) if pretrained else None,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "use_rslora": settings.scaling == "rank_stabilised",
        "target_modules": sorted(ranks),
        "rank_pattern": ranks,
        "alpha_pattern": {
            name: settings.alpha * (rank / settings.rank) ** power for name, rank in ranks.items()
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {
        "format": "pt",
        "lora": settings.model_dump_json(),
        "base": adapter.base,
    }
    save_tensors(state, folder / "adapter_model.safetensors", metadata)
    text = json.dumps(config, indent=1) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf8")


def load_peft(folder: Path, decoder: Decoder) -> Adapter:
    """Read what `save_peft` wrote.

    Raises:
        CheckpointError: missing, torn, or not written by Talipot.
    """
    path = folder / "adapter_model.safetensors"
    metadata = _adapter_metadata(path)
    if metadata is None:
        raise CheckpointError(f"{path}: not an adapter that talipot wrote")
    settings, state = LoraConfig.model_validate_json(metadata["lora"]), load_file(path)
    tensors: dict[str, Tensor] = {}
    for name, module in adapted(decoder):
        reached = module.reached(settings)
        if not reached:
            continue
        try:
            A = state[f"{_PEFT}{name}.lora_A.weight"]
            out = state[f"{_PEFT}{name}.lora_B.weight"]
        except KeyError as error:
            raise CheckpointError(f"{path}: no tensor {error}") from None
        tensors[f"{name}.lora_A"] = A
        parts = torch.split(out, settings.rank, dim=1)
        for (segment, rows), part in zip(reached.items(), parts, strict=True):
            tensors[f"{name}.lora_B_{segment}"] = part[rows]
    return Adapter(settings=settings, base=metadata["base"], tensors=tensors)


def _adapter_metadata(path: Path) -> dict[str, str] | None:
    """Metadata of a safetensors file that holds an adapter, else None."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such weights; {writer_of(path)}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: torn or not safetensors: {error}") from None
    return metadata if "lora" in metadata else None
