"""Settings of the parts of the score, by the kind of what scores."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from common.config.base import (
    Family,
    Float,
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Section,
)

ComponentName = Annotated[str, Field(pattern=r"^[^/\x00-\x1f]+$")]
"""Of a part of the score. Metrics are called by it, and a slash groups metrics."""


class RewardComponent(Family):
    """One named term of the score."""

    kind: str
    """What scores: the trained reward model, a Python function, a remote endpoint, or a language
    model that judges."""
    weight: Float = 1.0
    """Factor of this component in the score."""


class OutsideComponent(RewardComponent):
    """What scores is not of this run."""

    evaluation_only: bool = False
    """Asked about the responses of `evaluate.every` alone, and no part of their score: what it says
    is a metric of its own there (``component/NAME``), by a judge with `against` the win rate."""


class ModelComponent(RewardComponent):
    """The trained reward model scores."""

    kind: Literal["model"] = "model"


def _require_target(component: FunctionComponent | EndpointComponent) -> Any:
    if not component.target:
        raise ValueError(f"a {component.kind} component needs a target")
    return component


class IsolationConfig(Section):
    """Processes of its own for a function that runs what the policy wrote."""

    timeout_s: PositiveFloat = 10.0
    """Longest scoring of one response."""
    memory_mb: PositiveFloat = 2048.0
    """Most memory that a process may take, in MiB."""
    processes: PositiveInt = 1
    """Processes of a reward worker that score at once."""
    failed_score: Float | None = None
    """Score of a response whose scoring took too long, too much memory, or ended its process; null
    gives the response up, as a dead letter."""


class FunctionComponent(OutsideComponent):
    """A Python function scores, in the reward worker's process or in others."""

    kind: Literal["function"] = "function"
    target: str = ""
    """``package.module:function``."""
    isolation: IsolationConfig | None = None
    """Score one response at a time in processes with limits; ``process`` alone takes the defaults,
    null is the reward worker's own process."""

    @field_validator("isolation", mode="before")
    @classmethod
    def _by_its_name(cls, value: Any) -> Any:
        return {} if value == "process" else value

    _has_target = model_validator(mode="after")(_require_target)


class EndpointComponent(OutsideComponent):
    """What scores is asked over HTTP."""

    target: str = ""
    """The endpoint's URL; of a judge up to ``/v1``."""
    token_env: str = ""
    """Name of the environment variable that holds the endpoint's bearer token."""
    timeout_s: PositiveFloat = 10.0
    """Longest wait for one HTTP request."""
    max_concurrency: PositiveInt = 8
    """HTTP requests under way at once."""
    max_retries: NonNegativeInt = 5
    """Tries of one HTTP request after its first, before its responses are dead letters."""
    give_up_after_s: PositiveFloat = 120.0
    """Longest time that all tries of one HTTP request may take."""
    dead_letters: PathText = ""
    """File that responses given up are appended to, as JSON lines."""

    _has_target = model_validator(mode="after")(_require_target)


class HttpComponent(EndpointComponent):
    """A remote endpoint scores."""

    kind: Literal["http"] = "http"
    batch_size: PositiveInt = 32
    """Responses in one HTTP request."""


class JudgeComponent(EndpointComponent):
    """A language model judges, behind an endpoint of chat completions (OpenAI's, vLLM's)."""

    kind: Literal["judge"] = "judge"
    model: str = ""
    """The judge's name at its endpoint."""
    rubric: str = ""
    """What a good response is, in the judge's own language."""
    against: str = ""
    """Column of the data with a response to compare with: the score is 1 where the judge finds
    ours better, 0 worse, and 0.5 for a tie, over both orders. Empty: marks from lowest to
    highest."""
    lowest: Float = 1.0
    """Mark of the worst response: a score of 0."""
    highest: Float = 10.0
    """Mark of the best response: a score of 1."""
    votes: PositiveInt = 1
    """Answers of the judge to each question, whose mean is the score."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature of the judge."""
    max_tokens: PositiveInt = 512
    """Longest answer of the judge, in tokens."""

    @model_validator(mode="after")
    def _possible(self) -> JudgeComponent:
        for name in ("model", "rubric"):
            if not getattr(self, name).strip():
                raise ValueError(f"a judge component needs a {name}")
        if self.lowest >= self.highest:
            raise ValueError("highest is above lowest")
        if self.votes > 1 and not self.temperature:
            raise ValueError("votes of a judge differ by its temperature alone: set that above 0")
        return self
