"""A recipe on given hardware before it runs: memory by role, seconds by part, what to change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch

from common.config.run import RunConfig
from common.models.build import build_decoder, count_parameters
from common.out_of_memory import in_words
from deploy.planning.hardware import Device
from deploy.planning.seconds import Seconds, Shares, Sizes, seconds_of
from deploy.workers.memory import Need, needs
from deploy.workers.preflight import network_sizes

_MOST: Final = 0.5
"""Share of an iteration from which a part is worth changing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is known of a recipe on hardware."""

    device: Device
    memory: list[Need]
    seconds: Seconds
    tokens: float
    """Of an iteration, prompts and responses."""
    devices: int
    """That the recipe's workers compute on; 0 on a processor."""
    advice: list[str]

    def as_json(self) -> dict[str, Any]:
        """Return it for programs; bytes and seconds."""
        return {
            "device": asdict(self.device),
            "devices": self.devices,
            "memory": [
                {"role": n.what, "count": n.count, "bytes": n.each, "parts": dict(n.parts)}
                | ({} if n.beside is None else {"node": dict(n.beside)})
                for n in self.memory
            ],
            "seconds": {**asdict(self.seconds), "iteration": self.seconds.iteration},
            "tokens": self.tokens,
            "bottleneck": self.seconds.bottleneck,
            "advice": self.advice,
        }

    def lines(self) -> Iterator[str]:
        """Say what it takes; what to change is `advice`."""
        device, took = self.device, self.seconds
        yield (
            f"{device.name}: {in_words(device.memory)}, {device.products / 1e12:,.3g} TFLOP/s, "
            f"{device.reads / 1e9:,.0f} GB/s"
        )
        for need in self.memory:
            yield f"memory of {need}"
        listed = ", ".join(f"{part} {seconds:,.3g}" for part, seconds in took.parts.items())
        yield (
            f"an iteration of {self.tokens:,.0f} tokens takes about {took.iteration:,.3g} s: "
            + listed
            + (" (rollouts beside the learner)" if took.overlap else "")
        )


def plan_of(
    config: RunConfig,
    device: Device,
    *,
    prompt: float | None = None,
    response: float | None = None,
    shares: Shares | None = None,
) -> Plan:
    """Plan a recipe whose workers compute on such devices, one each.

    Args:
        config: the recipe.
        device: what each worker has, or what all share.
        prompt: mean tokens of a prompt; None: as many as there is room for.
        response: of a response; None: `rollout.max_response_tokens`.
        shares: of the device's limits that are reached; None: `Shares`' own.
    """
    longest = config.rollout.max_response_tokens
    response = float(longest) if response is None else response
    prompt = float(config.model.context - longest) if prompt is None else prompt
    gpus = 0.0 if device.shared else 1.0
    placed = _on(config, gpus)
    memory = needs(placed, "train")
    took = seconds_of(placed, _sizes(placed, prompt, response), device, shares or Shares())
    workers = sum(need.count for need in memory)
    rows = config.train.prompts_per_iteration * config.train.samples_per_prompt
    return Plan(
        device=device,
        memory=memory,
        seconds=took,
        tokens=rows * (prompt + response),
        devices=0 if device.shared else workers,
        advice=[*_tight(placed, memory, device), *([] if device.shared else _slow(placed, took))],
    )


def _on(config: RunConfig, gpus: float) -> RunConfig:
    """Return the recipe with every worker on a GPU, or with none."""
    return config.model_copy(
        update={
            "learner": config.learner.model_copy(update={"gpus_per_rank": gpus}),
            "rollout": config.rollout.model_copy(update={"gpus_per_actor": gpus}),
            "reward_service": config.reward_service.model_copy(update={"gpus_per_replica": gpus}),
        }
    )


