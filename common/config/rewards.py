"""Settings of the parts of the score, by the kind of what scores."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from common.config.base import (
    Family,
    Float,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
)

ComponentName = Annotated[str, Field(pattern=r"^[^/\x00-\x1f]+$")]
"""Of a part of the score. Metrics are called by it, and a slash groups metrics."""


class RewardComponent(Family):
    """One named term of the score."""

    kind: str
    """What scores: the trained reward model, a Python function, or a remote endpoint."""
    weight: Float = 1.0
    """Factor of this component in the score."""


class ModelComponent(RewardComponent):
    """The trained reward model scores."""

    kind: Literal["model"] = "model"


def _require_target(component: FunctionComponent | HttpComponent) -> Any:
    if not component.target:
        raise ValueError(f"a {component.kind} component needs a target")
    return component


class FunctionComponent(RewardComponent):
    """A Python function scores, in the reward worker's process."""

    kind: Literal["function"] = "function"
    target: str = ""
    """``package.module:function``."""

    _has_target = model_validator(mode="after")(_require_target)


class HttpComponent(RewardComponent):
    """A remote endpoint scores."""

    kind: Literal["http"] = "http"
    target: str = ""
    """The endpoint's URL."""
    token_env: str = ""
    """Name of the environment variable that holds the endpoint's bearer token."""
    timeout_s: PositiveFloat = 10.0
    """Longest wait for one HTTP request."""
    max_concurrency: PositiveInt = 8
    """HTTP requests under way at once."""
    batch_size: PositiveInt = 32
    """Responses in one HTTP request."""
    max_retries: NonNegativeInt = 5
    """Tries of one HTTP request after its first, before its responses are dead letters."""
    give_up_after_s: PositiveFloat = 120.0
    """Longest time that all tries of one HTTP request may take."""
    dead_letters: PathText = ""
    """File that responses given up are appended to, as JSON lines."""

    _has_target = model_validator(mode="after")(_require_target)
