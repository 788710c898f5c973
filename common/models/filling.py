"""Networks that have no memory for their weights yet, and where their numbers come from.

A large network is never whole in one process: it is built on the meta device, and each of its
parameters is read in the part that a process keeps of it (`learner.zero.engine`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from common.errors import CheckpointError
from common.files import one_line

Source = Callable[[int, int], Tensor]
"""Reads elements begin .. end - 1 of a flattened tensor, in whatever dtype they are stored."""

Weights = Iterable[tuple[str, Source]]
"""Parameters and buffers by name, each once, in the order in which they are best read. A source is
to be read before the next is taken: numbers that are drawn are drawn one after another."""


def held(tensor: Tensor) -> Source:
    """Return the source of a tensor that is in memory."""
    return lambda begin, end: tensor.detach().reshape(-1)[begin:end]


def stored(file: Path, name: str, shape: tuple[int, ...]) -> Source:
    """Return the source of a tensor in a safetensors file, of which no more than asked is read.

    The file is opened anew for every read: what was read of an open one stays in memory.

    Raises:
        CheckpointError: by the source, when the file is torn, gone or another by then.
    """
    width = math.prod(shape[1:])

    def read(begin: int, end: int) -> Tensor:
        try:
            with safe_open(file, framework="pt") as opened:
                part = opened.get_slice(name)
                if tuple(part.get_shape()) != shape:
                    raise CheckpointError(
                        f"{file}: '{name}' has another shape than when it was looked at; "
                        "leave weights as they are while they are read"
                    )
                if not shape:
                    only: Tensor = opened.get_tensor(name)
                    return only.reshape(-1)[begin:end]
                first, last = begin // width, -(-end // width)
                rows: Tensor = part[first:last].reshape(-1)
                return rows[begin - first * width : end - first * width]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file}: torn or not safetensors ({one_line(error)}); bring the file again"
            ) from None

    return read


@contextmanager
def without_memory() -> Iterator[None]:
    """Build networks inside the block whose parameters are on the meta device; buffers are not."""

    def leave(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.is_meta:
            return parameter
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    # Before a module draws first values, which nobody wants: they are drawn on the meta device.
    hook: Any = leave  # PyTorch's annotation has it that it returns nothing
    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def place(parameter: nn.Parameter, memory: Tensor) -> None:
    """Give a parameter on the meta device memory; it stays the same object, also where shared."""
    torch.utils.swap_tensors(parameter, nn.Parameter(memory, parameter.requires_grad))


def fill(module: nn.Module, weights: Weights) -> None:
    """Copy weights into a module's tensors, in the dtypes that those have."""
    own = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, source in weights:
            tensor = own[name]
            assert not tensor.is_meta, f"'{name}' has no memory (`place`)"
            tensor.copy_(source(0, tensor.numel()).view(tensor.shape))


@contextmanager
def streamed(module: nn.Module, sources: Mapping[str, Source]) -> Iterator[None]:
    """Let a module on the meta device compute: each part has its weights while it runs, in fp32.

    Args:
        module: whose parameters are used by their own modules alone.
        sources: of its parameters, by one of the names that each has.
    """
    found: dict[int, Source] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name in sources:
            found[id(parameter)] = sources[name]
    handles = []
    for part in module.modules():
        own = {name: p for name, p in part.named_parameters(recurse=False) if p.is_meta}
        if own:
            stream = _Stream({name: (p, found[id(p)]) for name, p in own.items()})
            handles.append(part.register_forward_pre_hook(stream.read))
            handles.append(part.register_forward_hook(stream.release))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Stream:
    """The parameters of one module, there for as long as it runs."""

    def __init__(self, parameters: Mapping[str, tuple[nn.Parameter, Source]]) -> None:
        self._parameters = parameters

    def read(self, module: nn.Module, *_given: Any) -> None:
        for name, (parameter, read) in self._parameters.items():
            whole = read(0, parameter.numel()).view(parameter.shape).float()
            module._parameters[name] = nn.Parameter(whole, requires_grad=False)

    def release(self, module: nn.Module, *_given: Any) -> None:
        for name, (empty, _) in self._parameters.items():
            module._parameters[name] = empty
