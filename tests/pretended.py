"""A card that is pretended: PyTorch's `meta` device computes shapes, and has no numbers to look at.

Under `Card` every operation whose tensors lie on different devices is refused (`meta` lets some of
them pass), as a GPU would; whatever needs a number of a tensor is an error of `meta` itself. Copies
to the processor are counted by the function that made them, and give zeros.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = "meta"
OURS = Path(__file__).parents[1]
_COPY_IN = torch.ops.aten.copy_.default
_COPY = torch.ops.aten._to_copy.default


class Card(TorchDispatchMode):
    """Refuses what a card would refuse, and counts what waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        """Copies to the processor, by ``file:function``."""
        self.reads: Counter[str] = Counter()
        """Those that are waited for later (`common.devices.wait_for`)."""
        self.products = 0
        """Matrix products on the card."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        devices = {x.device.type for x in tensors if x.dim()}
        if len(devices) > 1 and func is _COPY_IN and tensors[0].device.type != DEVICE:
            waits = self.waits if not (args[2:] or kwargs.get("non_blocking")) else self.reads
            waits[_caller()] += 1
            return tensors[0].zero_()
        if len(devices) > 1 and func is not _COPY_IN:
            raise AssertionError(f"{func} of tensors on {sorted(devices)}")
        away = kwargs.get("device") == torch.device("cpu")
        if func is _COPY and away and args[0].device.type == DEVICE:
            self.waits[_caller()] += 1
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if DEVICE in devices and func.overloadpacket in _PRODUCTS:
            self.products += 1
        return func(*args, **kwargs)


_PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm}


def _caller() -> str:
    """The function of ours that asked, outside of tests."""
    frame = sys._getframe(2)
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(OURS) and ".venv" not in path.parts and "tests" not in path.parts:
            return f"{path.relative_to(OURS)}:{frame.f_code.co_name}"
        if frame.f_back is None:
            break
        frame = frame.f_back
    return "a test"
