"""Weights of a network on disk: a safetensors file of ours, or a pretrained checkpoint's folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from common.config.model import ModelConfig
from common.errors import CheckpointError
from common.models.decoder import DECODER, Decoder
from common.models.filling import Source, fill, stored
from common.models.networks import DecoderNetwork, PolicyNetwork, ScalarNetwork
from common.models.pretrained.checkpoint import SCORE, Checkpoint
from common.models.pretrained.names import HEAD
from common.models.pretrained.writing import SCALAR_HEAD, VALUE_HEAD, write_like, written_whole
from common.models.tensor_files import save_tensors
from common.run_folder import PolicyFolder, writer_of

Part = TypeVar("Part")
_SCALAR = "head."
"""Begins the names of a scalar network's head."""
_VALUE = "value."
"""Likewise of a policy's."""


def save_weights(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write safetensors atomically. Metadata values are strings."""
    temporary = path.with_suffix(".tmp")
    save_tensors({k: v.detach().cpu().contiguous() for k, v in state.items()}, temporary, metadata)
    temporary.replace(path)


@contextmanager
def policy_folder(folder: Path, base: Path | None) -> Iterator[Path]:
    """Give the folder to write a policy into.

    Args:
        folder: where it belongs.
        base: as in `save_policy`. A folder like a checkpoint's has many files, so it is written
            beside and takes its name when it is whole.
    """
    if base is not None and base.is_dir():
        with written_whole(folder) as partial:
            yield partial
    else:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def save_policy(
    state: Mapping[str, Tensor], folder: Path, model: ModelConfig, base: Path | None = None
) -> None:
    """Write all weights of a policy into a folder that exists.

    Args:
        state: of a `PolicyNetwork`, without adapters.
        folder: where to write.
        model: the decoder's shape.
        base: what the policy was trained from. Where that is a checkpoint's folder, this becomes
            another one like it; else the weights are one file of ours.
    """
    if base is None or not base.is_dir():
        path = PolicyFolder(folder).weights
        save_weights(state, path, {"model": model.model_dump_json()})
        return
    head = {k.removeprefix(_VALUE): v for k, v in state.items() if k.startswith(_VALUE)}
    write_like(Checkpoint.open(base), decoder_part(state), folder, beside={VALUE_HEAD: head})


def save_scalar(state: Mapping[str, Tensor], folder: Path, base: Path) -> None:
    """Write all weights of a reward model as a folder like its base's, which exists.

    Args:
        state: of a `ScalarNetwork`, without adapters.
        folder: where to write; it exists.
        base: the checkpoint's folder that it was trained from.
    """
    checkpoint = Checkpoint.open(base)
    head = {k.removeprefix(_SCALAR): v for k, v in state.items() if k.startswith(_SCALAR)}
    decoder = {k: v for k, v in decoder_part(state).items() if k in checkpoint.facts}
    if checkpoint.labels:
        decoder[SCORE] = head["weight"]
    write_like(checkpoint, decoder, folder, beside={SCALAR_HEAD: head})


def weights_of(module: nn.Module, path: Path, prefix: str = "") -> dict[str, Source]:
    """Return where the weights of a network are, strictly: every tensor has one of its shape.

    A checkpoint's folder holds a decoder. Its policies have a value head beside, or keep the one
    that they have; its reward models have a head of theirs.

    Args:
        module: what they are for; it may be on the meta device. For a folder a whole network.
        path: a file of ours, or a checkpoint's folder.
        prefix: of a file only the names that begin with it count.

    Raises:
        CheckpointError: missing, torn, or of another architecture (naming the first difference).
    """
    if path.is_dir():
        return _folder_weights(module, path)
    shapes = {
        name.removeprefix(prefix): shape
        for name, shape in _shapes(path).items()
        if name.startswith(prefix)
    }
    ours = module.state_dict()
    for name in sorted(ours.keys() | shapes.keys()):
        needed = tuple(ours[name].shape) if name in ours else "absent"
        given = shapes.get(name, "absent")
        if needed != given:
            raise CheckpointError(
                f"{path}: of another architecture: '{name}' is {given}, this model needs {needed}"
            )
    return {name: stored(path, f"{prefix}{name}", shape) for name, shape in shapes.items()}


def decoder_weights(decoder: Decoder, path: Path) -> dict[str, Source]:
    """Return where a decoder's weights are, in a network's file or a checkpoint's folder.

    Raises:
        CheckpointError: as `weights_of`.
    """
    if path.is_dir():
        return Checkpoint.open(path).weights(decoder)
    return weights_of(decoder, path, prefix=f"{DECODER}.")


def scalar_start(network: ScalarNetwork, path: Path, seed: int) -> dict[str, Source]:
    """Begin a reward model: a classifier's weights, or a policy's decoder and a head from a seed.

    Raises:
        CheckpointError: as `weights_of`.
    """
    network.head.initialise(seed)
    if path.is_dir() and Checkpoint.open(path).labels:
        return weights_of(network, path)
    return prefixed(f"{DECODER}.", decoder_weights(network.decoder, path))


def load_decoder(decoder: Decoder, path: Path) -> None:
    """Load the decoder out of a network's file or a checkpoint's folder.

    Raises:
        CheckpointError: as `weights_of`; or the library computes other logits.
    """
    fill(decoder, decoder_weights(decoder, path).items())
    if path.is_dir():
        decoder.check()


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a network; the arguments are those of `weights_of`.

    Raises:
        CheckpointError: as `weights_of`; or the library computes other logits.
    """
    fill(module, weights_of(module, path).items())
    if path.is_dir() and isinstance(module, PolicyNetwork):
        module.decoder.check()


def prefixed(prefix: str, sources: Mapping[str, Source]) -> dict[str, Source]:
    """Return the sources of a part of a network by the names that they have in the whole."""
    return {f"{prefix}{name}": source for name, source in sources.items()}


def _folder_weights(network: nn.Module, path: Path) -> dict[str, Source]:
    """Return where the decoder of a checkpoint's folder is, and the head beside it."""
    assert isinstance(network, DecoderNetwork), "a folder holds a whole network"
    checkpoint = Checkpoint.open(path)
    if isinstance(network, PolicyNetwork):
        if checkpoint.labels:
            raise CheckpointError(f"{path}: a classifier, not a language model")
        found = prefixed(f"{DECODER}.", checkpoint.weights(network.decoder))
        if (path / VALUE_HEAD).exists():
            found |= prefixed(_VALUE, weights_of(network.value, path / VALUE_HEAD))
        return found
    assert isinstance(network, ScalarNetwork)
    decoder = checkpoint.weights(network.decoder, without=(HEAD, SCORE))
    for name, _ in network.decoder.named_parameters():
        if name.startswith(HEAD) and name not in checkpoint.facts:  # nothing reads it
            decoder[name] = _zeros
    if (path / SCALAR_HEAD).exists():
        head = weights_of(network.head, path / SCALAR_HEAD)
    else:
        head = _score(checkpoint)
    return prefixed(f"{DECODER}.", decoder) | prefixed(_SCALAR, head)


def _score(checkpoint: Checkpoint) -> dict[str, Source]:
    """Return the head of a sequence-classification checkpoint, which has no bias."""
    if checkpoint.labels != 1:
        what = f"a classifier of {checkpoint.labels} labels" if checkpoint.labels else ""
        raise CheckpointError(
            f"{checkpoint.path}: {what or 'a language model'}, not a reward model; that has one "
            f"label ({SCORE} of one row), or {SCALAR_HEAD} beside its weights"
        )
    fact = checkpoint.facts[SCORE]
    weight = stored(fact.file, fact.stored, fact.shape)
    return {"weight": weight, "bias": _zeros, "offset": _zeros}


def _zeros(begin: int, end: int) -> Tensor:
    return torch.zeros(end - begin)


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a file's tensors, by its header."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such weights; {writer_of(path)}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 not a mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: torn or not safetensors: {error}") from None


def decoder_part(state: Mapping[str, Part]) -> dict[str, Part]:
    """Return the decoder's of a network's tensors or sources, by the names that it has itself."""
    prefix = f"{DECODER}."
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
