"""Whether a checkpoint can be used at all: asked once, when it is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
)
from transformers.tokenization_utils_base import FULL_TOKENIZER_FILE
from transformers.utils import logging

from common.errors import CheckpointError
from common.files import one_line
from common.models.pretrained.checkpoint import Checkpoint, settings_of

_PROBE = 8
"""Tokens on which two forms of a model are compared."""
_CLOSE = 1e-4


def require_usable(checkpoint: Checkpoint) -> None:
    """Compare configuration, weights and tokenizer with each other; no weights are loaded.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape; there is no
            tokenizer.json; or the vocabulary is smaller than the tokenizer.
    """
    settings = settings_of(checkpoint.config, checkpoint.path)
    if checkpoint.labels:
        settings.num_labels = checkpoint.labels
    kinds: Any = (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        if checkpoint.labels
        else MODEL_FOR_CAUSAL_LM_MAPPING
    )
    with torch.device("meta"):
        module: nn.Module = kinds[type(settings)](settings)
    checkpoint.require(module)
    rows, tokens = checkpoint.facts[checkpoint.embedding].shape[0], _tokens(checkpoint.path)
    if tokens > rows:
        raise CheckpointError(
            f"{checkpoint.path}: the tokenizer has {tokens} tokens and the model embeds {rows}; "
            "bring the tokenizer that belongs to it"
        )


def be_quiet() -> None:
    """Keep the library's bars and reports off the screen: what is wrong is one line of ours."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def probe(model: nn.Module, vocabulary: int) -> Tensor:
    """Logits of a few tokens."""
    tokens = torch.arange(_PROBE)[None] * 7 % vocabulary
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=tokens, use_cache=False).logits
    return logits


def require_same(folder: Path, expected: Tensor, vocabulary: int) -> None:
    """Load a folder that was written, and compare what it computes.

    Raises:
        CheckpointError: other logits than expected.
    """
    be_quiet()
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype="auto")
    apart = float((probe(model, vocabulary).float() - expected.float()).abs().max())
    if not apart <= _CLOSE * float(expected.abs().max().clamp(min=1.0)):
        raise CheckpointError(f"{folder}: computes other logits than its source, by {apart:.2g}")


def _tokens(folder: Path) -> int:
    """Return one more than the highest id that the tokenizer makes."""
    path = folder / FULL_TOKENIZER_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: no {FULL_TOKENIZER_FILE}; bring the model's own tokenizer, or "
            "make it: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    try:
        vocabulary: dict[str, int] = Tokenizer.from_file(str(path)).get_vocab()
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path}: cannot be read ({one_line(error)})") from None
    return max(vocabulary.values(), default=-1) + 1
