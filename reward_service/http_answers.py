"""What a remote reward endpoint answers, and the two ways in which a request fails."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from common.files import one_line

_LARGEST = sys.float_info.max
_AGREED = "the answer is not {'scores': [{'rollout_id', 'score'}]}"


class Refused(Exception):
    """An answer that no retry would change."""


class Failed(Exception):
    """A try that may go better next time; `wait_s` is what the server asks for."""

    def __init__(self, message: str, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


def parse_answer(raw: bytes, expected: Sequence[str]) -> dict[str, float]:
    """Return scores by rollout_id; raises Failed for an answer that is not what was agreed."""
    try:
        answer: Any = json.loads(raw)
    except (ValueError, RecursionError):
        raise Failed(f"{_AGREED}: no JSON but {one_line(repr(raw[:60]))}") from None
    rows = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(rows, list):
        raise Failed(f"{_AGREED}: it has no list 'scores'")
    scores: dict[str, float] = {}
    for row in rows:
        rollout_id, score = _scored(row)
        if rollout_id in scores:
            raise Failed(f"the answer scores a rollout twice: {rollout_id}")
        scores[rollout_id] = score
    if scores.keys() != set(expected):
        missing, added = set(expected) - scores.keys(), scores.keys() - set(expected)
        differs = min(missing or added)
        raise Failed(f"the answer's rollouts differ from those asked for: {differs}")
    return scores


def _scored(row: Any) -> tuple[str, float]:
    """Return rollout_id and score of one entry of an answer."""
    if not isinstance(row, dict) or not {"rollout_id", "score"} <= row.keys():
        raise Failed(f"{_AGREED}: an entry is {one_line(json.dumps(row))}")
    rollout_id, score = row["rollout_id"], row["score"]
    if not isinstance(rollout_id, str):
        raise Failed(f"{_AGREED}: asked for: texts as rollout_id, not {json.dumps(rollout_id)}")
    if not isinstance(score, int | float) or not -_LARGEST <= score <= _LARGEST:
        if isinstance(score, float):
            raise Failed(f"the score of {rollout_id} is {score}")
        raise Failed(f"{_AGREED}: the score of {rollout_id} is {one_line(json.dumps(score))}")
    return rollout_id, float(score)
