"""Writes checkpoints in Hugging Face's layout: what `transformers`, vLLM and llama.cpp load.

A policy's folder is the checkpoint that it was trained from, with other weights: configuration,
generation config and tokenizer byte for byte, tensors under the same names and in the same number
types. Beside them lies what only we read: ``value_head.safetensors``, or a reward model's
``scalar_head.safetensors``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import CheckpointError, StorageError
from common.files import one_line
from common.models.pretrained.checkpoint import INDEX, TOKENIZER, WEIGHTS, Checkpoint
from common.models.pretrained.config_files import CONFIG, GENERATION, read_json
from common.models.tensor_files import save_tensors
from common.unfinished import REPLACED, left_by_writers, unfinished

MAX_SHARD_BYTES = 5_000_000_000
VALUE_HEAD, SCALAR_HEAD = "value_head.safetensors", "scalar_head.safetensors"
CARD = "README.md"
DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Number types of weights by their names in recipes."""
_LICENCE = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Give a folder beside `target` to write into; it takes that name at the end, or is removed.

    What had the name before is replaced, and what killed writers of `target` left is removed.

    Raises:
        StorageError: the disk is full or not writable.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(target, folder=True) as partial:
            yield partial
            for path in (*partial.rglob("*"), partial):
                _sync(path)
            if target.exists():
                target.rename(partial.with_suffix(f".{REPLACED}"))
            partial.rename(target)
        _sync(target.parent)
        # Those of writers too that were killed between their last two moves: a whole one is there.
        for path in left_by_writers(target, REPLACED):
            shutil.rmtree(path, ignore_errors=True)
    except OSError as error:
        raise StorageError(
            f"{target}: cannot be written ({one_line(error)}); check the folder, its rights and "
            "the free space"
        ) from error


def write_like(
    base: Checkpoint,
    state: Mapping[str, Tensor],
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    beside: Mapping[str, Mapping[str, Tensor]] | None = None,
    index: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write weights with all that a checkpoint has beside its own.

    Args:
        base: the checkpoint that they were trained from.
        state: all tensors, by the names of `transformers`; a tied head may be left out.
        folder: where to write; it exists.
        dtype: number type of all tensors; None: of each what the base stores it in.
        beside: files with heads of ours, by name.
        index: there are such files already.
        max_shard_bytes: largest file of weights.

    Raises:
        CheckpointError: the tensors are not those of the base.
    """
    copy_settings(base, folder, dtype)
    for name, head in (beside or {}).items():
        save_tensors(_ready(head), folder / name, {"format": "pt"})
    state = dict(state)
    if base.tied_copy:
        state[base.tied_copy] = state[base.embedding]
    if strange := sorted(state.keys() ^ base.facts.keys()):
        raise CheckpointError(
            f"{folder}: '{strange[0]}' is in only one of the weights and their base {base.path}"
        )
    stored = {fact.stored: state[name] for name, fact in base.facts.items()}
    dtypes = {fact.stored: dtype or fact.dtype for fact in base.facts.values()}
    write_weights(stored, dtypes, folder, max_shard_bytes, index=index or bool(beside))


def copy_settings(base: Checkpoint, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Copy configuration, generation config, tokenizer and licence, byte for byte.

    The configuration changes in what would not be true any more: the number type, and code of the
    checkpoint's own, which is not copied.
    """
    config = dict(base.config)
    if dtype is not None and dtype != base.dtype:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    if config == read_json(base.path / CONFIG):
        shutil.copyfile(base.path / CONFIG, folder / CONFIG)
    else:
        write_json(folder / CONFIG, config)
    if (base.path / GENERATION).is_file():
        shutil.copyfile(base.path / GENERATION, folder / GENERATION)
    licences = [p for p in base.path.iterdir() if p.is_file() and p.stem.upper() in _LICENCE]
    for path in (*base.tokenizer_files, *licences):
        copy_any(path, folder / path.name)


def take_tokenizer(tokenizer: Path, folder: Path) -> None:
    """Put a run's tokenizer into a policy's folder: its chat template may be another.

    Args:
        tokenizer: a folder of such files; a file, as of models of our own, has no place there.
        folder: where to write.
    """
    if tokenizer.is_dir():
        for path in tokenizer.iterdir():
            if TOKENIZER.fullmatch(path.name):  # it keeps a copy of the generation config too
                copy_any(path, folder / path.name)


def copy_any(source: Path, target: Path) -> None:
    """Copy a file or a folder's contents; links become what they lead to."""
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, target)


def write_weights(
    state: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    folder: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    index: bool = False,
) -> None:
    """Write safetensors, in shards where there is more than one file may hold.

    Args:
        state: tensors by the names that they are stored under.
        dtypes: what each is stored in.
        folder: where to write.
        max_shard_bytes: largest file; a larger tensor has one of its own.
        index: write an index for one file too. vLLM reads every safetensors file of a folder that
            has none, our value head too.
    """
    sizes = {name: tensor.numel() * dtypes[name].itemsize for name, tensor in state.items()}
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name in state:
        if shards[-1] and sizes[name] > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= sizes[name]
    files = [
        WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    for file, names in zip(files, shards, strict=True):
        shard = {name: state[name].detach().to("cpu", dtypes[name]) for name in names}
        save_tensors(_ready(shard), folder / file, {"format": "pt"})
    if index or len(shards) > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = {"total_size": sum(sizes.values())}
        write_json(folder / INDEX, {"metadata": total, "weight_map": dict(sorted(where.items()))})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object as `transformers` lays it out."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf8")


def _ready(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as a file takes them: on the processor, contiguous, none sharing another's memory."""
    seen: set[int] = set()
    ready: dict[str, Tensor] = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        ready[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return ready


def _sync(path: Path) -> None:
    """Make a file, or a folder's list of names, outlast a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
