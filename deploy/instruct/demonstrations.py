"""What the supervised stage of `instruct` imitates: the model's own answers, rewritten."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from common.errors import DataError
from common.files import write_atomic
from deploy.instruct.rewriting import rewritten
from deploy.instruct.task import Ask

FEWEST = 2
"""Demonstrations that a supervised stage needs: one is held out."""


def write_demonstrations(path: Path, asks: Sequence[Ask], answers: Sequence[str]) -> int:
    """Write conversations to learn from, and return how many answers could be rewritten.

    Raises:
        DataError: hardly any could be.
    """
    pairs = [(ask.text, rewritten(ask, text)) for ask, text in zip(asks, answers, strict=True)]
    kept = [(asked, text) for asked, text in pairs if text is not None]
    if len(kept) < FEWEST:
        raise DataError(
            f"quickstart.demonstrations: {len(kept)} of {len(asks)} answers of this model could be "
            "rewritten to keep to their instructions; set it to 0, which leaves that stage out"
        )
    rows = (
        {
            "messages": [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": text},
            ]
        }
        for asked, text in kept
    )
    write_atomic(path, (json.dumps(row).encode() + b"\n" for row in rows))
    return len(kept)
