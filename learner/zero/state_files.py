"""An engine's state on disk: each rank's own parts of fp32 parameters and moments.

A rank writes what it keeps, and nothing else: bytes for each rank fall as 1 / W. In its safetensors
file ``NAME|KIND@OFFSET`` are elements of a flattened parameter from OFFSET on, float32, of the
kinds master, exp_avg and exp_avg_sq and with an auxiliary phase also auxiliary_exp_avg and so on;
``NAME|step`` are AdamW's steps. Shapes of whole parameters are in the file's metadata. A rank reads
what it needs of whichever files have it (`learner.zero.state_parts`): so a run resumes on another
number of ranks or another ZeRO stage, bit for bit on the same one, and nothing is unpickled.
(DeepSpeed's own checkpoint is pickled per rank; its universal one needs a conversion beside the run
before another number of ranks can read it.) Files of earlier versions have whole tensors,
``NAME|KIND``, and are read too.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from common.errors import CheckpointError, StorageError
from common.files import one_line
from common.models.tensor_files import save_tensors
from learner.zero.engine import ZeroEngine
from learner.zero.process_group import all_sum, rank, world_size
from learner.zero.state_parts import SHAPES, StateParts


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A rank's part of an engine's state, copied: training may go on."""

    tensors: dict[str, Tensor]
    """By their names in the file."""
    shapes: dict[str, tuple[int, ...]]
    """Of whole parameters."""

    def write(self, folder: Path) -> Path:
        """Write this rank's file, and make it outlast a power cut; returns its path.

        Raises:
            StorageError: it cannot be written.
        """
        path = folder / f"rank-{rank():05d}.safetensors"
        try:
            folder.mkdir(exist_ok=True)  # not what it is in: that may have been given up
            save_tensors(self.tensors, path, {SHAPES: json.dumps(self.shapes)})
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        except (OSError, SafetensorError) as error:
            raise StorageError(f"{path}: {one_line(error)}") from None
        return path


def snapshot(engine: ZeroEngine) -> Snapshot:
    """Copy what this rank writes of an engine's state."""
    found = Snapshot({}, {})
    for index, (name, fragment) in enumerate(engine.fragments()):
        begin, end = fragment.share()
        found.shapes[name] = fragment.shape
        if begin < end:
            own = slice(begin - fragment.offset, end - fragment.offset)
            for kind, tensor in fragment.tensors.items():
                copied = tensor.detach()[own].to("cpu", copy=True)
                found.tensors[f"{name}|{kind}@{begin}"] = copied
        if index % world_size() == rank():
            for kind, step in fragment.steps.items():
                found.tensors[f"{name}|{kind}"] = step.detach().cpu().reshape(1).float().clone()
    return found


def save(engine: ZeroEngine, folder: Path) -> None:
    """Write the engine's state, and wait for it (a collective).

    Raises:
        StorageError: on every rank, when any could not write.
    """
    problem = ""
    try:
        snapshot(engine).write(folder)
    except StorageError as error:
        problem = str(error)
    if float(all_sum(torch.tensor([float(bool(problem))]))):
        raise StorageError(problem or f"{folder}: another rank could not write its share")


def load(engine: ZeroEngine, folder: Path) -> None:
    """Read what was written, by any number of ranks at any ZeRO stage (a collective).

    Raises:
        CheckpointError: a parameter is missing or of another shape.
    """
    engine.create_optimizer_state()
    stored = StateParts(folder)
    for name, fragment in engine.fragments():
        shape = stored.shape(name)
        if shape is not None and shape != fragment.shape:
            raise CheckpointError(
                f"{folder}: parameter '{name}' is {shape}, this model needs {fragment.shape}"
            )
        size = math.prod(fragment.shape)
        for kind, tensor in fragment.tensors.items():
            begin, end = (min(fragment.offset + n, size) for n in (0, tensor.numel()))
            tensor[: end - begin].copy_(stored.read(name, kind, begin, end))
        for kind, step in fragment.steps.items():
            step.fill_(max(float(stored.read(name, kind, 0, 1)), float(step)))
        engine.take_master(name, fragment)
