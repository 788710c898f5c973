"""One member of the learner gang: its verbs, from the first supervised step to the last export.

A plain class; `deploy.workers.gang` makes a Ray actor of it. All methods but `listen` are
collectives: the gang calls them on every rank together, and rank 0's answer counts.
"""

from __future__ import annotations

import gc
import socket
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from common.config.run import RunConfig
from common.devices import Compute
from common.metrics import read
from common.out_of_memory import memory_for, return_freed
from common.wire.trajectory import rows_without
from common.wire.weights import Payload
from learner.batch.pulse import telling
from learner.learner import Learner
from learner.supervised.examples import EncodedComparison, EncodedPair
from learner.supervised.reward_model import RewardModelStage
from learner.supervised.sft import SftStage
from learner.supervised.stage import SupervisedStage
from learner.zero import process_group
from learner.zero.publisher import Publication

_passes = memory_for("a learner rank's passes", "lower learner.micro_batch_tokens")
_states = memory_for(
    "building a learner rank's networks",
    "take a smaller model, or more learner.ranks on other nodes with learner.zero_stage=3",
)


class LearnerRank:
    """One rank: the process, and the stage that it trains."""

    def __init__(
        self,
        rank: int,
        world: int,
        compute: Compute,
        tell: Callable[[int], None] | None = None,
        tell_every_s: float = 5.0,
    ) -> None:
        """Begin without a stage.

        Args:
            rank: number in the gang, from 0.
            world: ranks in all.
            compute: what this rank computes with.
            tell: is told how many micro-batches were taken up, while calls last.
            tell_every_s: how often, where there are more.
        """
        if tell is not None:
            telling(tell, tell_every_s)
        torch.manual_seed(rank)
        self.rank, self.world = rank, world
        self._compute = compute
        self._listener: socket.socket | None = None
        self._stage: SupervisedStage | None = None
        self._learner: Learner | None = None

    def listen(self, host: str = "127.0.0.1") -> int:
        """Listen for the others, as rank 0; returns the port."""
        self._listener = process_group.listen(host)
        port: int = self._listener.getsockname()[1]
        return port

    def connect(self, port: int, hosts: Sequence[str] = (), timeout_s: float = 60.0) -> None:
        """Join the process group.

        Args:
            port: where rank 0 listens.
            hosts: addresses of the ranks' nodes, by rank; without any all are of this node.
            timeout_s: longest wait for the others in every collective.

        Raises:
            ClusterError: it reserved a GPU that is not there, or cannot meet the others. Not when
                the rank is made: of what a constructor raises Ray keeps the text alone.
        """
        self._compute.apply()
        process_group.connect(
            rank=self.rank,
            hosts=hosts or ["127.0.0.1"] * self.world,
            port=port,
            timeout_s=timeout_s,
            backend=self._compute.collectives,
            listener=self._listener,
        )

    # ---------------------------------------------------------------- supervised stages

    @_states
    def begin_sft(
        self,
        config: RunConfig,
        training: Sequence[EncodedPair],
        held_out: Sequence[EncodedPair],
    ) -> int:
        """Build the SFT stage; returns its number of steps.

        Args:
            config: the run's.
            training: demonstrations to train on.
            held_out: demonstrations to evaluate on.
        """
        self._end_stage()
        self._stage = SftStage(config, training, held_out)
        return self._stage.total_steps

    @_states
    def begin_reward(
        self,
        config: RunConfig,
        training: Sequence[EncodedComparison],
        held_out: Sequence[EncodedComparison],
        reported: Sequence[EncodedComparison],
        policy: str,
        seed: int,
    ) -> int:
        """Build the reward model's stage; returns its number of steps.

        Args:
            config: the run's.
            training: comparisons to train on.
            held_out: comparisons to evaluate on.
            reported: likewise, which no choice is made by.
            policy: the weights that it begins with, a file or a checkpoint's folder.
            seed: which of `reward_model.seeds` models this is.
        """
        self._end_stage()
        self._stage = RewardModelStage(config, training, held_out, reported, Path(policy), seed)
        return self._stage.total_steps

    @_passes
    def advance(self, steps: int, *, anew: bool = True) -> dict[str, float]:
        """Take steps of the current supervised stage; of `anew` see `SupervisedStage.advance`."""
        assert self._stage is not None
        return read(self._stage.advance(steps, anew=anew))

    @_passes
    def evaluate(self) -> dict[str, float]:
        """Return held-out metrics of the current supervised stage."""
        assert self._stage is not None
        return read(self._stage.evaluate())

    @_passes
    def shift(self, reference: Sequence[EncodedPair]) -> dict[str, float]:
        """Centre the reward model on reference responses."""
        assert isinstance(self._stage, RewardModelStage)
        return read(self._stage.shift(reference))

    def export_stage(self, folder: str) -> None:
        """Write the current supervised stage's weights."""
        assert self._stage is not None
        self._stage.export(Path(folder))

    def save_stage(self, folder: str) -> dict[str, Any]:
        """Write a checkpoint's tensors of the current supervised stage; returns the other state."""
        assert self._stage is not None
        return self._stage.save(Path(folder))

    def load_stage(self, folder: str, state: dict[str, Any]) -> None:
        """Read such a checkpoint."""
        assert self._stage is not None
        self._stage.load(Path(folder), state)

    def _end_stage(self) -> None:
        """Give the memory of the stage before back; engines hold themselves, in cycles."""
        self._stage = self._learner = None
        gc.collect()
        return_freed()

    # ---------------------------------------------------------------- policy training

    @_states
    def begin_train(
        self, config: RunConfig, policy: str, reward: str | None, eos_ids: Sequence[int]
    ) -> None:
        """Build the learner of policy training.

        Args:
            config: the run's.
            policy: weights of the supervised policy, a file or a checkpoint's folder.
            reward: likewise of the reward model; None: functions or endpoints score.
            eos_ids: the tokens that end a response.
        """
        self._end_stage()
        weights = Path(reward) if reward else None
        self._learner = Learner(config, Path(policy), weights, eos_ids)

    @_passes
    def policy_phase(
        self,
        iteration: int,
        log: str | None,
        *tables: pa.Table,
        without: Collection[str] = frozenset(),
    ) -> dict[str, float]:
        """Train on one iteration; returns its metrics.

        Args:
            iteration: its number, from 0.
            log: Parquet file that rank 0 writes what is trained on to, before the first step; None
                writes none.
            *tables: ScoredTrajectory.
            without: ids of rollouts that are left out, whether the tables have them or not.
        """
        kept = [rows_without(table, without) for table in tables]
        own = Path(log) if self.rank == 0 and log is not None else None
        return read(self.learner.policy_phase(kept, iteration, own))

    @_passes
    def auxiliary_phase(self, iteration: int) -> dict[str, float]:
        """Run an auxiliary phase on all that was trained on since the last; returns its metrics."""
        return read(self.learner.auxiliary_phase(iteration))

    def publish(self) -> tuple[Publication, Payload]:
        """Return this rank's slice of the policy: facts for the controller, bytes for actors."""
        return self.learner.networks.publish()

    def save(self, folder: str) -> dict[str, Any]:
        """Write a checkpoint's tensors; returns the state that belongs into its JSON."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        state = self.begin_save(folder)
        self.saved()
        return state

    def begin_save(self, folder: str) -> dict[str, Any]:
        """Begin to write a checkpoint's tensors; returns the state that belongs into its JSON."""
        self.learner.begin_save(Path(folder))
        return self.learner.state()

    def saved(self) -> dict[str, str]:
        """Wait until they are written; returns the hashes of this rank's files."""
        return self.learner.writer.wait()

    def load(self, folder: str, state: dict[str, Any]) -> None:
        """Read a checkpoint."""
        self.learner.load(Path(folder), state)

    def export_policy(self, folder: str) -> str:
        """Write the policy for users and later stages; rank 0 returns its hash."""
        return self.learner.networks.export(Path(folder))

    @property
    def learner(self) -> Learner:
        """The learner that `begin_train` made."""
        assert self._learner is not None, "begin_train comes first"
        return self._learner
