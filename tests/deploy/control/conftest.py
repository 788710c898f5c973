"""What tests of whole runs share: a gang, and an undisturbed run to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from common.config.run import RunConfig
from deploy.workers.gang import LearnerGang
from tests.deploy.control.runs import finish, stop_idle_pools
from tests.workspaces import run_copy


@pytest.fixture(scope="package")
def gang(workspace: RunConfig, cluster: None) -> Iterator[LearnerGang]:
    gang = LearnerGang(workspace, "controller-tests")
    yield gang
    gang.stop()


@pytest.fixture(scope="module", autouse=True)
def _idle_pools_end() -> Iterator[None]:
    yield
    stop_idle_pools()


@pytest.fixture(scope="package")
def reference(
    workspace: RunConfig, gang: LearnerGang, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, dict[str, Any]]:
    """An undisturbed synchronous run."""
    config = run_copy(workspace, tmp_path_factory.mktemp("reference"))
    return config, finish(config, gang)
