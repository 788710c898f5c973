"""DeepSpeed's one home: a network, its optimizer and their ZeRO state behind six methods.

Gradients are accumulated over any number of micro-batches and averaged by DeepSpeed over ranks;
`backward` multiplies by the number of ranks, so that a loss normalised by the *global* token count
gives the global gradient, however it was sharded (invariant I3).
"""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

# DeepSpeed reads this when it is imported. Ranks compute on the processor, because no recipe
# reserves a GPU for them: a GPU that can merely be seen is somebody else's.
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("DS_LOG_LEVEL", "error")

import deepspeed
import deepspeed.comm
import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import ClusterError
from common.files import one_line
from common.metrics import require_finite
from common.models.networks import compute_in
from learner.zero.adafactor import PalmAdafactor

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


# DeepSpeed compiles what it finds possible here: collectives in shared memory, for half a minute at
# a first start, which its inference alone uses. In every process it first probes for that.
deepspeed.ops.__compatible_ops__ = {}


def connect(*, rank: int, world: int, address: str, port: int, timeout_s: float) -> None:
    """Join the gang's process group (gloo).

    Raises:
        ClusterError: the meeting point is taken or cannot be reached.
    """
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    try:
        dist.init_process_group(
            "gloo",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
    except dist.DistNetworkError as error:
        raise ClusterError(
            f"learner-{rank} cannot meet the others at {address}:{port}: "
            f"{one_line(error)}; free the port or start again, which picks another"
        ) from None
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


def world_size() -> int:
    """Ranks in the gang."""
    return dist.get_world_size()


def rank() -> int:
    """This process's rank."""
    return dist.get_rank()


def all_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    dist.all_reduce(tensor)
    return tensor


_MOMENTS = ("exp_avg", "exp_avg_sq")
_AUXILIARY = "auxiliary_"
"""Before the names of what an auxiliary phase steps by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """This rank's part of one parameter's training state. Reading and writing are through it."""

    shape: tuple[int, ...]
    """Of the whole parameter."""
    offset: int
    """First element of the flattened parameter that is held here."""
    tensors: dict[str, Tensor]
    """float32 views ``[elements held]``: master, exp_avg, exp_avg_sq, and the moments of an
    auxiliary phase, where there is one. ZeRO 3 pads them."""
    steps: dict[str, Tensor]
    """float32 scalars: AdamW's steps on it, and those of an auxiliary phase."""
    replicated: bool = False
    """Every rank holds all of it."""


class ZeroEngine:
    """One network in training.

    Args:
        network: built and initialised the same on every rank.
        precision: bf16 runs products in bf16 (`common.models.networks.compute_in`); weights that
            are trained, their gradients and what AdamW keeps are fp32.
        max_grad_norm: largest global gradient norm.
        eps: of AdamW.
        auxiliary: there is an auxiliary phase, with moments of its own (`auxiliary_moments`).
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        zero_stage: int,
        precision: Literal["fp32", "bf16"],
        weight_decay: float,
        max_grad_norm: float,
        eps: float,
        optimizer: Literal["adamw", "adafactor"] = "adamw",
        auxiliary: bool = False,
    ) -> None:
        self.zero_stage, self.precision = zero_stage, precision
        if precision == "bf16":
            # Not DeepSpeed's bf16: every ZeRO stage of it is another one, stage 0 cannot sum
            # gradients in fp32, and 2 and 3 round each micro-batch's before they sum.
            compute_in(network, torch.bfloat16)
        trainable = [p for p in network.parameters() if p.requires_grad]
        # Learning rates are set at every step; this one is never used.
        made: torch.optim.Optimizer
        if optimizer == "adafactor":
            made = PalmAdafactor(trainable, sharded=zero_stage > 0)
        else:
            made = torch.optim.AdamW(
                trainable,
                lr=1e-3,
                betas=(0.9, 0.95),
                eps=eps,
                weight_decay=weight_decay,
            )
        self._engine: Any = deepspeed.initialize(
            model=network,
            optimizer=made,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": max_grad_norm,
                "zero_optimization": {
                    "stage": zero_stage,
                    "overlap_comm": False,
                    "contiguous_gradients": True,
                    "reduce_bucket_size": 50_000_000,
                    "allgather_bucket_size": 50_000_000,
                    "stage3_param_persistence_threshold": 10_000,
                },
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 1_000_000_000,
                "wall_clock_breakdown": False,
            },
        )[0]
        self._forget_gradients()  # before the first one: what memory held
        self._resting: list[dict[str, Tensor]] | None = None
        """Of each flat tensor the optimizer's state in the phase that is not under way."""
        if auxiliary:
            self._resting = [{} for _ in self._flats()]

    @property
    def network(self) -> nn.Module:
        """The module itself; call the engine, not this, to run it."""
        module: nn.Module = self._engine.module
        return module

    @property
    def device(self) -> torch.device:
        """Where inputs belong."""
        return torch.device(self._engine.device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass."""
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients; `last` marks the final micro-batch before a step."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * world_size())
        if not last:
            # DeepSpeed counts micro-steps in step(); off the boundary it does no more than that.
            self._engine.step()

    def step(self, lr: float, where: str) -> float:
        """Clip, update, clear; returns the global gradient norm before clipping.

        Raises:
            TrainingError: the norm is not finite.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        norm: float | None = None
        if self.zero_stage == 0:
            # What no loss reached steps on a gradient of 0, as under the other stages.
            for _, parameter in self._trainable():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            # DeepSpeed clips there too, but in fp32 it keeps no norm.
            gradients = [p.grad for _, p in self._trainable() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
            require_finite("gradient norm", norm, where)
        self._engine.step()
        self._forget_gradients()
        if norm is None:
            norm = float(self._engine.get_global_grad_norm())
        return require_finite("gradient norm", norm, where)

    @contextmanager
    def auxiliary_moments(self) -> Iterator[None]:
        """Step by moments of their own inside the block; the next block goes on with them.

        AdamW moves along what it remembers: without this an auxiliary phase would go on in the
        steps of policy phases after it, and a policy phase in the steps of auxiliary ones.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        assert self._resting is not None, "an engine without an auxiliary phase"
        for index, flat in enumerate(self._flats()):
            resting, self._resting[index] = self._resting[index], self._adam.state[flat]
            self._adam.state[flat] = resting

    def _forget_gradients(self) -> None:
        """DeepSpeed's ZeRO 3 keeps the last gradient of a parameter that a loss does not reach, as
        the auxiliary head in a policy phase, and steps on it again."""
        if self.zero_stage == 3:
            self._engine.optimizer.grad_partitions_flat_buffer.zero_()

    @contextmanager
    def gathered(self, parameters: list[Tensor]) -> Iterator[None]:
        """Whole parameters inside the block, whatever the ZeRO stage (a collective)."""
        if self.zero_stage < 3:
            yield
            return
        with deepspeed.zero.GatheredParameters(parameters):
            yield

    def full_state(self, *, frozen: bool = True) -> dict[str, Tensor]:
        """A copy of all parameters and buffers in fp32, on every rank (a collective); without what
        is `frozen` only of those that are trained."""
        state = {k: v.detach().float().cpu() for k, v in self.network.named_buffers()}
        for name, parameter in self.network.named_parameters():
            if not frozen and not parameter.requires_grad:
                continue
            with self.gathered([parameter]):
                state[name] = parameter.detach().float().cpu().clone()
        return state

    # ----------------------------------------------------- state, for `learner.zero.state_files`

    def fragments(self) -> Iterator[tuple[str, Fragment]]:
        """What this rank holds of every parameter's fp32 master and AdamW moments, as views."""
        for index, (name, parameter) in enumerate(self._trainable()):
            yield name, self._fragment(index, parameter)

    def make_optimizer_state(self) -> None:
        """Zero moments of every parameter, as the optimizer's first step would make them."""
        for index, flat in enumerate(self._flats()):
            self._adam.state[flat] = _no_steps(flat)
            if self._resting is not None:
                self._resting[index] = _no_steps(flat)

    def set_weights(self, name: str, master: Tensor) -> None:
        """Let the network compute with a master (a collective)."""
        parameter = self.network.get_parameter(name)
        if self.zero_stage < 3:
            with torch.no_grad():
                parameter.copy_(master)
            return
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if rank() == 0:
                parameter.copy_(master)

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self.network.named_parameters() if p.requires_grad]

    @property
    def _adam(self) -> torch.optim.Optimizer:
        """The optimizer itself, out of the wrapper that DeepSpeed puts around it."""
        outer = self._engine.optimizer
        inner: torch.optim.Optimizer = getattr(outer, "optimizer", outer)
        return inner

    def _flats(self) -> list[Tensor]:
        """The tensors that the optimizer itself steps on."""
        outer = self._engine.optimizer
        if self.zero_stage == 3:
            return list(outer.fp32_partitioned_groups_flat)
        if self.zero_stage > 0:
            return list(outer.single_partition_of_fp32_groups)
        return [p for group in self._adam.param_groups for p in group["params"]]

    def _fragment(self, index: int, parameter: nn.Parameter) -> Fragment:
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        outer, group, offset, start, size = self._engine.optimizer, 0, 0, 0, 0
        if self.zero_stage == 3:
            group, start, size = outer.grad_position[outer.get_param_id(parameter)]
            offset = rank() * size
        elif self.zero_stage > 0:
            held: Any = getattr(parameter, "_hp_mapping", None)
            if held is not None:  # otherwise all of this parameter is on other ranks
                group, offset = held.param_group_index, held.lp_fragment_address.start
                start, size = held.hp_fragment_address.start, held.hp_fragment_address.numel
        else:
            group, size = index, parameter.numel()
        flat = self._flats()[group]
        states = {"": self._adam.state[flat] or _no_steps(flat)}
        if self._resting is not None:
            states[_AUXILIARY] = self._resting[group] or _no_steps(flat)
        tensors = {"master": flat.detach()} | {
            f"{phase}{kind}": state[kind] for phase, state in states.items() for kind in _MOMENTS
        }
        return Fragment(
            shape=shape,
            offset=offset,
            tensors={k: tensors[k].flatten()[start : start + size] for k in sorted(tensors)},
            steps={f"{phase}step": state["step"] for phase, state in states.items()},
            replicated=self.zero_stage == 0,
        )


def _no_steps(flat: Tensor) -> dict[str, Tensor]:
    """AdamW's state of what it has not stepped on yet."""
    zeros = torch.zeros_like(flat, requires_grad=False)
    return {"step": torch.zeros(()), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}


def disconnect() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
