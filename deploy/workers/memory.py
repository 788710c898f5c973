"""Whether a stage's workers fit into this machine, asked before any of them loads weights.

Only of runs that start a cluster of their own: what the nodes of another one have, its scheduler
knows (`deploy.workers.preflight`).
"""

from __future__ import annotations

import os

import torch

from common.config.model import LoraConfig, ModelConfig
from common.config.run import RunConfig
from common.devices import torch_dtype
from common.models.adapters import adapter_size
from common.models.build import build_decoder, count_parameters
from common.out_of_memory import in_words, require_memory
from deploy.workers.preflight import NetworkSizes, extra_bytes, learner_bytes

_REMEDY = (
    "train adapters (lora), lower rollout.actors or learner.ranks, raise learner.zero_stage, set "
    "precision to bf16, or take a smaller model"
)


def require_room(config: RunConfig, stage: str) -> None:
    """Refuse a stage (sft, reward or train) whose weights alone will not fit.

    Raises:
        ClusterError: with the bytes that it needs and those that there are.
    """
    if config.cluster.address is not None or os.environ.get("RAY_ADDRESS"):
        return
    parts = {"sft": _supervised, "reward": _supervised, "train": _training}[stage](config, stage)
    listed = ", ".join(f"{what} {in_words(size)}" for what, size in parts.items())
    require_memory(sum(parts.values()), f"{stage} ({listed})", _REMEDY)


def _supervised(config: RunConfig, stage: str) -> dict[str, float]:
    settings = config.sft if stage == "sft" else config.reward_model
    model = config.model
    if stage == "reward" and config.reward_model.model is not None:
        model = config.reward_model.model
    sizes = _sizes(config, model, settings.lora, settings.precision == "bf16")
    return {"learner": learner_bytes(config, sizes) * config.learner.ranks}


def _training(config: RunConfig, stage: str) -> dict[str, float]:
    rollout, service = config.rollout, config.reward_service
    whole = _parameters(config, config.model)
    merged = config.train.lora is not None and rollout.lora == "merged"
    actor = whole * torch_dtype(rollout.precision).itemsize * (1 + merged)
    frozen = _parameters(config, service.reference or config.model)
    if service.needs_model and config.reward_model.lora is None:
        frozen += _parameters(config, config.reward_model.model or config.model)
    worker = frozen * torch_dtype(config.reward_precision).itemsize
    return {
        "learner": (learner_bytes(config) + extra_bytes(config)) * config.learner.ranks,
        "rollout actors": actor * rollout.actors_at_start,
        "reward workers": worker * service.replicas,
    }


def _sizes(
    config: RunConfig, model: ModelConfig, lora: LoraConfig | None, rounded: bool
) -> NetworkSizes:
    whole = _parameters(config, model)
    if lora is None:
        return NetworkSizes(trained=whole, policy=whole, frozen=0, frozen_bytes=0.0)
    with torch.device("meta"):
        decoder = build_decoder(model)
    trained = adapter_size(decoder, lora)
    return NetworkSizes(
        trained=trained, policy=trained, frozen=whole, frozen_bytes=2.0 if rounded else 4.0
    )


def _parameters(config: RunConfig, model: ModelConfig) -> int:
    vocabulary = model.vocab_size or config.model.vocab_size or config.tokenizer.vocab_size
    return count_parameters(model.model_copy(update={"vocab_size": vocabulary})).total
