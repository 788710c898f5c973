"""How much memory a command and all that it started hold at once."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Final, Self

import psutil

EVERY_S: Final = 5.0


class Resident:
    """Watches while its block runs; `peak_gb` is the most that was seen, in 10^9 bytes.

    What processes share counts once: each counts its part of it (PSS), where the system knows that.
    """

    def __init__(self, every_s: float = EVERY_S) -> None:
        self.peak_gb = 0.0
        self._every_s = every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while True:
            held = sum(_bytes_of(process) for process in [me, *me.children(recursive=True)])
            self.peak_gb = max(self.peak_gb, held / 1e9)
            if self._ended.wait(self._every_s):
                return


def _bytes_of(process: psutil.Process) -> int:
    try:
        memory = process.memory_full_info()
    except psutil.Error:  # it has ended, or is not ours to look at
        return 0
    return int(getattr(memory, "pss", memory.uss))
