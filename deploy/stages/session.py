"""A session: the folder, cluster, workers, logs and progress display of one command on a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import ray
from rich.console import Console

from common.config.run import RunConfig
from common.data.tokenizer import Tokenizer, load_tokenizer
from common.endings import at_the_end, take_all
from common.errors import StorageError
from common.run_folder import RunFolder
from deploy.run_folder.lock import RunLock
from deploy.run_folder.metrics_log import RunLog
from deploy.run_folder.paths import anchored
from deploy.screen import Bar, progress_bar, say
from deploy.workers.attach import start_cluster
from deploy.workers.gang import LearnerGang
from deploy.workers.pool import Pool
from deploy.workers.preflight import explain


@dataclass(slots=True)
class Session:
    """Owner of what stages share. Use `open_session`."""

    config: RunConfig
    """Its paths are absolute."""
    console: Console
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time per stage."""
    _gang: LearnerGang | None = None
    _pools: list[Pool] = field(default_factory=list)
    _lock: RunLock | None = None

    def __post_init__(self) -> None:
        self.config = anchored(self.config)

    @property
    def run_dir(self) -> Path:
        """``output/name``."""
        return self.config.run_dir

    @property
    def folder(self) -> RunFolder:
        """Every path in the run's folder."""
        return self.config.folder

    def tokenizer(self) -> Tokenizer:
        """Load the run's tokenizer."""
        return load_tokenizer(self.folder.tokenizer)

    def gang(self) -> LearnerGang:
        """Return the learner gang, started at its first use."""
        if self._gang is None:
            self._gang = LearnerGang(self.config, self.config.name, start=False)
        self._gang.start()
        return self._gang

    def started_gang(self) -> LearnerGang | None:
        """Return the learner gang if an earlier stage started it."""
        return self._gang

    def keep(self, pool: Pool) -> Pool:
        """Stop this pool when the session closes."""
        self._pools.append(pool)
        return pool

    def lock(self, stage: str) -> None:
        """Make this session the only writer into the run's folder, if it is not yet.

        Raises:
            StorageError: another command is writing there (it is named), or nothing can be written.
        """
        if self._lock is None:
            self._lock = RunLock(self.run_dir, stage)

    def unlock(self) -> None:
        """Let others write: the controller that this session starts, or the next command."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def close(self) -> None:
        """End all workers, free their resources and the run's folder; then raise what failed."""
        ends = [pool.stop for pool in self._pools] + ([self._gang.stop] if self._gang else [])
        self._pools, self._gang = [], None
        take_all(*ends, self.unlock)

    def log(self) -> RunLog:
        """Open this run's logs for writing; close them after use."""
        return RunLog(self.run_dir)

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        """Time a stage, and say so when it has ended."""
        begin = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
        say(self.console, ("✓", "green"), f" {title} ", (f"{self.seconds[name]:.0f} s", "dim"))

    def progress(self, title: str, total: int) -> AbstractContextManager[Bar]:
        """Show a live progress bar with metrics beside it."""
        return progress_bar(self.console, title, total)


@contextmanager
def open_session(config: RunConfig, console: Console, *, writer: str = "") -> Iterator[Session]:
    """Create the run's folder, and join or start the cluster.

    `writer` is the stage that writes into the folder from the beginning, so that another writer is
    noticed before anything starts.

    Raises:
        StorageError: the folder cannot be written, or another stage is writing there.
        ClusterError: no cluster answers, or it has no room for the recipe.
    """
    session = Session(config, console)
    try:
        session.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{session.run_dir}: cannot be written: {error}") from None
    if writer:
        session.lock(writer)
    joined = ray.is_initialized()  # by a program that uses this as a library: its own to end
    with at_the_end(session.close, *(() if joined else (ray.shutdown,))):
        url = start_cluster(session.config)
        if not session.config.cluster.autoscales:
            explain(session.config, ray.cluster_resources())
        say(console, (f"run {session.run_dir} · dashboard {url or 'off'}", "dim"))
        yield session
