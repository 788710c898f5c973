"""The verifier of `reasoning-gym` as a reward function.

    components:
      verified: {kind: function, target: "reward_service.reasoning:score", isolation: process}

Its prompts come from `reasoning_gym:` names (`common.reasoning_tasks`), whose lines say which task
each is. Isolated, since what the library does with an answer has no bounds (some of it is `eval`).
"""

from __future__ import annotations

from collections.abc import Sequence

from common.errors import DataError
from common.reasoning_tasks import COLUMNS, verified
from reward_service.samples import Sample, Score


def score(samples: Sequence[Sample]) -> list[Score]:
    """Score responses by the library: 1 is right; parts: whether right, and in the right form.

    Raises:
        DataError: a prompt does not say which task it is.
    """
    return [_scored(sample) for sample in samples]


def _scored(sample: Sample) -> Score:
    task, index, question = (sample.columns.get(name) for name in COLUMNS)
    if not (isinstance(task, str) and isinstance(index, int) and isinstance(question, str)):
        raise DataError(
            f"rollout {sample.rollout_id}: its prompt has no columns {', '.join(COLUMNS)}; take "
            "prompts from reasoning_gym:FAMILY, and name these columns where data.columns is set"
        )
    answered, value = verified(task, index, question, sample.response)
    return Score(value=value, parts={"right": float(value == 1.0), "form": float(answered)})
