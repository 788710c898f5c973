from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.data.own_tokenizer import EOS, PAD, SMALLEST_VOCABULARY, OwnTokenizer
from common.errors import ConfigError, DataError

TEXTS = [
    'def area(radius):\n    """Return the area of a circle.',
    'def close(self):\n    """Close the file and return the number of bytes.',
    "naïve café, " + EOS + PAD,
] * 5


@pytest.fixture(scope="module")
def tokenizer() -> OwnTokenizer:
    return OwnTokenizer.train(iter(TEXTS), 300)


@pytest.fixture(scope="module")
def identifiers() -> OwnTokenizer:
    return OwnTokenizer.train(iter(TEXTS), 300, "identifiers")


@given(st.text())
def test_every_text_comes_back(
    tokenizer: OwnTokenizer, identifiers: OwnTokenizer, text: str
) -> None:
    for one in (tokenizer, identifiers):
        ids = one.encode(text)
        assert one.decode(ids) == text
        assert not {one.pad_id, one.eos_id} & set(ids)


def test_a_word_is_the_same_token_in_code_and_in_text() -> None:
    texts = ["get_value getValue the value HTTPValue GetValue9"] * 9
    words = OwnTokenizer.train(iter(texts), 400, "identifiers")
    lower, upper = words.encode("value"), words.encode("Value")
    assert len(lower) == len(upper) == 1
    for text, word in (
        ("get_value", lower),
        ("the value", lower),
        ("getValue", upper),
        ("HTTPValue", upper),
    ):
        assert words.encode(text)[-1:] == word, text
    spaced = OwnTokenizer.train(iter(texts), 400)
    assert spaced.encode("the value")[-1:] != spaced.encode("_value")[-1:]


@given(st.lists(st.sampled_from([EOS, PAD, "<|", "|>", "eos", " ", "<", "a"])).map("".join))
def test_special_tokens_written_by_a_user_stay_text(tokenizer: OwnTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.pad_id, tokenizer.eos_id} & set(ids)
    assert tokenizer.encode_batch([text, "a"])[0] == ids


