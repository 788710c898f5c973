"""What an optimizer knows under ZeRO: where DeepSpeed keeps fp32 masters and AdamW's moments.

Stage 0 has whole parameters on every rank. Stages 1 and 2 lay all parameters in flat buffers and
give each rank a partition of them, stage 3 gives it a partition of every parameter. All that reads
DeepSpeed's own attributes for it is here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.wire.weights import slice_bounds
from learner.zero.process_group import all_sum, rank, world_size
from learner.zero.state_parts import MASTER

_MOMENTS = ("exp_avg", "exp_avg_sq")
_AUXILIARY = "auxiliary_"
"""Prefix of the names of the auxiliary phase's moments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """One rank's part of one parameter's training state, through which it is read and written."""

    shape: tuple[int, ...]
    """Of the whole parameter."""
    offset: int
    """First element of the flattened parameter that is kept here."""
    tensors: dict[str, Tensor]
    """float32 views ``[elements kept]``: master, exp_avg, exp_avg_sq, and the moments of an
    auxiliary phase, where there is one. ZeRO 3 pads them."""
    steps: dict[str, Tensor]
    """float32 scalars: AdamW's steps on it, and those of an auxiliary phase."""
    replicated: bool = False
    """Every rank keeps all of it."""

    def share(self) -> tuple[int, int]:
        """Return first and last + 1 element that this rank writes: all ranks' make the whole."""
        size = math.prod(self.shape)
        if self.replicated:
            return slice_bounds(size, world_size(), rank())
        kept = self.tensors[MASTER].numel()
        return min(self.offset, size), min(self.offset + kept, size)

    def whole_master(self) -> Tensor:
        """Return the whole parameter from all ranks' parts, on its device (a collective).

        Bits travel as integers: a sum of floats would turn -0 into 0.
        """
        own = self.tensors[MASTER].detach()
        begin, end = self.share()
        bits = torch.zeros(math.prod(self.shape), dtype=torch.int32, device=own.device)
        bits[begin:end] = own[begin - self.offset : end - self.offset].view(torch.int32)
        return all_sum(bits).view(torch.float32).reshape(self.shape)


class OptimizerState:
    """Masters and moments of the parameters that a DeepSpeed optimizer trains."""

    def __init__(
        self, wrapper: Any, parameters: dict[str, nn.Parameter], zero_stage: int, auxiliary: bool
    ) -> None:
        """Wrap an optimizer.

        Args:
            wrapper: the optimizer that DeepSpeed puts around AdamW or Adafactor; ZeRO 0 has none.
            parameters: those that it trains, by name, in its order.
            zero_stage: 0 to 3.
            auxiliary: there is an auxiliary phase, with moments of its own.
        """
        self._wrapper, self._parameters, self._zero_stage = wrapper, parameters, zero_stage
        self.optimizer: torch.optim.Optimizer = getattr(wrapper, "optimizer", wrapper)
        """AdamW or Adafactor itself."""
        self._other_phase: list[dict[str, Tensor]] | None = None
        """For each flat tensor the optimizer's state in the phase that does not run now."""
        if auxiliary:
            self._other_phase = [{} for _ in self._flat_tensors()]

    def exchange_phases(self) -> None:
        """Go on with the moments of the other phase: policy or auxiliary."""
        assert self._other_phase is not None, "an engine without an auxiliary phase"
        for index, flat in enumerate(self._flat_tensors()):
            other, self._other_phase[index] = self._other_phase[index], self.optimizer.state[flat]
            self.optimizer.state[flat] = other

    def clear_gradients(self) -> None:
        """Zero what ZeRO 3 keeps of gradients.

        DeepSpeed keeps the last gradient there of a parameter that a loss does not reach, as the
        auxiliary head in a policy phase, and steps on it again.
        """
        if self._zero_stage == 3:
            self._wrapper.grad_partitions_flat_buffer.zero_()

    def create(self) -> None:
        """Give every parameter zero moments, as the optimizer's first step would create them."""
        for index, flat in enumerate(self._flat_tensors()):
            self.optimizer.state[flat] = self._no_steps(flat)
            if self._other_phase is not None:
                self._other_phase[index] = self._no_steps(flat)

    def fragments(self) -> Iterator[tuple[str, Fragment]]:
        """Yield this rank's part of every parameter's masters and moments, as views."""
        for index, (name, parameter) in enumerate(self._parameters.items()):
            yield name, self._fragment(index, parameter)

    def _flat_tensors(self) -> list[Tensor]:
        """Return the tensors that the optimizer itself steps on."""
        if self._zero_stage == 3:
            return list(self._wrapper.fp32_partitioned_groups_flat)
        if self._zero_stage > 0:
            return list(self._wrapper.single_partition_of_fp32_groups)
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _fragment(self, index: int, parameter: nn.Parameter) -> Fragment:
        group, offset, start, size = self._place(index, parameter)
        flat = self._flat_tensors()[group]
        states = {"": self.optimizer.state[flat] or _nothing(flat)}
        if self._other_phase is not None:
            states[_AUXILIARY] = self._other_phase[group] or _nothing(flat)
        tensors = {MASTER: flat.detach()} | {
            f"{phase}{kind}": state[kind] for phase, state in states.items() for kind in _MOMENTS
        }
        return Fragment(
            shape=tuple(getattr(parameter, "ds_shape", parameter.shape)),
            offset=offset,
            tensors={k: tensors[k].flatten()[start : start + size] for k in sorted(tensors)},
            steps={f"{phase}step": state["step"] for phase, state in states.items()},
            replicated=self._zero_stage == 0,
        )

    def _place(self, index: int, parameter: nn.Parameter) -> tuple[int, int, int, int]:
        """Return which flat tensor, where the parameter begins, where in the tensor, and count."""
        wrapper = self._wrapper
        if self._zero_stage == 0:
            return index, 0, 0, parameter.numel()
        if self._zero_stage == 3:
            group, start, size = wrapper.grad_position[wrapper.get_param_id(parameter)]
            return group, rank() * size, start, size
        mapping: Any = getattr(parameter, "_hp_mapping", None)
        if mapping is None:  # all of this parameter is on other ranks
            return 0, 0, 0, 0
        own = mapping.hp_fragment_address
        return mapping.param_group_index, mapping.lp_fragment_address.start, own.start, own.numel

    def _no_steps(self, flat: Tensor) -> dict[str, Tensor]:
        """AdamW's state of what it has not stepped on yet; fused, it counts on the device."""
        zeros = torch.zeros_like(flat, requires_grad=False)
        device = flat.device if self.optimizer.defaults.get("fused") else None
        step = torch.zeros((), device=device)
        return {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}


def _nothing(flat: Tensor) -> dict[str, Tensor]:
    """Zeros to read, that take no memory: what AdamW has of what it has not stepped on yet."""
    zero = torch.zeros((), dtype=flat.dtype, device=flat.device)
    return {"step": torch.zeros(()), **dict.fromkeys(_MOMENTS, zero.expand(flat.shape))}
