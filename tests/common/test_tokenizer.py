from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError, DataError
from common.tokenizer import EOS, PAD, SMALLEST_VOCABULARY, Tokenizer

TEXTS = [
    'def area(radius):\n    """Return the area of a circle.',
    'def close(self):\n    """Close the file and return the number of bytes.',
    "naïve café, " + EOS + PAD,
] * 5


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(iter(TEXTS), 300)


@pytest.fixture(scope="module")
def identifiers() -> Tokenizer:
    return Tokenizer.train(iter(TEXTS), 300, "identifiers")


@given(st.text())
def test_every_text_comes_back(tokenizer: Tokenizer, identifiers: Tokenizer, text: str) -> None:
    for one in (tokenizer, identifiers):
        ids = one.encode(text)
        assert one.decode(ids) == text
        assert not {one.pad_id, one.eos_id} & set(ids)


def test_a_word_is_the_same_token_in_code_and_in_text() -> None:
    texts = ["get_value getValue the value HTTPValue GetValue9"] * 9
    words = Tokenizer.train(iter(texts), 400, "identifiers")
    lower, upper = words.encode("value"), words.encode("Value")
    assert len(lower) == len(upper) == 1
    for text, word in (
        ("get_value", lower),
        ("the value", lower),
        ("getValue", upper),
        ("HTTPValue", upper),
    ):
        assert words.encode(text)[-1:] == word, text
    spaced = Tokenizer.train(iter(texts), 400)
    assert spaced.encode("the value")[-1:] != spaced.encode("_value")[-1:]


@given(st.lists(st.sampled_from([EOS, PAD, "<|", "|>", "eos", " ", "<", "a"])).map("".join))
def test_special_tokens_written_by_a_user_stay_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.pad_id, tokenizer.eos_id} & set(ids)
    assert tokenizer.encode_batch([text, "a"])[0] == ids


def test_special_ids_are_distinct_and_not_decoded(tokenizer: Tokenizer) -> None:
    assert tokenizer.pad_id != tokenizer.eos_id
    assert tokenizer.bos_id is None
    ids = [*tokenizer.encode("circle"), tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode(ids) == "circle"


def test_vocabulary_is_as_asked_and_every_id_fits(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 300
    assert max(max(tokenizer.encode(text)) for text in TEXTS) < 300
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2  # merges were learned


def test_small_corpus_gives_the_true_smaller_size() -> None:
    assert Tokenizer.train(iter(["ab", "ab"]), 1000).vocab_size == SMALLEST_VOCABULARY + 1


def test_training_is_deterministic(tokenizer: Tokenizer) -> None:
    again = Tokenizer.train(iter(TEXTS), 300)
    assert again.fingerprint() == tokenizer.fingerprint()
    assert Tokenizer.train(iter(TEXTS), 299).fingerprint() != tokenizer.fingerprint()


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    text = TEXTS[2] * 3
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert (loaded.pad_id, loaded.eos_id) == (tokenizer.pad_id, tokenizer.eos_id)


def _edited(tokenizer: Tokenizer, path: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    tokenizer.save(path)
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


def test_truncation_and_padding_of_a_file_are_switched_off(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["truncation"] = {
            "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0
        }  # fmt: skip
        content["padding"] = {
            "strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": PAD,
        }  # fmt: skip

    loaded = Tokenizer.load(_edited(tokenizer, tmp_path / "t.json", edit))
    assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert loaded.fingerprint() == tokenizer.fingerprint()


def _drop_eos(content: dict[str, Any]) -> None:
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != EOS]


def _plain_pad(content: dict[str, Any]) -> None:
    content["added_tokens"][0]["special"] = False


def _lower_case(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Lowercase"}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_drop_eos, "no special token '<|eos|>'; "),
        (_plain_pad, "no special token '<|pad|>'; "),
        (_lower_case, "text does not come back as it went in; "),
    ],
)
def test_unfit_tokenizer_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = _edited(tokenizer, tmp_path / "t.json", edit)
    with pytest.raises(DataError) as caught:
        Tokenizer.load(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_torn_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    with pytest.raises(DataError, match=r"t\.json: cannot be read \("):
        Tokenizer.load(path)
    tokenizer.save(path)
    for raw in (path.read_bytes()[:-40], b"", b"\xff\xfe", b"{}"):
        path.write_bytes(raw)
        with pytest.raises(DataError, match=r"t\.json: torn or not a tokenizer\.json \(") as caught:
            Tokenizer.load(path)
        assert "\n" not in str(caught.value)


def test_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size: 257 is too small"):
        Tokenizer.train(iter(TEXTS), SMALLEST_VOCABULARY - 1)
    assert Tokenizer.train(iter(TEXTS), SMALLEST_VOCABULARY).vocab_size == SMALLEST_VOCABULARY
