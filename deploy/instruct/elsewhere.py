"""What training cost elsewhere: likelihood of other text, and a question of another kind.

Both are asked of a checkpoint's folder by `transformers` itself, in this process: what is measured
is what a user of the folder gets.
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

TEXTS: Final = 32
TEXT_TOKENS: Final = 192
CAPITALS: Final = {
    "Argentina": "Buenos Aires",
    "Australia": "Canberra",
    "Austria": "Vienna",
    "Belgium": "Brussels",
    "Canada": "Ottawa",
    "Chile": "Santiago",
    "China": "Beijing",
    "Colombia": "Bogot",
    "Cuba": "Havana",
    "Denmark": "Copenhagen",
    "Egypt": "Cairo",
    "Ethiopia": "Addis Ababa",
    "Finland": "Helsinki",
    "France": "Paris",
    "Germany": "Berlin",
    "Ghana": "Accra",
    "Greece": "Athens",
    "Hungary": "Budapest",
    "India": "Delhi",
    "Indonesia": "Jakarta",
    "Iran": "Tehran",
    "Iraq": "Baghdad",
    "Ireland": "Dublin",
    "Italy": "Rome",
    "Jamaica": "Kingston",
    "Japan": "Tokyo",
    "Kenya": "Nairobi",
    "Lebanon": "Beirut",
    "Morocco": "Rabat",
    "Nepal": "Kathmandu",
    "Norway": "Oslo",
    "Pakistan": "Islamabad",
    "Peru": "Lima",
    "Philippines": "Manila",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Romania": "Bucharest",
    "Russia": "Moscow",
    "Saudi Arabia": "Riyadh",
    "South Korea": "Seoul",
    "Spain": "Madrid",
    "Sweden": "Stockholm",
    "Switzerland": "Bern",
    "Syria": "Damascus",
    "Thailand": "Bangkok",
    "Turkey": "Ankara",
    "Vietnam": "Hanoi",
}
"""Countries, and how the names of their capitals begin in every spelling."""


def questions() -> list[str]:
    """Ask for the capital of each country."""
    return [f"What is the capital of {country}?" for country in CAPITALS]


def known(answers: Sequence[str]) -> list[bool]:
    """Tell of each answer to `questions` whether it names the capital, in whatever case."""
    return [
        capital.lower() in answer.lower()
        for capital, answer in zip(CAPITALS.values(), answers, strict=True)
    ]


def other_texts() -> list[str]:
    """Return pages of Python's own documentation, which every Python brings (`pydoc_data`).

    They are evenly spaced over all that are long enough, in the order of their names.
    """
    pages = sorted(pydoc_data.topics.topics.items())
    long = [text for _, text in pages if len(text) > 8 * TEXT_TOKENS]
    return [long[i * len(long) // TEXTS] for i in range(TEXTS)]


def text_nll(folder: Path, texts: Sequence[Sequence[int]]) -> float:
    """Return the mean negative log-likelihood per token of texts in tokens, all of one length."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32
    )
    total, count = 0.0, 0
    with torch.inference_mode():
        for ids in torch.tensor(texts).split(4):
            logits: Tensor = model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            total, count = total + float(loss), count + ids[:, 1:].numel()
    return total / count
