"""A tokenizer.json of others: what is switched off in it, and what it is refused for.

Tokens are to be a function of the text, and the text of its tokens. That is so by construction
where nothing rewrites the text, what cuts it drops nothing, byte-level BPE chooses without chance,
and an added token takes nothing around it. A setting that only says how a text is encoded (dropout,
truncation, padding, what is put around it, blanks taken along) is switched off; one that belongs to
the vocabulary is refused with its name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, Final

from common.errors import DataError

_AROUND: Final = ("truncation", "padding", "post_processor")
_TAKES_ALONG: Final = ("lstrip", "rstrip")
_CUTS: Final = ("ByteLevel", "Split", "Punctuation", "Digits", "UnicodeScripts", "FixedLength")
_LOSSLESS: Final = "text does not come back as it went in"


def switched_off(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the file's content without truncation, padding and the like."""
    clean = deepcopy(dict(values))
    for part in _AROUND:
        clean[part] = None
    if clean["model"].get("dropout") is not None:
        clean["model"]["dropout"] = None
    for token in clean.get("added_tokens") or ():
        for blanks in _TAKES_ALONG:
            if token.get(blanks):
                token[blanks] = False
    return clean


def require_faithful(values: Mapping[str, Any], name: str) -> None:
    """Raise DataError for a part that loses text, or whose tokens depend on more than the text."""
    model = values["model"].get("type", "BPE")
    if model != "BPE":
        raise DataError(f"{name}: field 'model': is {model}; use a byte-level BPE")
    for part in _parts(values.get("normalizer")):
        if part["type"] != "ByteLevel":
            raise DataError(
                f"{name}: {_LOSSLESS}; field 'normalizer': {part['type']} rewrites it, so use a "
                "tokenizer without a normalizer, or set it to null"
            )
    for part in _parts(values.get("pre_tokenizer")):
        if part["type"] not in _CUTS or part.get("behavior") == "Removed":
            raise DataError(
                f"{name}: {_LOSSLESS}; field 'pre_tokenizer': {part['type']} drops a part of it; "
                "use a byte-level tokenizer"
            )
        if part["type"] == "ByteLevel" and part.get("add_prefix_space", True):
            raise DataError(
                f"{name}: {_LOSSLESS}; field 'pre_tokenizer': add_prefix_space puts a blank before "
                "it; set it to false"
            )
    decoders = [part["type"] for part in _parts(values.get("decoder"))]
    if decoders != ["ByteLevel"]:
        raise DataError(
            f"{name}: {_LOSSLESS}; field 'decoder': is {' and '.join(decoders) or 'null'}; use a "
            "byte-level tokenizer, whose decoder is ByteLevel alone"
        )
    _require_distinct(values.get("added_tokens") or (), name)


def _require_distinct(tokens: Sequence[Mapping[str, Any]], name: str) -> None:
    for key in ("content", "id"):
        value, times = Counter(token[key] for token in tokens).most_common(1)[0]
        if times > 1:
            raise DataError(
                f"{name}: field 'added_tokens': {key} {value!r} is there {times} times; keep one"
            )


def _parts(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Return a part of the pipeline, or those that it is a sequence of."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
        return
    for inner in next(value for value in part.values() if isinstance(value, list)):
        yield from _parts(inner)
