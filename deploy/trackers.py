"""Metrics sent to services: the lines of metrics.jsonl, in order, each once, beside the run.

What cannot be sent at once is tried again; a service that is down or slow never holds a run up. A
run is one run there too: its id is kept in its folder, so stages and resumptions go on with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Final, Protocol

from common.config.run import RunConfig
from common.errors import ConfigError
from common.files import one_line, write_atomic

_PACKAGES: Final = {"wandb": "wandb", "mlflow": "mlflow-skinny", "trackio": "trackio"}
_RETRY_S: Final = (1.0, 5.0, 15.0, 60.0)
_NOT_MLFLOWS: Final = re.compile(r"[^\w\-. :]")
BEGIN_S: Final = 90.0
"""Longest wait for a service before anything starts."""
_END_S: Final = 30.0
"""Longest wait at the end of a run for what is not sent yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One line of metrics.jsonl."""

    stage: str
    step: int
    time: float
    """Seconds since 1970."""
    metrics: Mapping[str, float]

    def named(self) -> dict[str, float]:
        """Return the metrics as TensorBoard calls them: ``stage/name``."""
        return {f"{self.stage}/{name}": value for name, value in self.metrics.items()}


class Tracker(Protocol):
    """A run at a service. Whatever it raises is taken for a service that is down."""

    run_id: str
    """By which the service finds the run again."""

    def log(self, step: Step) -> None:
        """Send one line."""

    def close(self) -> None:
        """Say that this process sends no more."""


def names_of(config: RunConfig) -> list[str]:
    """Return the services that a recipe asks for."""
    return [name for name in _PACKAGES if getattr(config.trackers, name) is not None]


def require_installed(config: RunConfig) -> None:
    """Refuse a service whose package is not there.

    Raises:
        ConfigError: naming the first, and how to install it.
    """
    for name in names_of(config):
        if find_spec(name) is None:
            raise ConfigError(
                f"trackers.{name}: the package {name} is not installed; run `pip install "
                f"{_PACKAGES[name]}`, or leave it out"
            )


def begin(config: RunConfig) -> None:
    """Open and close the run at each service, so that what is wrong is told before anything starts.

    Raises:
        ConfigError: a package is missing, or a service refuses or does not answer.
    """
    require_installed(config)
    for name in names_of(config):
        ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        threading.Thread(target=_try, args=(name, config, ended), daemon=True).start()
        try:
            error = ended.get(timeout=BEGIN_S)
        except queue.Empty:
            error = TimeoutError(f"no answer within {BEGIN_S:.0f} s")
        if error is not None:
            raise ConfigError(
                f"trackers.{name}: cannot be reached ({type(error).__name__}: {one_line(error)}); "
                "mend it, or leave it out"
            )


def _try(name: str, config: RunConfig, ended: queue.SimpleQueue[Exception | None]) -> None:
    """Open and close the run at a service, which may never answer; tells how that ended."""
    try:
        _open(name, config).close()
        ended.put(None)
    except Exception as error:
        ended.put(error)


def outboxes(config: RunConfig, note: Callable[[str], None]) -> list[Outbox]:
    """Return one for each service of the recipe; what could not be sent is told to `note`."""
    return [Outbox(name, partial(_open, name, config), note) for name in names_of(config)]


class Outbox:
    """Lines on their way to one service, sent by a thread of its own."""

    def __init__(self, name: str, opened: Callable[[], Tracker], note: Callable[[str], None]):
        """Open the run at the service at the first line."""
        self._name, self._opened, self._note = name, opened, note
        self._lines: queue.SimpleQueue[Step | None] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._left = 0
        self._why = ""
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, step: Step) -> None:
        """Send a line as soon as the service takes it; returns at once."""
        self._left += 1
        self._lines.put(step)

    def end(self) -> None:
        """Say that there are no more lines; returns at once."""
        self._lines.put(None)
        self._ending.set()

    def finish(self, deadline: float) -> None:
        """Wait until a moment of the monotonic clock for what is not sent yet; tell the rest."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._left:
            why = f" ({self._why})" if self._why else ""
            self._note(
                f"trackers.{self._name}: {self._left} lines were not sent{why}; they stand in "
                "metrics.jsonl"
            )

    def _work(self) -> None:
        tracker: Tracker | None = None
        while (step := self._lines.get()) is not None:
            for wait in self._waits():
                try:
                    tracker = tracker or self._opened()
                    tracker.log(step)
                    self._left -= 1
                    break
                except Exception as error:  # the service's, whatever its package calls it
                    self._why = f"{type(error).__name__}: {one_line(error)}"
                    self._ending.wait(wait)
            else:
                break
        if tracker is not None:
            with contextlib.suppress(Exception):  # what it lacks is told by the count
                tracker.close()

    def _waits(self) -> Iterator[float]:
        """Yield how long to wait after each failure, until one after the run's end."""
        tries = 0
        while not self._ending.is_set() or not tries:
            yield _RETRY_S[min(tries, len(_RETRY_S) - 1)]
            tries += 1


