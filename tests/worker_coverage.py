"""Coverage inside Ray's workers, which are killed at the end instead of leaving in order.

Ray calls `start` in every worker of the tests' cluster (`worker_process_setup_hook`). A thread
saves what was measured every second, since no exit hook ever runs there.
"""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest  # which no worker needs

_STARTS = "COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG"
"""Either makes Python itself start measuring, from its first line on."""
_OURS = "TALIPOT_TESTS_COVERAGE"


def hand_over(environment: pytest.MonkeyPatch) -> None:
    """Let the processes of a cluster begin unmeasured: `start` begins it in those that matter."""
    if "COVERAGE_PROCESS_START" in os.environ:
        environment.setenv(_OURS, os.environ["COVERAGE_PROCESS_START"])
    for name in _STARTS:
        environment.delenv(name, raising=False)


def start() -> None:
    """Measure this process, if the tests run under coverage."""
    if _OURS not in os.environ:
        return
    import coverage

    os.environ["COVERAGE_PROCESS_START"] = os.environ[_OURS]
    running = coverage.process_startup()
    if running is not None:
        threading.Thread(target=_save, args=(running,), daemon=True).start()


def _save(running: object) -> None:
    while True:
        time.sleep(1.0)
        running.save()  # type: ignore[attr-defined]
