"""Scorers that are not models: a Python function of the user's, and what all scorers share."""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from common.errors import ConfigError, RewardError


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """One response to be scored."""

    rollout_id: str
    prompt_text: str
    response_text: str
    finished: bool
    """The response ended with EOS."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreResult:
    """One score, or the reason why there is none."""

    rollout_id: str
    score: float | None
    """None = a dead letter: the scorer gave this response up."""
    error: str | None = None


class Scorer(Protocol):
    """Scores responses; results in the requests' order, one for each."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Score a batch. Raises RewardError when the scorer itself is broken."""
        ...


class FunctionScorer:
    """``package.module:function``, called as ``f(prompts, responses) -> one number each``."""

    def __init__(self, target: str) -> None:
        self.target = target
        self._function = _resolve(target)

    def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Call the function once for the batch.

        Raises:
            RewardError: it raised, or returned something else than one finite number each.
        """
        prompts = [request.prompt_text for request in requests]
        responses = [request.response_text for request in requests]
        try:
            scores = list(self._function(prompts, responses))
        except Exception as error:
            # The user's code may raise anything; it is named and passed on as the cause.
            raise RewardError(
                f"reward function {self.target} raised {type(error).__name__}: {error}"
            ) from error
        if len(scores) != len(requests):
            raise RewardError(
                f"reward function {self.target} returned {len(scores)} scores for "
                f"{len(requests)} responses"
            )
        return [
            ScoreResult(rollout_id=r.rollout_id, score=self._number(s, r.rollout_id))
            for r, s in zip(requests, scores, strict=True)
        ]

    def _number(self, score: object, rollout_id: str) -> float:
        try:
            value = float(score)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not math.isfinite(value):
            raise RewardError(
                f"reward function {self.target} returned {score!r} for rollout {rollout_id}; "
                "a score is a finite number"
            )
        return value


def _resolve(target: str) -> Callable[[list[str], list[str]], Sequence[float]]:
    """Import the function. Raises ConfigError naming the part that is missing."""
    module_name, colon, name = target.partition(":")
    if not colon or not module_name or not name:
        raise ConfigError(f"reward function '{target}': write it as package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"reward function '{target}': {error}") from None
    except Exception as error:
        # The user's module may raise anything while it is imported, SyntaxError included.
        raise ConfigError(
            f"reward function '{target}': importing {module_name} raised "
            f"{type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if function is None:
        near = difflib.get_close_matches(name, dir(module), 1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ConfigError(f"reward function '{target}': {module_name} has no '{name}'{hint}")
    if not callable(function):
        raise ConfigError(f"reward function '{target}': '{name}' is not a function")
    return function  # type: ignore[no-any-return]
