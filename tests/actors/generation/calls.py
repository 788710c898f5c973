"""What an engine asks of its decoder, call by call."""

from __future__ import annotations

from typing import Any

import pytest

from actors.generation.engine import GenerationEngine


def rows_of_calls(engine: GenerationEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens that each later call of the decoder computes, prompts included."""
    rows: list[int] = []
    forward = engine.cached.forward

    def spy(newest: Any, positions: Any, chunks: Any, *more: Any) -> Any:
        rows.append(len(newest) + sum(len(chunk.tokens) for chunk in chunks))
        return forward(newest, positions, chunks, *more)

    monkeypatch.setattr(engine.cached, "forward", spy)
    return rows
