"""Native kernels: `kernels.c` compiled for this machine, this head shape and this precision.

Compilation takes about a second, happens once per machine and shape, and is kept in the user's
cache folder. Everything here runs on the processor; on a GPU `actors.torch_kernels` runs instead.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from actors.step import Step, rope_tables
from common.errors import ClusterError
from common.logprobs import Sampling
from common.model_config import ModelConfig

_SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = [
    *("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-ffp-contract=fast"),
    # Sums may be reordered into vector lanes; the order is fixed by the binary, not by the batch.
    *("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros"),
    *("-freciprocal-math", "-ffinite-math-only"),
]


class NativeKernels:
    """The work between two matrix products, on the processor."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, keys: Tensor, values: Tensor):
        """`keys` and `values` are the cache, ``[layers, slots, context, K]`` in `dtype`.

        Raises:
            ClusterError: there is no C compiler, or it fails.
        """
        self._config = config
        self._dtype = dtype
        begin = time.perf_counter()
        self._library = ctypes.CDLL(str(compiled(config, dtype)))
        self.build_seconds = time.perf_counter() - begin
        self._keys, self._values = keys, values
        self._tables = rope_tables(config)
        self._step: Step
        self._copies = torch.zeros(0, dtype=torch.int64)

    def begin(self, step: Step) -> None:
        """Take in the rows of a step; all later calls until the next `begin` are for them."""
        self._step = step
        self._copies = torch.tensor(
            [
                number
                for copy in step.copies
                for target in copy.targets
                for number in (copy.source, target, copy.positions)
            ],
            dtype=torch.int64,
        )

    def store(self, layer: int, kv: Tensor) -> None:
        """Write keys and values ``[N - used, 2 K]`` of the rows after the newest to the cache."""
        rows, width = kv.shape
        step = self._step
        self._library.store(
            *(_at(kv), _size(width), _size(rows), _at(step.slots, step.used)),
            *(_at(step.positions, step.used), *(_at(table) for table in self._tables[2:])),
            *(_at(self._keys[layer]), _at(self._values[layer]), _size(self._config.context)),
        )

    def attend(self, layer: int, fused: Tensor, out: Tensor) -> None:
        """Rotate, write the cache, attend: ``fused [n, q + k + v + ...]`` of the first n rows, to
        the left of `out`."""
        rows, width = fused.shape
        self._library.attend(
            *(_at(fused), _size(width), _size(rows), _at(self._step.slots)),
            *(_at(self._step.positions), *(_at(table) for table in self._tables)),
            *(_at(self._keys[layer]), _at(self._values[layer]), _size(self._config.context)),
            *(_at(self._copies), _size(len(self._copies) // 3), _at(out), _size(out.shape[1])),
        )

    def activate(self, fused: Tensor, out: Tensor) -> None:
        """SwiGLU of the right of `fused` to the right of `out`."""
        config, rows = self._config, len(fused)
        ff, inner = config.ff_mult * config.dim, config.heads * config.head_dim
        up = inner + 2 * config.head_dim
        self._library.activate(
            *(_at(fused, up), _at(fused, up + ff), _size(fused.shape[1]), _size(rows), _size(ff)),
            *(_at(out, inner), _size(out.shape[1])),
        )

    def add_norm(self, x: Tensor, y: Tensor | None, weight: Tensor) -> Tensor:
        """Add `y` to `x` (fp32 ``[N, D]``, in place) and return its LayerNorm for a product."""
        out = torch.empty(x.shape, dtype=self._dtype)
        self._library.add_norm(
            *(_at(x), None if y is None else _at(y), _at(weight)),
            *(_size(x.shape[0]), _size(x.shape[1]), _at(out)),
        )
        return out

    def draw(self, logits: Tensor, sampling: Sampling, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """As `common.logprobs.draw`, for logits ``[B, V]`` without a filter."""
        rows, vocabulary = logits.shape
        tokens = torch.empty(rows, dtype=torch.int64)
        logprobs = torch.empty(rows, dtype=torch.float32)
        self._library.draw(
            *(_at(logits), _size(rows), _size(vocabulary), ctypes.c_float(sampling.temperature)),
            *(_at(uniforms), _at(tokens), _at(logprobs)),
        )
        return tokens, logprobs


def compiled(config: ModelConfig, dtype: torch.dtype) -> Path:
    """The shared library for a head shape and precision, compiled unless it is there already.

    Raises:
        ClusterError: there is no C compiler, or it fails.
    """
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    if compiler is None:
        raise ClusterError(
            "native kernels need a C compiler: install gcc, or set rollout.kernels=torch"
        )
    shape = [f"-DHEADS={config.heads}", f"-DHEAD_DIM={config.head_dim}"]
    shape += ["-DBF16"] if dtype == torch.bfloat16 else []
    wide = ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []
    flags = [*_FLAGS, *wide, *shape]
    key = hashlib.sha256(
        "\n".join([_SOURCE.read_text(), _processor(), compiler, *flags]).encode()
    ).hexdigest()[:24]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "talipot"
    target = cache / f"kernels-{key}.so"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Workers start together: each compiles for itself, and the renames are of equal files.
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / "kernels.so"
            done = subprocess.run(
                [compiler, *flags, str(_SOURCE), "-o", str(built), "-lm"],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise ClusterError(
                    f"{compiler} cannot compile the native kernels: "
                    f"{done.stderr.strip().splitlines()[-1]}; or set rollout.kernels=torch"
                )
            built.replace(target)
    return target


def _processor() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split("flags", 1)[-1].split("\n", 1)[0] if info.exists() else ""
    return platform.machine() + flags


def _at(tensor: Tensor, offset: int = 0) -> ctypes.c_void_p:
    """Address of an element; rows must be contiguous."""
    return ctypes.c_void_p(tensor.data_ptr() + offset * tensor.element_size())


_size = ctypes.c_int64
