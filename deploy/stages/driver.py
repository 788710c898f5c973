"""How a command starts, finds, follows and stops the controller of a run.

::

    talipot train --start or attach--> ControllerActor (named RUN:controller, detached)
         ^                                  | owns, and builds again
         '------ status, outcome -----------'--> learner gang, rollout actors, reward workers

The run belongs to the controller, not to the command: a driver that dies on a cluster that lives on
leaves the run working, and the next ``--resume`` attaches to it. A controller never outlives its
use: its own workers end with the run, and it ends once its outcome was fetched, or `LINGER_S` after
the run if nobody comes for it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from common.config.run import RunConfig
from common.data.prompts import EncodedPrompt
from common.errors import ConfigError, Interrupted, WorkerError
from deploy.control.controller import Controller
from deploy.control.status import Status
from deploy.run_folder.resume_rules import changes
from deploy.workers.gang import LearnerGang, plain
from deploy.workers.placement import NAMESPACE
from deploy.workers.pool import Pool

LINGER_S = 600.0
"""How long a controller keeps the outcome of an ended run for a driver to fetch it."""
_POLL_S = 0.25
_ANSWER_S = 10.0
_NAME_FREE_S = 60.0
_ELSEWHERE = ("name", "output", "cluster.")
"""Fields that say where a run is looked at from."""

Show = Callable[[Status], None]


class ControllerActor(Controller):
    """A controller as a Ray actor: works in a thread of its own, whoever asks or leaves."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ended = threading.Event()
        self._facts: dict[str, Any] | None = None
        self._error: BaseException | None = None
        threading.Thread(target=self._work, name="run", daemon=True).start()

    def recipe(self) -> RunConfig:
        """What is being run."""
        return self.config

    def outcome(self, wait_s: float) -> dict[str, Any] | None:
        """The run's facts; None while it works. Raises what stopped the run."""
        self._ended.wait(wait_s)
        if self._error is not None:
            raise self._error
        return self._facts

    def _work(self) -> None:
        try:
            self._facts = self.run()
        except BaseException as error:  # handed to whoever asks for the outcome
            self._error = error
        self._ended.set()
        time.sleep(LINGER_S)
        os._exit(0)


def start_controller(
    config: RunConfig,
    prompts: Sequence[EncodedPrompt],
    gang: LearnerGang,
    pools: tuple[Pool, Pool],
    stop_after: int | None,
    *,
    detached: bool,
) -> Any:
    """The controller at work. Detached when all workers are its own, so that nothing it needs
    ends with the driver."""
    options: dict[str, Any] = {
        "name": controller_name(config),
        "namespace": NAMESPACE,
        "num_cpus": 0,
        "max_concurrency": 8,
        "lifetime": "detached" if detached else None,
    }
    actor = ray.remote(ControllerActor).options(**options)
    deadline = time.monotonic() + _NAME_FREE_S
    while True:
        try:
            return actor.remote(config, prompts, gang, *pools, stop_after)
        except ValueError:  # the name's last holder is dead, and not buried yet
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_S)


def controller_name(config: RunConfig) -> str:
    """The name that a run's controller has in namespace `NAMESPACE`."""
    return f"{config.name}:controller"


def answer(reference: ray.ObjectRef[Any], config: RunConfig) -> Any:
    """What a run's controller answers.

    Raises:
        WorkerError: it does not, in time.
        ray.exceptions.RayError: it died, or raised.
    """
    try:
        return ray.get(reference, timeout=_ANSWER_S)
    except ray.exceptions.GetTimeoutError:
        raise WorkerError(
            f"the controller of {config.run_dir} does not answer within {_ANSWER_S:.0f} s; try "
            f"again, or end its cluster and carry on with `talipot train --resume {config.run_dir}`"
        ) from None


def living_controller(config: RunConfig) -> Any:
    """The controller that works on this run, if there is one; one whose run failed or was stopped
    is ended, to make room.

    Raises:
        ConfigError: another folder's run of this name is at work, or this one by another recipe.
        WorkerError: it does not answer.
    """
    try:
        controller = ray.get_actor(controller_name(config), namespace=NAMESPACE)
        recipe: RunConfig = answer(controller.recipe.remote(), config)
    except (ValueError, ray.exceptions.RayActorError):
        return None
    if recipe.run_dir.resolve() != config.run_dir.resolve():
        raise ConfigError(
            f"a run called '{config.name}' of another folder ({recipe.run_dir}) is at work on this "
            "cluster; set name to another one"
        )
    try:
        facts = answer(controller.outcome.remote(0.0), config)
    except ray.exceptions.RayError:
        facts = {"finished": False}
    if facts is None:
        found = [c for c in changes(recipe, config, 0) if not c.field.startswith(_ELSEWHERE)]
        if found:
            raise ConfigError(
                f"{config.run_dir} is at work under another recipe: {'; '.join(map(str, found))}; "
                "stop it first, or attach to it with what it was started with"
            )
    if facts is None or facts["finished"]:
        return controller
    ray.kill(controller)
    return None


def follow(controller: Any, config: RunConfig, show: Show) -> dict[str, Any]:
    """Show progress until the run ends; its facts. Ends the controller then.

    The first SIGTERM or Ctrl-C asks the run to stop with a checkpoint and waits for that; a second
    one leaves at once.

    Raises:
        Interrupted: a signal stopped the run.
        WorkerError: the controller died.
        TalipotError: whatever stopped the run.
    """
    with _asked_to_stop() as asked:
        deadline = float("inf")
        pending = controller.outcome.remote(_POLL_S * 4)
        while True:
            if asked and deadline == float("inf"):
                controller.stop.remote()
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
            pending = controller.outcome.remote(_POLL_S * 4)
    ray.kill(controller)
    if asked and not facts["finished"]:
        raise Interrupted(
            asked[0],
            f"stopped after iteration {facts['iterations']} with a checkpoint; carry on with "
            f"`talipot train --resume {config.run_dir}`",
        )
    return facts


def _outcome(
    pending: ray.ObjectRef[Any], controller: Any, config: RunConfig
) -> dict[str, Any] | None:
    try:
        facts: dict[str, Any] | None = ray.get(pending)
        return facts
    except ray.exceptions.ActorUnavailableError:
        return None  # a lost connection, not a death: ask again
    except ray.exceptions.RayActorError as error:
        raise WorkerError(
            f"the controller died: {str(error).splitlines()[0]}; "
            f"carry on with `talipot train --resume {config.run_dir}`"
        ) from None
    except ray.exceptions.RayTaskError as error:
        ray.kill(controller)
        raise plain(error) from None


def _show(show: Show, controller: Any) -> None:
    try:
        show(ray.get(controller.status.remote(), timeout=5))
    except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError):
        return  # The run's own reference tells what happened.


@contextmanager
def _asked_to_stop() -> Iterator[list[signal.Signals]]:
    """Signals that arrived; after the first one they mean again what they meant before."""
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
