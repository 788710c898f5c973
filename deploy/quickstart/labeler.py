"""A program that prefers one docstring to another: the quickstart's stand-in for people.

It looks for two things, both computed by the rules below and by no linter:

    form       PEP 257: one line, capital letter, imperative verb, closing period, no signature
    aboutness  the line speaks of this function: it shares word stems with the name and parameters

    quality = naturalness * (0.5 * form + 0.5 * aboutness)                              in [0, 1]

A policy will look for the cheapest text that scores well, so each part is closed against it:
aboutness saturates at two hits (naming everything gains nothing), all parameters together give half
a hit, hits must be a fair part of the content words (padding loses), the verb of a name counts
only where a verb belongs, and a line that only restates the name is not the best one;
naturalness takes points off for repeated words, for lists of words without any grammar between
them, and for lines outside 3 ... 16 words.
The judges of the results (`deploy.quickstart.judges`: ruff and ROUGE-L) share no code with this
file; what its form has in common with them is PEP 257.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Final

import numpy as np
import snowballstemmer

from common.data.records import Comparison
from deploy.quickstart.harvest import Pair, prompt_text

LABELER: Final = "pep257+topic"
MARGIN: Final = 0.05
"""Differences of quality below it are ties."""
SHARPNESS: Final = 8.0
"""confidence = sigmoid(SHARPNESS * difference): 0.69 at 0.1, 0.98 at 0.5."""

WORDS: Final = range(3, 17)
TARGET_HITS: Final = 2.0
TARGET_PRECISION: Final = 0.4  # two of five content words: where people's own lines lie
COPYING: Final = 0.6
"""Factor on the aboutness of a line that pastes the function's name."""

_STEMMER: Final = snowballstemmer.stemmer("english")
_WORD: Final = re.compile(r"[A-Za-z]+(?:'[a-z]+)?|\d+")
_NAME_PART: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")

_DETERMINERS: Final = frozenset(_WORD.findall("the a an all any each every both its"))
_GLUE: Final = _DETERMINERS | frozenset(
    _WORD.findall(
        "this that these those "
        "of to in on at by for from with without into onto over under between and or nor not no if "
        "whether when while where which who whose what how as than then is are was were be been "
        "being it they them their there so such only also but do does has have had can could may "
        "might should will would must via per until after before during about against"
    )
)

# What people call it when a name starts so: nobody writes "is" in the line about is_valid.
_CALLS_FOR: Final = {
    "get": frozenset({"return", "retrieve", "fetch", "find", "obtain"}),
    "set": frozenset({"assign", "update", "store", "change"}),
    "is": frozenset({"return", "check", "determine", "test"}),
    "has": frozenset({"return", "check", "determine", "test"}),
    "to": frozenset({"convert", "return", "transform"}),
    "from": frozenset({"create", "construct", "build", "load", "convert"}),
    "make": frozenset({"create", "build", "construct"}),
    "init": frozenset({"initialize", "initialise", "create", "construct", "set"}),
    "iter": frozenset({"iterate", "yield", "return"}),
}
_ANY_PARAMS: Final = frozenset({"args", "kwargs", "kwds", "kw", "options"})


def verb_lexicon(lines: Sequence[str]) -> frozenset[str]:
    """Learn the verbs that open `lines`, in their base form and lower case, from the lines alone.

    A verb opens lines in two moods ("Return the path.", "Returns paths.") and takes an object:
    an s-form opens some line, and a determiner follows the base form at least twice and in three
    of a hundred of its lines. Nouns ("Name of"), pronouns and prepositions fail one or the other.
    """
    opening: Counter[str] = Counter()
    with_object: Counter[str] = Counter()
    for line in lines:
        words = line.lower().split(maxsplit=2)
        if len(words) > 1 and words[0].isalpha():
            opening[words[0]] += 1
            with_object[words[0]] += words[1] in _DETERMINERS
    return frozenset(
        word
        for word, count in with_object.items()
        if count >= 2
        and count >= 0.03 * opening[word]
        and len(word) > 1
        and (word not in _GLUE or word == "do")
        and any(form in opening for form in third_persons(word))
    )


