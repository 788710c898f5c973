"""Answers rewritten by a program until they keep to the instructions of their prompts.

    an answer of the model itself -> its sentences -> the wanted number of words -> edits, in an
    order in which no later one undoes an earlier one -> a demonstration, if the reward agrees

The model's own words are kept as far as the instructions let them be, so that what is learnt from
them is the form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Final

from deploy.instruct.instructions import Instruction
from deploy.instruct.reward import credit, substance
from deploy.instruct.task import Ask

LONGEST: Final = 36
"""Words of a demonstration before its edits; they and the edits fit the recipe's 64 tokens."""
LEAST_SUBSTANCE: Final = 0.9

_INSTEAD: Final = {
    "the": "this",
    "and": "with",
    "very": "so",
    "people": "folks",
    "world": "earth",
    "many": "several",
    "beautiful": "lovely",
    "place": "spot",
    "great": "grand",
}
"""What stands for a word that is not allowed; others are left out."""


def rewritten(ask: Ask, answer: str) -> str | None:
    """Return the answer, made to keep to what was asked for; None where that cannot be done."""
    prompt = ask.text
    for most in (LONGEST, LONGEST // 2, 12):
        text = _shortened(ask, answer, most)
        for edit in _EDITS:
            for instruction in ask.instructions:
                text = edit(instruction, text, ask)
        followed = all(credit(instruction, text) == 1.0 for instruction in ask.instructions)
        if followed and substance(prompt, text) >= LEAST_SUBSTANCE:
            return text
    return None


def _shortened(ask: Ask, answer: str, most: int) -> str:
    """Return the first sentences of an answer, whole ones, of at most so many words."""
    least = 0
    for instruction in ask.instructions:
        if instruction.kind == "fewer_words":
            most = min(most, instruction.number - 1)
        elif instruction.kind == "at_least_words":
            least = instruction.number
    kept: list[str] = []
    for sentence in _sentences(answer):
        words = sum(len(_counted(one)) for one in kept)
        if kept and words >= least and words + len(_counted(sentence)) > most:
            break
        kept.append(sentence)
    text = " ".join(kept)
    if len(_counted(text)) > most >= least:  # a first sentence that is too long by itself
        text = " ".join(text.split()[:most]).rstrip(",;:.!? ") + "."
    return text


def _sentences(answer: str) -> Iterator[str]:
    """Yield an answer's sentences, without marks of lists, titles and quotations around them."""
    plain = re.sub(r"<<[^>]*>>|\*+|^\s*(?:[-#]+|\d+\.)\s+", " ", answer, flags=re.MULTILINE)
    plain = re.sub(r'["“”{}\[\]<>]', "", plain)
    for sentence in re.split(r"(?<=[.!?])\s+|\n+", plain):
        words = sentence.split()
        if len(words) > 2 and not words[-1].endswith(":"):
            whole = " ".join(words)
            yield whole if whole.endswith((".", "!", "?")) else whole.rstrip(",;") + "."


def _counted(text: str) -> list[str]:
    return re.findall(r"\w+", text)


# --------------------------------------------------------- edits, of which each kind has one


def _words_asked_for(instruction: Instruction, text: str, ask: Ask) -> str:
    if instruction.kind == "word" and credit(instruction, text) < 1.0:
        return f"{text} It brings {instruction.text} to mind."
    if instruction.kind == "word_times" and credit(instruction, text) < 1.0:
        word = instruction.text
        return f"{text} " + " ".join((f"There is {word} and more {word}.", f"So much {word}!"))
    return text


def _words_not_allowed(instruction: Instruction, text: str, ask: Ask) -> str:
    if instruction.kind != "without":
        return text
    word = instruction.text

    def other(match: re.Match[str]) -> str:
        instead = _INSTEAD.get(word.lower(), "")
        return instead.capitalize() if match[0][:1].isupper() else instead

    text = re.sub(rf"\b{re.escape(word)}\b", other, text, flags=re.IGNORECASE)
    return re.sub(r"[ \t]+", " ", text).strip()


def _commas(instruction: Instruction, text: str, ask: Ask) -> str:
    return text.replace(",", "") if instruction.kind == "no_comma" else text


def _parts(instruction: Instruction, text: str, ask: Ask) -> str:
    if instruction.kind == "bullets":
        return "\n".join(f"* {part}" for part in _in_parts(text, instruction.number))
    if instruction.kind == "paragraphs":
        return "\n***\n".join(_in_parts(text, instruction.number))
    return text


def _in_parts(text: str, count: int) -> list[str]:
    """Cut a text into so many parts: at the ends of sentences where there are enough of them."""
    pieces: Sequence[str] = re.split(r"(?<=[.!?])\s+", text)
    if len(pieces) < count:
        pieces = text.split()
    cuts = [round(at * len(pieces) / count) for at in range(count + 1)]
    return [" ".join(pieces[begin:end]) for begin, end in pairwise(cuts)]


def _title(instruction: Instruction, text: str, ask: Ask) -> str:
    return f"<<{ask.about.title()}>>\n{text}" if instruction.kind == "title" else text


def _ending(instruction: Instruction, text: str, ask: Ask) -> str:
    return f"{text} {instruction.text}" if instruction.kind == "ends" else text


def _case(instruction: Instruction, text: str, ask: Ask) -> str:
    cases: dict[str, Callable[[str], str]] = {"lowercase": str.lower, "capitals": str.upper}
    return cases.get(instruction.kind, str)(text)


def _wrapping(instruction: Instruction, text: str, ask: Ask) -> str:
    if instruction.kind == "quotes":
        return f'"{text}"'
    if instruction.kind == "json":
        return json.dumps({ask.about: text}, ensure_ascii=False)
    return text


_EDITS: Final[tuple[Callable[[Instruction, str, Ask], str], ...]] = (
    _words_not_allowed,
    _words_asked_for,
    _commas,
    _parts,
    _title,
    _ending,
    _case,
    _wrapping,
)
