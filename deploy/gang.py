"""The learner gang: W ranks in one placement group, called together, each wait with a deadline.

The gang never joins a collective with elastic workers: a dying receiver cannot hang it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from common.config import RunConfig
from common.errors import ClusterError, TalipotError, WorkerError
from learner.rank import LearnerRank


def plain(error: ray.exceptions.RayError) -> Exception:
    """Our own error out of the wrapper Ray puts around what a worker raised."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, TalipotError) else error


class LearnerGang:
    """Handles to all ranks."""

    def __init__(self, config: RunConfig, run: str) -> None:
        settings = config.learner
        self.deadline_s = settings.deadline_s
        bundle = {"CPU": settings.cpus_per_rank}
        if settings.gpus_per_rank:
            bundle["GPU"] = settings.gpus_per_rank
        self._group: PlacementGroup = placement_group(
            [bundle] * settings.ranks,
            strategy="PACK",
            bundle_label_selector=[dict(settings.labels)] * settings.ranks,
        )
        if not self._group.wait(config.cluster.start_timeout_s):
            remove_placement_group(self._group)
            raise ClusterError(
                f"the cluster has no room for {settings.ranks} learner ranks of {bundle} within "
                f"{config.cluster.start_timeout_s:.0f} s; run `talipot preflight` to see why"
            )
        actor = ray.remote(LearnerRank)
        self.ranks: list[Any] = [
            actor.options(
                name=f"{run}:learner-{rank}",
                num_cpus=settings.cpus_per_rank,
                num_gpus=settings.gpus_per_rank,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=rank
                ),
            ).remote(rank, settings.ranks, max(1, int(settings.cpus_per_rank)))
            for rank in range(settings.ranks)
        ]
        address, port = self._get([self.ranks[0].address.remote()], "address")[0]
        self.call("connect", address, port, settings.deadline_s)

    def call(self, method: str, *args: Any) -> Any:
        """Call a method on every rank together; rank 0's answer.

        Raises:
            WorkerError: a rank died or outran its deadline; the error names it.
        """
        return self._get(self.submit(method, *args), method)[0]

    def submit(self, method: str, *args: Any) -> list[ray.ObjectRef[Any]]:
        """Start a call on every rank."""
        return [getattr(rank, method).remote(*args) for rank in self.ranks]

    def finish(
        self, refs: Sequence[ray.ObjectRef[Any]], method: str, pump: Callable[[], None]
    ) -> Any:
        """Wait for a started call while `pump` keeps other work moving."""
        waiting = list(refs)
        while waiting:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0.02)
            pump()
        return self._get(refs, method)[0]

    def publish(self) -> tuple[list[Any], list[ray.ObjectRef[Any]]]:
        """Every rank's facts, and references to the bytes (which stay in the object store)."""
        pairs = [rank.publish.options(num_returns=2).remote() for rank in self.ranks]
        return self._get([facts for facts, _ in pairs], "publish"), [ref for _, ref in pairs]

    def stop(self) -> None:
        """End all ranks and free their resources."""
        for rank in self.ranks:
            ray.kill(rank)
        remove_placement_group(self._group)

    def _get(self, refs: Sequence[ray.ObjectRef[Any]], method: str) -> list[Any]:
        try:
            return ray.get(list(refs), timeout=self.deadline_s)
        except ray.exceptions.GetTimeoutError:
            ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0)
            late = [f"learner-{i}" for i, ref in enumerate(refs) if ref not in ready]
            raise WorkerError(
                f"{', '.join(late)} did not finish {method} within {self.deadline_s:.0f} s "
                "(learner.deadline_s)"
            ) from None
        except ray.exceptions.RayActorError as error:
            raise WorkerError(f"a learner rank died in {method}: {_ends(error)}") from None
        except ray.exceptions.RayTaskError as error:
            raise plain(error) from None


def _ends(error: Exception) -> str:
    """First and last line of a long message: what died, and of what."""
    lines = str(error).strip().splitlines()
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"
