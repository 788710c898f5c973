"""What every part of a run asks of a tokenizer, and where one is read from.

A run has a tokenizer of its own (``tokenizer.json``, `OwnTokenizer`) or that of a pretrained
checkpoint (a folder, `PretrainedTokenizer`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from common.data.chat import ChatTemplate
from common.data.own_tokenizer import OwnTokenizer
from common.data.pretrained_tokenizer import PretrainedTokenizer
from common.errors import ConfigError
from common.files import is_local


class Tokenizer(Protocol):
    """Text to ids and back. What is learnt or masked follows from lengths, never from ids."""

    @property
    def eos_id(self) -> int:
        """The token that ends a text; behind every plain response that is learnt."""
        ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """All tokens that end a response, `eos_id` first."""
        ...

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """What stands before a plain text: BOS, or nothing."""
        ...

    @property
    def vocab_size(self) -> int:
        """The largest id and one; a model may have more rows than that, which are never used."""
        ...

    @property
    def chat(self) -> ChatTemplate | None:
        """The template of conversations, if there is one."""
        ...

    @property
    def chat_missing(self) -> str:
        """Why there is none."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without prefix and EOS; no control token can come out."""
        ...

    def encode_batch(self, texts: Sequence[str], *, follows: bool = False) -> list[list[int]]:
        """Encode every text; `follows`: as what stands behind another text, a response."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        ...

    def spelling(self, place: int) -> str:
        """Return a token as the tokenizer's file spells it; empty where there is none."""
        ...

    def fingerprint(self) -> str:
        """Return 32 hex digits of all that it does."""
        ...

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it so that `load_tokenizer` reads it: a file, or a folder."""
        ...


def load_tokenizer(
    path: str | os.PathLike[str], chat_template: str | os.PathLike[str] | None = None
) -> Tokenizer:
    """Read a run's own tokenizer (a file) or a checkpoint's (its folder).

    Args:
        path: the file or folder.
        chat_template: a template to take instead of the checkpoint's.

    Raises:
        DataError: it cannot be read, or is not what it should be; names the file and the part.
        ConfigError: a template for a tokenizer that has no control tokens.
    """
    if is_local(path) and Path(path).expanduser().is_dir():
        return PretrainedTokenizer.load(Path(path).expanduser(), chat_template)
    if chat_template is not None:
        raise ConfigError(
            f"tokenizer.chat_template: {os.fspath(path)} has no control tokens to write; chat "
            "needs the tokenizer of a pretrained model, so name its folder in tokenizer.path"
        )
    return OwnTokenizer.load(path)
