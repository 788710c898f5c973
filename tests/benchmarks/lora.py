"""LoRA against full fine-tuning: bytes on the wire, memory, and the learner's step.

``python -m tests.benchmarks.lora KIND`` prints the resident bytes of the four networks of one kind
(full, lora), or the seconds of updates (step), each in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from common.config.model import LoraConfig, PalmConfig
from common.devices import compute_of
from common.models.adapters import adapter_tensors, add_adapter, attach_adapter, share_base
from common.models.build import build_policy, build_scalar
from common.models.palm import PaLM
from common.wire.weights import FlatBuffer, Manifest
from learner.rank import LearnerRank
from learner.zero import process_group
from learner.zero.engine import ZeroEngine
from learner.zero.publisher import Publisher
from tests.benchmarks.learner_step import ROWS, data, network, policy_update
from tests.benchmarks.measure import PROMPT, RESPONSE, THREADS, Result, interleaved

LORA = LoraConfig(rank=8)
WIDE = PalmConfig(vocab_size=16_384, dim=768, layers=12, heads=12, head_dim=64, context=192)
"""113 million parameters."""
REPEATS = 7


# ------------------------------------------------------------------ bytes on the wire


def wire() -> list[Result]:
    """Publishing and loading, hashes included, without the object store between."""
    palm = PaLM(WIDE)
    add_adapter(palm, "policy", LORA, seed=0)
    named: dict[str, list[tuple[str, torch.Tensor]]] = {
        "full": [(n, p) for n, p in palm.named_parameters() if "lora_" not in n],
        "lora": list(adapter_tensors(palm, "policy")),
    }
    receiver = PaLM(WIDE)
    add_adapter(receiver, "policy", LORA, seed=1)
    buffers = {
        "full": FlatBuffer(
            [(n, p) for n, p in receiver.named_parameters() if "lora_" not in n], torch.float32
        ),
        "lora": FlatBuffer(adapter_tensors(receiver, "policy"), torch.float32),
    }

    publishers = {
        kind: Publisher(pairs, rank=0, ranks=1, dtype=torch.float32)
        for kind, pairs in named.items()
    }

    def sync(kind: str) -> None:
        made, payload = publishers[kind].publish()
        manifest = Manifest(
            policy_version=0, total=made.total, layout=made.layout, slices=(made.slice,)
        )
        assert buffers[kind].load(manifest, [payload]) == manifest.fingerprint

    found = interleaved({kind: partial(sync, kind) for kind in named}, REPEATS)
    size = {kind: buffer.total / 2**20 for kind, buffer in buffers.items()}
    adapter_bytes = sum(4 * tensor.numel() for _, tensor in named["lora"])
    assert buffers["lora"].total == adapter_bytes, "the adapter and nothing else"
    return [
        Result(
            key="lora_publish_bytes_share",
            value=size["lora"] / size["full"],
            metric=f"a version on the wire, rank {LORA.rank} on {millions(WIDE)} parameters",
            ours=f"{size['lora']:.1f} MiB, {found['lora'] * 1e3:.1f} ms",
            baseline=f"{size['full']:.0f} MiB of all weights, {found['full'] * 1e3:.0f} ms",
        )
    ]


# ------------------------------------------------------------------ memory


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def four(kind: str) -> dict[str, int]:
    """Bytes of policy, reference, value and reward network, and with what training adds."""
    before = resident()
    policy, value, reward = build_policy(WIDE), build_scalar(WIDE), build_scalar(WIDE)
    policy.initialise(0)
    networks: list[nn.Module] = [policy, value, reward]
    if kind == "full":
        networks.append(build_policy(WIDE))
        value.initialise(1)
        reward.initialise(2)
        networks[-1].load_state_dict(policy.state_dict())
    else:
        for other, name in ((value, "value"), (reward, "reward")):
            share_base(other.decoder, policy.decoder)
            attach_adapter(other, name, LORA, seed=0)
        attach_adapter(policy, "policy", LORA, seed=0)
    weights = resident() - before
    trained = [p for n in (policy, value) for p in n.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter).add_(1.0)
    optimizer.step()
    return {"weights": weights, "training": resident() - before}


def memory() -> list[Result]:
    """Both kinds, each in a fresh process."""
    found = {kind: alone(kind) for kind in ("full", "lora")}
    mib = {k: {n: size / 2**20 for n, size in sizes.items()} for k, sizes in found.items()}
    share = {n: mib["lora"][n] / mib["full"][n] for n in ("weights", "training")}
    return [
        Result(
            key="lora_memory_share",
            value=share["weights"],
            metric=f"policy, reference, value and reward of {millions(WIDE)}, in memory",
            ours=f"{mib['lora']['weights']:,.0f} MiB",
            baseline=f"{mib['full']['weights']:,.0f} MiB four whole networks",
        ),
        Result(
            key="lora_training_memory_share",
            value=share["training"],
            metric="the same with gradients and AdamW's moments of policy and value",
            ours=f"{mib['lora']['training']:,.0f} MiB",
            baseline=f"{mib['full']['training']:,.0f} MiB",
        ),
    ]


def alone(argument: str) -> dict[str, float]:
    """What this module prints in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.lora", argument]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def millions(config: PalmConfig) -> str:
    """Number of parameters, in words."""
    with torch.device("meta"):
        count = sum(p.numel() for p in PaLM(config).parameters())
    return f"{count / 1e6:.0f}M"


# ------------------------------------------------------------------ the learner's step


def step_seconds() -> dict[str, float]:
    """Median seconds of a policy update at shape S, on one DeepSpeed rank."""
    torch.set_num_threads(THREADS)
    rank = LearnerRank(0, 1, compute_of(cpus=1, threads=THREADS))
    rank.connect(rank.listen())
    sequences, targets = data()
    engines = {}
    for precision in ("fp32", "bf16"):
        for kind in ("full", "lora"):
            net = network()
            if kind == "lora":
                attach_adapter(net, "policy", LORA, seed=0)
            engines[f"{kind} {precision}"] = ZeroEngine(
                net,
                zero_stage=2,
                precision=precision,
                weight_decay=0.0,
                max_grad_norm=1.0,
                eps=1e-8,
            )
    runs = {
        name: partial(policy_update, engine, sequences, targets) for name, engine in engines.items()
    }
    interleaved(runs, 1)
    found = interleaved(runs, REPEATS)
    process_group.disconnect()
    return found


def step() -> list[Result]:
    """Both kinds, in fp32 and in bf16."""
    found = alone("step")
    tokens = ROWS * (PROMPT + RESPONSE)
    return [
        Result(
            key=key,
            value=found[f"full {precision}"] / found[f"lora {precision}"],
            metric=f"policy update with LoRA, rank {LORA.rank} on everything, {precision}",
            ours=f"{tokens / found[f'lora {precision}']:,.0f} tokens/s",
            baseline=f"{tokens / found[f'full {precision}']:,.0f} full fine-tuning",
        )
        for key, precision in (("lora_step_vs_full", "fp32"), ("lora_step_vs_full_bf16", "bf16"))
    ]


def run() -> list[Result]:
    return [*wire(), *memory(), *step()]


def main(arguments: Sequence[str]) -> None:
    """What is asked for; without an argument all results."""
    if arguments:
        kind = arguments[0]
        print(json.dumps(step_seconds() if kind == "step" else four(kind)))
        return
    torch.set_num_threads(THREADS)
    for result in run():
        print(f"{result.key} {result.value:.3f} | {result.ours} | {result.baseline}")


if __name__ == "__main__":
    main(sys.argv[1:])
