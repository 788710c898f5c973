"""Adapters of a whole network: adding, freezing, sharing, merging, reading and filling them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from common.config.model import ALL_PROJECTIONS, LoraConfig
from common.errors import CheckpointError, ConfigError, TrainingError
from common.models.decoder import DECODER, Decoder
from common.models.filling import Source
from common.models.lora import Adapted, adapted
from common.models.networks import DecoderNetwork
from common.randomness import derive_seed
from common.wire.weights import state_hash, tensors_hash


def add_adapter(network: nn.Module, name: str, settings: LoraConfig, seed: int) -> None:
    """Put a new adapter on every projection that `settings` targets.

    Raises:
        ConfigError: the name cannot be one, or is taken, or no projection has a name of `targets`.
    """
    if not re.fullmatch(r"[a-z0-9]+", name):
        raise ConfigError(f"adapter name '{name}' must be of small letters and digits")
    _require_targets(network, settings)
    generator = torch.Generator().manual_seed(seed)
    for path, module in adapted(network):
        if name in module.settings:
            raise ConfigError(f"{path} has an adapter '{name}' already")
        module.add(name, settings, generator)


def _require_targets(network: nn.Module, settings: LoraConfig) -> None:
    """Refuse names that no projection has, with the nearest one that is there."""
    known = sorted({segment for _, module in adapted(network) for segment in module.segments})
    for target in settings.targets:
        if target not in (ALL_PROJECTIONS, *known):
            near = difflib.get_close_matches(target, known, 1, 0.5)
            meant = f"; did you mean '{near[0]}'?" if near else ""
            raise ConfigError(
                f"lora.targets: '{target}' is no projection of this model{meant}; it has "
                f"{', '.join(known)}, or {ALL_PROJECTIONS} for all"
            )


def snapshot_adapter(network: nn.Module, source: str, name: str) -> None:
    """Keep a frozen copy of an adapter under another name."""
    for _, module in adapted(network):
        module.snapshot(source, name)


def drop_adapter(network: nn.Module, name: str) -> None:
    """Remove an adapter."""
    for _, module in adapted(network):
        module.drop(name)


def freeze_base(network: nn.Module) -> None:
    """Compute gradients for adapters alone."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(".lora_" in f".{name}")


def attach_adapter(network: DecoderNetwork, name: str, settings: LoraConfig, seed: int) -> None:
    """Put a new adapter on a network's decoder and run with it.

    Adapter and head are then trained, and the base is frozen.
    """
    add_adapter(network.decoder, name, settings, derive_seed(seed, "adapter", name) >> 1)
    freeze_base(network.decoder)
    network.adapter = name


def share_base(network: nn.Module, base: nn.Module) -> None:
    """Let a network use the base of another of the same shape, each with adapters of its own."""
    theirs = dict(base.named_parameters())
    for path, module in network.named_modules():
        for name, _ in list(module.named_parameters(recurse=False)):
            if not name.startswith("lora_"):
                setattr(module, name, theirs[f"{path}.{name}" if path else name])


def adapter_tensors(network: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield one adapter's tensors by name; the adapter's own name is left out of theirs."""
    for path, module in adapted(network):
        if name in module.settings:
            for tensor in module.names(name):
                yield f"{path}.{tensor.replace(f'lora_{name}_', 'lora_')}", getattr(module, tensor)


def adapter_size(network: nn.Module, settings: LoraConfig) -> int:
    """Count the parameters that an adapter of these settings has on a network."""
    size = 0
    for _, module in adapted(network):
        spans = module.reached(settings).values()
        rows = sum(span.stop - span.start for span in spans)
        size += settings.rank * (len(spans) * module.in_features + rows)
    return size


def load_adapter(network: nn.Module, name: str, state: Mapping[str, Tensor]) -> None:
    """Fill an adapter with tensors by the names of `adapter_tensors`.

    Raises:
        CheckpointError: a tensor is missing, superfluous or of another shape.
    """
    ours = dict(adapter_tensors(network, name))
    for key in sorted(ours.keys() | state.keys()):
        needed = tuple(ours[key].shape) if key in ours else "absent"
        given = tuple(state[key].shape) if key in state else "absent"
        if needed != given:
            raise CheckpointError(
                f"adapter tensor '{key}' is {given}, these settings need {needed}"
            )
    with torch.no_grad():
        for key, tensor in ours.items():
            tensor.copy_(state[key])


def merged_state(network: nn.Module, name: str) -> dict[str, Tensor]:
    """State dict of the plain network with an adapter merged into its weights.

    Raises:
        TrainingError: the adapter is not finite.
    """
    state = {k: v.detach() for k, v in network.state_dict().items() if ".lora_" not in f".{k}"}
    for path, module in adapted(network):
        state[f"{path}.weight"] = _merged(path, module, name)
    return state


def base_fingerprint(state: Mapping[str, Tensor]) -> str:
    """Content hash of a decoder's own weights in fp32, adapters and heads left out."""
    plain = {
        name.removeprefix(f"{DECODER}."): tensor.detach().float()
        for name, tensor in state.items()
        if ".lora_" not in f".{name}" and not name.startswith(("value.", "head."))
    }
    return state_hash(plain)


def sources_fingerprint(decoder: Decoder, sources: Mapping[str, Source]) -> str:
    """Return the `base_fingerprint` of a decoder that has no memory for its weights."""
    shapes = {name: tensor.shape for name, tensor in decoder.state_dict().items()}
    assert all(p.is_meta for p in decoder.parameters()), "under ZeRO 3 shapes are gone by then"

    def whole(name: str) -> Tensor:
        return sources[name](0, shapes[name].numel()).view(shapes[name]).float()

    return tensors_hash((name, whole(name)) for name in sorted(sources))


def merged_sources(
    network: nn.Module, name: str, sources: Mapping[str, Source]
) -> dict[str, Source]:
    """Return the sources of `merged_state` of a network that has memory for its adapters alone."""
    found = dict(sources)
    for path, module in adapted(network):
        if name in module.settings:
            found[f"{path}.weight"] = _merged_source(path, module, name, found[f"{path}.weight"])
    return found


def _merged_source(path: str, module: Adapted, name: str, source: Source) -> Source:
    def read(begin: int, end: int) -> Tensor:
        shape = module.weight.shape
        weight = source(0, shape.numel()).view(shape)
        return _merged(path, module, name, weight).reshape(-1)[begin:end]

    return read


def _merged(path: str, module: Adapted, name: str, weight: Tensor | None = None) -> Tensor:
    try:
        return module.merged(name, weight)
    except TrainingError as error:
        raise TrainingError(f"{path}: {error}") from None
