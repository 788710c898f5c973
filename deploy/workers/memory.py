"""What each process of a stage takes at its peak, and whether that fits into this machine.

Asked before any of them loads weights, and only of runs that start a cluster of their own: what the
nodes of another one have, its scheduler knows (`deploy.workers.preflight`). The numbers follow from
the recipe alone; nothing is allocated for them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch

from common.config.model import LoraConfig, ModelConfig
from common.config.run import RunConfig
from common.devices import torch_dtype
from common.models.adapters import adapter_size
from common.models.build import build_decoder
from common.models.footprint import kept_per_token
from common.models.lora import adapted
from common.native.coverage import lacking
from common.native.frozen import asked_for
from common.native.library import packed_itemsize
from common.out_of_memory import in_words, require_memory
from deploy.workers.preflight import (
    NetworkSizes,
    extra_bytes,
    learner_bytes,
    snapshot_bytes,
)
from learner.zero.buckets import BUCKET, LIVE, SUMMED

_REMEDY: Final = (
    "train adapters (lora), lower rollout.actors, rollout.slots or learner.ranks, lower "
    "micro_batch_tokens, raise learner.zero_stage, set precision to bf16, or take a smaller model"
)
_PROCESS: Final = 0.35 * 2**30
"""Of a worker's process before it holds anything: Python, torch, Ray and what they load. What
processes share counts once, and is taken by the command itself already."""
_CUDA: Final = 0.6 * 2**30
"""What CUDA and PyTorch take of a GPU for each process that computes on it."""
_CONTROL: Final = 2
"""Processes beside the workers: the controller, and Ray's own of a run."""
_PIECES: Final = 5
"""Blocks of `logits_mb` that one piece of the logits takes with what is computed from it."""
_DRAWN: Final = 4
"""Numbers of fp32 for each logit that a token is drawn from."""
_LOADED: Final = 4
"""Bytes of a number while weights are loaded: rounding comes after."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Memory of the processes of one role, each at its peak."""

    what: str
    """As in "rollout actors"."""
    count: int
    parts: Mapping[str, float]
    """Bytes of one of them where it computes, by what takes them."""
    beside: Mapping[str, float] | None = None
    """Bytes of its node's memory, where it computes on a GPU; None: it does not."""

    @property
    def each(self) -> float:
        """Bytes of one process where it computes."""
        return sum(self.parts.values())

    @property
    def here(self) -> float:
        """Bytes of one process of its node's memory."""
        return self.each if self.beside is None else sum(self.beside.values())

    def __str__(self) -> str:
        """Say what one takes, in a line."""
        said = f"{self.count} {self.what}: {in_words(self.each)} each at most"
        if self.beside is not None:
            said += f" on a GPU, and {in_words(self.here)} of the node's memory,"
        listed = ", ".join(f"{what} {in_words(size)}" for what, size in self.parts.items() if size)
        return f"{said} ({listed})"


def require_room(config: RunConfig, stage: str) -> None:
    """Refuse a stage (sft, reward or train) that will not fit.

    Raises:
        ClusterError: with the bytes that it needs and those that there are.
    """
    if config.cluster.address is not None or os.environ.get("RAY_ADDRESS"):
        return
    needed = needs(config, stage)
    listed = ", ".join(f"{need.what} {in_words(need.count * need.here)}" for need in needed)
    total = sum(need.count * need.here for need in needed) + _CONTROL * _PROCESS
    require_memory(total, f"{stage} ({listed})", _REMEDY)


def needs(config: RunConfig, stage: str) -> list[Need]:
    """Return what every role of a stage (sft, reward or train) takes."""
    if stage == "train":
        return [_policy_learner(config), _actors(config), _reward_workers(config)]
    settings = config.sft if stage == "sft" else config.reward_model
    model = config.model
    if stage == "reward" and config.reward_model.model is not None:
        model = config.reward_model.model
    shape = _Shape(config, model)
    states = learner_bytes(config, _sizes(shape, settings.lora, settings.precision == "bf16"))
    return [
        _learner(
            config,
            shape,
            lora=settings.lora,
            dtype=torch_dtype(settings.precision),
            states={"weights, gradients, moments": states},
            networks=[shape],
            reads_logits=stage == "sft",
        )
    ]


# ------------------------------------------------------------------ roles


