"""A decoder that `transformers` computes, from a checkpoint in a Hugging Face folder.

The library's module gives the states. Its projections, embedding and norms are replaced by ours of
the same names, so that adapters, number types and ZeRO treat it as any other decoder; its attention
is an argument (`common.models.pretrained.attention`), so that training and generation run the same
blocks. The state dict has the checkpoint's own names.

Rows are packed (`common.models.packing`): tokens of all sequences one after another, without
padding, each response attending to its prompt and itself alone. The library's own packing by
positions is not used: with a cache, or with a mask of ones, it lets sequences attend to each other.

Shape suffixes: B sequences, T positions, N flat tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer

from common.config.model import PretrainedConfig
from common.devices import PROCESSOR
from common.errors import CheckpointError
from common.models.attention import PLAIN, Attention, Mixing
from common.models.decoder import Decoder
from common.models.embedding import (
    HeadReader,
    OutputHead,
    Reader,
    Rule,
    TiedEmbedding,
    as_it_is,
)
from common.models.filling import Source, Weights, held, streamed, without_memory
from common.models.lora import (
    OFF,
    Adapted,
    RowSelection,
    running_with,
    selected,
)
from common.models.packing import pack
from common.models.precision import wide
from common.models.pretrained import falcon
from common.models.pretrained.attention import NAME, attending, attention_now
from common.models.pretrained.checkpoint import Checkpoint
from common.models.pretrained.families import FAMILIES, Shape, read_shape, sizes_of

_PROBE = 8
"""Tokens whose logits are compared with the library's."""
_CLOSE = 1e-4


class InputEmbedding(TiedEmbedding):
    """The library's embedding: in fp32, as the residual stream is, and scaled where it does so."""

    scale = 1.0

    def forward(
        self,
        x: Tensor,
        to_logits: bool = False,
        read: Reader | HeadReader | None = None,
        rows: int = 0,
        vocabulary: int | None = None,
        rule: Rule = as_it_is,
    ) -> Tensor:
        """Embed tokens, or make logits of states, as `TiedEmbedding`."""
        out = super().forward(x, to_logits, read, rows, vocabulary, rule)
        return out if to_logits else wide(out) * self.scale


class WideLayerNorm(nn.LayerNorm):
    """LayerNorm in fp32, whatever the dtype of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., D]``."""
        bias = None if self.bias is None else wide(self.bias)
        return F.layer_norm(wide(x), self.normalized_shape, wide(self.weight), bias, self.eps)


