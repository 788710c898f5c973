"""Shared fixtures: one real Ray cluster, a tiny tokenizer, and tiny weights on disk."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from hypothesis import settings

from common.config.run import RunConfig
from tests.forked_workers import forking
from tests.workspaces import make_workspace

torch.set_num_threads(1)
# Two noisy cores: how long an example takes says nothing; the same commit tests the same examples.
settings.register_profile("talipot", deadline=None, derandomize=True)
settings.load_profile("talipot")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a cluster is slow: `make test-fast` leaves it out."""
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
    # Far longer than any other: the rest is shared out beside it.
    items.sort(key=lambda item: "tests/journey" not in item.nodeid)


def pytest_collection_finish() -> None:
    """What was imported stays: collections of garbage need not go through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A local Ray cluster of more logical than real cores.

    Its workers inherit the environment: a `runtime_env` that says the same would have Ray start
    each of them twice.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        with forking() as python:
            patch.setattr(sys, "executable", python)
            ray.init(
                address="local",
                num_cpus=32,
                include_dashboard=False,
                namespace="talipot",
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=200 * 2**20,
                _system_config={"prestart_worker_first_driver": False},
            )
            patch.undo()
            yield
            ray.shutdown()


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run folder with data, tokenizer, random policy and reward weights; its config."""
    return make_workspace(tmp_path_factory.mktemp("workspace"))
