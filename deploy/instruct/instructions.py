"""Verifiable instructions: their kinds, how each is said in a prompt, and read back out of it.

    KINDS -> Instruction(kind, number, text) -> `say` -> a sentence of a prompt -> `read` -> itself

A reward function gets nothing but the prompt's text, so what is asked for is read from there: every
sentence is made from a phrasing that is its own pattern.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np

_NUMERALS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_WORDS: Final = ("light", "friend", "water", "time", "home", "music", "color", "story", "heart")
_AVOIDED: Final = ("the", "and", "very", "people", "world", "many", "beautiful", "place", "great")
_LETTERS: Final = tuple("bgkpvwy")
_ENDINGS: Final = (
    "That is all.",
    "I hope this helps.",
    "Thank you for reading.",
    "Is there anything else I can help with?",
    "Any other questions?",
    "Take good care.",
    "And that is that.",
)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One thing that an answer has to keep to. Example: `Instruction("bullets", number=3)`."""

    kind: str
    number: int = 0
    """How many, of kinds that count."""
    text: str = ""
    """A word, a letter or a phrase, of kinds that have one."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of instruction."""

    phrasings: tuple[str, ...]
    """Sentences with ``{n}`` and ``{text}`` where the kind has a number and a text."""
    numbers: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    trained: bool = True
    """False: a kind that only the judge asks for, in held-out prompts."""


KINDS: Final[dict[str, Kind]] = {
    "lowercase": Kind(
        (
            "Use lowercase letters only.",
            "Do not use any capital letters.",
            "Your entire response should be in all lowercase letters.",
        )
    ),
    "capitals": Kind(
        (
            "Use capital letters only.",
            "Do not use any lowercase letters.",
            "Your entire response should be in all capital letters.",
        )
    ),
    "no_comma": Kind(
        (
            "Do not use commas.",
            "Write without a single comma.",
            "Refrain from the use of any commas in your entire response.",
        )
    ),
    "quotes": Kind(
        (
            "Put your whole answer in double quotation marks.",
            "Begin and end your answer with a double quotation mark.",
            "Wrap your entire response with double quotation marks.",
        )
    ),
    "title": Kind(
        (
            "Give it a title in double angular brackets, such as <<my title>>.",
            "Begin with a title that is wrapped like this: <<my title>>.",
            "It must contain a title, wrapped in double angular brackets, such as <<my title>>.",
        )
    ),
    "bullets": Kind(
        (
            "Answer with exactly {n} bullet points that start with *.",
            "Make it a list of exactly {n} bullets, each on a line that starts with *.",
            "It must contain exactly {n} bullet points, such as: * This is a point.",
        ),
        numbers=(2, 3, 4),
    ),
    "paragraphs": Kind(
        (
            "Write exactly {n} paragraphs with the divider *** between them.",
            "Use {n} paragraphs, separated by ***.",
            "There should be {n} paragraphs, separated with the markdown divider: ***",
        ),
        numbers=(2, 3),
    ),
    "json": Kind(
        (
            "Answer in JSON only.",
            "The entire output must be valid JSON.",
            "The entire output should be wrapped in JSON format.",
        )
    ),
    "fewer_words": Kind(
        (
            "Use fewer than {n} words.",
            "Answer with less than {n} words.",
            "Stay under {n} words.",
        ),
        numbers=(15, 20, 25, 30),
    ),
    "at_least_words": Kind(
        (
            "Use at least {n} words.",
            "Write {n} words or more.",
            "Answer with at least {n} words.",
        ),
        numbers=(20, 25, 30, 35),
    ),
    "ends": Kind(
        (
            'End with the exact phrase "{text}"',
            'The last words must be "{text}"',
            'Finish your response with this exact phrase: "{text}" No words should follow it.',
        ),
        texts=_ENDINGS,
    ),
    "word": Kind(
        (
            'Include the word "{text}".',
            'Use the word "{text}" in your answer.',
            'The word "{text}" must appear.',
        ),
        texts=_WORDS,
    ),
    "word_times": Kind(
        (
            'Use the word "{text}" at least {n} times.',
            'The word "{text}" must appear at least {n} times.',
            'Write the word "{text}" {n} times or more.',
        ),
        numbers=(2, 3),
        texts=_WORDS,
    ),
    "without": Kind(
        (
            'Do not use the word "{text}".',
            'Avoid the word "{text}".',
            'The word "{text}" is not allowed.',
        ),
        texts=_AVOIDED,
    ),
    "placeholders": Kind(
        (
            "Include at least {n} placeholders in square brackets, such as [name].",
            "There must be at least {n} placeholders like [address] in it.",
        ),
        numbers=(1, 2),
        trained=False,
    ),
    "postscript": Kind(
        ("Add a postscript that starts with P.S.", "At the end, write a postscript: P.S."),
        trained=False,
    ),
    "highlights": Kind(
        (
            "Highlight at least {n} parts of it like *this*.",
            "Put at least {n} parts of your answer between asterisks, such as *this part*.",
        ),
        numbers=(1, 2),
        trained=False,
    ),
    "sections": Kind(
        (
            "Write {n} sections and mark each as Section 1, Section 2 and so on.",
            "Divide it into {n} sections that begin with Section 1, Section 2 and so on.",
        ),
        numbers=(2, 3),
        trained=False,
    ),
    "letter": Kind(
        (
            'The letter "{text}" must appear fewer than {n} times.',
            'Use the letter "{text}" less than {n} times.',
        ),
        numbers=(2, 3),
        texts=_LETTERS,
        trained=False,
    ),
    "two_answers": Kind(
        (
            "Give two different answers, separated by six asterisks: ******.",
            "Answer twice in different ways, with ****** between the two.",
        ),
        trained=False,
    ),
    "first_word": Kind(
        (
            'Write a single paragraph whose first word is "{text}".',
            'Your answer is one paragraph and starts with the word "{text}".',
        ),
        texts=_WORDS,
        trained=False,
    ),
}
"""Every kind by its name."""

