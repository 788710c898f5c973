"""The reward of `instruct`: how far an answer keeps to what its prompt asks, and is a text.

::

    score = substance * (mean of credits + all followed) / 2                             in [0, 1]

A credit is 1 for an instruction that is followed and below 1/2 for one that is not: more, the
closer the answer comes. `substance` closes the cheap ways to a score: an answer of a few words, one
that repeats itself or its instructions, one that is not about what was asked. How well a text is
written it cannot tell; that is left to the KL to the reference policy, and what never ended to
`train.missing_eos_penalty`.

The judge (`deploy.instruct.judge`) shares no code with this file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Final

from deploy.instruct.instructions import KINDS, Instruction, read, say
from deploy.instruct.topics import THINGS

ENOUGH_WORDS: Final = 10
"""Shorter answers are worth less, in proportion."""
NEARLY: Final = 0.5
"""Bound of the credit for what is not followed."""

_WORD: Final = re.compile(r"[^\W_]+")


def score(prompts: list[str], responses: list[str]) -> list[float]:
    """Score each response to the instructions in its prompt, in [0, 1].

    Raises:
        ValueError: a prompt holds no instruction that is known here.
    """
    return [_score(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def _score(prompt: str, response: str) -> float:
    instructions = read(prompt)
    if not instructions:
        raise ValueError(f"no instruction is known in the prompt {prompt[-200:]!r}")
    credits = [credit(instruction, response) for instruction in instructions]
    kept = sum(credits) / len(credits) + all(c == 1.0 for c in credits)
    return substance(prompt, response) * kept / 2


def credit(instruction: Instruction, response: str) -> float:
    """Return 1 for an answer that follows the instruction, else less than `NEARLY`."""
    text = response.strip()
    if not text:
        return 0.0
    rated = _RATINGS[instruction.kind](instruction, text)
    return 1.0 if rated >= 1.0 else NEARLY * max(0.0, rated) * 0.99


def substance(prompt: str, response: str) -> float:
    """Return a factor in [0, 1] that is near 1 for a text about what was asked.

    Product of: at least ten words; at least half of the words differ, and three quarters of the
    pairs of neighbours; 0.9 where nothing in it names the thing that was asked for; 0.5 where it
    repeats a sentence of its prompt.
    """
    words = _words(response)
    if not words:
        return 0.0
    length = min(1.0, len(words) / ENOUGH_WORDS)
    neighbours = list(pairwise(words))
    varied = min(1.0, len(set(words)) / (0.5 * len(words)))
    if neighbours:
        varied *= min(1.0, len(set(neighbours)) / (0.75 * len(neighbours)))
    asked = [thing for thing in THINGS if thing in _words(prompt)]
    named = any(word.startswith(thing[:5]) for word in words for thing in asked)
    return length * varied * (1.0 if named else 0.9) * (0.5 if _echoes(prompt, response) else 1.0)


def _echoes(prompt: str, response: str) -> bool:
    """Tell whether the answer says an instruction of its prompt again."""
    lowered = response.lower()
    return any(
        say(instruction, phrasing, spelt=spelt).lower() in lowered
        for instruction in read(prompt)
        for phrasing in range(len(KINDS[instruction.kind].phrasings))
        for spelt in (False, True)
    )


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


# ----------------------------------------------- one rating per kind: 1 or more is followed

_Rating = Callable[[Instruction, str], float]


def _near(count: int, wanted: int) -> float:
    """Return 1 where a count is as wanted, and less the further it is from that."""
    return 1.0 - abs(count - wanted) / (wanted + 1)


def _lowercase(_: Instruction, text: str) -> float:
    return _without_case(text, str.isupper, str.islower)


def _capitals(_: Instruction, text: str) -> float:
    return _without_case(text, str.islower, str.isupper)


def _without_case(text: str, wrong: Callable[[str], bool], right: Callable[[str], bool]) -> float:
    """Return 1 where no letter has the wrong case and one has the right one.

    Less by the share of words that hold a wrong one, steep at both ends, where answers differ by a
    word or two: the first capitals in a text, and the last ones.
    """
    words = text.split()
    share = sum(any(map(wrong, word)) for word in words) / len(words)
    near = 0.45 * math.sqrt(1.0 - share) + 0.45 / (1.0 + 15.0 * share)
    return near + 0.1 * (not share and any(map(right, text)))


def _no_comma(_: Instruction, text: str) -> float:
    return 1.0 / (1 + text.count(","))


def _quotes(_: Instruction, text: str) -> float:
    return (text.startswith('"') + text.endswith('"')) / 2 if len(text) > 1 else 0.0


def _title(_: Instruction, text: str) -> float:
    for line in text.splitlines():
        opened = line.find("<<")
        inside = line[opened + 2 : line.find(">>", opened)].strip("<> ")
        if opened >= 0 and ">>" in line[opened:] and inside:
            return 0.8 if inside.lower() in ("my title", "title") else 1.0
    return 0.3 * ("<<" in text) + 0.3 * (">>" in text)


def _bullets(instruction: Instruction, text: str) -> float:
    lines = [line.strip() for line in text.splitlines()]
    points = [line for line in lines if line.startswith("-") or re.match(r"\*[^*]", line)]
    rating = _near(len(points), instruction.number)
    return rating if all(any(map(str.isalnum, point)) for point in points) else 0.9 * rating


def _paragraphs(instruction: Instruction, text: str) -> float:
    parts = text.split("***")
    written = [part for part in parts if part.strip()]
    empty_inside = any(not part.strip() for part in parts[1:-1])
    return _near(len(written), instruction.number) * (0.9 if empty_inside else 1.0)


def _json(_: Instruction, text: str) -> float:
    inside = re.sub(r"^```(?:json)?\s*|\s*```$", "", text, flags=re.IGNORECASE).strip()
    try:
        value = json.loads(inside)
    except ValueError:
        # How far the answer goes before it stops being JSON says how close it is.
        return (
            0.3 * inside.startswith(("{", "["))
            + 0.3 * inside.endswith(("}", "]"))
            + 0.3 * ('":' in inside or '" :' in inside)
        )
    except RecursionError:
        return 0.0
    return 1.0 if isinstance(value, dict | list) and value else 0.3


def _fewer_words(instruction: Instruction, text: str) -> float:
    over = len(_tokens(text)) - instruction.number
    return 1.0 if over < 0 else 0.9 - over / instruction.number


def _at_least_words(instruction: Instruction, text: str) -> float:
    return len(_tokens(text)) / instruction.number


def _tokens(text: str) -> list[str]:
    """Split into runs of letters, digits and underscores: how the task counts words."""
    return re.findall(r"\w+", text)


def _ends(instruction: Instruction, text: str) -> float:
    said, wanted = text.rstrip('"').lower(), instruction.text.lower()
    if said.endswith(wanted):
        return 1.0
    return 0.6 if wanted.rstrip(".?") in said else 0.0


def _times(word: str, text: str) -> int:
    return _words(text).count(word.lower())


def _word(instruction: Instruction, text: str) -> float:
    return float(_times(instruction.text, text))


def _word_times(instruction: Instruction, text: str) -> float:
    return _times(instruction.text, text) / instruction.number


def _without(instruction: Instruction, text: str) -> float:
    return 1.0 / (1 + _times(instruction.text, text))


def _placeholders(instruction: Instruction, text: str) -> float:
    return len(re.findall(r"\[[^\]\n]+\]", text)) / instruction.number


def _postscript(_: Instruction, text: str) -> float:
    return 1.0 if re.search(r"(?:^|\s)p\. ?s\.", text.lower()) else 0.0


def _highlights(instruction: Instruction, text: str) -> float:
    return len(re.findall(r"(?<!\*)\*[^*\n]*[^*\s][^*\n]*\*", text)) / instruction.number


def _sections(instruction: Instruction, text: str) -> float:
    return len(re.findall(r"Section ?\d+", text)) / instruction.number


def _letter(instruction: Instruction, text: str) -> float:
    over = text.lower().count(instruction.text) - instruction.number
    return 1.0 if over < 0 else 0.9 / (1 + over)


def _two_answers(_: Instruction, text: str) -> float:
    parts = [part.strip() for part in text.split("******") if part.strip()]
    return 1.0 if len(parts) == 2 and parts[0] != parts[1] else 0.5 * (len(parts) > 1)


def _first_word(instruction: Instruction, text: str) -> float:
    starts = _words(text)[:1] == [instruction.text.lower()]
    return 0.5 * starts + 0.5 * ("\n\n" not in text)


_RATINGS: Final[dict[str, _Rating]] = {
    "lowercase": _lowercase,
    "capitals": _capitals,
    "no_comma": _no_comma,
    "quotes": _quotes,
    "title": _title,
    "bullets": _bullets,
    "paragraphs": _paragraphs,
    "json": _json,
    "fewer_words": _fewer_words,
    "at_least_words": _at_least_words,
    "ends": _ends,
    "word": _word,
    "word_times": _word_times,
    "without": _without,
    "placeholders": _placeholders,
    "postscript": _postscript,
    "highlights": _highlights,
    "sections": _sections,
    "letter": _letter,
    "two_answers": _two_answers,
    "first_word": _first_word,
}