def _sizes(config: RunConfig, prompt: float, response: float) -> Sizes:
    counted, train = network_sizes(config), config.train
    vocabulary = config.model.vocab_size or config.tokenizer.vocab_size
    model = config.model.model_copy(update={"vocab_size": vocabulary})
    whole = count_parameters(model).total
    value = 0
    if train.separate_values:
        value = whole if train.critic is None else count_parameters(train.critic).total
    service, judge = config.reward_service, config.reward_model.model
    scored = whole if service.reference is None else count_parameters(service.reference).total
    if service.needs_model:
        scored += whole if judge is None else count_parameters(judge).total
    with torch.device("meta"):
        decoder = build_decoder(model)
    shape = decoder.sizes
    return Sizes(
        policy=whole,
        value=value,
        scored=scored,
        sent=counted.policy,
        trained=counted.trained,
        cached=2.0 * 2 * shape.layers * shape.kv_heads * shape.head_dim,
        prompt=prompt,
        response=response,
        shares_prompts=decoder.shares_prompts,
    )


def _tight(config: RunConfig, memory: list[Need], device: Device) -> Iterator[str]:
    """Say whose memory is more than there is, and what fills it."""
    if device.shared:
        total = sum(need.count * need.each for need in memory)
        if total > device.memory:
            worst = max(memory, key=lambda need: need.count * need.each)
            yield _too_much(config, worst, f"all workers take {in_words(total)} together", device)
        return
    for need in memory:
        if need.each > device.memory:
            yield _too_much(config, need, f"one of {need.what} takes {in_words(need.each)}", device)


def _too_much(config: RunConfig, need: Need, said: str, device: Device) -> str:
    part = max(need.parts, key=lambda name: need.parts[name])
    return (
        f"{said} and there are {in_words(device.memory)}: {in_words(need.parts[part])} of it for "
        f"{part}; {_remedy(config, need, part)}"
    )


def _remedy(config: RunConfig, need: Need, part: str) -> str:
    """Say what helps against a part of a role's memory, of what the recipe has not done yet."""
    learner, rollout = config.learner, config.rollout
    section, precision = {
        "learner ranks": ("learner", learner.precision),
        "rollout actors": ("rollout", rollout.precision),
        "reward workers": ("reward_service", config.reward_precision),
    }[need.what]
    every = [
        (
            part == "weights, gradients, moments" and learner.zero_stage < 3,
            "raise learner.zero_stage to 3",
        ),
        (
            part == "weights, gradients, moments" and config.train.lora is None,
            "train adapters (train.lora), or take more learner.ranks",
        ),
        (part == "weights, gradients, moments", "take more learner.ranks"),
        (part == "copies and auxiliary phase", "leave train.ppg out, or take more learner.ranks"),
        (
            part == "activations"
            and section == "learner"
            and not config.model.activation_checkpointing,
            "set model.activation_checkpointing",
        ),
        (
            part == "activations" and section == "rollout",
            "lower rollout.prefill_tokens or rollout.slots",
        ),
        (part == "activations", f"lower {section}.micro_batch_tokens"),
        (part == "keys and values", "lower rollout.cache_mb or rollout.slots"),
        (
            part == "weights"
            and section == "rollout"
            and config.train.lora is not None
            and rollout.lora == "merged",
            "sample with adapters beside their base (rollout.lora=unmerged)",
        ),
        (part == "weights" and precision == "fp32", f"set {section}.precision to bf16"),
        (part == "logits", "lower model.logits_mb"),
    ]
    fallback = "take a smaller model, or devices with more memory: no worker computes on several"
    return next((text for applies, text in every if applies), fallback)


def _slow(config: RunConfig, took: Seconds) -> Iterator[str]:
    """Say what takes longest, and what would shorten it."""
    part, learner = took.bottleneck, config.learner
    share = took.parts[part] / took.iteration
    if share < _MOST:
        return
    remedy = {
        "generate": f"more rollout.actors than {config.rollout.actors_at_start}, or more "
        "rollout.slots in each",
        "score": f"more reward_service.replicas than {config.reward_service.replicas}",
        "learn": f"more learner.ranks than {learner.ranks}, or train adapters (train.lora)",
        "publish": "train adapters (train.lora), whose weights are few",
    }[part]
    yield f"{part} takes {share:.0%} of an iteration: {remedy}"
    if not took.overlap and part != "publish":
        rollouts = took.generate + took.score
        hidden = min(rollouts, took.parts["learn"]) / took.iteration
        if hidden > 0.2:
            yield (
                f"train.max_staleness=1 samples while the learner works: {hidden:.0%} less time, "
                "and runs are not reproducible"
            )
