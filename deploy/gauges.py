"""Ray's metrics of one process: what varies is a label, and every value is told again and again.

Ray forgets a gauge that is not set for two of its report intervals (20 to 30 s), though its process
lives, and iterations of real models are longer: one thread sets all of them every few seconds.
Ray's own counters refuse a first value of 0, so the first event would never be seen as a rise:
counts are gauges here, called ``..._total``, and 0 before anything has happened.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import ray
from psutil import Process
from ray.util.metrics import Gauge

from common.live_metrics import Live
from common.metric_facts import Catalogue
from common.metric_names import logged_as

EVERY_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A metric's value now."""

    metric: Catalogue
    value: float
    labels: Mapping[str, str]

    @classmethod
    def of(cls, metric: Catalogue, value: float, *labels: object) -> Reading:
        """Return a reading, with the values of the metric's labels in their order."""
        named = dict(zip(metric.labels, map(str, labels), strict=True))
        return cls(metric=metric, value=float(value), labels=named)

    @classmethod
    def logged(cls, stage: str, name: str, value: float) -> Reading:
        """Return a reading of a metric of the log, by the name that is written there.

        Raises:
            KeyError: no such metric.
        """
        metric, labels = logged_as(name)
        return cls(metric=metric, value=float(value), labels={"stage": stage, **labels})


def own_readings(role: str, worker: str) -> list[Reading]:
    """Return what every process knows of itself."""
    return [Reading.of(Live.RESIDENT_BYTES, Process().memory_info().rss, role, worker)]


def _nothing() -> Iterable[Reading]:
    return ()


class Gauges:
    """All of one process, of one run."""

    def __init__(
        self,
        run: str,
        ask: Callable[[], Iterable[Reading]] = _nothing,
        every_s: float = EVERY_S,
    ) -> None:
        """Tell from now on.

        Args:
            run: the label `run` of every value.
            ask: is asked for what has changed before each telling, from the thread that tells.
            every_s: how often all is told.
        """
        self._run, self._ask, self._every_s = run, ask, every_s
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._gauges: dict[str, Gauge] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="gauges", daemon=True)
        self._thread.start()

    def set(self, readings: Iterable[Reading], *, whole: bool = False) -> None:
        """Take values up, and tell them at once.

        Args:
            readings: what is known now.
            whole: what they do not say of the metrics that they are of is true no more, such as the
                count of rollouts of an age that none had.
        """
        readings = list(readings)
        with self._lock:
            if whole:
                fresh = {(r.metric.facts.series, r.labels.get("stage")) for r in readings}
                for key in list(self._values):
                    if (key[0], dict(key[1]).get("stage")) in fresh:
                        del self._values[key]
            for reading in readings:
                facts = reading.metric.facts
                tags = {"run": self._run, **reading.labels}
                if facts.series not in self._gauges:
                    self._gauges[facts.series] = Gauge(
                        f"talipot_{facts.series}",
                        description=f"{facts.meaning} ({facts.unit})",
                        tag_keys=tuple(tags),
                    )
                self._values[facts.series, tuple(tags.items())] = reading.value
                self._gauges[facts.series].set(reading.value, tags)

    def ask(self) -> None:
        """Ask for what has changed, and tell it at once."""
        self.set(self._ask())

    def close(self) -> None:
        """Tell no more; Ray forgets the values within half a minute."""
        self._ended.set()
        self._thread.join()

    def _go_on(self) -> None:
        complained = False
        while True:
            try:
                if ray.is_initialized():  # else a program uses a run's log without a cluster
                    self._tell()
            except Exception:  # of whatever is asked: the run goes on, and so does telling
                if not complained:
                    traceback.print_exc()
                complained = True
            if self._ended.wait(self._every_s):
                return

    def _tell(self) -> None:
        try:
            self.ask()
        finally:
            with self._lock:
                for (series, tags), value in self._values.items():
                    self._gauges[series].set(value, dict(tags))