class PretrainedDecoder(Decoder):
    """A module of `transformers` as a decoder, on the device of its parameters."""

    shares_prompts = True

    def __init__(self, config: PretrainedConfig) -> None:
        """Build the module; `initialise` or a file of weights fills it.

        Raises:
            CheckpointError: the folder has no readable ``config.json``, or is of a model that is
                not supported.
            ConfigError: the context is longer than the model's own.
        """
        folder = Path(config.start)
        shape = read_shape(folder)
        super().__init__(sizes_of(shape, config.context, folder))
        self.config, self.shape, self.rule = config, shape, FAMILIES[shape.model_type](shape)
        module = _module(shape)
        self._base: str = module.base_model_prefix
        for name, child in module.named_children():
            self.add_module(name, child)
        paths = {type(part): path for path, part in self.named_modules()}
        self._embedding, self._output = paths[InputEmbedding], paths.get(OutputHead)
        if config.activation_checkpointing:
            _checkpoint_blocks(self)

    def first_weights(self, seed: int) -> Weights:
        """Take the checkpoint's weights; nothing is drawn."""
        return Checkpoint.open(self.config.start).weights(self).items()

    @torch.no_grad()
    def check(self, sources: Mapping[str, Source] | None = None) -> None:
        """Compare logits of a few tokens with the library's own module on the same weights.

        Args:
            sources: as `Decoder.check`; both modules then have one part's weights at a time.

        Raises:
            CheckpointError: they differ by more than rounding.
        """
        with no_init_weights(), without_memory():
            module = AutoModelForCausalLM.from_config(
                read_shape(Path(self.config.start)),
                attn_implementation="eager",
                dtype=torch.float32,
            )
        module.tie_weights()
        tokens = torch.arange(_PROBE)[None] * 7 % self.embedding.num_embeddings
        packed = pack(tokens)
        own = sources or {name: held(tensor) for name, tensor in self.state_dict().items()}
        with streamed(self, own), streamed(module.eval(), own):
            states = self.states(packed.tokens_N, packed.positions_N, packed.attention, OFF)
            found = self.logits(packed.unpack(states))
            expected = module(input_ids=tokens, use_cache=False).logits[..., : found.shape[-1]]
        apart = float((found - expected).abs().max())
        if not apart <= _CLOSE * max(1.0, float(expected.abs().max())):
            raise CheckpointError(
                f"{self.config.start}: transformers computes other logits, by {apart:.2g}; this "
                "variant of the family is not supported"
            )

    def states(
        self, tokens: Tensor, positions: Tensor, attention: Attention, adapter: RowSelection
    ) -> Tensor:
        """Compute the final normalised states, as `Decoder.states`."""
        shape = tokens.shape
        with _running(_reshaped(attention, shape), adapter):
            out = self.base(
                input_ids=tokens.reshape(1, -1),
                position_ids=positions.expand(shape).reshape(1, -1),
                use_cache=False,
            )
        return wide(out.last_hidden_state).view(*shape, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits ``[..., V]`` of the tokenizer's tokens."""
        return self.rule(self._head(hidden).float())

    def read(self, hidden: Tensor, read: Reader | HeadReader) -> Tensor:
        """Return what a reader makes of the logits, in pieces (`ModelConfig.logits_mb`)."""
        vocabulary = self.config.vocab_size or self.embedding.num_embeddings
        on_processor = hidden.device.type == PROCESSOR
        rows = self.config.logits_rows(vocabulary, processor=on_processor)
        values = self._head(hidden.flatten(0, -2), read=read, rows=rows, rule=self.rule)
        return values.view(*hidden.shape[:-1], values.shape[-1])

    @property
    def embedding(self) -> InputEmbedding:
        """The input embedding, which is the output head too where they are tied."""
        embedding = self.get_submodule(self._embedding)
        assert isinstance(embedding, InputEmbedding)
        return embedding

    @property
    def base(self) -> Any:
        """The library's module below the output head."""
        return self.get_submodule(self._base)

    @property
    def head_weight(self) -> Tensor:
        """The output head's weight, ``[V, D]``; that of the embedding where they are tied."""
        if self._output is None:
            return self.embedding.weight
        output = self.get_submodule(self._output)
        assert isinstance(output, OutputHead)
        return output.weight

    def _head(self, hidden: Tensor, **reading: Any) -> Tensor:
        """Make products of the tokenizer's tokens; rows of the head beyond them are no tokens."""
        reading["vocabulary"] = self.config.vocab_size or None
        if self._output is None:
            tied: Tensor = self.embedding(hidden, to_logits=True, **reading)
            return tied
        own: Tensor = self.get_submodule(self._output)(hidden, **reading)
        return own


def _module(shape: Shape) -> Any:
    """Build the library's module with parts of ours; its weights are not drawn."""
    for name, value in shape.to_dict().items():
        if name.endswith(("dropout", "pdrop")) and isinstance(value, float):
            setattr(shape, name, 0.0)  # log-probabilities are those of the whole network
    falcon.register()
    with no_init_weights():
        module = AutoModelForCausalLM.from_config(
            shape, attn_implementation=NAME, dtype=torch.float32
        )
        embedding, output = module.get_input_embeddings(), module.get_output_embeddings()
        for path, part in list(module.named_modules()):
            parent, _, name = path.rpartition(".")
            if part is output:
                if shape.tie_word_embeddings:
                    delattr(module.get_submodule(parent), name)
                    continue
                ours: nn.Module = OutputHead(
                    part.in_features, part.out_features, bias=part.bias is not None
                )
            elif part is embedding:
                ours = InputEmbedding(part.num_embeddings, part.embedding_dim)
                ours.scale = float(getattr(part, "scalar_embed_scale", 1.0))
            elif isinstance(part, nn.Linear):
                ours = Adapted(
                    part.in_features, {name: part.out_features}, bias=part.bias is not None
                )
            elif type(part) is nn.LayerNorm:
                part.__class__ = WideLayerNorm
                continue
            else:
                continue
            setattr(module.get_submodule(parent), name, ours)
    return module


@contextmanager
def _running(attention: Attention, adapter: RowSelection) -> Iterator[None]:
    with attending(attention), running_with(adapter):
        yield


def _reshaped(attention: Attention, shape: Sequence[int]) -> Attention:
    """Let an attention over tokens of some leading shape run on flat ones."""
    if len(shape) == 1:
        return attention

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, mixing: Mixing = PLAIN) -> Tensor:
        q, k, v = (t.unflatten(0, tuple(shape)) for t in (q, k, v))
        return attention(layer, q, k, v, mixing).flatten(0, len(shape) - 1)

    return attend


def _checkpoint_blocks(decoder: nn.Module) -> None:
    """Recompute the activations of every block in the backward pass."""
    for module in decoder.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing = True
            setattr(module, "_gradient_checkpointing_func", _recomputed)  # noqa: B010


def _recomputed(run: Callable[..., Any], *inputs: Any) -> Any:
    """Run a block; the backward pass runs it again, under the same attention and adapter."""
    if not torch.is_grad_enabled():
        return run(*inputs)
    attention, adapter = attention_now(), selected(None)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _running(attention, adapter)

    return checkpoint(run, *inputs, use_reentrant=False, context_fn=contexts)
