"""An engine's state on disk: whole fp32 parameters and moments by name, whatever the ranks.

Per parameter ``NAME|master``, ``NAME|exp_avg``, ``NAME|exp_avg_sq`` (float32, of its shape) and
``NAME|step``, and with an auxiliary phase also ``NAME|auxiliary_exp_avg`` and so on. Each rank
writes the parameters dealt to it into a safetensors file of its own. So a run resumes on another
number of ranks or another ZeRO stage, bit for bit on the same one, and nothing is unpickled.
(DeepSpeed's own checkpoint is pickled per rank; its universal one needs a conversion beside the run
before another number of ranks can read it.)

Parameters are gathered one by one (a collective): no rank ever holds more than its share and one.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import CheckpointError, StorageError
from common.files import one_line
from common.models.tensor_files import save_tensors
from learner.zero.engine import ZeroEngine
from learner.zero.optimizer_state import Fragment
from learner.zero.process_group import all_sum, rank, world_size


def save(engine: ZeroEngine, folder: Path) -> None:
    """Write the engine's state (a collective).

    Raises:
        StorageError: on every rank, when any could not write.
    """
    mine: dict[str, Tensor] = {}
    for index, (name, fragment) in enumerate(engine.fragments()):
        for kind in fragment.tensors:
            whole = _whole(fragment, kind)
            if index % world_size() == rank():
                mine[f"{name}|{kind}"] = whole
        if index % world_size() == rank():
            for kind, step in fragment.steps.items():
                mine[f"{name}|{kind}"] = step.detach().cpu().reshape(1).float().clone()
    path = folder / f"rank-{rank():05d}.safetensors"
    problem = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(mine, path)
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    except (OSError, SafetensorError) as error:
        problem = one_line(error)
    if float(all_sum(torch.tensor([float(bool(problem))]))):
        raise StorageError(f"{path}: {problem or 'another rank could not write its share'}")


def load(engine: ZeroEngine, folder: Path) -> None:
    """Read what `save` wrote, by any number of ranks at any ZeRO stage (a collective).

    Raises:
        CheckpointError: a parameter is missing or of another shape.
    """
    engine.create_optimizer_state()
    paths = sorted(folder.glob("rank-*.safetensors"))
    files: list[Any] = [safe_open(path, framework="pt") for path in paths]
    where = {key: file for file in files for key in file.keys()}  # noqa: SIM118 not a mapping
    for name, fragment in engine.fragments():
        read: dict[str, Tensor] = {}
        for kind in (*fragment.tensors, *fragment.steps):
            key = f"{name}|{kind}"
            if key not in where:
                raise CheckpointError(f"{folder}: no {kind} of parameter '{name}'")
            read[kind] = where[key].get_tensor(key)
        if tuple(read["master"].shape) != fragment.shape:
            raise CheckpointError(
                f"{folder}: parameter '{name}' is {tuple(read['master'].shape)}, this model needs "
                f"{fragment.shape}"
            )
        for kind, tensor in fragment.tensors.items():
            own = read[kind].flatten()[fragment.offset : fragment.offset + tensor.numel()]
            tensor[: own.numel()].copy_(own)
        for kind, step in fragment.steps.items():
            step.fill_(max(float(read[kind]), float(step)))
        engine.set_weights(name, read["master"])


def _whole(fragment: Fragment, kind: str) -> Tensor:
    """Return one tensor of a parameter, whole, on the processor.

    Bits travel as integers: a sum of floats would turn -0 into 0.
    """
    own = fragment.tensors[kind]
    size = math.prod(fragment.shape)
    if fragment.replicated:
        return own.detach().cpu().reshape(fragment.shape).clone()
    bits = torch.zeros(size, dtype=torch.int32, device=own.device)
    own = own[: max(0, size - fragment.offset)]
    bits[fragment.offset : fragment.offset + own.numel()] = own.detach().view(torch.int32)
    return all_sum(bits).view(torch.float32).cpu().reshape(fragment.shape)