def _policy_learner(config: RunConfig) -> Need:
    train = config.train
    shape = _Shape(config, config.model)
    networks = [shape]
    if train.separate_values:
        networks.append(shape if train.critic is None else _Shape(config, train.critic))
    return _learner(
        config,
        shape,
        lora=train.lora,
        dtype=torch_dtype(config.learner.precision),
        states={
            "weights, gradients, moments": learner_bytes(config),
            "copies and auxiliary phase": extra_bytes(config),
        },
        networks=networks,
        reads_logits=True,
        written=snapshot_bytes(config),
    )


def _learner(
    config: RunConfig,
    shape: _Shape,
    *,
    lora: LoraConfig | None,
    dtype: torch.dtype,
    states: Mapping[str, float],
    networks: Sequence[_Shape],
    reads_logits: bool,
    written: float = 0.0,
) -> Need:
    tokens = max(config.learner.micro_batch_tokens, shape.model.context)
    kept = kept_per_token(shape.model, lora, dtype)
    work = {
        "activations": tokens * (kept + kept / shape.layers),
        "logits": reads_logits
        * shape.pieces(trained=lora is None, dtype=dtype, gpus=config.learner.gpus_per_rank),
    }
    kept_in = dtype.itemsize if lora is not None else 4
    buffers = _buffers(config, networks, lora, kept_in)
    learner, parts = config.learner, {**states, **work, "ZeRO buffers": buffers}
    loaded = max(network.largest for network in networks)  # read one after another
    if not learner.gpus_per_rank:
        saved = {"checkpoint": written} if written else {}
        return _need("learner ranks", learner.ranks, {**parts, **saved}, loaded, gpus=0.0)
    need = _need("learner ranks", learner.ranks, parts, loaded, gpus=learner.gpus_per_rank)
    sent = dtype.itemsize * shape.whole / learner.ranks
    beside = {**(need.beside or {}), "checkpoint": written, "published": sent}
    return replace(need, beside=beside)


def _buffers(
    config: RunConfig, networks: Sequence[_Shape], lora: LoraConfig | None, itemsize: int
) -> float:
    """Return the bytes that DeepSpeed has beside states: what ranks send each other.

    Gradients on their way to the rank that keeps them: a card has room for all that may be, and
    for twice as many under ZeRO 1 and 2, where the next are collected while some are sent. Under
    ZeRO 3 each network has its own, and those of one that computes are whole.
    """
    learner = config.learner
    trained = [
        network.whole if lora is None else adapter_size(network.decoder, lora)
        for network in networks
    ]
    if learner.zero_stage == 0:
        return 4.0 * min(max(trained), SUMMED)
    sent = [4.0 * (BUCKET if learner.gpus_per_rank else min(n, BUCKET)) for n in trained]
    if learner.zero_stage < 3:
        return max(sent) * (2 if learner.gpus_per_rank else 1)
    return sum(sent) + itemsize * max(min(network.whole, LIVE) for network in networks)


def _actors(config: RunConfig) -> Need:
    rollout, lora = config.rollout, config.train.lora
    shape, dtype = _Shape(config, config.model), torch_dtype(rollout.precision)
    weights = shape.whole * dtype.itemsize
    beside = lora is not None and rollout.lora == "unmerged"
    native = rollout.kernels != "torch" and not beside and not rollout.gpus_per_actor
    native = native and not lacking(shape.decoder)
    # Kernels have weights in a layout of their own, and adapters' base stays beside it.
    packed = native * shape.whole * packed_itemsize(dtype)
    base = 0 if native and lora is None else weights
    merged = 0
    if lora is not None and not beside and not native:
        merged = 2 * shape.merged(lora) * dtype.itemsize  # a new version beside the one before
    each = 2 * shape.layers * shape.kv_numbers * shape.model.context * dtype.itemsize
    slots, room = min(rollout.slots, rollout.lease_size), rollout.cache_mb * 2**20
    if not native:
        slots = max(1, min(slots, int(room / each)))
    parts = {
        "weights": base + merged,
        "packed weights": packed,
        "keys and values": max(each, min(slots * each, room)),
        "activations": (slots + rollout.prefill_tokens) * shape.layer(dtype),
        "logits": _DRAWN * 4.0 * slots * shape.vocabulary,
    }
    count, gpus = rollout.actors_at_start, rollout.gpus_per_actor
    return _need("rollout actors", count, parts, shape.whole, gpus=gpus)


