"""The verifier of `reasoning-gym` as a reward function.

    components:
      verified: {kind: function, target: "reward_service.reasoning:score"}

Its prompts come from `reasoning_gym:` names (`common.reasoning_tasks`), whose lines say which task
each is.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.errors import DataError
from common.reasoning_tasks import verified
from reward_service.samples import Sample, Score


def score(samples: Sequence[Sample]) -> list[Score]:
    """Score responses by the library: 1 is right; parts: whether right, and in the right form.

    Raises:
        DataError: a prompt does not say which task it is.
    """
    return [_scored(sample) for sample in samples]


def _scored(sample: Sample) -> Score:
    task, index = sample.columns.get("task"), sample.columns.get("index")
    if not isinstance(task, str) or not isinstance(index, int):
        raise DataError(
            f"rollout {sample.rollout_id}: its prompt has no columns 'task' and 'index'; take "
            "prompts from reasoning_gym:FAMILY, and name both columns where data.columns is set"
        )
    answered, value = verified(task, index, sample.response)
    return Score(value=value, parts={"right": float(value == 1.0), "form": float(answered)})
