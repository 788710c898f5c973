"""What tests of the learner share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from common.config.run import RunConfig
from common.devices import compute_of
from deploy.workers.gang import LearnerGang
from learner.rank import LearnerRank
from learner.zero.process_group import disconnect


@pytest.fixture(scope="session")
def one_rank() -> Iterator[None]:
    """A learner gang of one, in this process: for what needs DeepSpeed and no cluster."""
    rank = LearnerRank(0, 1, compute_of(cpus=1))
    rank.connect(rank.listen())
    yield
    disconnect()


@pytest.fixture(scope="module")
def gangs(
    workspace: RunConfig, cluster: None, request: pytest.FixtureRequest
) -> Iterator[dict[int, LearnerGang]]:
    """Learner gangs of one and of two ranks, by their number."""
    made = {}
    for ranks in (1, 2):
        learner = workspace.learner.model_copy(update={"ranks": ranks})
        config = workspace.model_copy(update={"learner": learner})
        made[ranks] = LearnerGang(config, f"{request.module.__name__.rpartition('.')[2]}-{ranks}")
    yield made
    for gang in made.values():
        gang.stop()