def test_special_ids_are_distinct_and_not_decoded(tokenizer: OwnTokenizer) -> None:
    assert tokenizer.pad_id != tokenizer.eos_id
    ids = [*tokenizer.encode("circle"), tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode(ids) == "circle"


def test_vocabulary_is_as_asked_and_every_id_fits(tokenizer: OwnTokenizer) -> None:
    assert tokenizer.vocab_size == 300
    assert max(max(tokenizer.encode(text)) for text in TEXTS) < 300
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2  # merges were learned


def test_small_corpus_gives_the_true_smaller_size() -> None:
    assert OwnTokenizer.train(iter(["ab", "ab"]), 1000).vocab_size == SMALLEST_VOCABULARY + 1


def test_training_is_deterministic(tokenizer: OwnTokenizer) -> None:
    again = OwnTokenizer.train(iter(TEXTS), 300)
    assert again.fingerprint() == tokenizer.fingerprint()
    assert OwnTokenizer.train(iter(TEXTS), 299).fingerprint() != tokenizer.fingerprint()


def test_save_and_load(tokenizer: OwnTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = OwnTokenizer.load(tmp_path / "tokenizer.json")
    text = TEXTS[2] * 3
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert (loaded.pad_id, loaded.eos_id) == (tokenizer.pad_id, tokenizer.eos_id)


def _edited(tokenizer: OwnTokenizer, path: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    tokenizer.save(path)
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


Edit = Callable[[dict[str, Any]], None]

# ------------------------------------------------------------------ what files of others carry


def _truncation(content: dict[str, Any]) -> None:
    content["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip


def _padding(content: dict[str, Any]) -> None:
    content["padding"] = {
        "strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": PAD,
    }  # fmt: skip


def _dropout(content: dict[str, Any]) -> None:
    content["model"]["dropout"] = 0.3


def _twice(content: dict[str, Any]) -> None:
    once, other = ({"Sequence": {"id": i, "type_id": 0}} for i in "AB")
    content["post_processor"] = {
        "type": "TemplateProcessing", "single": [once, once], "pair": [once, other],
        "special_tokens": {},
    }  # fmt: skip


def _with_eos(content: dict[str, Any]) -> None:
    text, eos = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": EOS, "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing", "single": [eos, text, eos], "pair": [eos, text, eos],
        "special_tokens": {EOS: {"id": EOS, "ids": [1], "tokens": [EOS]}},
    }  # fmt: skip


def _trim(content: dict[str, Any]) -> None:
    content["post_processor"] = {
        "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True
    }  # fmt: skip


def _nothing(content: dict[str, Any]) -> None:
    """As it was."""


def _adds(text: str, **flags: Any) -> Edit:
    """One more added token, with the next free id."""

    def edit(content: dict[str, Any]) -> None:
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        added = {"content": text, **plain, "id": 300, **flags}
        content["added_tokens"].append(added)

    return edit


def _both(*edits: Edit) -> Edit:
    def edit(content: dict[str, Any]) -> None:
        for one in edits:
            one(content)

    return edit


def _ignores_merges(content: dict[str, Any]) -> None:
    content["model"]["ignore_merges"] = True


HARMLESS: dict[str, Edit] = {
    edit.__name__: edit
    for edit in (_nothing, _truncation, _padding, _dropout, _twice, _with_eos, _trim)
}
ADDED: dict[str, Edit] = {
    "plain": _adds("<tool>"),
    "lstrip": _adds("<tool>", lstrip=True),
    "rstrip": _adds("<tool>", rstrip=True, normalized=True),
    "both": _adds("<tool>", lstrip=True, rstrip=True, single_word=True),
    "special": _adds("<tool>", lstrip=True, rstrip=True, special=True),
    "blanks": _adds("  "),
    "none": _nothing,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_a_setting_of_the_encoder_is_switched_off(
    tokenizer: OwnTokenizer, tmp_path: Path, name: str
) -> None:
    loaded = OwnTokenizer.load(_edited(tokenizer, tmp_path / "t.json", HARMLESS[name]))
    streams = {tuple(loaded.encode(TEXTS[0])) for _ in range(20)}
    assert streams == {tuple(tokenizer.encode(TEXTS[0]))}
    assert loaded.encode_batch([TEXTS[0]]) == [tokenizer.encode(TEXTS[0])]
    assert loaded.fingerprint() == tokenizer.fingerprint(), "and stays so once saved"


@pytest.fixture(scope="module")
def foreign(
    tokenizer: OwnTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> list[OwnTokenizer]:
    """Files of others in every pair of what they carry and what they add."""
    folder = tmp_path_factory.mktemp("foreign")
    every = _both(*HARMLESS.values(), _ignores_merges)
    return [
        OwnTokenizer.load(_edited(tokenizer, folder / "t.json", _both(carries, adds)))
        for carries in (_dropout, _twice, every)
        for adds in ADDED.values()
    ]


_WRITTEN = st.lists(
    st.sampled_from(["<tool>", "<tool", " ", "  ", "\n", "a", "é", "\u4e2d", EOS, PAD, "open"])
    | st.characters(exclude_categories=["Cs"])
).map("".join)


@given(_WRITTEN)
def test_tokens_are_a_function_of_the_text_and_it_of_them(
    foreign: list[OwnTokenizer], text: str
) -> None:
    for one in foreign:
        ids = one.encode(text)
        assert one.encode_batch([text, text]) == [ids, ids]
        assert one.decode(ids) == text
        assert not {one.pad_id, one.eos_id} & set(ids)
        assert all(0 <= token < one.vocab_size for token in ids)


@given(_WRITTEN)
def test_a_special_token_of_others_stays_text_too(foreign: list[OwnTokenizer], text: str) -> None:
    with_special = foreign[list(ADDED).index("special")]
    assert 300 not in with_special.encode(text)
    plain = foreign[list(ADDED).index("plain")]
    assert plain.encode(f" {text}<tool> ").count(300) == text.count("<tool>") + 1


def test_a_vocabulary_with_holes_has_rows_up_to_its_largest_id(
    tokenizer: OwnTokenizer, tmp_path: Path
) -> None:
    def hole(content: dict[str, Any]) -> None:
        content["model"]["vocab"]["zzz"] = 1000

    loaded = OwnTokenizer.load(_edited(tokenizer, tmp_path / "t.json", hole))
    assert loaded.vocab_size == 1001
    assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def _drop_eos(content: dict[str, Any]) -> None:
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != EOS]


def _plain_pad(content: dict[str, Any]) -> None:
    content["added_tokens"][0]["special"] = False


def _normalizer(name: str) -> Edit:
    def edit(content: dict[str, Any]) -> None:
        content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": name}]}

    return edit


def _cuts(**settings: Any) -> Edit:
    def edit(content: dict[str, Any]) -> None:
        parts = [settings, content["pre_tokenizer"]]
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}

    return edit


def _prefix(content: dict[str, Any]) -> None:
    content["pre_tokenizer"]["add_prefix_space"] = True


def _strips(content: dict[str, Any]) -> None:
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    content["decoder"] = {"type": "Sequence", "decoders": [content["decoder"], strip]}


def _no_decoder(content: dict[str, Any]) -> None:
    content["decoder"] = None


def _unigram(content: dict[str, Any]) -> None:
    vocab = [[token, -1.0] for token in content["model"]["vocab"]]
    content["model"] = {"type": "Unigram", "vocab": vocab, "unk_id": None, "byte_fallback": False}


def _no_chinese(content: dict[str, Any]) -> None:
    del content["model"]["vocab"]["\u00e4"]  # the symbol of byte 0xe4


def _whole_words(content: dict[str, Any]) -> None:
    _ignores_merges(content)
    content["pre_tokenizer"]["use_regex"] = False


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_drop_eos, "no special token '<|eos|>'; "),
        (_plain_pad, "no special token '<|pad|>'; "),
        *(
            (
                _normalizer(name),
                f"text does not come back as it went in; field 'normalizer': {name}",
            )
            for name in ("Lowercase", "NFC", "NFKC", "StripAccents")
        ),
        (
            _cuts(type="Split", pattern={"String": "qqq"}, behavior="Removed", invert=False),
            "field 'pre_tokenizer': Split drops ",
        ),
        (_cuts(type="CharDelimiterSplit", delimiter="q"), "CharDelimiterSplit drops "),
        (_cuts(type="Whitespace"), "Whitespace drops "),
        (_prefix, "add_prefix_space puts a blank before it; set it to false"),
        (_strips, "field 'decoder': is ByteLevel and Strip; "),
        (_no_decoder, "field 'decoder': is null; "),
        (_unigram, "field 'model': is Unigram; "),
        (_no_chinese, "whose vocabulary has all 256 bytes"),
        (_whole_words, "a text that spells '<|pad|>' becomes a special token; "),
        (_adds("café"), "'café' does not come back as it went in; take it out"),
        (_adds("\u0120q"), "does not come back as it went in; take it out"),
        (_adds("<x>", id=5000), "'<x>' is to be 5000 and becomes 300; "),
        (_adds("<x>", id=7), "'<x>' is to be 7 and becomes 300; "),
        (_both(_adds("<x>"), _adds("<x>", id=301)), "content '<x>' is there 2 times; keep one"),
        (_both(_adds("<x>"), _adds("<y>")), "id 300 is there 2 times; keep one"),
    ],
)
def test_unfit_tokenizer_is_refused(
    tokenizer: OwnTokenizer, tmp_path: Path, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = _edited(tokenizer, tmp_path / "t.json", edit)
    with pytest.raises(DataError) as caught:
        OwnTokenizer.load(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_torn_files(tokenizer: OwnTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    with pytest.raises(DataError, match=r"t\.json: cannot be read \("):
        OwnTokenizer.load(path)
    tokenizer.save(path)
    for raw in (path.read_bytes()[:-40], b"", b"\xff\xfe", b"{}"):
        path.write_bytes(raw)
        with pytest.raises(DataError, match=r"t\.json: torn or not a tokenizer\.json \(") as caught:
            OwnTokenizer.load(path)
        assert "\n" not in str(caught.value)


def test_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size: 257 is too small"):
        OwnTokenizer.train(iter(TEXTS), SMALLEST_VOCABULARY - 1)
    assert OwnTokenizer.train(iter(TEXTS), SMALLEST_VOCABULARY).vocab_size == SMALLEST_VOCABULARY
