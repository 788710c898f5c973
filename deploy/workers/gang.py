"""The learner gang: W ranks in one placement group, called together, each wait with a deadline.

The gang never joins a collective with elastic workers: a dying receiver cannot hang it. A rank that
dies or falls silent is `LearnerLost`: the others wait for it in a collective, so the gang is of no
more use, and `restart` makes another one in its place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from common.config.run import RunConfig
from common.config.workers import threads_of
from common.data.tokenizer import Tokenizer
from common.endings import take_all
from common.errors import ClusterError, TalipotError, WorkerError
from common.files import one_line
from common.run_folder import RunFolder
from learner.rank import LearnerRank

_GRACE_S = 15.0
"""After a rank failed: how long the others have to show who died. A collective breaks for the
survivors a moment before Ray notices the death."""
_WAIT_S, _PUMP_S = 1.0, 0.02

Meanwhile = Callable[[], None]
"""What keeps other work moving while ranks are waited for: short, and called again and again."""


class LearnerLost(WorkerError):
    """A rank died or outran its deadline; only a new gang can go on."""

    data_lost: bool = False
    """What the ranks were given went with its node: it cannot be given to them again."""


def plain(error: ray.exceptions.RayError) -> Exception:
    """Our own error out of the wrapper Ray puts around what a worker raised."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, TalipotError) else error


