"""A reward function in processes of its own, one response at a time, with limits.

::

    reward worker --sample, a line of JSON--> process of the function
                  <--result, a line of JSON--

For functions that run what a policy wrote. Such code may loop, take all memory, end its process or
start others; each costs the response that it came from, and a new process takes the place of the
old one. What the function itself does wrong (it raises, or returns no number) is an error of the
run, as without isolation. Nothing is pickled; what the function prints goes to the worker's log.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any, Final

from common.errors import ConfigError, RewardError
from reward_service.samples import Sample
from reward_service.scorers import FunctionScorer, ScoreResult

START_S: Final = 120.0
"""Longest import of the function's module."""
_LOOK_S: Final = 0.05
"""How soon the end of a process is noticed."""
_STARTS: Final = 3
"""Processes that may die one after the other before they have imported the function."""
_SET_PARENT_DEATH_SIGNAL: Final = 1
"""``PR_SET_PDEATHSIG`` of Linux' prctl.h."""


class IsolatedScorer:
    """A Python function in its own processes; a `Scorer`."""

    def __init__(
        self,
        target: str,
        *,
        timeout_s: float,
        memory_mb: float,
        processes: int,
        failed_score: float | None,
    ) -> None:
        """Start the first process.

        Args:
            target: ``package.module:function``.
            timeout_s: longest scoring of one response.
            memory_mb: most memory that a process may take, in MiB.
            processes: that score at once.
            failed_score: of a response whose scoring took too long or ended its process; None
                gives the response up.

        Raises:
            ConfigError: the function cannot be imported.
        """
        self._title = f"reward function {target}"
        self._timeout_s, self._failed_score = timeout_s, failed_score
        self._start: Callable[[], _Process] = partial(_Process, target, memory_mb)
        # A process dies with the thread that started it, so the threads stay.
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="isolated")
        self._own = threading.local()
        self._started: list[_Process] = []
        self._threads.submit(self._process).result()

    def score(self, samples: Sequence[Sample]) -> list[ScoreResult]:
        """Call the function once for each response.

        Raises:
            RewardError: it raised, or returned something else than one finite number or `Score`.
        """
        return list(self._threads.map(self._score, samples))

    def close(self) -> None:
        """End all processes, and what they have started."""
        self._threads.shutdown(cancel_futures=True)
        for process in self._started:
            process.end()

    def _process(self) -> _Process:
        """Return this thread's process, a new one where it has none that lives."""
        running: _Process | None = getattr(self._own, "process", None)
        for _ in range(_STARTS):
            if running is not None:
                if running.alive():
                    return running
                running.end()  # by itself, after its last answer; what it has started may live
                self._started.remove(running)
            running = self._own.process = self._start()
            self._started.append(running)
            answer = running.answer(START_S)
            if answer is not None and answer.keys() == {"ready"}:
                return running
            running.end()
            if answer is not None:
                raise ConfigError(str(answer["error"]))
        raise ConfigError(
            f"{self._title}: {_STARTS} processes ended before they had imported it, the last with "
            f"{running.how_it_ended() if running else 'nothing'}"
        )

    def _score(self, sample: Sample) -> ScoreResult:
        process = self._process()
        process.ask(sample)
        answer = process.answer(self._timeout_s)
        if answer is None:
            took = process.alive()
            process.end()
            why = f"took more than {self._timeout_s:g} s" if took else process.how_it_ended()
            return self._failed(sample, why)
        if "error" in answer:
            raise RewardError(str(answer["error"]))
        if "failed" in answer:
            return self._failed(sample, str(answer["failed"]))
        found = answer["result"]
        tokens = found["tokens"]
        return ScoreResult(**{**found, "tokens": None if tokens is None else tuple(tokens)})

    def _failed(self, sample: Sample, why: str) -> ScoreResult:
        score = self._failed_score
        return ScoreResult(
            rollout_id=sample.rollout_id,
            score=score,
            error=f"{self._title}: {why}" if score is None else None,
            reason="" if score is None else why,
        )


class _Process:
    """One process, which imports a function and answers line by line."""

    def __init__(self, target: str, memory_mb: float) -> None:
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        try:
            self._running = subprocess.Popen(
                [
                    *(sys.executable, "-c", _CHILD, target, str(int(memory_mb * 2**20))),
                    *(str(theirs_in), str(theirs_out)),
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs_in, theirs_out),
                start_new_session=True,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                },
            )
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        self._out, self._in, self._heard = ours_out, ours_in, b""
        self._ended = False

    def alive(self) -> bool:
        """Whether it runs."""
        return self._running.poll() is None

    def ask(self, sample: Sample) -> None:
        """Send a response; one that is gone is noticed by its missing answer."""
        line = json.dumps(asdict(sample)).encode() + b"\n"
        with suppress(BrokenPipeError):
            while line:
                line = line[os.write(self._out, line) :]

    def answer(self, within_s: float) -> Mapping[str, Any] | None:
        """Return its next line; None if that does not come in time, or never will."""
        until = time.monotonic() + within_s
        while b"\n" not in self._heard:
            ended, left = not self.alive(), until - time.monotonic()
            if left <= 0:
                return None
            if select.select([self._in], [], [], min(left, _LOOK_S))[0]:
                read = os.read(self._in, 2**16)
                if not read:
                    self._running.wait()
                    return None
                self._heard += read
            elif ended:  # what it has started may still hold the pipe open
                return None
        line, _, self._heard = self._heard.partition(b"\n")
        found: Mapping[str, Any] = json.loads(line)
        return found

    def end(self) -> None:
        """End it, and everything that it has started in its session; once."""
        if self._ended:
            return
        self._ended = True
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._running.pid, signal.SIGKILL)
        self._running.wait()
        os.close(self._out)
        os.close(self._in)

    def how_it_ended(self) -> str:
        """Say how, in words."""
        code = self._running.returncode
        if code is not None and code < 0:
            return f"its process was ended by {signal.Signals(-code).name}"
        return f"its process ended with exit code {code}"


_CHILD: Final = "from reward_service.isolation import serve; serve()"


def serve() -> None:
    """Answer, in a process of the function's own, until nobody asks any more."""
    target, memory, asked, answered = sys.argv[1], *map(int, sys.argv[2:5])
    _limit(memory)
    with os.fdopen(asked, "rb") as requests, os.fdopen(answered, "wb") as answers:

        def say(answer: Mapping[str, Any]) -> None:
            answers.write(json.dumps(answer).encode() + b"\n")
            answers.flush()

        try:
            scorer = FunctionScorer(target)
            scorer.require_callable()
        except (ConfigError, RewardError) as error:
            say({"error": str(error)})
            return
        say({"ready": True})
        for line in requests:
            say(_answer(scorer.score, Sample(**json.loads(line)), memory))


def _answer(
    score: Callable[[Sequence[Sample]], Sequence[ScoreResult]], sample: Sample, memory: int
) -> Mapping[str, Any]:
    # JSON knows no tuples; the function is given what it would be without isolation.
    given = Sample(
        **{**asdict(sample), "tokens": tuple(sample.tokens), "messages": tuple(sample.messages)}
    )
    try:
        (result,) = score([given])
    except RewardError as error:
        if isinstance(error.__cause__, MemoryError):
            return {"failed": f"took more than {memory / 2**20:g} MiB"}
        return {"error": str(error)}
    return {"result": asdict(result)}


def _limit(memory: int) -> None:
    """Bound this process's memory, leave no core files, and die with the reward worker."""
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
