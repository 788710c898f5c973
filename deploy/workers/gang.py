"""The learner gang: W ranks in one placement group, called together, each wait with a deadline.

Each verb of a rank (`learner.rank.LearnerRank`) is one typed method here: it runs on every rank,
and the answer is rank 0's. The gang never joins a collective with elastic workers: a dying receiver
cannot hang it. A rank that dies or falls silent is `LearnerLost`: the others wait for it in a
collective, so the gang is of no more use, and `restart` builds another one in its place.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Concatenate

import pyarrow as pa
import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from common.config.run import RunConfig
from common.data.tokenizer import load_tokenizer
from common.devices import compute_of
from common.endings import take_all
from common.errors import ClusterError, TalipotError, WorkerError
from common.files import one_line
from common.wire.weights import Manifest, Payload
from deploy.run_folder.weights import policy_start, reward_weights
from deploy.workers import hosted_rank, pulses
from deploy.workers.calls import (
    Answer,
    Arguments,
    Handle,
    actor_name,
    as_argument,
    kill,
    own_error,
    start,
    start_function,
    start_pair,
    summary,
)
from deploy.workers.gang_place import GangPlace
from deploy.workers.reservations import reserved
from deploy.workers.told import Identity
from learner.rank import LearnerRank
from learner.supervised.columns import columns
from learner.supervised.examples import EncodedComparison, EncodedPair
from learner.zero.process_group import NotMet

_GRACE_S = 15.0
"""After a rank failed: how long the others have to show who died. A collective breaks for the
survivors a moment before Ray notices the death."""
_WAIT_S, _PUMP_S = 1.0, 0.02
_TRIES = 3
"""Of ranks to reach each other."""
_PULSE_S = 5.0
"""How often a rank tells how far it is, at most."""

Meanwhile = Callable[[], None]
"""What keeps other work moving while ranks are waited for: short, and called again and again."""


class LearnerLost(WorkerError):
    """A rank died or outran its deadline; only a new gang can go on."""

    data_lost: bool = False
    """What the ranks were given was lost with its node: it cannot be given to them again."""


class LearnerGang:
    """All ranks, called together.

    Each verb raises LearnerLost when a rank dies or is silent for too long, and what a rank raises.
    `meanwhile` keeps other work moving while the ranks are waited for.
    """

    def __init__(self, config: RunConfig, run: str, *, start: bool = True) -> None:
        """With `start` False this is a plan only: whoever starts it owns the ranks."""
        self.config, self.run = config, run
        self.deadline_s = config.learner.deadline_s
        self.ranks: list[Handle] = []
        self._place = GangPlace(config, run)
        self._pulses: list[str] = []
        """Where each rank tells how far it is."""
        if start:
            self.start()

    @property
    def started(self) -> bool:
        """Whether ranks were started and not stopped."""
        return bool(self.ranks)

    # ------------------------------------------------------------------ start and end

    def start(self, meanwhile: Meanwhile | None = None) -> None:
        """Place all ranks and connect them; nothing to do when they are there.

        Once they have their place, `meanwhile` is called again and again until they are connected:
        what starts beside them takes no room that they need.

        Ranks that cannot reach each other are ended, and others tried at other ports.

        Raises:
            ClusterError: no room for all of them, or they cannot reach each other.
            LearnerLost: one died on the way.
        """
        if self.started:
            return
        for left in reversed(range(_TRIES)):
            try:
                self._start_ranks()
                self._meet(meanwhile)
                return
            except NotMet:
                self.stop()
                if not left:
                    raise
            except ClusterError:
                self.stop()
                raise

    def _start_ranks(self) -> None:
        settings = self.config.learner
        cpus = reserved(self.config).rank
        compute = compute_of(
            cpus=cpus,
            gpus=settings.gpus_per_rank,
            threads=settings.threads,
            frugal=self.config.pretrained,
        )
        group = self._place.reserve(cpus)
        environment: dict[str, Any] = {}
        if compute.environment:
            environment = {"runtime_env": {"env_vars": compute.environment}}
        own = f"{self.run}:{secrets.token_hex(4)}"
        self._pulses = [f"{own}:{rank}" for rank in range(settings.ranks)]
        pulses.begin(self._pulses)
        self.ranks = [
            ray.remote(hosted_rank.LearnerRank)
            .options(
                **actor_name(self.run, f"learner-{rank}"),
                num_cpus=cpus,
                num_gpus=settings.gpus_per_rank,
                **environment,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=rank
                ),
            )
            .remote(
                Identity(run=self.config.run_dir.name, role="learner", worker=f"learner-{rank}"),
                rank,
                settings.ranks,
                compute,
                partial(pulses.tell, self._pulses[rank]),
                min(_PULSE_S, self.deadline_s / 16),
            )
            for rank in range(settings.ranks)
        ]

    def _meet(self, meanwhile: Meanwhile | None) -> None:
        """Connect the ranks: on the loopback device where they are on one node."""
        asked = [start_function(rank, _host_of) for rank in self.ranks]
        hosts = self._answers(asked, "start", meanwhile)
        if len(set(hosts)) == 1:
            hosts = ["127.0.0.1"] * len(hosts)
        asked_port = [start(self.ranks[0], LearnerRank.listen, hosts[0])]
        (port,) = self._answers(asked_port, "listen", meanwhile)
        self._call(LearnerRank.connect, meanwhile, port, hosts, self.deadline_s)

    def stop(self) -> None:
        """End all ranks and free their resources, all of them; then raise what failed."""
        end = [partial(kill, rank) for rank in self.ranks]
        silent = [partial(pulses.forget, self._pulses)] if self.ranks else []
        self.ranks = []
        take_all(*end, self._place.free, *silent)

    def restart(self, meanwhile: Meanwhile | None = None) -> None:
        """End what is left of this gang and start another; raises what `start` raises."""
        self.stop()
        self.start(meanwhile)

    # ------------------------------------------------------------------ supervised stages

    def begin_sft(
        self, config: RunConfig, train: Sequence[EncodedPair], held_out: Sequence[EncodedPair]
    ) -> int:
        """Build the SFT stage; returns its number of steps."""
        data = _put(columns(EncodedPair, train)), _put(columns(EncodedPair, held_out))
        return self._call(LearnerRank.begin_sft, None, config, *data)

    def begin_reward(
        self,
        config: RunConfig,
        train: Sequence[EncodedComparison],
        held_out: Sequence[EncodedComparison],
        reported: Sequence[EncodedComparison],
        sft: Path,
        seed: int,
    ) -> int:
        """Build the reward stage on the supervised policy's weights; returns its steps."""
        first, second, third = (
            _put(columns(EncodedComparison, part)) for part in (train, held_out, reported)
        )
        start = _absolute(sft)
        return self._call(LearnerRank.begin_reward, None, config, first, second, third, start, seed)

    def advance(self, steps: int, *, anew: bool = True) -> dict[str, float]:
        """Take steps of the current supervised stage; of `anew` see `SupervisedStage.advance`."""
        return self._call(LearnerRank.advance, None, steps, anew=anew)

    def evaluate(self) -> dict[str, float]:
        """Return held-out metrics of the current supervised stage."""
        return self._call(LearnerRank.evaluate, None)

    def shift(self, reference: Sequence[EncodedPair]) -> dict[str, float]:
        """Centre the reward model on reference responses."""
        return self._call(LearnerRank.shift, None, _put(columns(EncodedPair, reference)))

    def export_stage(self, folder: Path) -> None:
        """Write the current supervised stage's weights."""
        self._call(LearnerRank.export_stage, None, _absolute(folder))

    def save_stage(self, folder: Path) -> dict[str, Any]:
        """Write a checkpoint's tensors of the current supervised stage; returns the other state."""
        return self._call(LearnerRank.save_stage, None, _absolute(folder))

    def load_stage(self, folder: Path, state: dict[str, Any]) -> None:
        """Read such a checkpoint."""
        self._call(LearnerRank.load_stage, None, _absolute(folder), state)

    # ------------------------------------------------------------------ policy training

    def begin_train(self, config: RunConfig, meanwhile: Meanwhile | None = None) -> None:
        """Build policy and value engines from the weights in the run's folder."""
        self._call(
            LearnerRank.begin_train,
            meanwhile,
            config,
            _absolute(policy_start(config)),
            _absolute(reward_weights(config)) if config.reward_service.needs_model else None,
            load_tokenizer(config.folder.tokenizer).stop_ids,
        )

    def policy_phase(
        self,
        iteration: int,
        log: Path | None,
        tables: Sequence[pa.Table | ray.ObjectRef[pa.Table]],
        *,
        without: Collection[str] = frozenset(),
        meanwhile: Meanwhile | None = None,
    ) -> dict[str, float]:
        """Train the policy on the tables' rows `without` some rollouts, and log these rows."""
        path = _absolute(log) if log else None
        return self._call(
            LearnerRank.policy_phase, meanwhile, iteration, path, *tables, without=without
        )

    def auxiliary_phase(
        self, iteration: int, *, meanwhile: Meanwhile | None = None
    ) -> dict[str, float]:
        """Run PPG's auxiliary phase on all that was trained on since the last one."""
        return self._call(LearnerRank.auxiliary_phase, meanwhile, iteration)

    def publish(self, version: int) -> tuple[Manifest, tuple[ray.ObjectRef[Payload], ...]]:
        """Publish the policy as this version: its manifest, and the references to its slices."""
        pairs = [start_pair(rank, LearnerRank.publish) for rank in self.ranks]
        published = self._answers([facts for facts, _ in pairs], "publish")
        manifest = Manifest(
            policy_version=version,
            total=published[0].total,
            layout=published[0].layout,
            slices=tuple(facts.slice for facts in published),
        )
        return manifest, tuple(payload for _, payload in pairs)

    def save(self, folder: Path) -> dict[str, Any]:
        """Write a checkpoint's tensors; returns the state that belongs into its JSON."""
        return self._call(LearnerRank.save, None, _absolute(folder))

    def begin_save(self, folder: Path, *, meanwhile: Meanwhile | None = None) -> dict[str, Any]:
        """As `save`, but the ranks write while they train on; `saved` waits for that.

        `learner.checkpointing.written` tells without waiting whether it is done.
        """
        return self._call(LearnerRank.begin_save, meanwhile, _absolute(folder))

    def saved(self, *, meanwhile: Meanwhile | None = None) -> dict[str, str]:
        """Wait until all ranks have written; returns the hashes of their files by path."""
        calls = [start(rank, LearnerRank.saved) for rank in self.ranks]
        found: dict[str, str] = {}
        for sums in self._answers(calls, "saved", meanwhile):
            found |= sums
        return found

    def load(
        self, folder: Path, state: dict[str, Any], *, meanwhile: Meanwhile | None = None
    ) -> None:
        """Read a checkpoint."""
        self._call(LearnerRank.load, meanwhile, _absolute(folder), state)

    def export_policy(self, folder: Path) -> str:
        """Write the policy's weights; returns the hash of what was trained."""
        return self._call(LearnerRank.export_policy, None, _absolute(folder))

    # ------------------------------------------------------------------ parts

    def _call(
        self,
        method: Callable[Concatenate[Any, Arguments], Answer],
        meanwhile: Meanwhile | None,
        *args: Arguments.args,
        **named: Arguments.kwargs,
    ) -> Answer:
        """Call a method on every rank; returns rank 0's answer."""
        calls = [start(rank, method, *args, **named) for rank in self.ranks]
        return self._answers(calls, method.__name__, meanwhile)[0]

    def _answers(
        self,
        calls: Sequence[ray.ObjectRef[Answer]],
        method: str,
        meanwhile: Meanwhile | None = None,
    ) -> list[Answer]:
        """Return every rank's answer, or raise the failure that explains those of the others."""
        names = {call: f"learner-{rank}" for rank, call in enumerate(calls)}
        waiting, answers = list(calls), dict[ray.ObjectRef[Answer], Answer]()
        deadline, broken = time.monotonic() + self.deadline_s, list[tuple[str, Exception]]()
        listening = pulses.Listening(self._pulses, self.deadline_s)
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=_PUMP_S if meanwhile else _WAIT_S)
            for call in ready:
                try:
                    answers[call] = ray.get(call)
                except ray.exceptions.RayActorError as error:
                    raise LearnerLost(f"{names[call]} died in {method}: {summary(error)}") from None
                except ray.exceptions.RayTaskError as error:
                    cause = _explained(error, names[call], method)
                    if isinstance(cause, TalipotError):
                        raise cause from None
                    broken.append((names[call], cause))
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
            if not broken and listening.moved():
                deadline = time.monotonic() + self.deadline_s
            if waiting and not ready and time.monotonic() > deadline:
                raise self._late([names[call] for call in waiting], method, broken)
            if meanwhile:
                meanwhile()
        if broken:  # and nobody died: it is not the gang that failed
            raise broken[0][1] from None
        return [answers[call] for call in calls]

    def _late(self, late: list[str], method: str, broken: list[tuple[str, Exception]]) -> Exception:
        who = ", ".join(late)
        if broken:
            name, error = broken[0]
            return LearnerLost(f"{who} fell silent in {method}; {name} said: {one_line(error)}")
        return LearnerLost(
            f"{who} did not finish {method}, nor a micro-batch of it, within "
            f"{self.deadline_s:.0f} s (learner.deadline_s)"
        )


def _host_of(rank: object) -> str:
    """Return, in a rank, the address by which the cluster knows its node."""
    return str(ray.util.get_node_ip_address())


def _put(value: Answer) -> Answer:
    """Put what all ranks are given into the object store once; Ray hands each the value."""
    return as_argument(ray.put(value))


def _absolute(path: Path) -> str:
    """Return a path that means the same in every rank's working folder."""
    return str(path.absolute())


def _explained(error: ray.exceptions.RayTaskError, name: str, method: str) -> Exception:
    """Return what a rank raised: an error of ours when no other rank can explain it better."""
    if isinstance(getattr(error, "cause", None), ray.exceptions.RayError):
        lost = LearnerLost(f"what {name} needs for {method} was lost: {summary(error)}")
        lost.data_lost = True
        return lost
    return own_error(error)
