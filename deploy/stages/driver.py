"""How a command follows the controller of a run to its end, and stops it at a signal."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from common.config.run import RunConfig
from common.errors import Interrupted, WorkerError
from deploy.control.status import Status
from deploy.stages.controller_actor import RemoteController
from deploy.workers.calls import own_error

_POLL_S = 0.25
_OUTCOME_S = 1.0
"""How long the controller waits for the run's end before it answers that there is none yet."""
_STATUS_S = 5.0

Show = Callable[[Status], None]


def follow(controller: RemoteController, config: RunConfig, show: Show) -> dict[str, Any]:
    """Show progress until the run ends, and end the controller; returns the run's facts.

    The first SIGTERM or Ctrl-C asks the run to stop with a checkpoint and waits for that; a second
    one leaves at once.

    Raises:
        Interrupted: a signal stopped the run.
        WorkerError: the controller died.
        TalipotError: whatever stopped the run.
    """
    with _asked_to_stop() as asked:
        deadline = float("inf")
        pending = controller.start_outcome(_OUTCOME_S)
        while True:
            if asked and deadline == float("inf"):
                controller.stop()
                deadline = time.monotonic() + config.cluster.stop_timeout_s
            if time.monotonic() > deadline:
                raise Interrupted(
                    asked[0],
                    f"the run did not stop within {config.cluster.stop_timeout_s:.0f} s "
                    f"(cluster.stop_timeout_s); carry on with `talipot train --resume "
                    f"{config.run_dir}`",
                )
            if not ray.wait([pending], timeout=_POLL_S)[0]:
                _show(show, controller)
                continue
            facts = _outcome(pending, controller, config)
            if facts is not None:
                break
            pending = controller.start_outcome(_OUTCOME_S)
    controller.end()
    if asked and not facts["finished"]:
        raise Interrupted(
            asked[0],
            f"stopped after iteration {facts['iterations']} with a checkpoint; carry on with "
            f"`talipot train --resume {config.run_dir}`",
        )
    return facts


def _outcome(
    pending: ray.ObjectRef[dict[str, Any] | None], controller: RemoteController, config: RunConfig
) -> dict[str, Any] | None:
    try:
        return ray.get(pending)
    except ray.exceptions.ActorUnavailableError:
        return None  # a lost connection, not a death: ask again
    except ray.exceptions.RayActorError as error:
        raise WorkerError(
            f"the controller died: {str(error).splitlines()[0]}; "
            f"carry on with `talipot train --resume {config.run_dir}`"
        ) from None
    except ray.exceptions.RayTaskError as error:
        controller.end()
        raise own_error(error) from None


def _show(show: Show, controller: RemoteController) -> None:
    try:
        show(controller.status(_STATUS_S))
    except (WorkerError, ray.exceptions.RayActorError):
        return  # The pending outcome tells what happened.


@contextmanager
def _asked_to_stop() -> Iterator[list[signal.Signals]]:
    """Note the signals that arrive; after the first one they mean again what they meant before."""
    asked: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _: object) -> None:
        asked.append(signal.Signals(number))
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        restore()
