"""Where the learner's ranks are placed: one placement group, all of it or nothing."""

from __future__ import annotations

import secrets
from contextlib import suppress
from typing import Final

from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from common.config.run import RunConfig
from common.errors import ClusterError

_OTHERS_S: Final = 5.0
"""For which a gang waits for its place before it looks what else of its run has one."""


class GangPlace:
    """The place of one gang at a time."""

    def __init__(self, config: RunConfig, run: str) -> None:
        """Nothing is reserved yet."""
        self._config = config
        self._prefix = f"{run} {config.run_dir.absolute()} "
        self._group: PlacementGroup | None = None

    def reserve(self, cpus: float) -> PlacementGroup:
        """Reserve a place for each rank, and wait for it.

        Args:
            cpus: of each rank.

        Raises:
            ClusterError: the cluster has no room for all of them in time.
        """
        settings, timeout_s = self._config.learner, self._config.cluster.start_timeout_s
        bundle = {"CPU": cpus}
        if settings.gpus_per_rank:
            bundle["GPU"] = settings.gpus_per_rank
        group: PlacementGroup = placement_group(
            [bundle] * settings.ranks,
            strategy="PACK",
            bundle_label_selector=[dict(settings.labels)] * settings.ranks,
            name=self._prefix + secrets.token_hex(4),
        )
        self._group = group
        if not group.wait(min(_OTHERS_S, timeout_s)):
            self._remove_others()
        if not group.wait(timeout_s):
            raise ClusterError(
                f"the cluster has no room for {settings.ranks} learner ranks of {bundle} within "
                f"{timeout_s:.0f} s; run `talipot preflight` to see why"
            )
        return group

    def free(self) -> None:
        """Give the place back."""
        group, self._group = self._group, None
        if group is not None:
            remove_placement_group(group)

    def _remove_others(self) -> None:
        """Remove the places that earlier gangs of this run have left.

        A controller that was cut off, and declared dead, may ask for one in the moment before it
        ends, and then nobody is left whose death would free it. A run has one writer, and that is
        whoever reserves here.
        """
        assert self._group is not None
        for place in placement_group_table().values():
            name = place["name"]
            if name.startswith(self._prefix) and place["state"] != "REMOVED":
                with suppress(ValueError):  # it is just going
                    other = get_placement_group(name)
                    if other.id != self._group.id:
                        remove_placement_group(other)
