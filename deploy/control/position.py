"""Where a run stands: its books, what a checkpoint of it holds, and how it goes back to one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.config.run import RunConfig
from deploy.control.collector import Collector
from deploy.control.held_out import HeldOut
from deploy.control.issuing import Issuer
from deploy.control.jobs import Scored, Weights
from deploy.control.ledger import Ledger
from deploy.run_folder import checkpoints
from deploy.workers.gang import LearnerGang


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
        """Iteration of the newest checkpoint written."""

    def publish(self, version: int) -> None:
        """Make a new version of the weights what actors must sample from."""
        manifest, payloads = self.gang.publish(version)
        self.collector.weights = Weights(manifest=manifest, payloads=payloads)

    def move_rollouts(self) -> None:
        """Keep rollouts moving while the learner works: asynchronous mode has some in flight."""
        self.collector.pump(0.0)

    def account(self, batch: Sequence[Scored]) -> None:
        """Enter in the books that the iteration was trained."""
        self.ledger.train(i for s in batch for i in s.trained)
        self.ledger.check()
        self.issuer.trained(self.iteration, batch)
        self.batch = []
        self.iteration += 1

    def checkpoint(self) -> None:
        """Write what the run is after `iteration` iterations, unless that is written already."""
        if self._saved != self.iteration:
            keep, run_dir = self.config.train.keep_checkpoints, self.config.run_dir
            best = self.held_out.best
            checkpoints.write(run_dir, self.iteration, self._fill, keep=keep, best=best)
            self._saved = self.iteration

    def _fill(self, folder: Path) -> dict[str, Any]:
        learner = self.gang.save(folder, meanwhile=self.move_rollouts)
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
