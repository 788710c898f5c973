"""Generation from every supported family, against the library's forward and `generate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from actors.generation.engine import GenerationEngine
from common.data.prompts import EncodedPrompt, evaluation_requests
from common.logprobs import Sampling
from common.wire.trajectory import RolloutRequest
from tests.common.models.pretrained.tiny import VARIANTS, VOCABULARY, loaded, reference
from tests.likelihoods import chosen_logprobs

SAMPLINGS = (
    Sampling(),
    Sampling(temperature=0.6, top_p=0.9),
    Sampling(temperature=1.3, top_k=20, min_p=0.02),
)


def requests(count: int, seed: int = 0) -> list[RolloutRequest]:
    """Prompts of 1 to 30 tokens; every third one has a sibling of the same prompt."""
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for i in range(count):
        length = int(torch.randint(1, 31, (), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        prompts.append(EncodedPrompt(uid=f"{i}", text="x", ids=ids))
    return evaluation_requests(prompts, seed=seed, label="pretrained")


def engine_of(decoder: object, sampling: Sampling, slots: int = 5) -> GenerationEngine:
    return GenerationEngine(
        decoder,  # type: ignore[arg-type]
        eos_ids=(2,),
        sampling=sampling,
        max_tokens=25,
        slots=slots,
        prefill_tokens=16,
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_sampled_logprobs_are_the_librarys(name: str, tmp_path: Path) -> None:
    model = reference(name)
    decoder = loaded(model, tmp_path).eval().requires_grad_(False)
    for seed, sampling in enumerate(SAMPLINGS):
        asked = requests(6, seed)
        responses = engine_of(decoder, sampling).generate(asked)
        alone = [engine_of(decoder, sampling, slots=1).generate([each])[0] for each in asked[:2]]
        assert [r.response_ids for r in responses[:2]] == [r.response_ids for r in alone]
        for request, response in zip(asked, responses, strict=True):
            whole = torch.tensor([[*request.prompt_ids, *response.response_ids]])
            with torch.no_grad():
                logits = model(whole, use_cache=False).logits[:, len(request.prompt_ids) - 1 : -1]
            chosen, found = torch.tensor([response.response_ids]), torch.tensor([response.logprobs])
            # A rounding of the logits may put a token on the other side of a filter's border.
            borders = (
                replace(sampling, top_p=sampling.top_p + d, min_p=sampling.min_p * (1 + 10 * d))
                for d in (0.0, 1e-5, -1e-5)
            )
            apart = [(found - chosen_logprobs(logits, chosen, each)).abs() for each in borders]
            assert float(torch.stack(apart).amin(0).max()) < 1e-4


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere2", "falcon-grouped"])
def test_greedy_text_is_that_of_generate(name: str, tmp_path: Path) -> None:
    model = reference(name, seed=3)
    decoder = loaded(model, tmp_path).eval().requires_grad_(False)
    asked = requests(6, 5)
    responses = engine_of(decoder, Sampling(temperature=0.0)).generate(asked)
    for request, response in zip(asked, responses, strict=True):
        with torch.no_grad():
            out = model.generate(
                torch.tensor([request.prompt_ids]),
                do_sample=False,
                max_new_tokens=25,
                eos_token_id=2,
                pad_token_id=0,
            )
        assert out[0, len(request.prompt_ids) :].tolist() == response.response_ids
