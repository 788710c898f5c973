"""Where a run stands: its books, what a checkpoint of it holds, and how it goes back to one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from common.config.run import RunConfig
from common.errors import StorageError, TalipotError
from deploy.control.collector import Collector
from deploy.control.held_out import HeldOut
from deploy.control.issuing import Issuer
from deploy.control.jobs import Scored, Weights
from deploy.control.ledger import Ledger
from deploy.run_folder import checkpoints
from deploy.workers.gang import LearnerGang
from learner.checkpointing import forget_marks, written

_LOOK_S: Final = 1.0
"""How often it is seen whether ranks have written a checkpoint, at most."""
_TURN_S: Final = 0.02
"""How long rollouts are waited for in one turn, while a checkpoint gets its name."""


@dataclass(slots=True)
class _Writing:
    """A checkpoint that the ranks are writing."""

    begun: checkpoints.Unfinished
    state: dict[str, Any]
    """What its JSON will say: the run as it was when it was begun."""
    best: int | None
    """The best iteration as it was known then: its checkpoint is kept."""
    look_again: float = 0.0
    """When to see again whether it is done."""
    naming: Future[None] | None = None
    """All of it is written: it is being made to outlast a power cut, and given its name."""


class Position:
    """A run between two iterations, or in the midst of one.

    A run that is restored issues what was issued beyond the checkpoint again, less what is in
    flight and still of use; so the history that survives trains every rollout once.
    """

    def __init__(
        self,
        config: RunConfig,
        gang: LearnerGang,
        ledger: Ledger,
        collector: Collector,
        issuer: Issuer,
        held_out: HeldOut,
    ) -> None:
        """Stand before the first iteration, with nothing published yet."""
        self.config, self.gang, self.ledger = config, gang, ledger
        self.collector, self.issuer, self.held_out = collector, issuer, held_out
        self.iteration = 0
        """Next iteration to train."""
        self.batch: list[Scored] = []
        """What the learner trains on now."""
        self.learner_restarts = 0
        self._saved = -1
        """Iteration of the newest checkpoint that was begun."""
        self._writing: _Writing | None = None
        """The checkpoint that the ranks are writing."""
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="checkpoints")
        """Name one, and remove others: disks may take their time, and rollouts go on."""
        self._removals: list[Future[None]] = []
        """Of checkpoints that others have taken the place of."""

    def publish(self, version: int) -> None:
        """Make a new version of the weights what actors must sample from."""
        manifest, payloads = self.gang.publish(version)
        self.collector.weights = Weights(manifest=manifest, payloads=payloads)

    def move_rollouts(self) -> None:
        """Keep rollouts moving while the learner works: asynchronous mode has some in flight."""
        self.settle_checkpoint()
        self.collector.pump(0.0)

    def account(self, batch: Sequence[Scored]) -> None:
        """Enter in the books that the iteration was trained."""
        self.ledger.train(i for s in batch for i in s.trained)
        self.ledger.check()
        self.issuer.trained(self.iteration, batch)
        self.batch = []
        self.iteration += 1

    def checkpoint(self) -> None:
        """Begin to write what the run is after `iteration` iterations, unless that is written.

        The ranks write their parts while they train on; it is a checkpoint once all have.
        """
        if self._saved == self.iteration:
            return
        self.finish_checkpoint()
        begun = checkpoints.Unfinished(self.config.run_dir, self.iteration)
        try:
            with begun.attempt():
                learner = self.gang.begin_save(begun.folder, meanwhile=self.move_rollouts)
        except BaseException:
            begun.drop()
            raise
        self._writing = _Writing(begun, self._state(learner), self.held_out.best)
        self._saved = self.iteration

    def settle_checkpoint(self) -> None:
        """Get on with the checkpoint that is being written, as far as that takes no waiting."""
        writing = self._writing
        if writing is None:
            return
        if writing.naming is not None:
            if writing.naming.done():
                self._named(writing.naming)
            return
        if time.monotonic() < writing.look_again:
            return
        writing.look_again = time.monotonic() + _LOOK_S
        with writing.begun.attempt():
            sums = written(writing.begun.folder, self.config.learner.ranks)
        if sums is not None:
            self._name(writing, sums)

    def finish_checkpoint(self) -> None:
        """Wait until the checkpoint that is being written is one; without a gang it never is."""
        self._settle_now()
        writing = self._writing
        if writing is not None and writing.naming is None and self.gang.started:
            with writing.begun.attempt():
                sums = self.gang.saved(meanwhile=lambda: self.collector.pump(0.0))
            self._name(writing, sums)
        if writing is not None and writing.naming is not None:
            while not writing.naming.done():
                self.collector.pump(_TURN_S)
            self._named(writing.naming)
        self._await_removals()

    def end(self) -> None:
        """Let what is being written become a checkpoint if it can: the run ends here."""
        with suppress(TalipotError):  # what ends the run is what matters
            self.finish_checkpoint()
        self._drop_checkpoint()

    def _name(self, writing: _Writing, sums: Mapping[str, str]) -> None:
        """Begin to make what the ranks have written a checkpoint."""

        def finish() -> None:
            with writing.begun.attempt():
                forget_marks(writing.begun.folder)
            writing.begun.finish(writing.state, sums)
            run_dir, keep = self.config.run_dir, self.config.train.keep_checkpoints
            step = writing.state["iteration"]
            for path in checkpoints.outdated(run_dir, step, keep=keep, best=writing.best):
                self._removals.append(self._threads.submit(checkpoints.remove, path))

        writing.naming = self._threads.submit(finish)

    def _named(self, naming: Future[None]) -> None:
        """Take note that it has its name, or raise why it has not."""
        self._writing = None
        naming.result()

    def _await_removals(self) -> None:
        """Wait until what others have taken the place of is gone."""
        while self._removals:
            self._removals.pop().result()

    def _settle_now(self) -> None:
        if self._writing is not None:
            self._writing.look_again = 0.0
        self.settle_checkpoint()

    def _drop_checkpoint(self) -> None:
        """Give up the checkpoint that is being written, unless it is whole: the ranks are gone."""
        with suppress(StorageError):
            self._settle_now()
        if (writing := self._writing) is not None:
            if writing.naming is None:
                writing.begun.drop()
            else:  # it is whole, or gone
                with suppress(StorageError):
                    writing.naming.result()
            self._writing = None
        self._await_removals()

    def _state(self, learner: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a checkpoint's JSON says."""
        return {
            "iteration": self.iteration,
            "config": self.config.model_dump(mode="json"),
            "prompt_position": self.issuer.position(self.iteration),
            "further_position": self.issuer.further_position,
            "curriculum": self.issuer.curriculum(),
            "ledger": self.ledger.state(),
            "learner": learner,
            "learner_restarts": self.learner_restarts,
            "counts": self.collector.tally.counted(),
        }

    def restore(self) -> None:
        """Stand where the newest whole checkpoint stands, or at the start; publish its weights."""
        self._drop_checkpoint()
        run_dir, train = self.config.run_dir, self.config.train
        newest = checkpoints.newest(run_dir)
        self.gang.begin_train(self.config, self.collector.tend)
        state: dict[str, Any] = {}
        if newest is not None:
            folder, state = newest
            self.gang.load(folder, state["learner"], meanwhile=self.collector.tend)
        issued = self.issuer.next
        self.iteration = self._saved = state.get("iteration", 0)
        self.held_out.rewind(self.iteration)
        checkpoints.rewind(run_dir, self.iteration)
        self.learner_restarts = max(self.learner_restarts, state.get("learner_restarts", 0))
        self.collector.tally.carry_on(state.get("counts", {}))
        self.ledger = self.ledger.rewound(state.get("ledger"))
        prompt, further = (state.get(f"{name}_position", 0) for name in ("prompt", "further"))
        self.issuer.rewind(self.iteration, prompt, further, state.get("curriculum"))
        ahead = self.iteration + train.max_staleness
        self.issuer.issue(self.ledger, until=min(issued - 1, ahead))
        self.collector.batches.waiting += self.batch
        self.batch = []
        self.collector.rewind(self.ledger, self.iteration, train.max_staleness)
        self.ledger.check()
        self.publish(self.iteration)
