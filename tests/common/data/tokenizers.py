"""Small tokenizers of the kinds that checkpoints bring, trained here, with their chat templates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer, UnigramTrainer

TEXTS = [
    "You are a helpful assistant that writes short texts about ships, rivers and maps.",
    "Write a text of exactly three lines, all in lower case, without commas, about a harbour.",
    "the river runs from the hills to the sea and the ships follow the map of the harbour",
    "think about it, then answer: what is the capital of France? It is Paris, on the Seine.",
] * 4

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if tools %}{{ '<tools>' + (tools | tojson) + '</tools>\n' }}{% endif %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant') }}"
    "{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
THINKING = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and '</think>' in m['content'] and loop.index0 < ns.last %}"
    "{{ m['content'].split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write(folder: Path, rust: Tokenizer, settings: Mapping[str, Any], template: str = "") -> Path:
    """Write a tokenizer as a checkpoint's folder has it."""
    folder.mkdir(parents=True, exist_ok=True)
    rust.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def byte_level(folder: Path, template: str = CHATML, **more: Any) -> Path:
    """ChatML as of Qwen: bytes, no BOS, pad is not EOS, plain added tokens."""
    rust = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r"\s*[\r\n]+|\s*\w+|[^\s\w]+|\s+"), "isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.pre_tokenizer = pre_tokenizers.Sequence([words, plain])
    rust.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    rust.train_from_iterator(TEXTS, trainer)
    rust.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>", "    ")])
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", **more}
    return write(folder, rust, settings, template)


def sentencepiece(folder: Path, *, legacy: bool = False, template: str = LLAMA) -> Path:
    """As of Llama 2: byte fallback, a blank before a text, BOS; pad is EOS."""
    rust = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    space = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=True)
    rust.pre_tokenizer = space
    escapes = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = BpeTrainer(
        vocab_size=520, special_tokens=["<unk>", "<s>", "</s>", *escapes], show_progress=False
    )
    rust.train_from_iterator(TEXTS, trainer)
    values = json.loads(rust.to_str())
    values["added_tokens"] = values["added_tokens"][:3]  # bytes are tokens of the model
    rust = Tokenizer.from_str(json.dumps(values))
    if legacy:
        rust = Tokenizer.from_str(json.dumps(values | {"pre_tokenizer": None}))
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        rust.normalizer = normalizers.Sequence(steps)
    else:
        rust.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    rust.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    rust.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    return write(folder, rust, settings, template)


def unigram(folder: Path) -> Path:
    """A model whose own vocabulary has the control tokens, which it finds in any text."""
    rust = Tokenizer(models.Unigram())
    rust.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    rust.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    trainer = UnigramTrainer(
        vocab_size=90,
        special_tokens=["<unk>", "</s>"],
        unk_token="<unk>",
        initial_alphabet=list("</s>|abcdefghijklmnopqrstuvwxyz"),
        show_progress=False,
    )
    rust.train_from_iterator(TEXTS, trainer)
    return write(folder, rust, {"eos_token": "</s>", "unk_token": "<unk>"})


def settle(folder: Path, name: str, **values: Any) -> Path:
    """Change a JSON file of a folder."""
    path = folder / name
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | values))
    return folder
