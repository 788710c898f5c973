"""The tokenizer of a pretrained checkpoint: any tokenizer.json, with its chat template.

Ids are those of `transformers`, with two exceptions that no ordinary text meets: what a user writes
never becomes a control token (`common.data.control_tokens`), and truncation, padding and dropout
are off. A pad token is not needed and not used; often it is EOS.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

from common.data.chat import ChatTemplate, written_by
from common.data.control_tokens import ControlTokens
from common.data.pretrained_files import (
    SETTINGS,
    TEMPLATE,
    TOKENIZER,
    TokenizerFiles,
    kept_files,
    read_files,
)
from common.errors import DataError
from common.files import one_line, write_atomic


class PretrainedTokenizer:
    """Built by `load`."""

    def __init__(self, files: TokenizerFiles, contents: Mapping[str, bytes]) -> None:
        """Take what the files say, and their contents by name.

        Raises:
            DataError: they are not those of a tokenizer.
        """
        self._contents = contents
        name = str(files.folder / TOKENIZER)
        values = _settled(files.tokenizer)
        self._rust = _built(values, name)
        self._require_ids(values, name)
        self._prefix = self._prefix_of(files)
        self._eos = self._endings(files)
        self._vocabulary = self._rust.get_vocab(with_added_tokens=True)
        self.chat_missing = "" if files.template else files.template_name
        """Why there is no chat template."""
        self._prepare(files, values, self._controls(files, values))
        if self.chat is not None and (end := self.chat.end_of_turn) is not None:
            if end not in self._control_tokens.special:  # the assistant may not write it
                self._prepare(files, values, self._controls(files, values, {end}))
            self._eos = tuple(dict.fromkeys((*self._eos, self._vocabulary[end])))
        if not self._eos:
            raise DataError(
                f"{files.folder}: no token ends a response; name it as eos_token in {SETTINGS}"
            )
        if self.chat is not None:
            spelled = {token: place for place in self._eos if (token := self.spelling(place))}
            self.chat.ends_with(spelled, self.eos_id)

    @classmethod
    def load(
        cls, folder: Path, chat_template: str | os.PathLike[str] | None = None
    ) -> PretrainedTokenizer:
        """Read a checkpoint's folder, or one that `save` wrote.

        Raises:
            DataError: a file is missing or torn, or the chat template is none.
        """
        given = None if chat_template is None else Path(chat_template).expanduser()
        files = read_files(folder, given)
        contents = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in kept_files(folder)
        }
        if given is not None:
            contents[TEMPLATE] = given.read_bytes()
        return cls(files, contents)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all files into a folder, byte for byte. Raises: StorageError."""
        for name, content in self._contents.items():
            write_atomic(Path(path) / name, [content])

    # ------------------------------------------------------------------ text and ids

    def encode(self, text: str) -> list[int]:
        """Return ids of `text`; nothing is added, and no control token can come out."""
        return self.encode_named(text)

    def encode_batch(self, texts: Sequence[str], *, follows: bool = False) -> list[list[int]]:
        """Encode every text, on all cores; `follows`: as what stands behind another text."""
        rust = self._following if follows else self._text
        return [e.ids for e in rust.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_named(self, text: str, *, follows: bool = False) -> list[int]:
        """Encode a text in which control tokens stand by their secret names (`ChatTemplate`)."""
        ids: list[int] = []
        if follows:
            first = self._control_tokens.name.search(text)
            head = text if first is None else text[: first.start()]
            ids += self._following.encode(head, add_special_tokens=False).ids
            text = text[len(head) :]
        return ids + list(self._text.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` without special tokens; blanks stay as they are."""
        text: str = self._rust.decode(list(ids), skip_special_tokens=True)
        return text

    # ------------------------------------------------------------------ tokens

    @property
    def eos_id(self) -> int:
        """The token that ends a text; behind every plain response that is learnt."""
        return self._eos[0]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """EOS of the tokenizer, all of the generation config, and the template's end of turn."""
        return self._eos

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """What stands before a plain text: BOS, or nothing."""
        return self._prefix

    @property
    def vocab_size(self) -> int:
        """The largest id and one, without rows that a model has beyond them."""
        return 1 + max(self._vocabulary.values())

    def spelling(self, place: int) -> str:
        """Return a token as the tokenizer's file spells it; empty where there is none."""
        token: str | None = self._rust.id_to_token(place)
        return token or ""

    def fingerprint(self) -> str:
        """Return 32 hex digits of all files' names and contents."""
        digest = blake2b(digest_size=16)
        for name, content in sorted(self._contents.items()):
            for part in (name.encode(), content):
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part)
        return digest.hexdigest()

    # ------------------------------------------------------------------ parts of the start

    def _prepare(
        self, files: TokenizerFiles, values: dict[str, Any], controls: ControlTokens
    ) -> None:
        """Build what encodes texts, and the template."""
        name = str(files.folder / TOKENIZER)
        renamed = controls.renamed(values)
        self._control_tokens = controls
        self._text = _built(renamed, name)
        bare = _without_blank(renamed)
        self._following = self._text if bare == renamed else _built(bare, name)
        self.chat = (
            ChatTemplate(
                files.template,
                files.template_name,
                variables=files.named,
                controls=controls,
                encoder=self,
            )
            if files.template
            else None
        )

    def _controls(
        self, files: TokenizerFiles, values: dict[str, Any], more: set[str] | None = None
    ) -> ControlTokens:
        """Tell control tokens: special ones, those that end a response, and the template's."""
        added = values["added_tokens"]
        special = {token["content"] for token in added if token["special"]} | (more or set())
        special |= {token for place in self._eos if (token := self.spelling(place))}
        # Runs of blanks are added tokens too, and any text may have them.
        plain = {token["content"] for token in added} - special
        plain = {token for token in plain if token.strip()}
        shared: set[str] = set()
        if files.template and plain:
            shared = written_by(files.template, files.template_name, files.named, plain)
        return ControlTokens(special=frozenset(special), shared=frozenset(shared))

    def _endings(self, files: TokenizerFiles) -> tuple[int, ...]:
        places = [self._rust.token_to_id(e) if isinstance(e, str) else e for e in files.eos]
        known = [place for place in places if place is not None and self.spelling(place)]
        return tuple(dict.fromkeys(known))

    def _prefix_of(self, files: TokenizerFiles) -> tuple[int, ...]:
        """Return what the post-processor puts before a text, as `transformers` would set it."""
        bos = files.named.get("bos_token")
        if files.add_bos is not None:
            place = self._rust.token_to_id(bos) if files.add_bos and bos else None
            return () if place is None else (place,)
        text, alone = "a", self._rust.encode("a", add_special_tokens=False).ids
        whole: list[int] = self._rust.encode(text).ids
        for begin in range(len(whole) - len(alone) + 1):
            if whole[begin : begin + len(alone)] == alone:
                return tuple(whole[:begin])
        return ()

    def _require_ids(self, values: Mapping[str, Any], name: str) -> None:
        for token in values["added_tokens"]:
            if (found := self._rust.token_to_id(token["content"])) != token["id"]:
                raise DataError(
                    f"{name}: field 'added_tokens': {token['content']!r} is to be {token['id']} "
                    f"and becomes {found}; copy the file again"
                )


def _settled(values: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer.json whose tokens are a function of the text, all of it."""
    clean = values | {"truncation": None, "padding": None}
    if clean["model"].get("dropout") is not None:
        clean["model"] = clean["model"] | {"dropout": None}
    return clean


def _built(values: Mapping[str, Any], name: str) -> RustTokenizer:
    try:
        return RustTokenizer.from_str(json.dumps(values))
    except Exception as error:  # the library raises bare Exception for a file it cannot read
        raise DataError(
            f"{name}: torn or not a tokenizer.json ({one_line(error)}); copy it again"
        ) from error


def _without_blank(values: Any) -> Any:
    """Return a tokenizer.json that puts no blank before a text."""
    if isinstance(values, list):
        return [_without_blank(v) for v in values if not _prepends(v)]
    if not isinstance(values, dict):
        return values
    parts = ("normalizer", "pre_tokenizer")
    changed = dict(values)
    for key in (*parts, "normalizers", "pretokenizers"):
        if key in changed:
            changed[key] = None if _prepends(changed[key]) else _without_blank(changed[key])
    if changed.get("type") == "Metaspace":
        changed |= {"prepend_scheme": "never", "add_prefix_space": False}
    if changed.get("type") == "ByteLevel" and "add_prefix_space" in changed:
        changed["add_prefix_space"] = False
    return changed


def _prepends(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "Prepend"
