"""Prints what log-probabilities add to a process at their peak, and what full logits would."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from common.config.model import PalmConfig
from common.logprobs import Sampling, chosen_reader
from common.models.palm import PaLM

TOKENS, VOCABULARY = 8192, 50_000


def status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1]) * 1024


def main() -> None:
    torch.set_num_threads(2)
    config = PalmConfig(vocab_size=VOCABULARY, dim=256, layers=1, heads=4, head_dim=64)
    decoder = PaLM(config)
    decoder.initialise(0)
    hidden = torch.randn(1, TOKENS, config.dim, requires_grad=True)
    chosen = torch.randint(0, VOCABULARY, (1, TOKENS))
    # Gradients exist already, as from the second micro-batch on.
    for tensor in (hidden, decoder.embedding.weight):
        tensor.grad = torch.zeros_like(tensor)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    decoder.read(hidden, chosen_reader(chosen, Sampling()))[..., 0].sum().backward()
    print(json.dumps({"peak": status("VmHWM") - before, "logits": TOKENS * VOCABULARY * 4}))


if __name__ == "__main__":
    main()
