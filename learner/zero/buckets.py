"""How much DeepSpeed gathers and sends at a time, also for those who plan memory without it."""

from __future__ import annotations

from typing import Final

BUCKET: Final = 50_000_000
"""Numbers that are reduced, or gathered before they are used, at a time."""
SUMMED: Final = 500_000_000
"""Gradients that ZeRO 0 sums over ranks at a time, in a copy: DeepSpeed's own number."""
LIVE: Final = 1_000_000_000
"""Numbers of a network that ZeRO 3 keeps whole from the forward to the backward pass, rather than
gather them twice."""
SMALL: Final = 10_000
"""Numbers of a parameter that every rank keeps whole under ZeRO 3."""
