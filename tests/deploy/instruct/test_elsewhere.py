"""What is measured beside the task, and the memory of all processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deploy.instruct.elsewhere import (
    CAPITALS,
    TEXT_TOKENS,
    TEXTS,
    known,
    other_texts,
    questions,
    text_nll,
)


def test_capitals_are_found_in_answers_of_any_case() -> None:
    asked = questions()
    assert len({*asked}) == len(CAPITALS) > 40
    answers = [f"IT IS {capital.upper()}." for capital in CAPITALS.values()]
    assert all(known(answers))
    assert not any(known(["I do not know."] * len(asked)))
    rows = [sum(capital.lower() in a.lower() for a in answers) for capital in CAPITALS.values()]
    assert rows == [1] * len(CAPITALS), "no name is part of another"


def test_texts_are_long_different_and_of_this_python() -> None:
    texts = other_texts()
    assert len({*texts}) == TEXTS
    assert min(map(len, texts)) > 8 * TEXT_TOKENS


def test_the_likelihood_of_a_text_is_that_of_one_token_after_the_other(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    texts = torch.randint(0, 40, (6, 9)).tolist()
    literal = [
        -float(model(torch.tensor([text[:at]])).logits[0, -1].detach().log_softmax(-1)[text[at]])
        for text in texts
        for at in range(1, len(text))
    ]
    assert text_nll(tmp_path, texts) == pytest.approx(sum(literal) / len(literal), abs=1e-5)


def test_memory_of_children_counts() -> None:
    """In a process of its own: of this one, other tests' children come and go."""
    code = """
import subprocess, sys, time
from deploy.evaluation.memory import Resident

with Resident(every_s=0.05) as alone:
    time.sleep(0.2)
holds = "x = bytearray(b'1' * 300_000_000); print('held', flush=True); input()"
with subprocess.Popen(
    [sys.executable, "-c", holds], stdin=subprocess.PIPE, stdout=subprocess.PIPE
) as child:
    child.stdout.readline()
    with Resident(every_s=0.05) as both:
        time.sleep(0.3)
    child.communicate(b"\\n")
print(both.peak_gb - alone.peak_gb)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 0.25 < float(done.stdout) < 0.6
