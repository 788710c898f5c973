"""A session: the folder, cluster, workers, logs and progress display of one command on a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NoReturn

import ray
from rich.console import Console

from common.config.run import RunConfig
from common.data.tokenizer import Tokenizer, load_tokenizer
from common.endings import at_the_end, take_all
from common.errors import ClusterError, StorageError
from common.run_folder import RunFolder
from deploy.exits import end_now
from deploy.run_folder.failures import note_failure, note_success, note_untracked
from deploy.run_folder.lock import RunLock, at_work, remove_unused
from deploy.run_folder.metrics_log import RunLog
from deploy.run_folder.paths import anchored
from deploy.screen import Bar, progress_bar, say
from deploy.trackers import outboxes
from deploy.workers.attach import Way, own_address, sign_in, start_cluster, way_to
from deploy.workers.gang import LearnerGang
from deploy.workers.guard import closed_token, unguarded
from deploy.workers.head import HeadWatch, end_here
from deploy.workers.pool import Pool
from deploy.workers.preflight import explain, sharing

_RESUMABLE: Final = ("sft", "reward", "train")
_AGAIN: Final = "give the command again"


@dataclass(slots=True)
class Session:
    """Owner of what stages share. Use `open_session`."""

    config: RunConfig
    """Its paths are absolute."""
    console: Console
    attached: bool = False
    """Its cluster is the one that the run is at work on already."""
    again: str = ""
    """How to go on after an error; empty where that is the stage's `--resume`."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time per stage."""
    _gang: LearnerGang | None = None
    _pools: list[Pool] = field(default_factory=list)
    _lock: RunLock | None = None
    _stage: str = ""
    """The one that is under way, or was last."""

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
            self._lock = RunLock(self.run_dir, stage, cluster=own_address())

    def unlock(self) -> None:
        """Let others write: the controller that this session starts, or the next command."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def end_gang(self) -> None:
        """End the learner gang, if there is one: what comes next trains nothing."""
        gang, self._gang = self._gang, None
        if gang is not None:
            gang.stop()

    def close(self) -> None:
        """End all workers, free their resources and the run's folder; then raise what failed."""
        pools, self._pools = self._pools, []
        take_all(*(pool.stop for pool in pools), self.end_gang, self.unlock)

    def end_without_head(self, why: str) -> NoReturn:
        """End the program, with a line that says how to go on: the cluster has lost its head.

        Nothing is asked of the cluster any more, and no thread is waited for.
        """
        resume = f"carry on with `talipot {self._stage} --resume {self.run_dir}`"
        again = self.again or (resume if self._stage in _RESUMABLE else _AGAIN)
        error = ClusterError(f"{why}; {again}")
        try:
            self._note_failure(self._stage, error)
            self.console.show_cursor()
            end_here()
        finally:
            end_now(error)

    def log(self) -> RunLog:
        """Open this run's logs for writing; close them after use."""
        return RunLog(self.run_dir, outboxes(self.config, self._untracked))

    def _untracked(self, text: str) -> None:
        note_untracked(self.folder.events, text)
        say(self.console, (text, "yellow"))

    @contextmanager
    def stage(self, name: str, title: str, *, least_s: float = 0.0) -> Iterator[None]:
        """Time a stage, and say so when it has ended, or note in the run's folder why it failed.

        Nothing is said of one that took less than `least_s` seconds.
        """
        begin, self._stage = time.perf_counter(), name
        try:
            yield
        except Exception as error:
            self._note_failure(name, error)
            raise
        if not self.attached:
            note_success(self.folder.events, name)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
        if self.seconds[name] >= least_s:
            say(self.console, ("✓", "green"), f" {title} ", (f"{self.seconds[name]:.0f} s", "dim"))

    def _note_failure(self, stage: str, error: Exception) -> None:
        # A folder without a recipe is no run yet, and goes again.
        if stage and not self.attached and self.folder.config.exists():
            note_failure(self.folder.events, stage, error)

    def progress(self, title: str, total: int, done: int = 0) -> AbstractContextManager[Bar]:
        """Show a live progress bar with metrics beside it, from where `done` steps are done."""
        return progress_bar(self.console, title, total, done)


@contextmanager
def open_session(
    config: RunConfig,
    console: Console,
    *,
    writer: str = "",
    attach: bool = False,
    address: str | None = None,
) -> Iterator[Session]:
    """Create the run's folder, and join or start the cluster.

    Args:
        config: the recipe.
        console: what is told goes there.
        writer: the stage that writes into the folder from the beginning, so that another writer is
            noticed before anything starts.
        attach: join the cluster that the run is at work on, if it is.
        address: another way to that cluster, as the user gave it.

    Raises:
        StorageError: the folder cannot be written, or another stage is writing there.
        ClusterError: no cluster answers, or it has no room for the recipe.
    """
    session = Session(config, console, again=_AGAIN if writer == "quickstart" else "")
    with _run_folder(session.run_dir):
        if writer:
            session.lock(writer)
        joined = ray.is_initialized()  # by a program that uses this as a library: its own to end
        watch = HeadWatch(session.end_without_head)
        with at_the_end(session.close, watch.stop, *(() if joined else (ray.shutdown,))):
            way = _way_to_attach(session.run_dir, address) if attach else None
            session.attached = way is not None
            _in_cluster(session, way)
            watch.start(own_address())
            yield session


def _in_cluster(session: Session, way: Way | None) -> None:
    """Join or start the session's cluster, and say where it is."""
    url = start_cluster(session.config, way)
    if not session.config.cluster.autoscales:
        explain(session.config, ray.cluster_resources())
        if told := sharing(session.config, ray.cluster_resources().get("CPU", 0.0)):
            say(session.console, (told, "dim"))
    say(session.console, (f"run {session.run_dir} · dashboard {url or 'off'}", "dim"))
    if url and (hint := sign_in()):
        say(session.console, (hint, "dim"))
    for told in (unguarded(own_address()), closed_token()):
        if told:
            say(session.console, (told, "yellow"))


def _way_to_attach(run_dir: Path, address: str | None) -> Way | None:
    """Return how to join the cluster that a run is trained on now; None where it is on none."""
    holder = at_work(run_dir)
    if holder is None or holder.stage != "train" or not holder.cluster:
        return None
    return way_to(run_dir, holder, address)


@contextmanager
def _run_folder(run_dir: Path) -> Iterator[None]:
    """Make a run's folder. One that was not there before and has no recipe at the end goes again.

    Raises:
        StorageError: it cannot be made.
    """
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{run_dir}: cannot be written: {error}") from None
    try:
        yield
    finally:
        folder = RunFolder(run_dir)
        if made and not folder.config.exists():
            begun = (folder.own_tokenizer, folder.pretrained_tokenizer, folder.inputs)
            remove_unused(run_dir, [path.name for path in begun])
            with suppress(OSError):  # another run lies there
                for parent in made[1:]:
                    parent.rmdir()
