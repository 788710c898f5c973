"""The algorithms of the policy phase, and what each needs of a run.

Their advantage functions are in `learner.algorithms.estimators`, under the same names: a recipe is
read without torch. Nothing else asks for an algorithm by its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What an advantage function looks at, beside the scores and the KL penalties."""

    values: bool = False
    """A value function, which is trained with the policy."""
    tokens: bool = False
    """Single tokens, whose rewards `gamma` discounts; without it a response is one number."""
    least_responses: int = 1
    """Scored responses of a prompt: 2 where they are compared with each other, which a single one
    cannot be."""


ALGORITHMS: dict[str, Needs] = {
    "ppo": Needs(values=True, tokens=True),
    "rloo": Needs(least_responses=2),
    "grpo": Needs(least_responses=2),
    "dr_grpo": Needs(least_responses=2),
    "reinforce_pp": Needs(tokens=True),
    "reinforce_pp_baseline": Needs(tokens=True, least_responses=2),
}


def _known(name: Any) -> Any:
    if not isinstance(name, str) or name not in ALGORITHMS:
        *others, last = (f"'{known}'" for known in ALGORITHMS)
        raise ValueError(f"should be {', '.join(others)} or {last}")
    return name


AlgorithmName = Annotated[str, BeforeValidator(_known)]
"""A name in `ALGORITHMS`."""
