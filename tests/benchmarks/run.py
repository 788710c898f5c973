"""``make bench``: every hot path against a named baseline measured in the same run.

Prints one table, writes ``docs/performance.md`` and, into the folder it is told,
``benchmarks.json``. Every ratio is of medians over interleaved repeats, on the same threads; none
is asserted on.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tests.benchmarks import (
    control_plane,
    decode,
    learner_step,
    llama,
    lora,
    pretrained,
    sync,
    timeline,
)
from tests.benchmarks.measure import PROMPT, RESPONSE, SHAPE, THREADS, Result, product_rate

_PAGE = Path(__file__).with_name("performance.md")
_PACKAGES = ("torch", "ray", "deepspeed", "transformers", "palm-rlhf-pytorch", "numpy", "pyarrow")


def main(arguments: Sequence[str]) -> None:
    """Measure everything, print a table, write the page."""
    # transformers has no business with the network here.
    os.environ["HF_HUB_OFFLINE"] = "1"
    begin = time.perf_counter()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    console = Console()
    rates = {str(t).split(".")[-1]: product_rate(t) for t in (torch.float32, torch.bfloat16)}
    results: list[Result] = []
    with console.status("generation"):
        found, spent = decode.run()
        results += found
    with console.status("learner"):
        results += learner_step.run()
    with console.status("adapters"):
        results += lora.run()
    with console.status("a pretrained model's shape"):
        results += pretrained.run()
    if not llama.VLLM.exists():
        console.print(llama.MISSING, style="yellow")
    with console.status("generation from a pretrained model's shape"):
        found, llama_spent = llama.run()
        results += found
    with console.status("weights"):
        results += sync.run()
    with console.status("control plane"):
        results += control_plane.run()
    with console.status("an iteration"):
        found, lines = timeline.run()
        results += found
    table = Table(title=f"{THREADS} threads, medians", title_justify="left", box=None)
    for column in ("metric", "ours", "baseline", "value", "of the limit"):
        table.add_column(column)
    for result in results:
        table.add_row(result.metric, result.ours, result.baseline, value(result), result.limit)
    console.print(table)
    out = Path(arguments[0])
    out.mkdir(parents=True, exist_ok=True)
    figures = {result.key: result.value for result in results}
    (out / "benchmarks.json").write_text(json.dumps(figures, indent=1), encoding="utf8")
    took = time.perf_counter() - begin
    page = _PAGE.read_text(encoding="utf8")
    for name, text in {
        "machine": machine(rates, took),
        "table": rows(results),
        "profile": profile(spent),
        "llama profile": profile(llama_spent),
        "vllm": "" if llama.VLLM.exists() else f"{llama.MISSING}.",
        "timeline": bars(lines),
    }.items():
        page = page.replace(f"<!-- {name} -->", text)
    Path("docs/performance.md").write_text(page, encoding="utf8")
    console.print(f"docs/performance.md and {out / 'benchmarks.json'} written in {took:.0f} s")


def value(result: Result) -> str:
    """Write a share in percent, a rate without decimals, a ratio with two."""
    if result.key.endswith(("_share", "_of_limit", "_waste", "_async")):
        return f"{result.value:.1%}"
    return f"{result.value:,.0f}" if result.value > 1000 else f"{result.value:.2f}"


def rows(results: Sequence[Result]) -> str:
    """Write the table in Markdown."""
    lines = ["| `benchmarks.json` | metric | ours | baseline | value | of the limit |"]
    lines.append("|---|---|---|---|---:|---:|")
    lines += [
        f"| `{r.key}` | {r.metric} | {r.ours} | {r.baseline} | {value(r)} | {r.limit} |"
        for r in results
    ]
    return "\n".join(lines)


def machine(rates: Mapping[str, float], took: float) -> str:
    """Describe the machine, the versions and the model of these measurements."""
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    name = names[0].split(":")[1].strip() if names else platform.processor()
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in _PACKAGES)
    limits = ", ".join(f"{t} {rate / 1e9:,.0f} GFLOP/s" for t, rate in rates.items())
    return (
        f"- Machine: {name}, {os.cpu_count()} cores, {THREADS} threads; products of 2048 x 2048: "
        f"{limits}.\n"
        f"- Versions: Python {platform.python_version()}, {versions}.\n"
        f"- Shape S: vocabulary {SHAPE.vocab_size}, width {SHAPE.dim}, {SHAPE.layers} layers, "
        f"{SHAPE.heads} heads of {SHAPE.head_dim}, one key and value head; prompts of {PROMPT}, "
        f"responses of {RESPONSE}, temperature 1.\n"
        f"- The whole run took {took / 60:.0f} minutes."
    )


def profile(spent: Mapping[str, float]) -> str:
    """Write where the time of a generation run goes."""
    total = sum(spent.values())
    lines = ["| operation | ms | share |", "|---|---:|---:|"]
    lines += [
        f"| {name} | {took * 1e3:,.0f} | {took / total:.0%} |"
        for name, took in sorted(spent.items(), key=lambda item: -item[1])
    ]
    return "\n".join(lines)


def bars(lines: Mapping[str, Mapping[str, float]]) -> str:
    """Draw one iteration in both modes: the learner's time as bars, the workers' as numbers."""
    out = []
    for name, spent in lines.items():
        parts = {
            "waits for rollouts": spent["collect_seconds"],
            "learns": spent["learn_seconds"],
            "publishes": spent["publish_seconds"],
        }
        parts["other"] = max(0.0, spent["seconds"] - sum(parts.values()))
        out.append(f"{name}: an iteration takes {spent['seconds']:.2f} s")
        at = 0.0
        for part, took in parts.items():
            width = round(60 * took / spent["seconds"])
            out.append(
                f"  learner {part:<19}|{' ' * round(at)}{'#' * width}".ljust(91)
                + f"{took:6.2f} s {took / spent['seconds']:4.0%}"
            )
            at += 60 * took / spent["seconds"]
        out.append(
            f"  meanwhile: two actors generate {spent['generate_seconds']:.2f} s and load weights "
            f"{spent['load_seconds']:.3f} s, a reward worker scores "
            f"{spent['score_seconds']:.2f} s\n"
        )
    return "```text\n" + "\n".join(out).rstrip() + "\n```"


if __name__ == "__main__":
    main(sys.argv[1:])
