"""DeepSpeed's one home: a network in training, with its optimizer, under any ZeRO stage.

Gradients are accumulated over any number of micro-batches and averaged by DeepSpeed over ranks;
`backward` multiplies by the number of ranks, so that a loss normalised by the *global* token count
gives the global gradient, however it was sharded (invariant I3).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Literal

from common.devices import ACCELERATOR, PROCESSOR

# DeepSpeed reads this when it is imported, before a rank is told what it computes with; it would
# take a GPU that is merely visible.
os.environ["DS_ACCELERATOR"] = os.environ.get(ACCELERATOR, PROCESSOR)
os.environ.setdefault("DS_LOG_LEVEL", "error")

import deepspeed
import deepspeed.comm
import torch
from torch import Tensor, nn

from common.metrics import require_finite
from common.models.filling import Weights, place
from common.models.networks import compute_in
from learner.zero.adafactor import PalmAdafactor
from learner.zero.buckets import BUCKET, LIVE, SMALL
from learner.zero.optimizer_state import Fragment, OptimizerState
from learner.zero.process_group import backend, rank, world_size
from learner.zero.state_parts import MASTER

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


# DeepSpeed compiles what it finds possible here: collectives in shared memory, for half a minute at
# a first start, which its inference alone uses. In every process it first probes for that.
deepspeed.ops.__compatible_ops__ = {}


class ZeroEngine:
    """One network in training."""

    def __init__(
        self,
        network: nn.Module,
        weights: Weights = (),
        *,
        zero_stage: int,
        precision: Literal["fp32", "bf16"],
        weight_decay: float,
        max_grad_norm: float,
        eps: float,
        optimizer: Literal["adamw", "adafactor"] = "adamw",
        auxiliary: bool = False,
    ) -> None:
        """Give a network its weights and hand it over to DeepSpeed (a collective).

        Args:
            network: built the same on every rank. Parameters on the meta device get memory here:
                under ZeRO 3 for this rank's part alone, and no more of their weights is read.
            weights: of what is on the meta device, and of anything else that they name.
            zero_stage: 1 shards optimizer states, 2 also gradients, 3 also parameters.
            precision: bf16 runs products in bf16 (`common.models.networks.compute_in`); weights
                that are trained, their gradients and what AdamW keeps are fp32.
            weight_decay: of AdamW, decoupled.
            max_grad_norm: largest global gradient norm; what is above is scaled down to it.
            eps: of AdamW.
            optimizer: Adafactor is PaLM's (`learner.zero.adafactor`).
            auxiliary: there is an auxiliary phase, with moments of its own (`auxiliary_moments`).
        """
        self.zero_stage, self.precision = zero_stage, precision
        if precision == "bf16":
            # Not DeepSpeed's bf16: every ZeRO stage of it is another one, stage 0 cannot sum
            # gradients in fp32, and 2 and 3 round each micro-batch's before they sum.
            compute_in(network, torch.bfloat16)
        device = torch.device(deepspeed.accelerator.get_accelerator().current_device_name())
        settings = _settings(zero_stage, max_grad_norm, device)
        deepspeed.init_distributed(dist_backend=backend(), auto_mpi_discovery=False, verbose=False)
        _fill(network, weights, settings, device)
        network.to(device)
        trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
        stepper: torch.optim.Optimizer
        if optimizer == "adafactor":
            stepper = PalmAdafactor(trained.values(), sharded=zero_stage > 0)
        else:
            stepper = _adamw(trained.values(), eps, weight_decay)
        if zero_stage > 0:
            _import_muon()
        self._engine: Any = deepspeed.initialize(
            model=network, optimizer=stepper, dist_init_required=False, config=settings
        )[0]
        self._parameters = list(trained.values())
        self.optimizer_state = OptimizerState(
            self._engine.optimizer, trained, zero_stage, auxiliary
        )
        self.optimizer_state.clear_gradients()  # before the first one: what was in memory

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
        """Run the network's forward pass."""
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

        Args:
            lr: learning rate of this step.
            where: phase and step, in words, for the error.

        Raises:
            TrainingError: the norm is not finite.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        norm: float | None = None
        if self.zero_stage == 0:
            # What no loss reached steps on a gradient of 0, as under the other stages.
            for parameter in self._parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            # DeepSpeed clips there too, but in fp32 it keeps no norm.
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
            require_finite("gradient norm", norm, where)
        self._engine.step()
        self.optimizer_state.clear_gradients()
        if norm is None:
            norm = float(self._engine.get_global_grad_norm())
        return require_finite("gradient norm", norm, where)

    @contextmanager
    def auxiliary_moments(self) -> Iterator[None]:
        """Step by moments of their own inside the block; the next block goes on with them.

        AdamW moves along what it remembers: without this an auxiliary phase would go on in the
        steps of policy phases after it, and a policy phase in the steps of auxiliary ones.
        """
        self.optimizer_state.exchange_phases()
        try:
            yield
        finally:
            self.optimizer_state.exchange_phases()

    @contextmanager
    def gathered(self, parameters: list[Tensor]) -> Iterator[None]:
        """Make parameters whole inside the block, whatever the ZeRO stage (a collective)."""
        if self.zero_stage < 3:
            yield
            return
        with deepspeed.zero.GatheredParameters(parameters):
            yield

    def full_state(self, *, frozen: bool = True) -> dict[str, Tensor]:
        """Copy all parameters and buffers that belong to the weights, in fp32, on rank 0.

        A collective: the others have no copy, and return nothing.

        Args:
            frozen: False leaves out the parameters that are not trained.
        """
        state: dict[str, Tensor] = {}
        if rank() == 0:
            stored = self.network.state_dict().keys()
            buffers = self.network.named_buffers()
            state |= {k: v.detach().float().cpu() for k, v in buffers if k in stored}
        for name, parameter in self.network.named_parameters():
            if not frozen and not parameter.requires_grad:
                continue
            with self.gathered([parameter]):
                if rank() == 0:
                    state[name] = parameter.detach().float().cpu().clone()
        return state

    # ----------------------------------------------------- state, for `learner.zero.state_files`

    def fragments(self) -> Iterator[tuple[str, Fragment]]:
        """Yield what this rank keeps of every parameter's fp32 master and moments, as views."""
        yield from self.optimizer_state.fragments()

    def create_optimizer_state(self) -> None:
        """Give every parameter zero moments, as the optimizer's first step would create them."""
        self.optimizer_state.create()

    def take_master(self, name: str, fragment: Fragment) -> None:
        """Let the network compute with a parameter's master, as it is now (a collective)."""
        parameter: Any = self.network.get_parameter(name)
        if self.zero_stage == 0:
            return  # they are the same
        if self.zero_stage == 3 and not parameter.ds_persist:
            parameter.ds_tensor.detach().copy_(fragment.tensors[MASTER])
            return
        whole = fragment.whole_master()
        with torch.no_grad():
            if self.zero_stage < 3:
                parameter.copy_(whole)
                return
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if rank() == 0:
                    parameter.copy_(whole)