def third_persons(verb: str) -> tuple[str, ...]:
    """Spell the third person of a regular verb by the rules of English."""
    if verb.endswith("y") and verb[-2:-1] not in tuple("aeiou"):
        return (verb[:-1] + "ies",)
    if verb.endswith(("s", "x", "z", "ch", "sh", "o")):
        return (verb + "es",)
    return (verb + "s",)


def form(line: str, pair: Pair, verbs: frozenset[str]) -> float:
    """Rate PEP 257 by our own rules, in [0, 1]; 0 for an empty or broken line.

    The verb weighs 0.5, the period 0.25, the capital 0.25; half is lost when the line repeats the
    signature, which PEP 257 forbids.
    """
    words = line.split()
    if not words or not line.isprintable():
        return 0.0
    first = words[0].rstrip(",.:;")
    points = 0.5 * (first.lower() in verbs)
    points += 0.25 * (line.endswith(".") and not line.endswith(("..", " .")))
    points += 0.25 * (line[0].isupper() and first[1:] == first[1:].lower())
    return points * (0.5 if f"{pair.name}(" in line else 1.0)


def aboutness(line: str, pair: Pair, verbs: frozenset[str]) -> float:
    """Rate how much `line` is about this function, in [0, 1].

    min(1, hits / offered) * min(1, precision / 0.4) * (0.8 if it only restates the name)
        * (COPYING if it pastes the name)

    hits = name parts found in the line + half of the parameters' parts (at most half a point),
    offered = min(2, what there is to hit); precision = found / content words. A verb that opens
    the name is hit by opening the line ("Create" for create_user, "Return" for get_path) or by
    another form of it ("creation"), not where no verb belongs ("Return the create user"). A
    function whose name and parameters say nothing (`f(x)`) gives 0.5 to every line.
    """
    lead, name, params = topic(pair, verbs)
    offered = min(TARGET_HITS, bool(lead) + len(name) + min(0.5, 0.5 * len(params)))
    words = [word.lower() for word in _WORD.findall(line)]
    if not offered or not words:
        return 0.5 * bool(words)
    inflected = {stem(word) for word in words if word not in lead} & {stem(verb) for verb in lead}
    opens = words[0] in lead or bool(inflected)
    opening = stem(words[0]) if words[0] in verbs else None
    content = {stem(word) for word in words if word not in _GLUE} - {opening}
    if opening is not None and not lead and any(_same(part, opening) for part in name):
        content.add(opening)  # the name holds the verb elsewhere, or shortened (`calc_total`)
    by_name = sum(any(_same(part, word) for word in content) for part in name)
    by_params = sum(any(_same(part, word) for word in content) for part in params)
    shared = sum(any(_same(part, word) for part in name | params) for word in content)
    hits = opens + by_name + min(0.5, 0.5 * by_params)
    precision = (opens + shared) / max(1, opens + len(content))
    spoken = name | params | {stem(verb) for verb in lead}
    restates = all(any(_same(part, word) for part in spoken) for word in content)
    full = min(1.0, hits / offered) * min(1.0, precision / TARGET_PRECISION)
    return full * (0.8 if restates else 1.0) * (COPYING if pastes_name(words, pair) else 1.0)


def pastes_name(words: Sequence[str], pair: Pair) -> bool:
    """Tell whether the line repeats the name's words in their order, where people would rephrase.

    True for three in a row, and for the first two anywhere but at the start of the line.
    """
    parts = _parts(pair.name)
    runs = [parts[i : i + 3] for i in range(len(parts) - 2)]
    if len(parts) > 1 and any(tuple(words[i : i + 2]) == parts[:2] for i in range(1, len(words))):
        return True
    return any(tuple(words[i : i + 3]) in runs for i in range(len(words)))