class LearnerGang:
    """Handles to all ranks."""

    def __init__(self, config: RunConfig, run: str, *, start: bool = True) -> None:
        """With `start` False this is a plan only: whoever starts it owns the ranks."""
        self.config, self.run = config, run
        self.deadline_s = config.learner.deadline_s
        self.ranks: list[Any] = []
        self._group: PlacementGroup | None = None
        self._generation = 0
        if start:
            self.start()

    @property
    def started(self) -> bool:
        """Whether ranks were started and not stopped."""
        return bool(self.ranks)

    def start(self, meanwhile: Meanwhile | None = None) -> None:
        """Place all ranks and let them meet; nothing to do when they are there.

        From when they have their place `meanwhile` is called, again and again, until they have met:
        what starts beside them takes no room that they need.

        Raises:
            ClusterError: no room for all of them.
            LearnerLost: one died on the way.
        """
        if self.started:
            return
        settings, timeout_s = self.config.learner, self.config.cluster.start_timeout_s
        bundle = {"CPU": settings.cpus_per_rank}
        if settings.gpus_per_rank:
            bundle["GPU"] = settings.gpus_per_rank
        group = self._group = placement_group(
            [bundle] * settings.ranks,
            strategy="PACK",
            bundle_label_selector=[dict(settings.labels)] * settings.ranks,
        )
        if not group.wait(timeout_s):
            self.stop()
            raise ClusterError(
                f"the cluster has no room for {settings.ranks} learner ranks of {bundle} within "
                f"{timeout_s:.0f} s; run `talipot preflight` to see why"
            )
        # Ray gives a name free only once its holder is buried: a successor gets another.
        suffix = f".{self._generation}" if self._generation else ""
        self.ranks = [
            ray.remote(LearnerRank)
            .options(
                name=f"{self.run}:learner-{rank}{suffix}",
                num_cpus=settings.cpus_per_rank,
                num_gpus=settings.gpus_per_rank,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=rank
                ),
            )
            .remote(rank, settings.ranks, threads_of(settings.threads, settings.cpus_per_rank))
            for rank in range(settings.ranks)
        ]
        address, port = self.finish([self.ranks[0].address.remote()], "address", meanwhile)
        self.finish(
            self.submit("connect", address, port, settings.deadline_s), "connect", meanwhile
        )

    def stop(self) -> None:
        """End all ranks and free their resources, all of them; then raise what failed."""
        kill = [partial(ray.kill, rank) for rank in self.ranks]
        free = [partial(remove_placement_group, self._group)] if self._group else []
        self.ranks, self._group = [], None
        take_all(*kill, *free)

    def restart(self, meanwhile: Meanwhile | None = None) -> None:
        """End what is left of this gang and start another; raises what `start` raises."""
        self.stop()
        self._generation += 1
        self.start(meanwhile)

    def begin_train(self, config: RunConfig, meanwhile: Meanwhile | None = None) -> None:
        """Build policy and value engines from the weights in the run's folder."""
        folder = RunFolder(config.run_dir.absolute())
        refs = self.submit(
            "begin_train",
            config,
            str(folder.sft.weights),
            str(folder.reward_model.weights) if config.reward_service.needs_model else None,
            Tokenizer.load(folder.tokenizer).eos_id,
        )
        self.finish(refs, "begin_train", meanwhile)

    def call(self, method: str, *args: Any) -> Any:
        """Call a method on every rank together; rank 0's answer.

        Raises:
            LearnerLost: a rank died or outran its deadline; the error names it.
        """
        return self._results(self.submit(method, *args), method)[0]

    def submit(self, method: str, *args: Any, **named: Any) -> list[ray.ObjectRef[Any]]:
        """Start a call on every rank."""
        return [getattr(rank, method).remote(*args, **named) for rank in self.ranks]

    def finish(
        self, refs: Sequence[ray.ObjectRef[Any]], method: str, meanwhile: Meanwhile | None
    ) -> Any:
        """Wait for a started call while `meanwhile` keeps other work moving; rank 0's answer."""
        return self._results(refs, method, meanwhile)[0]

    def publish(self) -> tuple[list[Any], list[ray.ObjectRef[Any]]]:
        """Every rank's facts, and references to the bytes (which stay in the object store)."""
        pairs = [rank.publish.options(num_returns=2).remote() for rank in self.ranks]
        return self._results([facts for facts, _ in pairs], "publish"), [ref for _, ref in pairs]

    def _results(
        self,
        refs: Sequence[ray.ObjectRef[Any]],
        method: str,
        meanwhile: Meanwhile | None = None,
    ) -> list[Any]:
        """Every rank's answer, or the failure that explains those of the others."""
        names = {ref: f"learner-{rank}" for rank, ref in enumerate(refs)}
        waiting, found = list(refs), dict[ray.ObjectRef[Any], Any]()
        deadline, broken = time.monotonic() + self.deadline_s, list[tuple[str, Exception]]()
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=_PUMP_S if meanwhile else _WAIT_S)
            for ref in ready:
                try:
                    found[ref] = ray.get(ref)
                except ray.exceptions.RayActorError as error:
                    raise LearnerLost(f"{names[ref]} died in {method}: {_ends(error)}") from None
                except ray.exceptions.RayTaskError as error:
                    cause = _explained(error, names[ref], method)
                    if isinstance(cause, TalipotError):
                        raise cause from None
                    broken.append((names[ref], cause))
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
            if waiting and not ready and time.monotonic() > deadline:
                raise self._late([names[ref] for ref in waiting], method, broken)
            if meanwhile:
                meanwhile()
        if broken:  # and nobody died: it is not the gang that failed
            raise broken[0][1] from None
        return [found[ref] for ref in refs]

    def _late(self, late: list[str], method: str, broken: list[tuple[str, Exception]]) -> Exception:
        who = ", ".join(late)
        if broken:
            name, error = broken[0]
            return LearnerLost(f"{who} fell silent in {method}; {name} said: {one_line(error)}")
        return LearnerLost(
            f"{who} did not finish {method} within {self.deadline_s:.0f} s (learner.deadline_s)"
        )


def _explained(error: ray.exceptions.RayTaskError, name: str, method: str) -> Exception:
    """What a rank raised; an error of ours when no other rank can explain it better."""
    if isinstance(getattr(error, "cause", None), ray.exceptions.RayError):
        lost = LearnerLost(f"what {name} needs for {method} was lost: {_ends(error)}")
        lost.data_lost = True
        return lost
    return plain(error)


def _ends(error: Exception) -> str:
    """First and last line of a long message: what died, and of what."""
    lines = str(error).strip().splitlines()
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"