def _import_muon() -> None:
    """Import DeepSpeed's Muon, as it does itself with its first sharded engine, without Inductor.

    The kernels of this optimizer, which nobody asked for, are handed to `torch.compile`, and that
    imports Inductor: a second.
    """
    from deepspeed.runtime import compiler

    before, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    try:
        import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = before


def _adamw(trained: Iterable[nn.Parameter], eps: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW in one pass: else its temporaries are twice as large as a rank's flat share."""
    unused = 1e-3  # learning rates are set at every step
    return torch.optim.AdamW(
        trained, lr=unused, betas=(0.9, 0.95), eps=eps, weight_decay=weight_decay, fused=True
    )


def _fill(
    network: nn.Module, weights: Weights, settings: dict[str, Any], device: torch.device
) -> None:
    """Give weights to what is named; parameters on the meta device are placed on `device`."""
    own = network.state_dict(keep_vars=True)
    sharded = settings["zero_optimization"]["stage"] == 3
    empty = any(tensor.is_meta for tensor in own.values())
    parts: Any = None
    if sharded and empty:
        parts = deepspeed.zero.Init(config_dict_or_path=settings)
    for name, source in weights:
        tensor = own[name]
        begin, end = 0, tensor.numel()
        if not tensor.is_meta:
            tensor.detach().copy_(source(begin, end).view(tensor.shape))
            continue
        assert isinstance(tensor, nn.Parameter), f"'{name}' is a buffer without memory"
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if parts is not None:
            size = -(-end // world_size())
            begin, end = (min(end, (rank() + n) * size) for n in (0, 1))
        whole.view(-1)[begin:end].copy_(source(begin, end))
        place(tensor, whole)
        if parts is not None:
            # As `Init` does it, but that it sends each parameter of rank 0 to all ranks first: here
            # every rank has read its part, and the others are memory that is never touched.
            kept: Any = tensor
            parts._convert_to_deepspeed_param(kept)
            kept.partition()
            assert kept.ds_tensor.numel() == size
    left = [name for name, tensor in own.items() if tensor.is_meta]
    assert not left, f"no weights for {left}"


def _settings(zero_stage: int, max_grad_norm: float, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's configuration. Micro-batches are counted by `ZeroEngine.backward`, not by it."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": {
            "stage": zero_stage,
            # On the processor sums and products would share the same cores.
            "overlap_comm": device.type != PROCESSOR,
            "contiguous_gradients": True,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            "stage3_prefetch_bucket_size": BUCKET,
            "stage3_max_live_parameters": LIVE,
            "stage3_max_reuse_distance": LIVE,
            "stage3_param_persistence_threshold": SMALL,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
