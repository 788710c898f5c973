"""Settings of the elastic workers: rollout actors and the reward service."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, SerializeAsAny, model_validator

from common.config.base import (
    Conflict,
    Float,
    Fraction,
    GpuShare,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    require_no_conflict,
)
from common.config.model import PretrainedConfig
from common.config.rewards import ComponentName, ModelComponent, OutsideComponent, RewardComponent

Labels = Mapping[
    Annotated[str, Field(min_length=1)],
    Annotated[str, Field(pattern=r"^!?([\w.-]+|in\([\w.-]+(, ?[\w.-]+)*\))$")],
]
"""Node label -> what it must be: ``spot``, ``!spot``, ``in(a, b)`` or ``!in(a, b)``, as in Ray."""


class ActorBounds(Section):
    """Bounds within which a run chooses its own number of rollout actors."""

    min: PositiveInt
    """Actors to start with, and the fewest."""
    max: PositiveInt
    """The most."""

    @model_validator(mode="after")
    def _ordered(self) -> ActorBounds:
        if self.min > self.max:
            raise ValueError(f"min={self.min} exceeds max={self.max}")
        return self


class RolloutConfig(Section):
    """Rollout actors and sampling."""

    actors: PositiveInt | ActorBounds = 2
    """Rollout actors to start with; or ``{min: 2, max: 8}``: the run adds and takes away actors
    between these, by who waits for whom."""
    labels: Labels = Field(default_factory=dict)
    """Labels of the nodes that actors may be on, as ``ray.io/market-type: spot``; none = any."""
    cpus_per_actor: PositiveFloat | None = None
    """Cores each actor asks Ray for; null: one, or a fraction of one where a recipe has more
    workers than the cluster has cores."""
    threads: PositiveInt | None = None
    """Threads that each actor computes with, as does whatever samples in its own process; null: the
    whole cores that it asks for, at least one. More are worth it where cores are idle, and cost
    much where they are not."""
    gpus_per_actor: GpuShare = 0.0
    """GPUs each actor asks Ray for and computes on: 0 is the processor, a part of one is shared."""
    lease_size: PositiveInt = 64
    """Rollouts in one lease: the unit of work, of reissue and of batching."""
    lease_deadline_s: PositiveFloat = 300.0
    """Longest time in which a lease is sampled or scored; in asynchronous mode several are scored
    together, with at most 8 x `reward_service.micro_batch_tokens` tokens. A worker that is silent
    for longer counts as hung, and is killed and replaced. A lease that costs three workers in a row
    ends the run."""
    max_response_tokens: PositiveInt = 32
    """Longest response."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature; 0 is greedy (evaluation only)."""
    top_p: Annotated[Float, Field(gt=0, le=1)] = 1.0
    """Nucleus: the smallest set of tokens with at least this probability."""
    top_k: NonNegativeInt = 0
    """Keep the k most probable tokens; 0 keeps all."""
    min_p: Fraction = 0.0
    """Keep tokens at least this share as probable as the most probable one."""
    min_response_tokens: NonNegativeInt = 0
    """No response ends before it has so many tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end a response; the text itself is cut off."""
    stop_ids: tuple[NonNegativeInt, ...] = ()
    """Tokens that end a response, beside EOS."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number type of weights that are sent and of matrix products; softmax and log-probabilities
    stay fp32."""
    slots: PositiveInt = 128
    """Responses that one actor generates at once."""
    cache_mb: PositiveFloat = 1024.0
    """Memory of one actor for keys and values, in MiB: requests wait until it has room for them."""
    prefill_tokens: PositiveInt = 2048
    """Prompt tokens that one step computes beside its decodes."""
    kernels: Literal["auto", "native", "torch"] = "auto"
    """native: compiled for the processor by gcc; torch: anywhere; auto: native where it can be."""
    graphs: bool = True
    """On a GPU: steps that only decode are recorded in CUDA graphs and replayed, which takes the
    processor's time out of them. false computes each step anew."""
    lora: Literal["merged", "unmerged"] = "merged"
    """How an adapter is sampled from (`train.lora`). merged: added to the weights as it arrives,
    which costs nothing at a token; unmerged: computed beside them, by torch and slower, without a
    second copy of them. Evaluation samples base and adapter side by side, unmerged."""

    @property
    def actors_at_start(self) -> int:
        """Rollout actors to start with."""
        return self.actors if isinstance(self.actors, int) else self.actors.min

    @model_validator(mode="after")
    def _ends(self) -> RolloutConfig:
        conflicts: list[Conflict] = []
        if self.min_response_tokens > self.max_response_tokens:
            text = (
                f"min_response_tokens={self.min_response_tokens} exceeds "
                f"max_response_tokens={self.max_response_tokens}"
            )
            conflicts.append((("min_response_tokens", "max_response_tokens"), text))
        if self.lora == "unmerged" and self.kernels == "native":
            text = (
                "kernels=native computes no adapter beside the weights: set lora to merged, or "
                "kernels to auto or torch"
            )
            conflicts.append((("lora", "kernels"), text))
        if self.gpus_per_actor and self.kernels == "native":
            text = (
                "kernels=native are for processors: set gpus_per_actor to 0, or kernels to auto or "
                "torch"
            )
            conflicts.append((("gpus_per_actor", "kernels"), text))
        if "" in self.stop:
            text = "stop: an empty text would end every response at once"
            conflicts.append((("stop",), text))
        require_no_conflict(self, conflicts)
        return self


