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

from common.devices import Doing, Record

_REFUSED = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class _Tape(TorchDispatchMode):
    """Keeps every operation, its arguments and its results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self._between: list[Tensor] = []

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
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self._between += [
            x for x in made if x.is_floating_point() and not any(_alias(x, i) for i in inputs)
        ]
        return results

    def spoil(self) -> None:
        """Write over what was computed between: other recordings have the same memory for it."""
        for tensor in self._between:
            tensor.fill_(torch.nan)


class Recorder:
    """What begins recordings (`common.devices.recorder_on`), and counts them."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self) -> Record:
        return self._record

    def _record(self, step: Doing) -> Callable[[], object]:
        with _Tape() as tape:
            step()
        self.recorded += 1
        tape.spoil()

        def replay() -> None:
            self.replayed += 1
            for func, args, kwargs, made in tape.operations:
                again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
                for held, new in zip(made, again, strict=True):
                    if not _alias(held, new):  # neither a view nor written in place
                        held.copy_(new)
            tape.spoil()

        return replay


def _alias(one: Tensor, other: Tensor) -> bool:
    found: bool = torch._C._is_alias_of(one, other)  # type: ignore[attr-defined]
    return found
