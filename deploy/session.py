"""A run in progress as the driver holds it: folder, cluster, gang, logs and progress display."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import ray
from rich.console import Console

from common.config import RunConfig
from common.errors import StorageError
from common.recipe import save_config
from common.tokenizer import Tokenizer
from deploy.ends import at_the_end, take_all
from deploy.gang import LearnerGang
from deploy.placement import start_cluster
from deploy.pool import Pool
from deploy.preflight import explain
from deploy.run_log import RunLog
from deploy.screen import Bar, progress_bar, say


@dataclass(slots=True)
class Session:
    """Owns what stages share. Use `open_session`."""

    config: RunConfig
    console: Console
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time per stage."""
    _gang: LearnerGang | None = None
    _pools: list[Pool] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        """``output/name``."""
        return self.config.run_dir

    @property
    def tokenizer_path(self) -> Path:
        """The run's tokenizer.json."""
        return (self.run_dir / "tokenizer.json").absolute()

    @property
    def sft_weights(self) -> Path:
        """Weights of the supervised policy."""
        return (self.run_dir / "sft" / "policy.safetensors").absolute()

    @property
    def reward_weights(self) -> Path:
        """Weights of the reward model."""
        return (self.run_dir / "reward_model" / "reward.safetensors").absolute()

    @property
    def policy_weights(self) -> Path:
        """Weights of the trained policy."""
        return (self.run_dir / "policy" / "policy.safetensors").absolute()

    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer."""
        return Tokenizer.load(self.tokenizer_path)

    def gang(self) -> LearnerGang:
        """The learner gang, started at its first use."""
        if self._gang is None:
            self._gang = LearnerGang(self.config, self.config.name, start=False)
        self._gang.start()
        return self._gang

    def started_gang(self) -> LearnerGang | None:
        """The learner gang if an earlier stage started it."""
        return self._gang

    def keep(self, pool: Pool) -> Pool:
        """Take charge of a pool's end."""
        self._pools.append(pool)
        return pool

    def close(self) -> None:
        """End all workers and free their resources, all of them; then raise what failed."""
        ends = [pool.stop for pool in self._pools] + ([self._gang.stop] if self._gang else [])
        self._pools, self._gang = [], None
        take_all(*ends)

    def log(self) -> RunLog:
        """A writer of this run's logs; close it after use."""
        return RunLog(self.run_dir)

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        """Time a stage and announce its end."""
        begin = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
        say(self.console, ("✓", "green"), f" {title} ", (f"{self.seconds[name]:.0f} s", "dim"))

    def progress(self, title: str, total: int) -> AbstractContextManager[Bar]:
        """A live progress bar that shows metrics beside it."""
        return progress_bar(self.console, title, total)


@contextmanager
def open_session(config: RunConfig, console: Console, *, record: bool = True) -> Iterator[Session]:
    """Create the run's folder, save the resolved config, join or start the cluster.

    Whoever only looks at a finished run (`record` False) leaves its config as it was trained with.

    Raises:
        StorageError: the folder cannot be written.
        ClusterError: no cluster answers, or it cannot hold the recipe; said before anything waits.
    """
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{config.run_dir}: cannot be written: {error}") from None
    if record:
        save_config(config, config.run_dir / "config.yaml")
    joined = ray.is_initialized()  # by a program that uses this as a library: its own to end
    url = start_cluster(config)
    session = Session(config, console)
    with at_the_end(session.close, *(() if joined else (ray.shutdown,))):
        if not config.cluster.autoscales:
            explain(config, ray.cluster_resources())  # type: ignore[no-untyped-call]
        say(console, (f"run {config.run_dir} · dashboard {url or 'off'}", "dim"))
        yield session
