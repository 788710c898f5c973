"""Weights of a network on disk: a safetensors file of ours, or a pretrained checkpoint's folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from common.config.model import ModelConfig, PretrainedConfig
from common.errors import CheckpointError
from common.models.decoder import DECODER, Decoder
from common.models.networks import DecoderNetwork, PolicyNetwork, ScalarHead, ScalarNetwork
from common.models.pretrained.checkpoint import SCORE, Checkpoint
from common.models.pretrained.names import HEAD
from common.models.pretrained.writing import SCALAR_HEAD, VALUE_HEAD, write_like, written_whole
from common.models.tensor_files import save_tensors
from common.run_folder import PolicyFolder, writer_of

_SCALAR = "head."
"""Begins the names of a scalar network's head."""
_VALUE = "value."
"""Likewise of a policy's."""


def save_weights(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write safetensors atomically. Metadata values are strings."""
    temporary = path.with_suffix(".tmp")
    save_tensors({k: v.detach().cpu().contiguous() for k, v in state.items()}, temporary, metadata)
    temporary.replace(path)


def checkpoint_of(model: ModelConfig | None) -> Path | None:
    """Return the folder that a model starts from; None for one of our own."""
    return Path(model.start) if isinstance(model, PretrainedConfig) else None


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
    write_like(Checkpoint.open(base), _decoder_state(state), folder, beside={VALUE_HEAD: head})


def save_scalar(state: Mapping[str, Tensor], folder: Path, base: Path) -> None:
    """Write all weights of a reward model as a folder like its base's, which exists.

    Args:
        state: of a `ScalarNetwork`, without adapters.
        folder: where to write; it exists.
        base: the checkpoint's folder that it was trained from.
    """
    checkpoint = Checkpoint.open(base)
    head = {k.removeprefix(_SCALAR): v for k, v in state.items() if k.startswith(_SCALAR)}
    decoder = {k: v for k, v in _decoder_state(state).items() if k in checkpoint.facts}
    if checkpoint.labels:
        decoder[SCORE] = head["weight"]
    write_like(checkpoint, decoder, folder, beside={SCALAR_HEAD: head})


def load_decoder(decoder: Decoder, path: Path) -> None:
    """Load the decoder out of a network's file or a checkpoint's folder, strictly.

    Raises:
        CheckpointError: as `load_weights`.
    """
    if path.is_dir():
        Checkpoint.open(path).load_into(decoder)
        decoder.check()
    else:
        load_weights(decoder, path, prefix=f"{DECODER}.")


def start_scalar(network: ScalarNetwork, path: Path, seed: int) -> None:
    """Begin a reward model: a policy's decoder with a head drawn from a seed, or a classifier.

    Raises:
        CheckpointError: as `load_weights`.
    """
    network.head.initialise(seed)
    if path.is_dir() and Checkpoint.open(path).labels:
        load_weights(network, path)
    else:
        load_decoder(network.decoder, path)


def load_weights(module: nn.Module, path: Path, prefix: str = "") -> None:
    """Load a network, strictly: of a file with a prefix only the names that begin with it.

    A checkpoint's folder holds a decoder. Its policies have a value head beside, or keep the one
    that they have; its reward models have a head of theirs.

    Raises:
        CheckpointError: missing, torn, or of another architecture (naming the first difference).
    """
    if path.is_dir():
        _load_folder(module, path)
        return
    if not path.exists():
        raise CheckpointError(f"{path}: no such weights; {writer_of(path)}")
    stored = _read(path)
    state = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    ours: dict[str, Any] = dict(module.state_dict())
    for name in sorted(ours.keys() | state.keys()):
        needed = tuple(ours[name].shape) if name in ours else "absent"
        given = tuple(state[name].shape) if name in state else "absent"
        if needed != given:
            raise CheckpointError(
                f"{path}: of another architecture: '{name}' is {given}, this model needs {needed}"
            )
    module.load_state_dict(state)


def _load_folder(network: nn.Module, path: Path) -> None:
    """Load the decoder of a checkpoint's folder, and the head beside it."""
    assert isinstance(network, DecoderNetwork), "a folder holds a whole network"
    checkpoint = Checkpoint.open(path)
    if isinstance(network, PolicyNetwork):
        if checkpoint.labels:
            raise CheckpointError(f"{path}: a classifier, not a language model")
        checkpoint.load_into(network.decoder)
        network.decoder.check()
        if (path / VALUE_HEAD).exists():
            load_weights(network.value, path / VALUE_HEAD)
        return
    assert isinstance(network, ScalarNetwork)
    checkpoint.load_into(network.decoder, without=(HEAD, SCORE))
    for name, parameter in network.decoder.named_parameters():
        if name.startswith(HEAD) and name not in checkpoint.facts:  # nothing reads it
            nn.init.zeros_(parameter)
    if (path / SCALAR_HEAD).exists():
        load_weights(network.head, path / SCALAR_HEAD)
    else:
        _take_score(network.head, checkpoint)


def _take_score(head: ScalarHead, checkpoint: Checkpoint) -> None:
    """Take over the head of a sequence-classification checkpoint, which has no bias."""
    if checkpoint.labels != 1:
        what = f"a classifier of {checkpoint.labels} labels" if checkpoint.labels else ""
        raise CheckpointError(
            f"{checkpoint.path}: {what or 'a language model'}, not a reward model; that has one "
            f"label ({SCORE} of one row), or {SCALAR_HEAD} beside its weights"
        )
    with torch.no_grad():
        for _, score in checkpoint.tensors({SCORE}):
            head.weight.copy_(score)
        head.bias.zero_()
        head.offset.zero_()


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: torn or not safetensors: {error}") from None


def _decoder_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the decoder's tensors, by the names that it has itself."""
    prefix = f"{DECODER}."
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
