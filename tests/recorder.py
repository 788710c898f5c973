"""Steps recorded as CUDA graphs record them, on any device: operations with their tensors.

What is replayed are the operations and nothing of the Python that asked for them: numbers that it
knew are frozen, and every tensor is where it was. What a recording on a GPU refuses is refused:
looking at a number, results whose size depends on numbers, copies between devices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from actors.generation.graphs import Compute

_REFUSED = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class _Tape(TorchDispatchMode):
    """Keeps every operation, its arguments and its results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [x.device for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if _REFUSED & set(func.tags) or func is torch.ops.aten.lift_fresh.default:
            raise RuntimeError(f"{func} is not permitted while a step is recorded")
        results = func(*args, **kwargs)
        made = [x for x in tree_leaves(results) if isinstance(x, Tensor)]
        if len({x.type for x in (*given, *(x.device for x in made))}) > 1:
            raise RuntimeError(f"{func} copies between devices while a step is recorded")
        self.operations.append((func, args, kwargs, made))
        return results


class Recorder:
    """A `Record` that counts."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, compute: Compute) -> Callable[[], object]:
        with _Tape() as tape:
            compute()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            for func, args, kwargs, made in tape.operations:
                again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
                for held, new in zip(made, again, strict=True):
                    # What is not a view, and was not written in place, is another tensor now.
                    if not torch._C._is_alias_of(held, new):  # type: ignore[attr-defined]
                        held.copy_(new)

        return replay
