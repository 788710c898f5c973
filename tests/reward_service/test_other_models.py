"""Reward models and references that are checkpoints of their own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from common.batching import sequence_batch
from common.config.model import PretrainedConfig
from common.config.workers import RewardServiceConfig
from common.data.tokenizer import load_tokenizer
from common.devices import compute_of
from common.logprobs import Sampling
from common.models.build import build_decoder
from common.wire.trajectory import Rollout
from reward_service.models import ReferencePolicy, RewardModel, frozen_pass
from reward_service.service import RewardWorker
from tests.common.data.tokenizers import byte_level
from tests.common.models.pretrained.tiny import _COMMON, VARIANTS, reference, saved
from tests.reward_service.samples import rollouts

MESSAGES = [
    {"role": "user", "content": "Write about ships."},
    {"role": "assistant", "content": "ships of the sea"},
    {"role": "user", "content": "Now about the <|im_end|> of the river."},
]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of one label with a tokenizer and a template of its own."""
    folder = byte_level(tmp_path_factory.mktemp("judge"))
    values: dict[str, Any] = _COMMON | VARIANTS["qwen3"]
    values |= {"vocab_size": load_tokenizer(folder).vocab_size + 7, "num_labels": 1}
    shape = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(shape)
    model.save_pretrained(folder)
    return folder


def asked() -> list[Rollout]:
    """Plain prompts and conversations, ended and cut off."""
    made = []
    for index, rollout in enumerate(rollouts(6)):
        texts = {"prompt_text": f"about harbour {index}", "response_text": f"the map {index}"}
        chat = json.dumps({"messages": MESSAGES, "tools": []}) if index % 2 else None
        ended = "eos" if index % 3 else "length"
        made.append(replace(rollout, **texts, conversation=chat, finish_reason=ended))
    return made


def test_a_classifier_scores_texts_in_its_own_tokens(judge: Path, tmp_path: Path) -> None:
    policy = PretrainedConfig(
        start=str(saved(reference("llama", vocab_size=200), tmp_path / "policy")), context=64
    )
    config = PretrainedConfig(start=str(judge), context=96)
    own = RewardModel(config, judge, build_decoder(config), load_tokenizer(judge))
    made = asked()
    scores, logprobs = frozen_pass(
        made, 50, own, ReferencePolicy(policy, Path(policy.start), Sampling())
    )
    assert [len(each) for each in logprobs] == [len(r.response_ids) for r in made]
    library = AutoModelForSequenceClassification.from_pretrained(judge, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(judge)
    for rollout, score in zip(made, scores, strict=True):
        answer = tokenizer(rollout.response_text, add_special_tokens=False)["input_ids"]
        if rollout.conversation is None:
            ids = tokenizer(rollout.prompt_text, add_special_tokens=False)["input_ids"]
            end = [tokenizer.eos_token_id]
        else:
            ids = tokenizer.apply_chat_template(MESSAGES[:2], add_generation_prompt=False)
            last = tokenizer(
                f"{MESSAGES[2]['content']}", add_special_tokens=False, split_special_tokens=True
            )
            start, end = (
                tokenizer(text, add_special_tokens=False)["input_ids"]
                for text in ("<|im_start|>user\n", "<|im_end|>")
            )
            follows = tokenizer("<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
            ids = [*ids["input_ids"], *start, *last["input_ids"], *follows["input_ids"]]
        whole = [*ids, *answer, *(end if rollout.finish_reason == "eos" else [])]
        with torch.no_grad():
            found = library.score(library.model(torch.tensor([whole])).last_hidden_state)[0, -1, 0]
        assert score == pytest.approx(float(found), abs=1e-5)


def test_a_reference_of_its_own(tmp_path: Path) -> None:
    model = reference("gemma2", vocab_size=230)
    folder = saved(model, tmp_path)
    own = PretrainedConfig(start=str(folder), context=64, vocab_size=200)
    made = rollouts(5)
    _, logprobs = frozen_pass(made, 40, None, ReferencePolicy(own, folder, Sampling()))
    for rollout, found in zip(made, logprobs, strict=True):
        whole = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]])
        with torch.no_grad():
            logits = model(whole, use_cache=False).logits[0, len(rollout.prompt_ids) - 1 : -1, :200]
        chosen = torch.tensor(rollout.response_ids)[:, None]
        expected = logits.log_softmax(-1).gather(-1, chosen)[:, 0]
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_a_reference_reads_as_long_sequences_as_the_policy_writes(
    tmp_path: Path, kernels: str
) -> None:
    """Its own setting is shorter: native kernels have tables of its context, and no more."""
    model = reference("llama3-rotary")
    folder = saved(model, tmp_path)
    own, policy = (PretrainedConfig(start=str(folder), context=n, vocab_size=90) for n in (8, 64))
    worker = RewardWorker(
        RewardServiceConfig.model_validate(
            {
                "reference": own,
                "kernels": kernels,
                "components": {"one": {"kind": "function", "target": "math:prod"}},
            }
        ),
        policy,
        str(folder),
        None,
        Sampling(),
        compute_of(cpus=1),
        merge=True,
    )
    prompt, response = [list(range(3, 33)), list(range(40, 50))]
    batch = sequence_batch([prompt], [response])
    found = worker.reference(batch)[0]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response]), use_cache=False).logits[0, 29:39, :90]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
