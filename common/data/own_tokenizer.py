"""Byte-level BPE: every text has tokens and comes back as it was.

No normalizer and no unknown token: 256 byte symbols are always in the vocabulary. PAD and EOS are
two tokens (a response that ends in PAD is not one that ended), and neither can be written by a
user: the text "<|eos|>" is encoded as the seven characters that it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Final, Literal

from tokenizers import Regex
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as Chain
from tokenizers.trainers import BpeTrainer

from common.data.chat import ChatTemplate
from common.data.tokenizer_file import require_faithful, switched_off
from common.errors import ConfigError, DataError
from common.files import one_line, resolve, write_atomic

PAD: Final = "<|pad|>"
EOS: Final = "<|eos|>"
SMALLEST_VOCABULARY: Final = 256 + 2

Words = Literal["spaced", "identifiers"]

# Capitalised or lower-case words, runs of capitals, numbers, white space, everything else.
_IDENTIFIER: Final = r"\p{Lu}?\p{Ll}+|\p{Lu}+(?!\p{Ll})|[^\P{L}\p{Ll}]|\p{N}+|\s+|[^\s\p{L}\p{N}]+"

# Every byte that UTF-8 uses, each in a character of its own; runs of blanks.
_PROBE: Final = "".join(
    map(
        chr,
        (
            *range(0x100),  # one byte, and all that follow a first one
            *range(0x100, 0x800, 0x40),  # the first of two, of three, of four
            *(0x800, *range(0x1000, 0x10000, 0x1000)),
            *range(0x10000, 0x110000, 0x40000),
            *b"  \n\t",
        ),
    )
)


class OwnTokenizer:
    """A trained vocabulary; build it by `train` or `load`."""

    def __init__(self, rust: RustTokenizer) -> None:
        """Take a tokenizer whose PAD and EOS are known to exist."""
        rust.encode_special_tokens = True  # a setting of the object, not of the file
        self._rust = rust
        pad_id, eos_id = rust.token_to_id(PAD), rust.token_to_id(EOS)
        assert pad_id is not None and eos_id is not None, "train and load see to both"
        self._pad_id, self._eos_id = pad_id, eos_id
        # A vocabulary may have holes: ids that no token has.
        self._size = 1 + max(rust.get_vocab(with_added_tokens=True).values())

    @classmethod
    def train(cls, texts: Iterator[str], vocab_size: int, words: Words = "spaced") -> OwnTokenizer:
        """Learn merges from `texts`; equal texts give an equal tokenizer.

        Merges never cross the border of a word. "spaced" words bring the space before them along
        (GPT-2); "identifiers" end at spaces, underscores and changes of case, so that a word is
        the same token in `get_value`, `GetValue` and "get the value".

        The vocabulary is smaller than `vocab_size` when the texts have no more pairs to merge:
        size the model from the property `vocab_size`.

        Raises:
            ConfigError: `vocab_size` has no room for the 256 bytes and two special tokens.
        """
        if vocab_size < SMALLEST_VOCABULARY:
            raise ConfigError(
                f"vocab_size: {vocab_size} is too small; 256 bytes, PAD and EOS need at least "
                f"{SMALLEST_VOCABULARY}"
            )
        rust = RustTokenizer(BPE())
        rust.pre_tokenizer = _borders(words)
        rust.decoder = ByteLevelDecoder()
        trainer = BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[PAD, EOS],
            initial_alphabet=ByteLevel.alphabet(),
            show_progress=False,
        )
        rust.train_from_iterator(texts, trainer=trainer)
        return cls(rust)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> OwnTokenizer:
        """Read a `tokenizer.json` (local path or URI).

        Raises:
            DataError: missing, torn, without special PAD and EOS tokens, or lossy; names the part
                of the file (`common.data.tokenizer_file`).
        """
        name = os.fspath(path)
        filesystem, inner = resolve(path)
        try:
            with filesystem.open_input_stream(inner, compression=None) as stream:
                raw: bytes = stream.read()
        except OSError as error:
            raise DataError(
                f"{name}: cannot be read ({one_line(error)}); check the path"
            ) from error
        try:
            rust = RustTokenizer.from_str(raw.decode("utf-8-sig"))
        except Exception as error:  # the library raises bare Exception for a file it cannot read
            raise DataError(
                f"{name}: torn or not a tokenizer.json ({one_line(error)}); train or copy it again"
            ) from error
        values = json.loads(raw)
        require_faithful(values, name)
        clean = switched_off(values)
        if clean != values:
            rust = RustTokenizer.from_str(json.dumps(clean))
        tokens = rust.get_added_tokens_decoder()
        special = {token.content for token in tokens.values() if token.special}
        for token in (PAD, EOS):
            if token not in special:
                raise DataError(
                    f"{name}: field 'added_tokens': no special token {token!r}; PAD and EOS must "
                    "be two special tokens of these names, so train a tokenizer or add them"
                )
        for stated in clean["added_tokens"]:
            if (found := rust.token_to_id(stated["content"])) != stated["id"]:
                raise DataError(
                    f"{name}: field 'added_tokens': {stated['content']!r} is to be {stated['id']} "
                    f"and becomes {found}; give it the next free id, or the vocabulary's own"
                )
        tokenizer = cls(rust)
        tokenizer._require_lossless(name)
        return tokenizer

    def _require_lossless(self, name: str) -> None:
        """Raise DataError where a text does not come back, or spells a special token."""
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise DataError(
                f"{name}: text does not come back as it went in; use a byte-level tokenizer "
                "without a normalizer, whose vocabulary has all 256 bytes"
            )
        tokens = self._rust.get_added_tokens_decoder()
        special = {token_id for token_id, token in tokens.items() if token.special}
        for token in tokens.values():
            word = token.content
            for text in (word, f" {word} ", f"a{word}b", f"{word}{word}"):
                ids = self.encode(text)
                if not special.isdisjoint(ids):
                    raise DataError(
                        f"{name}: field 'added_tokens': a text that spells {word!r} becomes a "
                        "special token; take it out of model.vocab, or set model.ignore_merges "
                        "to false"
                    )
                if self.decode(ids) != text:
                    raise DataError(
                        f"{name}: field 'added_tokens': {word!r} does not come back as it went "
                        "in; take it out"
                    )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `tokenizer.json` atomically. Raises: StorageError."""
        write_atomic(path, [self._rust.to_str(pretty=True).encode()])

    def encode(self, text: str) -> list[int]:
        """Return token ids of `text`; nothing is added, no special id can come out."""
        ids: list[int] = self._rust.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str], *, follows: bool = False) -> list[list[int]]:
        """Encode every text as `encode` does, on all cores; what it follows changes nothing."""
        encodings = self._rust.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` without special tokens; a cut-off character becomes U+FFFD."""
        text: str = self._rust.decode(list(ids), skip_special_tokens=True)
        return text

    @property
    def pad_id(self) -> int:
        """The token that fills rows of a batch; never trained on."""
        return self._pad_id

    @property
    def eos_id(self) -> int:
        """The token that ends a response; trained on."""
        return self._eos_id

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """EOS alone."""
        return (self._eos_id,)

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """Nothing stands before a text."""
        return ()

    @property
    def chat(self) -> ChatTemplate | None:
        """It knows no chat."""
        return None

    @property
    def chat_missing(self) -> str:
        """Say so."""
        return "the run's tokenizer is one of ours, which has no chat template"

    @property
    def vocab_size(self) -> int:
        """The largest id and one: the rows of the embedding, special tokens included."""
        return self._size

    def spelling(self, place: int) -> str:
        """Return a token as the tokenizer's file spells it; empty where there is none."""
        token: str | None = self._rust.id_to_token(place)
        return token or ""

    def fingerprint(self) -> str:
        """Return 32 hex digits of what the tokenizer does; equal after save and load."""
        canonical = json.dumps(json.loads(self._rust.to_str()), sort_keys=True)
        return blake2b(canonical.encode(), digest_size=16).hexdigest()


def _borders(words: Words) -> PreTokenizer:
    """Build the steps that end words, and write their bytes as symbols."""
    if words == "spaced":
        return ByteLevel(add_prefix_space=False, use_regex=True)
    cut = Split(Regex(_IDENTIFIER), "isolated")
    return Chain([cut, ByteLevel(add_prefix_space=False, use_regex=False)])
