"""What engines are asked in tests, and by `tests.gpu`, where libraries for tests may be missing."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from actors.generation.engine import GenerationEngine
from common.data.prompts import EncodedPrompt, evaluation_requests
from common.logprobs import Sampling
from common.models.decoder import Decoder
from common.models.lora import OFF
from common.wire.trajectory import RolloutRequest

FILTERED = Sampling(temperature=0.8, top_k=9, top_p=0.9, min_tokens=2, endings=(2,))


def requests(
    lengths: list[int], seed: int = 0, copies: int = 1, adapters: Sequence[str] = (OFF,)
) -> list[RolloutRequest]:
    generator = torch.Generator().manual_seed(seed)
    prompts = [
        EncodedPrompt(
            uid=f"p{i}", text="", ids=torch.randint(2, 53, (n,), generator=generator).tolist()
        )
        for i, n in enumerate(lengths)
    ]
    return evaluation_requests(prompts, seed=seed, label="t", samples=copies, adapters=adapters)


def engine(
    decoder: Decoder, *, graphs: bool, merged: str | None = "", sampling: Sampling = FILTERED
) -> GenerationEngine:
    return GenerationEngine(
        decoder,
        eos_ids=(2,),
        sampling=sampling,
        max_tokens=20,
        slots=11,
        prefill_tokens=16,
        kernels="torch",
        merged=merged,
        graphs=graphs,
    )
