"""What workers compute with: decided here, from what they reserved, and handed to them.

No worker asks torch for the devices that it can see: a GPU that is merely visible belongs to
somebody else.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from common.errors import ClusterError
from common.out_of_memory import return_large_at_once

PROCESSOR: Final = "cpu"
"""As torch and DeepSpeed name it."""
CARD: Final = "cuda:0"
"""The GPU of a worker that reserved one or a part of one: Ray shows it no other."""


ACCELERATOR: Final = "TALIPOT_ACCELERATOR"
"""Variable of the environment that names what DeepSpeed computes with; without it the processor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """What one worker computes with."""

    device: str
    """Where its tensors are, as torch names it."""
    threads: int
    """Threads of the processor."""
    collectives: str
    """Backend of a process group of such workers."""
    frugal: bool = False
    """Large tensors are the system's again when they are freed, as `return_large_at_once` says."""

    @property
    def environment(self) -> dict[str, str]:
        """What a learner rank's process has to find in its environment, before its first import."""
        return {} if self.device == PROCESSOR else {ACCELERATOR: torch.device(self.device).type}

    def apply(self) -> None:
        """Let torch use so many threads in this process, and free memory as it says.

        Products in fp32 are in fp32: TF32 would round their factors to 10 bits on a GPU, and
        log-probabilities would differ by more than a recipe that asks for fp32 means.

        Raises:
            ClusterError: a GPU was reserved, and torch finds none.
        """
        torch.set_num_threads(self.threads)
        if self.device != PROCESSOR and not torch.cuda.is_available():
            raise ClusterError(
                "a worker reserved a GPU, and PyTorch finds none on its node: install PyTorch for "
                "CUDA there, or set learner.gpus_per_rank, rollout.gpus_per_actor and "
                "reward_service.gpus_per_replica to 0"
            )
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        if self.frugal:
            return_large_at_once()


def compute_of(
    *, cpus: float, gpus: float = 0.0, threads: int | None = None, frugal: bool = False
) -> Compute:
    """Decide what a worker computes with.

    Args:
        cpus: cores that it reserved.
        gpus: GPUs that it reserved; a part of one is computed on like a whole one.
        threads: what a recipe sets; None takes the whole cores that were reserved, at least one.
        frugal: give large tensors back at once; for models whose products take far longer than the
            system takes to hand out memory.
    """
    return Compute(
        device=CARD if gpus else PROCESSOR,
        threads=threads or max(1, int(cpus)),
        collectives="cpu:gloo,cuda:nccl" if gpus else "gloo",
        frugal=frugal,
    )


Doing = Callable[[], Tensor]
"""Does a step with what is in its buffers; returns the buffer that it wrote into."""
Record = Callable[[Doing], Callable[[], object]]
"""Records what a step does, and returns what replays that."""


def recorder_on(device: torch.device) -> Callable[[], Record] | None:
    """Return what begins recordings of steps on a GPU; None: nothing is to be gained there.

    Recordings of one beginning share memory for what they compute between, so no two of them are
    replayed at once, and none after another beginning.
    """
    if device.type != "cuda":
        return None
    side = torch.cuda.Stream(device)

    def begin() -> Record:
        pool = torch.cuda.graph_pool_handle()

        def record(step: Doing) -> Callable[[], object]:
            graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
            torch.cuda.synchronize(device)
            side.wait_stream(here)
            # Not by `torch.cuda.graph`, which empties the cache of memory, and tells of the end of
            # a recording that failed, and not of what made it fail.
            with torch.cuda.stream(side):
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    step()
                except BaseException:
                    with suppress(RuntimeError):
                        graph.capture_end()
                    raise
                graph.capture_end()
            here.wait_stream(side)
            return graph.replay

        return record

    return begin


def onto(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; a copy to a GPU is not waited for.

    That takes memory which the system does not move (pinned). The allocator of such memory uses it
    again only when the copy is over, so the tensor may be dropped at once.
    """
    if device.type != "cuda" or tensor.device.type != PROCESSOR:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was given, copies to the processor among it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def torch_dtype(precision: Literal["fp32", "bf16"]) -> torch.dtype:
    """Return the dtype that a configuration names."""
    return torch.float32 if precision == "fp32" else torch.bfloat16
