"""The tokenizer's files of a checkpoint's folder: which they are, and what stands in them.

::

    tokenizer.json             the tokenizer itself
    tokenizer_config.json      names of its tokens (bos_token ...), often the chat template
    special_tokens_map.json    names of its tokens, in older folders
    chat_template.jinja        the chat template, before one that stands elsewhere
    generation_config.json     every token that ends a response
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from common.errors import DataError
from common.files import one_line

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
_TEMPLATES = "additional_chat_templates"
_NAMES, _GENERATION, _MODEL = (
    "special_tokens_map.json",
    "generation_config.json",
    "config.json",
)
_KEPT: Final = re.compile(
    r"tokenizer[\w.-]*|[\w.-]*\.(model|tiktoken)|vocab\.(json|txt)|merges\.txt"
    r"|added_tokens\.json|special_tokens_map\.json|generation_config\.json|chat_template\.\w+"
    rf"|{_TEMPLATES}/[\w.-]+\.jinja"
)
_NAMED: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
"""What `transformers` gives templates by name (and mask_token)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """What the files say."""

    folder: Path
    tokenizer: dict[str, Any]
    """Content of tokenizer.json; tokens that the others name are special in it."""
    named: Mapping[str, str]
    """Tokens by their names: bos_token, eos_token ..."""
    eos: tuple[int | str, ...]
    """Tokens that end a response, as ids or spelled, the tokenizer's own EOS first."""
    add_bos: bool | None
    """Whether BOS is to stand before a text; None: tokenizer.json says so."""
    template: str
    """The chat template; empty: none."""
    template_name: str
    """The file of it; where there is none, why."""


def kept_files(folder: Path) -> list[Path]:
    """List the files that make a tokenizer; of the model's only one that names its EOS."""
    present = sorted(path for path in folder.rglob("*") if path.is_file())
    kept = [p for p in present if _KEPT.fullmatch(p.relative_to(folder).as_posix())]
    model = folder / _MODEL
    return kept if folder / _GENERATION in kept or model not in present else [*kept, model]


def read_files(folder: Path, chat_template: Path | None = None) -> TokenizerFiles:
    """Read a folder's files; `chat_template` is another template than its own.

    Raises:
        DataError: one of them is missing or torn, or there is no EOS.
    """
    values = _json(folder / TOKENIZER)
    if values is None:
        raise DataError(
            f"{folder}: no {TOKENIZER}; bring the tokenizer that belongs to the model, or make it: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    if not isinstance(values.get("model"), dict):
        raise DataError(f"{folder / TOKENIZER}: field 'model': missing; copy the file again")
    settings = _json(folder / SETTINGS) or {}
    map_ = _json(folder / _NAMES) or {}
    generation = _json(folder / _GENERATION)
    if generation is None:  # then `transformers` takes them from the model's
        generation = _json(folder / _MODEL) or {}
    names = (*_NAMED, "mask_token")
    found = {name: _spelled(settings.get(name) or map_.get(name)) for name in names}
    named = {name: token for name, token in found.items() if token}
    ending = generation.get("eos_token_id")
    ids = ending if isinstance(ending, list) else [ending]
    eos = [named[name] for name in ("eos_token",) if name in named]
    stated = settings.keys() & {"add_bos_token", "add_eos_token"}
    template, where = _template(folder, settings, chat_template)
    try:
        values = _with_named(values, settings, named)
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder}: {TOKENIZER} and {SETTINGS} do not list tokens as they should "
            f"({one_line(repr(error))}); copy them again"
        ) from error
    return TokenizerFiles(
        folder=folder,
        tokenizer=values,
        named=named,
        eos=(*eos, *(i for i in ids if isinstance(i, int))),
        add_bos=bool(settings.get("add_bos_token")) if stated else None,
        template=template,
        template_name=where,
    )


def _template(folder: Path, settings: Mapping[str, Any], given: Path | None) -> tuple[str, str]:
    """Return the chat template and the name of its file, or why there is none."""
    if given is not None:
        if (text := _text(given)) is None:
            raise DataError(f"tokenizer.chat_template: {given}: no such file; check the path")
        return text, str(given)
    if (text := _text(folder / TEMPLATE)) is not None:
        return text, str(folder / TEMPLATE)
    stated, where = settings.get("chat_template"), folder / SETTINGS
    if stated is None:  # processors have it in a file of its own
        where = folder / "chat_template.json"
        stated = (_json(where) or {}).get("chat_template")
    if isinstance(stated, list):
        stated = {entry["name"]: entry["template"] for entry in stated}
    if isinstance(stated, str):
        return stated, str(where)
    several = dict(stated or {})
    for path in sorted((folder / _TEMPLATES).glob("*.jinja")):
        several[path.stem] = _text(path)
    if isinstance(several.get("default"), str):
        return several["default"], f"{where}, template 'default'"
    if several:
        return "", f"{folder} has chat templates {', '.join(sorted(several))} and no 'default'"
    return "", f"{folder} has no chat template"


def _with_named(
    values: dict[str, Any], settings: Mapping[str, Any], named: Mapping[str, str]
) -> dict[str, Any]:
    """Make tokens special that the settings call so, as `transformers` does."""
    stated = settings.get("added_tokens_decoder") or {}
    special = {token["content"] for token in stated.values() if token.get("special")}
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or ()
    listed = extra.values() if isinstance(extra, Mapping) else extra
    special |= {*named.values(), *filter(None, map(_spelled, listed))}
    added = values.setdefault("added_tokens", []) or []
    for token in added:
        token["special"] = token["special"] or token["content"] in special
    vocabulary = values["model"].get("vocab", {})
    pieces = (
        {piece: place for place, (piece, _) in enumerate(vocabulary)}
        if isinstance(vocabulary, list)
        else vocabulary
    )
    known = {token["content"] for token in added}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added += [
        {"id": pieces[token], "content": token, "special": True, **flags}
        for token in sorted(special - known)
        if token in pieces
    ]
    values["added_tokens"] = added
    return values


def _spelled(token: Any) -> str:
    """Return a token's text; some files have it as an object."""
    return str(token.get("content", "")) if isinstance(token, Mapping) else str(token or "")


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)}); copy it again") from error


def _json(path: Path) -> dict[str, Any] | None:
    if (text := _text(path)) is None:
        return None
    try:
        values = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: torn JSON ({one_line(error)}); copy it again") from error
    if not isinstance(values, dict):
        raise DataError(f"{path}: is no JSON object; copy it again")
    return values