def _reward_workers(config: RunConfig) -> Need:
    service, dtype = config.reward_service, torch_dtype(config.reward_precision)
    native = not service.gpus_per_replica and asked_for(service.kernels, dtype)
    reference = _Shape(config, service.reference or config.model)
    shapes, copies = [reference], 0
    if service.needs_model:
        judge = config.reward_model.model
        apart = judge is not None or service.reference is not None
        if config.reward_model.lora is None or apart:
            shapes.append(_Shape(config, judge or config.model))
        elif native and not lacking(reference.decoder):
            copies = reference.whole  # Packed a second time, with the adapter merged.
    loaded = sum(shape.whole for shape in shapes)
    packed = [shape.whole for shape in shapes if native and not lacking(shape.decoder)]
    each = packed_itemsize(dtype) if packed else dtype.itemsize
    # One is packed while it and all others are there.
    packing = (loaded * dtype.itemsize + (copies + max(packed, default=0)) * each) / _LOADED
    tokens = max(service.micro_batch_tokens, reference.model.context)
    parts = {
        "weights": (loaded + copies) * each,
        "activations": tokens * max(shape.layer(dtype) for shape in shapes),
        "logits": reference.pieces(trained=False, dtype=dtype, gpus=service.gpus_per_replica),
    }
    count, gpus = service.replicas, service.gpus_per_replica
    return _need("reward workers", count, parts, max(loaded, packing), gpus=gpus)


def _need(what: str, count: int, parts: Mapping[str, float], loaded: float, *, gpus: float) -> Need:
    """Add the process, and what loading takes beyond what comes after it.

    A GPU has what is computed with; weights are read into the node's memory first.
    """
    if gpus:
        beside = {"loading": _LOADED * loaded, "process": _PROCESS}
        return Need(what=what, count=count, parts={**parts, "CUDA": _CUDA}, beside=beside)
    loading = max(0.0, _LOADED * loaded - sum(parts.values()))
    return Need(what=what, count=count, parts={**parts, "loading": loading, "process": _PROCESS})


# ------------------------------------------------------------------ models


class _Shape:
    """A model's sizes, counted on the meta device."""

    def __init__(self, config: RunConfig, model: ModelConfig) -> None:
        """Count; a vocabulary that is not known yet is the policy's, or the tokenizer's."""
        self.vocabulary = model.vocab_size or config.model.vocab_size or config.tokenizer.vocab_size
        self.model = model.model_copy(update={"vocab_size": self.vocabulary})
        with torch.device("meta"):
            self.decoder = build_decoder(self.model)
        sizes = self.decoder.sizes
        counts = [parameter.numel() for parameter in self.decoder.parameters()]
        self.whole, self.largest = sum(counts), max(counts)
        self.layers, self.kv_numbers, self.dim = (
            sizes.layers,
            sizes.kv_heads * sizes.head_dim,
            sizes.dim,
        )

    def merged(self, lora: LoraConfig) -> int:
        """Count the weights that an adapter is merged into."""
        modules = [module for _, module in adapted(self.decoder) if module.reached(lora)]
        return sum(module.weight.numel() for module in modules)

    def layer(self, dtype: torch.dtype) -> float:
        """Bytes of a token in one block of a pass without gradients."""
        return kept_per_token(self.model, None, dtype) / self.layers

    def pieces(self, *, trained: bool, dtype: torch.dtype, gpus: float) -> float:
        """Bytes of logits in pieces, with the head's rounded copy and gradient."""
        head = self.vocabulary * self.dim
        rounded = 2 * head if trained and dtype != torch.float32 else 0
        rows = self.model.logits_rows(self.vocabulary, processor=not gpus)
        piece = 4.0 * rows * self.vocabulary
        return _PIECES * piece + rounded + (4 * head if trained else 0)


def _sizes(shape: _Shape, lora: LoraConfig | None, rounded: bool) -> NetworkSizes:
    whole = shape.whole
    if lora is None:
        return NetworkSizes(trained=whole, policy=whole, frozen=0, frozen_bytes=0.0)
    trained = adapter_size(shape.decoder, lora)
    return NetworkSizes(
        trained=trained, policy=trained, frozen=whole, frozen_bytes=2.0 if rounded else 4.0
    )
