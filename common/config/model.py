"""Shape of the model by architecture, presets, adapters and the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from common.config.base import (
    Family,
    Float,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Section,
)

_ON_GPU = 1024.0
"""`ModelConfig.logits_mb` on a GPU, in MiB."""


class ModelConfig(Family):
    """The model, a shape of its own or a checkpoint: what every kind of it has."""

    kind: str
    """Where its shape and its first weights come from."""
    vocab_size: NonNegativeInt = 0
    """Number of tokens that have logits; 0 takes the tokenizer's."""
    context: PositiveInt = 128
    """Longest prompt + response, in tokens."""
    logits_mb: PositiveFloat | None = None
    """Largest block of fp32 logits at once, in MiB; more tokens than fit are read in pieces, whose
    logits are computed again in the backward pass. null: 4 of a model of one's own, 64 of a
    pretrained one, and on a GPU 1024."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, one third more time."""

    on_processor: ClassVar[float] = 4.0
    """`logits_mb` where it is null: what stays in a processor's caches."""

    def logits_rows(self, vocabulary: int, *, processor: bool = True) -> int:
        """Return how many tokens' logits fit into `logits_mb`, at least one.

        Each piece writes the gradient of the whole head once more, which a GPU would mostly do if
        its pieces were a processor's: 3.2 of 3.6 s of a step with 256k tokens and 4 MiB.

        Args:
            vocabulary: tokens that have logits.
            processor: they are computed on it, not on a GPU.
        """
        block = self.logits_mb or (self.on_processor if processor else _ON_GPU)
        return max(1, int(block * 2**20 / (4 * vocabulary)))

    @classmethod
    def kind_of(cls, values: Any) -> type[Section] | None:
        """Return the kind that is named; a checkpoint to start from is a pretrained model."""
        if cls is ModelConfig and isinstance(values, Mapping):
            values = ({"kind": "pretrained"} if "start" in values else {}) | dict(values)
        return super().kind_of(values)


class PalmConfig(ModelConfig):
    """PaLM (Chowdhery 2022, section 2 and table 1): parallel blocks, one key and one value head."""

    kind: Literal["palm"] = "palm"
    dim: PositiveInt = 192
    """Width d of the residual stream."""
    layers: PositiveInt = 4
    """Number of blocks L."""
    heads: PositiveInt = 4
    """Query heads h."""
    head_dim: PositiveInt = 48
    """Width of a head; 256 in PaLM."""
    ff_mult: PositiveInt = 4
    """Width of the SwiGLU layer in multiples of d."""
    xpos: bool = False
    """Length-extrapolating decay on the rotary embedding."""
    scale_logits: bool = True
    """Multiply logits by 1/sqrt(d): tied embeddings have unit variance (PaLM, section 5)."""

    @model_validator(mode="after")
    def _even_head(self) -> PalmConfig:
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, not {self.head_dim}")
        return self


class PretrainedConfig(ModelConfig):
    """A checkpoint in a Hugging Face folder, which `transformers` computes."""

    kind: Literal["pretrained"] = "pretrained"
    start: Annotated[PathText, Field(min_length=1)]
    """Folder of the checkpoint, with its ``config.json``, on every node (`talipot import SOURCE
    TARGET`)."""
    context: PositiveInt = 1024
    """Longest prompt + response, in tokens; at most what the checkpoint was made for."""
    on_processor: ClassVar[float] = 64.0


PROJECTIONS = ("q", "k", "v", "attn_out", "up", "gate", "ff_out")
"""Projections of a block of PaLM; `up`, `gate` and `ff_out` are the MLP's."""
ALL_PROJECTIONS = "all-linear"
"""Every projection of the blocks, whatever the model; PEFT's word."""


class LoraConfig(Section):
    """Adapters on a frozen base (Hu 2021, arXiv 2106.09685)."""

    rank: PositiveInt = 8
    """Inner width r of every adapter."""
    alpha: PositiveFloat = 16.0
    """Strength of the adapters, divided by the rank or its root."""
    scaling: Literal["plain", "rank_stabilised"] = "plain"
    """plain: alpha / r (Hu 2021); rank_stabilised: alpha / sqrt(r), whose updates do not shrink as
    the rank grows (Kalajdzievski 2023, arXiv 2312.03732)."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = (ALL_PROJECTIONS,)
    """Projections with an adapter: all-linear, or names. PaLM's are q, k, v, attn_out, up, gate and
    ff_out; those of a checkpoint are its modules', such as q_proj."""
    dropout: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that are left out, in supervised stages."""

    @field_validator("targets")
    @classmethod
    def _all(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        """Say "all" in one way."""
        every = ALL_PROJECTIONS in targets or set(targets) == set(PROJECTIONS)
        return (ALL_PROJECTIONS,) if every else targets

    def reaches(self, projection: str) -> bool:
        """Whether a projection of this name has an adapter."""
        return ALL_PROJECTIONS in self.targets or projection in self.targets

    @property
    def scale(self) -> float:
        """Factor of B A x."""
        return self.alpha / (self.rank if self.scaling == "plain" else self.rank**0.5)


def checkpoint_of(model: ModelConfig | None) -> Path | None:
    """Return the folder that a model starts from; None for one of our own."""
    return Path(model.start) if isinstance(model, PretrainedConfig) else None


PRESETS: Mapping[str, ModelConfig] = {
    "tiny": PalmConfig(dim=64, layers=2, heads=2, head_dim=32),
    "small": PalmConfig(),
    "palm-8b": PalmConfig(
        vocab_size=256_000, dim=4096, layers=32, heads=16, head_dim=256, context=2048
    ),
    "palm-62b": PalmConfig(
        vocab_size=256_000, dim=8192, layers=64, heads=32, head_dim=256, context=2048
    ),
    "palm-540b": PalmConfig(
        vocab_size=256_000, dim=18432, layers=118, heads=48, head_dim=256, context=2048
    ),
}


class TokenizerConfig(Section):
    """What text becomes for the model: a byte-level BPE, or a checkpoint's own tokenizer."""

    path: PathText | None = None
    """An existing tokenizer.json of ours, or a checkpoint's folder with its tokenizer; without one
    it is that of model.start, or one is trained on the demonstrations."""
    chat_template: PathText | None = None
    """A file with the template of conversations; without one it is the checkpoint's own."""
    vocab_size: PositiveInt = 2048
    """Size to train to, special tokens included."""
    words: Literal["spaced", "identifiers"] = "spaced"
    """spaced: a word brings the space before it (GPT-2); identifiers: words end at underscores and
    changes of case too, so that a word is the same token in code and in text."""
