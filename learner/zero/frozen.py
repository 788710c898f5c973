"""A frozen copy of a network in training, sharded where the network is.

Under ZeRO 3 a rank keeps its share of each large parameter of the copy, and gathers it for as long
as its module computes. DeepSpeed would take the copy whole before it shards it; here one parameter
at a time is whole.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from learner.zero.buckets import SMALL
from learner.zero.engine import ZeroEngine
from learner.zero.process_group import rank, world_size


def fill(shell: nn.Module, engine: ZeroEngine, whole: Collection[nn.Module] = ()) -> None:
    """Fill a network on the meta device with what an engine's has (a collective).

    Parameters keep the dtype that they have in the shell. Where they are sharded, all ranks have
    to run the same modules in the same order.

    Args:
        shell: a network of the same modules.
        engine: what is copied.
        whole: modules of the shell whose parameters every rank keeps whole.
    """
    for path, module in shell.named_modules():
        source = engine.network.get_submodule(path)
        for name, buffer in source.named_buffers(recurse=False):
            module._buffers[name] = buffer.detach().clone()
        shards: list[_Shard] = []
        for name, parameter in list(module.named_parameters(recurse=False)):
            of = source.get_parameter(name)
            with engine.gathered([of]):
                copied = of.detach().to(parameter.dtype, copy=True)
            held = nn.Parameter(copied, requires_grad=False)
            setattr(module, name, held)
            if engine.zero_stage == 3 and module not in whole and copied.numel() > SMALL:
                shards.append(_Shard(held))
        for shard in shards:
            module.register_forward_pre_hook(shard.gather)
            module.register_forward_hook(shard.release)


class _Shard:
    """A rank's share of a parameter."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter, self._shape = parameter, parameter.shape
        each = -(-parameter.numel() // world_size())
        flat = F.pad(parameter.detach().flatten(), (0, each * world_size() - parameter.numel()))
        self._own = flat[rank() * each : (rank() + 1) * each].clone()
        self.release()

    def gather(self, *_: object) -> None:
        """Make the parameter whole (a collective)."""
        flat = self._own.new_empty(self._own.numel() * world_size())
        dist.all_gather_into_tensor(_bits(flat), _bits(self._own))
        self._parameter.data = flat[: self._shape.numel()].view(self._shape)

    def release(self, *_: object) -> None:
        """Keep the share alone."""
        self._parameter.data = self._own.new_empty(0)


def _bits(tensor: Tensor) -> Tensor:
    """Whatever numbers they are: not every backend knows every dtype."""
    return tensor.view(torch.uint8)
