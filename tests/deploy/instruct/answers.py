"""Constructed answers, good and bad, on which reward and judge can be compared.

``python -m tests.deploy.instruct.answers`` prints how often the two disagree, by kind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import numpy as np

from deploy.instruct.instructions import KINDS, Instruction, draw
from deploy.instruct.judge import follows
from deploy.instruct.reward import credit

SENTENCES = (
    "The old lighthouse stands on a quiet hill near the sea.",
    "Every morning, a small boat brings fresh bread to the island.",
    "People say that the music there is very beautiful!",
    "I don't know who built it, but my friend told me a story.",
    "In winter the wind is cold; the light keeps burning.",
    "Have you ever seen so many stars over the water?",
    "It was a strange and happy time in my heart.",
    "A good friend is worth more than gold, time or color.",
    "We walked home slowly, and nobody spoke a word.",
    "You should visit the bakery; it opens at seven.",
)
ENDS = (
    "That is all.",
    "I hope this helps.",
    "Take good care.",
    "Thank you for reading.",
    "And that is that.",
    "Any other questions?",
    "Is there anything else I can help with?",
)
Rewrite = Callable[[str, np.random.Generator], str]


def _cut(text: str, rng: np.random.Generator) -> str:
    return text[: int(rng.integers(1, len(text) + 1))]


def _bullets(text: str, rng: np.random.Generator) -> str:
    mark = ("* ", "- ", "1. ", "*", "\u2022 ")[int(rng.integers(5))]
    lines = text.split(". ")[: int(rng.integers(1, 6))]
    return "\n".join(mark + line for line in lines)


def _json(text: str, rng: np.random.Generator) -> str:
    values = [{"text": text}, [text], {"a": {"b": text}}, text, {}, [], 3]
    written = json.dumps(values[int(rng.integers(len(values)))])
    fences = ("{}", "```json\n{}\n```", "```\n{}```", "Here it is: {}", "{},", "'{}'", "{}\nDone.")
    return fences[int(rng.integers(len(fences)))].replace("{}", written)


def _divided(text: str, rng: np.random.Generator) -> str:
    marks = ("***", "******", "\n***\n", "\n\n", "---", " *** *** ", "\n***\n***\n")
    return marks[int(rng.integers(len(marks)))].join(text.split(". ")[:3])


def _titled(text: str, rng: np.random.Generator) -> str:
    titles = ("<<My title>>", "<<>>", "<title>", "<< A walk >>", "**Title**", "<<a\nb>>", "<<a")
    return f"{titles[int(rng.integers(len(titles)))]}\n{text}"


def _word(text: str, rng: np.random.Generator) -> str:
    words = ("light", "friend", "Water", "time", "home", "music", "color", "story", "heart")
    word = words[int(rng.integers(len(words)))]
    places = (f"{word}: {text}", f"{text} {word}.", f"{text} {word} and {word}", f"{word} {text}")
    return places[int(rng.integers(len(places)))]


def _extra(text: str, rng: np.random.Generator) -> str:
    extras = (
        *("[name]", "[ ]", "*this*", "**that**", "* *", "P.S. Come soon.", "p. s. yes", "PS: no"),
        *("Section 1\nx\nSection 2\ny", "section 1", "Section one", "pygmy, vow, kayak"),
    )
    return f"{text}\n{extras[int(rng.integers(len(extras)))]}"


REWRITES: tuple[Rewrite, ...] = (
    lambda text, rng: text.lower(),
    lambda text, rng: text.upper(),
    lambda text, rng: text.replace(",", ""),
    lambda text, rng: f'"{text}"',
    lambda text, rng: f'"{text}',
    lambda text, rng: f"\n{text}\n\n",
    lambda text, rng: f"{text} {ENDS[int(rng.integers(len(ENDS)))]}",
    lambda text, rng: text.replace("the ", "a ").replace("and ", "or "),
    lambda text, rng: text.replace(". ", ".\n\n"),
    lambda text, rng: text.capitalize(),
    _cut,
    _bullets,
    _json,
    _divided,
    _titled,
    _word,
    _extra,
)


def answers(count: int, seed: int) -> Iterator[str]:
    """Draw answers: some sentences, rewritten up to three times."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        chosen = rng.choice(len(SENTENCES), size=int(rng.integers(1, 6)), replace=False)
        text = " ".join(SENTENCES[i] for i in chosen)
        for _ in range(int(rng.integers(4))):
            text = REWRITES[int(rng.integers(len(REWRITES)))](text, rng) or " "
        yield text


def disagreements(count: int, seed: int) -> dict[str, list[tuple[Instruction, str, bool]]]:
    """Ask reward and judge about `count` answers for each kind.

    Returns, by kind, the instructions and answers on which they differ, and the judge's verdict.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, list[tuple[Instruction, str, bool]]] = {}
    for number, kind in enumerate(KINDS):
        found[kind] = []
        for answer in answers(count, seed + number):
            instruction = draw(kind, rng)
            verdict = follows(instruction, answer)
            if verdict != (credit(instruction, answer) == 1.0):
                found[kind].append((instruction, answer, verdict))
    return found


if __name__ == "__main__":
    COUNT = 2000
    for kind, rows in disagreements(COUNT, 0).items():
        lenient = sum(verdict for _, _, verdict in rows)
        print(f"{kind:16} {len(rows) / COUNT:7.2%}  judge alone says yes: {lenient}/{len(rows)}")
        for instruction, answer, verdict in rows[:3]:
            print(f"    {verdict} {instruction} {answer!r}")