TRAINED: Final = tuple(name for name, kind in KINDS.items() if kind.trained)
HELD_OUT: Final = tuple(name for name, kind in KINDS.items() if not kind.trained)

_APART: Final = (
    {"lowercase", "capitals"},
    {"lowercase", "ends"},
    {"capitals", "ends"},
    {"fewer_words", "at_least_words"},
    {"word", "word_times"},
    {"quotes", "title"},
    {"bullets", "paragraphs"},
)
_BESIDE_JSON: Final = {"json", "word", "without"}


def compatible(first: str, second: str) -> bool:
    """Tell whether one answer can keep to instructions of two trained kinds."""
    pair = {first, second}
    if "json" in pair:
        return first != second and pair <= _BESIDE_JSON
    return first != second and pair not in _APART


def draw(kind: str, rng: np.random.Generator) -> Instruction:
    """Draw an instruction of a kind; takes two numbers from `rng` whatever the kind."""
    at_number, at_text = rng.random(2)
    numbers, texts = KINDS[kind].numbers, KINDS[kind].texts
    return Instruction(
        kind,
        number=numbers[int(at_number * len(numbers))] if numbers else 0,
        text=texts[int(at_text * len(texts))] if texts else "",
    )


def say(instruction: Instruction, phrasing: int, *, spelt: bool = False) -> str:
    """Say an instruction in one of its kind's phrasings; `spelt` writes small numbers as words."""
    phrasings = KINDS[instruction.kind].phrasings
    number = instruction.number
    shown = _NUMERALS[number] if spelt and number < len(_NUMERALS) else str(number)
    return phrasings[phrasing % len(phrasings)].format(n=shown, text=instruction.text)


@lru_cache(maxsize=4096)
def read(prompt: str) -> tuple[Instruction, ...]:
    """Return the instructions that a prompt's text holds, in their order there.

    The text may have a chat template's marks around it.
    """
    found = [
        (match.start(), Instruction(kind, _number(match), match.groupdict().get("text", "")))
        for kind, pattern in _PATTERNS
        for match in pattern.finditer(prompt)
    ]
    return tuple(instruction for _, instruction in sorted(found, key=lambda at: at[0]))


def _pattern(phrasing: str) -> re.Pattern[str]:
    text = re.escape(phrasing)
    text = text.replace(re.escape("{n}"), rf"(?P<n>\d+|{'|'.join(_NUMERALS)})")
    return re.compile(text.replace(re.escape("{text}"), r'(?P<text>[^"\n]+)'))


def _number(match: re.Match[str]) -> int:
    number = match.groupdict().get("n", "0")
    return int(number) if number.isdigit() else _NUMERALS.index(number)


_PATTERNS: Final = tuple(
    (name, _pattern(phrasing)) for name, kind in KINDS.items() for phrasing in kind.phrasings
)
