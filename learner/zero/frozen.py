"""A frozen copy of a network in training, sharded where the network is.

Under ZeRO 3 a rank keeps its share of each large matrix of the copy, and gathers it for as long
as its module computes; of an output head, which is read when no module computes, some rows at a
time. DeepSpeed would take the copy whole before it shards it; here one parameter at a time is
whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.embedding import HeadRows, OutputHead, TiedEmbedding
from learner.zero.buckets import SMALL
from learner.zero.engine import ZeroEngine
from learner.zero.process_group import rank, world_size

_GATHERED, _ALIGNED = 2**23, 64
"""Numbers of a head that are gathered at a time, of which the last ones are still there as the next
are; and what its rows are cut at multiples of, for `learner.objectives.clone_kl`."""


def fill(
    shell: nn.Module, engine: ZeroEngine, head: OutputHead | TiedEmbedding
) -> Callable[[], HeadRows]:
    """Fill a network on the meta device with what an engine's has (a collective).

    Parameters keep the dtype that they have in the shell. Where they are sharded, all ranks have
    to run the same modules in the same order.

    Args:
        shell: a network of the same modules.
        engine: what is copied.
        head: module of the shell that is read some rows at a time too.

    Returns:
        What reads it (a collective).
    """
    in_rows: _Shard | None = None
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
            if engine.zero_stage < 3 or copied.numel() <= SMALL or copied.dim() == 1:
                continue
            if module is head and name == "weight":
                fit = _GATHERED // copied.shape[1] // _ALIGNED * _ALIGNED
                shards.append(in_rows := _Shard(held, max(_ALIGNED, fit)))
            else:
                shards.append(_Shard(held, len(copied)))
        for shard in shards:
            module.register_forward_pre_hook(shard.gather)
            module.register_forward_hook(shard.release)
    sharded = in_rows  # a name that is given once, as mypy wants it in a function within

    def rows() -> HeadRows:
        begin = 0
        for part in [head.weight] if sharded is None else sharded.rows():
            bias = getattr(head, "bias", None)
            yield part, None if bias is None else bias[begin : begin + len(part)]
            begin += len(part)

    return rows


class _Shard:
    """A rank's share of a parameter: of each so many rows of it."""

    def __init__(self, parameter: nn.Parameter, rows: int) -> None:
        self._parameter, self._shape = parameter, parameter.shape
        parts = parameter.detach().split(rows)
        self._shapes = [part.shape for part in parts]
        self._own = [_own(part.flatten()) for part in parts]
        self.release()

    def rows(self) -> Iterator[Tensor]:
        """Yield so many rows, whole, one after another (a collective)."""
        for shape, own in zip(self._shapes, self._own, strict=True):
            flat = own.new_empty(own.numel() * world_size())
            dist.all_gather_into_tensor(_bits(flat), _bits(own))
            yield flat[: shape.numel()].view(shape)

    def gather(self, *_: object) -> None:
        """Make the parameter whole (a collective)."""
        if len(self._own) == 1:
            [self._parameter.data] = self.rows()
            return
        whole, begin = self._own[0].new_empty(self._shape), 0
        for part in self.rows():
            whole[begin : begin + len(part)] = part
            begin += len(part)
        self._parameter.data = whole

    def release(self, *_: object) -> None:
        """Keep the share alone."""
        self._parameter.data = self._own[0].new_empty(0)


def _own(flat: Tensor) -> Tensor:
    """Return this rank's share of a tensor, the same size on all ranks."""
    each = -(-flat.numel() // world_size())
    padded = F.pad(flat, (0, each * world_size() - flat.numel()))
    return padded[rank() * each : (rank() + 1) * each].clone()


def _bits(tensor: Tensor) -> Tensor:
    """Whatever numbers they are: not every backend knows every dtype."""
    return tensor.view(torch.uint8)
