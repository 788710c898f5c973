"""A GGUF file (llama.cpp's format) as a checkpoint's folder: weights dequantized, once.

`transformers` reads the file; what it passes over in silence is refused here, because a model that
lost its rotary scaling, or a tokenizer that splits text otherwise, still runs, only worse.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from common.errors import CheckpointError
from common.files import one_line
from common.models.pretrained.checks import be_quiet, probe, require_same
from common.models.pretrained.config_files import CONFIG, GENERATION
from common.models.pretrained.names import HEAD
from common.models.pretrained.writing import write_json, write_weights
from common.out_of_memory import require_memory

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Of GGUF files; mistral's call themselves llama."""
_DIGITS = ("smollm", "starcoder", "refact", "command-r")
"""Kinds of pre-tokenizer that split digits one by one and then as GPT-2."""
_GPT2 = ("gpt-2", "gpt2", "olmo", "mpt", "default")
_TIED = f"{HEAD}weight"
"""Left out of a file where it is the embedding."""
_PACKAGES = ("gguf", "accelerate")
_DEQUANTIZED = 4
"""Bytes of a number while it is dequantized."""


def convert_gguf(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write a GGUF file's model and tokenizer as a folder.

    Args:
        source: the file.
        folder: where to write; it exists.
        dtype: number type of the weights; fp32 keeps the dequantized values exactly.

    Raises:
        CheckpointError: torn, of an architecture or with settings that are not read, or the
            packages that read it are missing.
    """
    metadata, names, numbers = _header(source)
    _require_read(source, metadata, names)
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise CheckpointError(
            f"{source}: reading GGUF files takes the package {missing[0]}: pip install "
            "'talipot[gguf]'"
        )
    require_memory(
        numbers * (dtype.itemsize + _DEQUANTIZED), f"{source}: dequantized", "use another machine"
    )
    be_quiet()
    _write_tokenizer(source, folder)
    model = _read_model(source, dtype)
    config = {key: _shortest(value) for key, value in model.config.to_diff_dict().items()}
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    rotary = config.get("rope_parameters") or {}
    if "rope_theta" in rotary:  # where versions before 5, and others, look for it
        config["rope_theta"] = rotary["rope_theta"]
    config |= {"architectures": [type(model).__name__], "dtype": str(dtype).removeprefix("torch.")}
    write_json(folder / CONFIG, config)
    (folder / GENERATION).write_text(
        model.generation_config.to_json_string(use_diff=True), encoding="utf8"
    )
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop(_TIED, None)
    write_weights(state, dict.fromkeys(state, dtype), folder)
    vocabulary = model.config.vocab_size
    logits = probe(model, vocabulary)
    del model, state  # before it is read again
    require_same(folder, logits, vocabulary)


def _read_model(source: Path, dtype: torch.dtype) -> Any:
    """Let the library read the weights, and make sure that it drew none of them at random."""
    try:
        with _without_its_bar():
            read: Any = AutoModelForCausalLM.from_pretrained(
                source.parent,
                gguf_file=source.name,
                dtype=dtype,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # whatever its reader meets in a damaged file
        raise CheckpointError(f"{source}: cannot be read ({one_line(error)})") from None
    model, report = read
    tied = {_TIED} if model.config.tie_word_embeddings else set()
    if missing := sorted(set(report["missing_keys"]) - tied):
        raise CheckpointError(
            f"{source}: has no '{missing[0]}'; bring the parts of a split file as one file"
        )
    return model


@contextmanager
def _without_its_bar() -> Iterator[None]:
    """Keep the library's bar of dequantized tensors off the screen; no setting of its does that."""
    from transformers import modeling_gguf_pytorch_utils

    library: Any = modeling_gguf_pytorch_utils
    bar = library.tqdm
    library.tqdm = lambda tensors, **_: tensors
    try:
        yield
    finally:
        library.tqdm = bar


def _header(source: Path) -> tuple[Mapping[str, Any], tuple[str, ...], int]:
    """Return the file's settings, and names and number of its parameters."""
    from transformers.integrations.gguf.reader import GgufHeader, read_gguf_metadata

    try:
        metadata, names = read_gguf_metadata(str(source))
        header = GgufHeader.from_file(str(source))
    except Exception as error:  # whatever its reader meets in a damaged file
        raise CheckpointError(f"{source}: torn or not GGUF ({one_line(error)})") from None
    end = header.data_start + max(t.offset + t.nbytes for t in header.tensors)
    if source.stat().st_size < end:
        raise CheckpointError(f"{source}: torn: it ends before its last tensor; bring it again")
    return metadata, names, sum(math.prod(t.shape) for t in header.tensors)


def _require_read(source: Path, metadata: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Refuse what `transformers` would pass over.

    Raises:
        CheckpointError: an architecture, a setting or a pre-tokenizer that is not read.
    """
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    elsewhere = "bring this model as a folder of safetensors"
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{source}: GGUF files of '{architecture}' are not read, only of "
            f"{', '.join(ARCHITECTURES)}; {elsewhere}"
        )
    tables: Any = GGUF_CONFIG_MAPPING
    known = {f"{architecture}.{key}" for key in tables[architecture]}
    # A head's width, where it is what every head has.
    known |= {f"{architecture}.attention.{key}_length" for key in ("key", "value")}
    unread = sorted(k for k in metadata if k.startswith(f"{architecture}.") and k not in known)
    unread += [name for name in names if name.startswith("rope_freqs")]
    if unread:
        raise CheckpointError(f"{source}: its setting {unread[0]} is not read; {elsewhere}")
    if metadata.get("tokenizer.ggml.model") != "gpt2":
        return
    kind = metadata.get("tokenizer.ggml.pre", "default")
    if kind not in (*GGUF_PRE_TOKENIZER_SPLITS, *_DIGITS, *_GPT2):
        raise CheckpointError(
            f"{source}: its kind of pre-tokenizer '{kind}' is not read; {elsewhere}"
        )


def _write_tokenizer(source: Path, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        convert_gguf_tokenizer,
        get_gguf_tokenizer,
    )

    try:
        architecture, facts, settings = get_gguf_tokenizer(str(source))
        backend = _of_the_file(convert_gguf_tokenizer(architecture, facts)[0], len(facts["tokens"]))
    except Exception as error:  # whatever its reader meets in a damaged file
        raise CheckpointError(
            f"{source}: its tokenizer cannot be read ({one_line(error)})"
        ) from None
    if facts.get("pre_tokenizer_type") in _DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    given = {key: value for key, value in settings.items() if value is not None}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **given)
    tokenizer.save_pretrained(folder)
    # A class that every version knows, and that takes tokenizer.json as it is.
    path = folder / "tokenizer_config.json"
    written = json.loads(path.read_text(encoding="utf8"))
    write_json(path, written | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _of_the_file(backend: Tokenizer, tokens: int) -> Tokenizer:
    """Take out what the library's class added: tokens that the model has no embeddings for."""
    content = json.loads(backend.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["id"] < tokens]
    kept: Tokenizer = Tokenizer.from_str(json.dumps(content))
    return kept


def _shortest(value: Any) -> Any:
    """Return a number that was stored in single precision as it was meant: 1e-05."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
