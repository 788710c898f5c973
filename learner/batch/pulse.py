"""How many micro-batches this process has taken up: what tells a long phase from a hang."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress

_taken = 0


def beat() -> None:
    """Count a micro-batch."""
    global _taken
    _taken += 1


def telling(tell: Callable[[int], None], every_s: float) -> None:
    """Tell from now on, in a thread of its own, how many were taken up, whenever that has grown.

    What `tell` raises is passed over: it is told again with the next one.
    """

    def go_on() -> None:
        told = 0
        while True:
            time.sleep(every_s)
            if (taken := _taken) != told:
                with suppress(Exception):  # the cluster's; who waits takes silence for a hang
                    tell(taken)
                    told = taken

    threading.Thread(target=go_on, name="pulse", daemon=True).start()
