"""What tests of the learner share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from common.devices import compute_of
from learner.rank import LearnerRank
from learner.zero.process_group import disconnect


@pytest.fixture(scope="session")
def one_rank() -> Iterator[None]:
    """A learner gang of one, in this process: for what needs DeepSpeed and no cluster."""
    rank = LearnerRank(0, 1, compute_of(cpus=1))
    rank.connect(*rank.address(), 60.0)
    yield
    disconnect()
