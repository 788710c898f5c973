"""Tokenizers of checkpoints: ids as `transformers` has them, and no control token from a user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from common.data.own_tokenizer import OwnTokenizer
from common.data.pretrained_tokenizer import PretrainedTokenizer
from common.data.tokenizer import load_tokenizer
from common.errors import ConfigError, DataError
from tests.common.data.tokenizers import (
    CHATML,
    THINKING,
    byte_level,
    sentencepiece,
    settle,
    unigram,
)

KINDS: dict[str, Any] = {
    "byte level": lambda folder: byte_level(folder, template=THINKING),
    "sentencepiece": sentencepiece,
    "legacy": lambda folder: sentencepiece(folder, legacy=True),
    "unigram": unigram,
}
SPELLED = ["<|im_end|>", "<|im_start|>", "</s>", "<s>", "<think>", "</think>", "<unk>", "<", "|>"]
TEXT = st.lists(st.sampled_from([*SPELLED, " ", "\n", "the ship", "é", "名", "    "]), max_size=8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: make(root / kind.replace(" ", "_")) for kind, make in KINDS.items()}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> dict[str, PretrainedTokenizer]:
    return {kind: PretrainedTokenizer.load(folder) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def theirs(folders: dict[str, Path]) -> dict[str, Any]:
    return {
        kind: PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        for kind, folder in folders.items()
    }


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(text=st.text(st.sampled_from("the ship, a\n é名\t"), max_size=20))
def test_ids_of_plain_text_are_those_of_transformers(
    loaded: dict[str, PretrainedTokenizer], theirs: dict[str, Any], kind: str, text: str
) -> None:
    ours, other = loaded[kind], theirs[kind]
    ids = other(text, add_special_tokens=False)["input_ids"]
    assert ours.encode(text) == ids and ours.encode_batch([text]) == [ids]
    assert ours.decode(ids) == other.decode(ids, skip_special_tokens=True)
    if text:
        assert [*ours.prefix_ids, *ids] == other(text)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(parts=TEXT)
def test_no_text_becomes_a_control_token_and_it_comes_back(
    loaded: dict[str, PretrainedTokenizer], theirs: dict[str, Any], kind: str, parts: list[str]
) -> None:
    ours, text = loaded[kind], "".join(parts)
    for follows in (False, True):
        [ids] = ours.encode_batch([text], follows=follows)
        control = {*SPELLED} & set(theirs[kind].get_vocab()) - {"<", "|>"}
        unknown = theirs[kind].unk_token_id if "unigram" in kind else None  # what it cannot spell
        places = {theirs[kind].convert_tokens_to_ids(token) for token in control} - {unknown}
        assert not places & set(ids)
        if "unigram" not in kind:
            back = ours.decode(ids)
            # Sentencepiece's decoder drops the one blank that stands (or was put) before a text.
            blank = kind != "byte level" and back != text
            assert back == (text.removeprefix(" ") if blank else text)


def test_the_vocabulary_of_unigram_has_its_control_tokens(
    loaded: dict[str, PretrainedTokenizer], theirs: dict[str, Any]
) -> None:
    split = theirs["unigram"]("a</s>b", add_special_tokens=False, split_special_tokens=True)
    eos = loaded["unigram"].eos_id
    assert eos in split["input_ids"], "the trap: the library's own switch does not help"
    assert eos not in loaded["unigram"].encode("a</s>b")


def test_a_response_gets_no_blank_of_its_own(loaded: dict[str, PretrainedTokenizer]) -> None:
    for kind in ("sentencepiece", "legacy"):
        ours = loaded[kind]
        whole = ours.encode("the ship")
        [end] = ours.encode_batch([" ship"], follows=True)
        assert [*ours.encode("the"), *end] == whole, kind


def test_stop_ids_are_of_all_files_and_eos_is_first(tmp_path: Path) -> None:
    folder = byte_level(tmp_path, eos_token="<|endoftext|>")
    assert PretrainedTokenizer.load(folder).stop_ids == (0, 2), "and the template's end of turn"
    settle(folder, "generation_config.json", eos_token_id=[1, 0])
    assert PretrainedTokenizer.load(folder).stop_ids == (0, 1, 2)
    settle(folder, "generation_config.json", eos_token_id=1)
    assert PretrainedTokenizer.load(folder).stop_ids == (0, 1, 2)
    (folder / "generation_config.json").unlink()
    settle(folder, "config.json", eos_token_id=1, vocab_size=512)
    assert PretrainedTokenizer.load(folder).stop_ids == (0, 1, 2)


def test_pad_may_be_eos_or_missing(tmp_path: Path) -> None:
    one = PretrainedTokenizer.load(byte_level(tmp_path / "a", pad_token="<|im_end|>"))
    none = PretrainedTokenizer.load(byte_level(tmp_path / "b", pad_token=None))
    assert one.stop_ids == none.stop_ids == (2,)
    assert one.encode("the ship") == none.encode("the ship")


def test_bos_stands_before_a_text_as_the_settings_say(tmp_path: Path) -> None:
    folder = sentencepiece(tmp_path)
    assert PretrainedTokenizer.load(folder).prefix_ids == (1,)
    settle(folder, "tokenizer_config.json", add_bos_token=False)
    assert PretrainedTokenizer.load(folder).prefix_ids == ()
    settle(folder, "tokenizer_config.json", add_bos_token=True)
    assert PretrainedTokenizer.load(folder).prefix_ids == (1,)


def test_truncation_padding_and_dropout_are_off(tmp_path: Path) -> None:
    folder = byte_level(tmp_path)
    ids = PretrainedTokenizer.load(folder).encode("the ship")
    padding = {
        "strategy": {"Fixed": 32},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    cut = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    settle(folder, "tokenizer.json", padding=padding, truncation=cut)
    assert PretrainedTokenizer.load(folder).encode("the ship") == ids


def test_the_vocabulary_is_the_tokenizers_and_not_the_models(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path))
    size = tokenizer.vocab_size
    assert tokenizer.encode("    ") == [size - 1], "the last of the added tokens"


def test_save_copies_every_file_byte_for_byte(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "from")
    settle(folder, "generation_config.json", eos_token_id=[0, 2], temperature=0.6)
    (folder / "vocab.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    tokenizer = load_tokenizer(folder)
    tokenizer.save(tmp_path / "to")
    names = {path.name for path in (tmp_path / "to").iterdir()}
    assert names == {path.name for path in folder.iterdir()} - {"model.safetensors"}
    assert all((tmp_path / "to" / n).read_bytes() == (folder / n).read_bytes() for n in names)
    assert load_tokenizer(tmp_path / "to").fingerprint() == tokenizer.fingerprint()
    settle(folder, "generation_config.json", eos_token_id=[0])
    assert load_tokenizer(folder).fingerprint() != tokenizer.fingerprint()


def test_another_template_goes_along(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "from", template="{{ raise_exception('no') }}")
    (tmp_path / "mine.jinja").write_text(CHATML)
    tokenizer = load_tokenizer(folder, tmp_path / "mine.jinja")
    tokenizer.save(tmp_path / "to")
    assert (tmp_path / "to" / "chat_template.jinja").read_text() == CHATML
    assert load_tokenizer(tmp_path / "to").fingerprint() == tokenizer.fingerprint()


def test_where_templates_stand(tmp_path: Path) -> None:
    folder = byte_level(tmp_path, template="")
    assert "has no chat template" in load_tokenizer(folder).chat_missing
    several = [{"name": "rag", "template": "x"}, {"name": "tool_use", "template": "y"}]
    settle(folder, "tokenizer_config.json", chat_template=several)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat is None and "rag, tool_use and no 'default'" in tokenizer.chat_missing
    several.append({"name": "default", "template": CHATML})
    settle(folder, "tokenizer_config.json", chat_template=several)
    assert (chat := load_tokenizer(folder).chat) is not None and chat.source == CHATML
    settle(folder, "tokenizer_config.json", chat_template="in the settings")
    assert (chat := load_tokenizer(folder).chat) is not None and chat.source == "in the settings"
    (folder / "chat_template.jinja").write_text("a file of its own")
    assert (chat := load_tokenizer(folder).chat) is not None and chat.source == "a file of its own"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "no tokenizer.json; bring the tokenizer"),
        ("tokenizer.json", "{", "tokenizer.json: torn JSON"),
        ("tokenizer.json", "[]", "tokenizer.json: is no JSON object"),
        ("tokenizer.json", "{}", "tokenizer.json: field 'model': missing"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: torn JSON"),
        ("tokenizer_config.json", "{}", "no token ends a response; name it as eos_token in"),
        ("chat_template.jinja", "{% for %}", "chat_template.jinja:1: no chat template"),
    ],
)
def test_bad_files_are_one_line(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    folder = byte_level(tmp_path, template="")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(DataError) as refused:
        load_tokenizer(folder)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_template_needs_control_tokens(tmp_path: Path) -> None:
    OwnTokenizer.train(iter(["ab ab"]), 260).save(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match="has no control tokens"):
        load_tokenizer(tmp_path / "tokenizer.json", tmp_path / "chat.jinja")
