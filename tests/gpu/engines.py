"""Which engine the learner gets: DeepSpeed's, or plain PyTorch where it is not installed."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from common.devices import ACCELERATOR

Build = Callable[..., Any]
"""What is put in the place of `ZeroEngine`."""


def prepare(device: str) -> str:
    """Let DeepSpeed compute on a device, before anything imports it; returns the engine's name.

    Where it is not installed, `learner.zero.engine` finds an empty module of its name.
    """
    kind = device.partition(":")[0]
    if kind != "cpu":
        os.environ[ACCELERATOR] = kind
    if importlib.util.find_spec("deepspeed") is not None:
        return "DeepSpeed, ZeRO 0"
    for name in ("deepspeed", "deepspeed.ops", "deepspeed.comm"):
        sys.modules[name] = ModuleType(name)
    for name in ("ops", "comm"):
        setattr(sys.modules["deepspeed"], name, sys.modules[f"deepspeed.{name}"])
    return "plain PyTorch, for DeepSpeed is not installed"


def engine_of(name: str, device: str) -> Build:
    """Return what builds engines."""
    from learner.zero.engine import ZeroEngine  # after `prepare`
    from tests.plain_engine import plain

    return ZeroEngine if name.startswith("DeepSpeed") else plain(device)
