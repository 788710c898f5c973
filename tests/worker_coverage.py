"""Coverage inside Ray's workers, which are killed at the end instead of leaving in order.

Ray calls `start` in every worker of the tests' cluster (`worker_process_setup_hook`). A thread
saves what was measured every second, since no exit hook ever runs there.
"""

from __future__ import annotations

import os
import threading
import time


def start() -> None:
    """Measure this process, if the tests run under coverage."""
    if "COVERAGE_PROCESS_START" not in os.environ:
        return
    import coverage

    coverage.process_startup()
    running = coverage.Coverage.current()
    if running is not None:
        threading.Thread(target=_save, args=(running,), daemon=True).start()


def _save(running: object) -> None:
    while True:
        time.sleep(1.0)
        running.save()  # type: ignore[attr-defined]
