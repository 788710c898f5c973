"""Which decoders the native forward computes, and what each is described by."""

from __future__ import annotations

from typing import Literal

from common.models.decoder import Decoder
from common.models.palm import PaLM
from common.native.blocks import Description
from common.native.palm_blocks import PalmBlocks

Kernels = Literal["auto", "native", "torch"]
"""What a decoder is computed by: these kernels, PyTorch, or these where they can."""


def why_not(decoder: Decoder) -> str:
    """Say why the native forward does not run a decoder where it is; empty where it does."""
    device = next(decoder.parameters()).device
    if device.type != "cpu":
        return f"they are for processors, and it is on {device}"
    return lacking(decoder)


def lacking(decoder: Decoder) -> str:
    """Say which part of a decoder the native forward lacks; empty where it computes it."""
    if isinstance(decoder, PaLM):
        return ""
    # With `transformers`, which takes seconds to import: a run of PaLM does without.
    from common.native import llama_blocks

    return llama_blocks.lacking(decoder)


def describe(decoder: Decoder) -> Description:
    """Describe a decoder that nothing is lacking for (`why_not`)."""
    if isinstance(decoder, PaLM):
        return PalmBlocks(decoder)
    from common.native import llama_blocks

    return llama_blocks.LlamaBlocks(decoder)