def naturalness(line: str) -> float:
    """Return a factor in [0, 1] that is 1 for nearly every line a person wrote.

    Product of: length within 3 ... 16 words; squared shares of content words that do
    not repeat (one may) and of word pairs that do not; 0.7 where four or more words hold no
    grammatical word at all.
    """
    words = [word.lower() for word in _WORD.findall(line)]
    content = [stem(word) for word in words if word not in _GLUE]
    if not content:
        return 0.0
    length = min(1.0, len(words) / WORDS.start, (WORDS.stop - 1) / len(words))
    repeats = sum(count - 1 for count in Counter(content).values())
    # One repeat is human ("Convert a string to a byte string."); looping is not.
    looping = 1.0 - max(0, repeats - 1) / len(content)
    bigrams = list(pairwise(words))
    looping *= len(set(bigrams)) / len(bigrams) if bigrams else 1.0
    bare = len(words) >= 4 and not any(word in _GLUE for word in words)
    return length * looping**2 * (0.7 if bare else 1.0)


def quality(line: str, pair: Pair, verbs: frozenset[str]) -> float:
    """Rate `line` as the docstring of `pair`'s function, in [0, 1].

    Reads the pair's name and parameters, never its docstring. `verbs` is `verb_lexicon` of the
    training lines.
    """
    text = line.strip()
    rated = 0.5 * form(text, pair, verbs) + 0.5 * aboutness(text, pair, verbs)
    return naturalness(text) * rated


def label(
    pair: Pair,
    a: str,
    b: str,
    *,
    verbs: frozenset[str],
    rng: np.random.Generator,
    noise: float = 0.0,
    margin: float = MARGIN,
) -> Comparison | None:
    """Compare responses `a` and `b`; None is a tie (qualities less than `margin` apart).

    `noise` is the share of labels that are turned round, because people make mistakes too; the
    confidence stays as it was. Takes exactly one number from `rng`, tie or not.
    """
    flip = bool(rng.random() < noise)
    difference = quality(a, pair, verbs) - quality(b, pair, verbs)
    if a == b or abs(difference) < margin:
        return None
    chosen, rejected = (a, b) if (difference > 0) != flip else (b, a)
    return Comparison(
        prompt=prompt_text(pair),
        chosen=chosen,
        rejected=rejected,
        labeler=LABELER,
        confidence=1.0 / (1.0 + math.exp(-SHARPNESS * abs(difference))),
    )


def topic(
    pair: Pair, verbs: frozenset[str]
) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """Return what a line may speak of: (opening verbs, name stems, parameter stems).

    Opening verbs are empty unless the name starts with a verb; parameter stems are those that
    the name does not have.
    """
    parts = _parts(pair.name)
    lead: frozenset[str] = frozenset()
    if parts and (parts[0] in _CALLS_FOR or parts[0] in verbs):
        lead = _CALLS_FOR.get(parts[0], frozenset()) | {parts[0]}
        parts = parts[1:]
    name = _stems(parts)
    params = {s for p in pair.params if p not in _ANY_PARAMS for s in _stems(_parts(p))}
    return lead, name, frozenset(params) - name


@lru_cache(maxsize=2**16)
def stem(word: str) -> str:
    """Return the English snowball stem of a lower-case word."""
    return str(_STEMMER.stemWord(word))


@lru_cache(maxsize=2**16)
def _parts(name: str) -> tuple[str, ...]:
    """Split a snake_case, camelCase or ALLCaps name into words, lower case, no single letters."""
    parts = (part.lower() for part in _NAME_PART.findall(name))
    return tuple(part for part in parts if len(part) > 1)


def _stems(parts: tuple[str, ...]) -> frozenset[str]:
    return frozenset(stem(part) for part in parts if part not in _GLUE)


def _same(part: str, word: str) -> bool:
    """Tell whether stems are equal, or `part` abbreviates `word` (`dir`: directory)."""
    return part == word or (len(part) >= 3 and word.startswith(part))