def close_all(boxes: Sequence[Outbox]) -> None:
    """Wait a while for what is not sent yet, for all services at once."""
    for box in boxes:
        box.end()
    deadline = time.monotonic() + _END_S
    for box in boxes:
        box.finish(deadline)


# ------------------------------------------------------------------ the services


def _open(name: str, config: RunConfig) -> Tracker:
    """Open a run at a service, the one that the folder names or a new one, which it names then."""
    path = config.folder.trackers
    ids: dict[str, str] = json.loads(path.read_text(encoding="utf8")) if path.exists() else {}
    opened: dict[str, Callable[[RunConfig, str | None], Tracker]] = {
        "wandb": _Wandb,
        "mlflow": _Mlflow,
        "trackio": _Trackio,
    }
    tracker = opened[name](config, ids.get(name))
    if ids.get(name) != tracker.run_id:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, [json.dumps(ids | {name: tracker.run_id}, indent=1).encode()])
    return tracker


class _Wandb:
    def __init__(self, config: RunConfig, run_id: str | None) -> None:
        import wandb

        assert config.trackers.wandb is not None
        # It names folders by the second, and writes over one of the second before it.
        folder = config.run_dir / "wandb" / os.urandom(4).hex()
        folder.mkdir(parents=True)
        self._run: Any = wandb.init(
            project=config.trackers.wandb.project,
            entity=config.trackers.wandb.entity,
            name=config.name,
            id=run_id,
            resume="allow",
            dir=str(folder),
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(console="off", silent=True),
        )
        self.run_id = str(self._run.id)

    def log(self, step: Step) -> None:
        axis = f"{step.stage}/step"
        # Stages begin at step 1 each, and a service that has one axis alone would drop them.
        self._run.define_metric(f"{step.stage}/*", step_metric=axis)
        self._run.log({**step.named(), axis: step.step})

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, config: RunConfig, run_id: str | None) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        settings = config.trackers.mlflow
        assert settings is not None
        self._metric = Metric
        self._client = MlflowClient(tracking_uri=settings.uri)
        if run_id is None:
            found = self._client.get_experiment_by_name(settings.experiment)
            experiment = (
                self._client.create_experiment(settings.experiment)
                if found is None
                else found.experiment_id
            )
            run_id = self._client.create_run(experiment, run_name=config.name).info.run_id
        self.run_id = str(run_id)
        self._client.update_run(self.run_id, status="RUNNING")

    def log(self, step: Step) -> None:
        at = int(step.time * 1000)
        # It takes no other characters in names ("pass@1" for one), and where it keeps files, none
        # that is a folder of another ("staleness", "staleness/0").
        named = {
            f"{step.stage}/{_NOT_MLFLOWS.sub('_', name.replace('/', '.'))}": value
            for name, value in step.metrics.items()
        }
        metrics = [self._metric(name, value, at, step.step) for name, value in named.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self.run_id)


class _Trackio:
    def __init__(self, config: RunConfig, run_id: str | None) -> None:
        import trackio

        assert config.trackers.trackio is not None
        # It finds a run by its name; runs of one name in two folders are two.
        self.run_id = run_id or f"{config.name}-{os.urandom(3).hex()}"
        # It prints how to look at a run, and has no switch for that. A module's own name goes
        # before the built-in one; sys.stdout is other threads' too.
        for module in (trackio, trackio.run, trackio.utils):
            vars(module)["print"] = lambda *_, **__: None
        self._run: Any = trackio.init(
            project=config.trackers.trackio.project,
            name=self.run_id,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
            config=config.model_dump(mode="json"),
        )

    def log(self, step: Step) -> None:
        self._run.log({**step.named(), f"{step.stage}/step": step.step})

    def close(self) -> None:
        self._run.finish()