class RewardServiceConfig(Section):
    """The reward service."""

    replicas: PositiveInt = 1
    """Reward workers."""
    cpus_per_replica: PositiveFloat | None = None
    """Cores each worker asks Ray for, as in `rollout`."""
    threads: PositiveInt | None = None
    """Threads of frozen passes, as in `rollout`."""
    precision: Literal["fp32", "bf16"] | None = None
    """Number type of products in frozen passes; null: the learner's, so that equal policies have
    a KL of 0. Scores and log-probabilities are fp32 either way."""
    kernels: Literal["auto", "native", "torch"] = "auto"
    """Of frozen passes, as in `rollout`, but that auto is torch in bf16: there native kernels round
    elsewhere than the learner, so that equal policies have a small KL."""
    gpus_per_replica: GpuShare = 0.0
    """GPUs each worker asks Ray for, as in `rollout`."""
    labels: Labels = Field(default_factory=dict)
    """Labels of the nodes that workers may be on, as in `rollout`."""
    micro_batch_tokens: PositiveInt = 8192
    """Tokens of one frozen forward pass, counted as `learner.micro_batch_tokens`."""
    reference: PretrainedConfig | None = None
    """A model of its own as the reference, which reads the policy's tokens; null is the supervised
    policy."""
    components: Mapping[ComponentName, SerializeAsAny[RewardComponent]] = Field(
        default_factory=lambda: {"reward_model": ModelComponent()}
    )
    """The score is the weighted sum of these."""

    @model_validator(mode="after")
    def _device(self) -> RewardServiceConfig:
        if self.gpus_per_replica and self.kernels == "native":
            text = (
                "kernels=native are for processors: set gpus_per_replica to 0, or kernels to auto "
                "or torch"
            )
            require_no_conflict(self, [(("gpus_per_replica", "kernels"), text)])
        return self

    @model_validator(mode="after")
    def _some(self) -> RewardServiceConfig:
        if not (trained := self.scoring):
            raise ValueError("at least one component is needed that is not `evaluation_only`")
        if not any(component.weight for component in trained.values()):
            raise ValueError("every weight is 0, so every score would be; give one another weight")
        return self

    @property
    def scoring(self) -> dict[str, RewardComponent]:
        """The components that the score is made of."""
        return {
            name: component
            for name, component in self.components.items()
            if not (isinstance(component, OutsideComponent) and component.evaluation_only)
        }

    @property
    def needs_model(self) -> bool:
        """Whether a component is the trained reward model."""
        return any(isinstance(component, ModelComponent) for component in self.components.values())
