"""Workers that a pool has lost: by cause, how many lately, and the wait before a replacement."""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, field

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 30.0


@dataclass(slots=True)
class Losses:
    """Losses over a pool's life."""

    by_cause: Counter[str] = field(default_factory=Counter)
    recent: deque[float] = field(default_factory=deque)
    """Times of the failures that count."""
    replace_at: float = -math.inf
    """No lost worker is replaced before this time."""
    _succeeded: float = -math.inf
    """When a call came back last."""
    _wait_s: float = 0.0

    def succeed(self, now: float) -> None:
        """Note that a call came back: the next wait is short again."""
        self._succeeded = now
        self._wait_s = 0.0

    def fail(self, now: float, window_s: float) -> int:
        """Count a failure; returns how many there were within the window.

        Failures without one success between them are one trouble, however slowly they come.
        """
        self.recent.append(now)
        while self.recent[0] < min(now - window_s, self._succeeded):
            self.recent.popleft()
        return len(self.recent)

    def back_off(self, now: float) -> None:
        """Wait before the replacement, twice as long as the last time.

        Losses during one wait are one event: a node that died.
        """
        if now >= self.replace_at:
            self._wait_s = min(_LONGEST_WAIT_S, max(_FIRST_WAIT_S, 2.0 * self._wait_s))
            self.replace_at = now + self._wait_s

    def shift(self, by: float) -> None:
        """Move all times to a clock with another zero."""
        self.recent = deque(at + by for at in self.recent)
        self.replace_at += by
        self._succeeded += by
