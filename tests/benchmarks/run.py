"""``make bench``: hot paths against named baselines measured in the same run.

Prints one table and writes ``benchmarks.json`` into the folder it is told. Every figure is a ratio
of medians over interleaved repeats, on the same threads; none is asserted on.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from palm_rlhf_pytorch import PaLM as OtherPaLM
from rich.console import Console
from rich.table import Table

from actors.engine import Engine
from common.logprobs import Sampling, draw, uniforms
from common.model_config import ModelConfig
from common.palm import PolicyNetwork
from common.trajectory import RolloutRequest
from common.weights import manifest_of
from learner.supervised import EncodedPair, pack

REPEATS = 5
SHAPE = ModelConfig(vocab_size=2048, dim=256, layers=6, heads=4, head_dim=64, context=112)
PROMPT, RESPONSE, BATCH = 64, 48, 64
THREADS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One line of the table."""

    metric: str
    ours: str
    baseline: str
    ratio: float


def interleaved(first: Callable[[], float], second: Callable[[], float]) -> tuple[float, float]:
    """Median of each of two measurements, taken by turns so that noise hits both."""
    pairs = [(first(), second()) for _ in range(REPEATS)]
    return median(a for a, _ in pairs), median(b for _, b in pairs)


def seconds(run: Callable[[], object]) -> float:
    """Wall time of a call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def decode() -> Result:
    """Tokens a second of our engine against palm-rlhf-pytorch's generate (no KV cache)."""
    network = PolicyNetwork(SHAPE)
    network.initialise(0)
    network.eval()
    never = SHAPE.vocab_size  # no token ends a response: both sides sample the same number
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0)
    engine = Engine(network.palm, eos_id=never, sampling=sampling, max_tokens=RESPONSE)
    prompts = torch.randint(0, SHAPE.vocab_size, (BATCH, PROMPT))
    requests = [
        RolloutRequest(
            rollout_id=str(i),
            group=i,
            prompt_uid="",
            prompt_text="",
            prompt_ids=row.tolist(),
            seed=i,
        )
        for i, row in enumerate(prompts)
    ]
    other = OtherPaLM(num_tokens=SHAPE.vocab_size, dim=SHAPE.dim, depth=SHAPE.layers, heads=4)
    few = prompts[: BATCH // 8]

    def theirs() -> float:
        took = seconds(
            lambda: other.generate(
                PROMPT + RESPONSE, few, use_tqdm=False, return_seq_without_prompt=True
            )
        )
        return len(few) * RESPONSE / took

    def ours() -> float:
        return BATCH * RESPONSE / seconds(lambda: engine.generate(requests))

    ours_rate, theirs_rate = interleaved(ours, theirs)
    return Result(
        metric="decode_vs_palm_rlhf",
        ours=f"{ours_rate:,.0f} tokens/s",
        baseline=f"{theirs_rate:,.0f} tokens/s (palm-rlhf-pytorch 0.8.0)",
        ratio=ours_rate / theirs_rate,
    )


def sampling() -> Result:
    """One draw for a batch against torch.multinomial on the same probabilities."""
    logprobs = torch.randn(128, SHAPE.vocab_size).log_softmax(-1)
    seeds, at = np.arange(128, dtype=np.uint64), np.zeros(128, dtype=np.uint64)
    ours, theirs = interleaved(
        lambda: seconds(lambda: draw(logprobs, uniforms(seeds, at))),
        lambda: seconds(lambda: torch.multinomial(logprobs.exp(), 1)),
    )
    return Result(
        metric="multinomial_vs_draw",
        ours=f"{ours * 1e6:,.0f} us",
        baseline=f"{theirs * 1e6:,.0f} us (torch.multinomial)",
        ratio=theirs / ours,
    )


def weights() -> Result:
    """Flattening and hashing all weights against a plain copy of the same bytes."""
    network = PolicyNetwork(SHAPE)
    network.initialise(0)
    state = network.palm.state_dict()
    flat = torch.cat([tensor.flatten() for tensor in state.values()])
    ours, theirs = interleaved(
        lambda: seconds(lambda: manifest_of(state, 0)), lambda: seconds(lambda: flat.clone())
    )
    return Result(
        metric="publish_vs_copy",
        ours=f"{ours * 1e3:.2f} ms",
        baseline=f"{theirs * 1e3:.2f} ms (torch clone)",
        ratio=ours / theirs,
    )


def packing() -> Result:
    """Share of padding in packed supervised batches against one row a document."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(8, 90, 4000)
    pairs = [EncodedPair(prompt=[0] * int(n // 2), response=[0] * int(n - n // 2)) for n in sizes]
    rows = pack(pairs, SHAPE.context)
    waste = 1 - sizes.sum() / (len(rows) * SHAPE.context)
    padded = 1 - sizes.sum() / (len(pairs) * SHAPE.context)
    return Result(
        metric="padding_waste",
        ours=f"{waste:.1%}",
        baseline=f"{padded:.1%} (one row a document)",
        ratio=float(waste / padded),
    )


def main(arguments: Sequence[str]) -> None:
    """Measure, print, write."""
    out = Path(arguments[0])
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    table = Table(title=f"{THREADS} threads, medians of {REPEATS}", title_justify="left", box=None)
    for column in ("metric", "ours", "baseline", "ratio"):
        table.add_column(column)
    found = {}
    for measure in (decode, sampling, weights, packing):
        result = measure()
        found[result.metric] = result.ratio
        table.add_row(result.metric, result.ours, result.baseline, f"{result.ratio:.2f}")
    Console().print(table)
    out.mkdir(parents=True, exist_ok=True)
    (out / "benchmarks.json").write_text(json.dumps(found, indent=1), encoding="utf8")


if __name__ == "__main__":
    main(sys.argv[1:])
