"""GPUs that workers reserve, on a cluster that believes to have two."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.deploy.workers.alone import said_by


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What ranks found, by whether they reserved GPUs."""
    return said_by("tests.deploy.workers.cards")


@pytest.mark.slow
def test_each_rank_has_its_own_and_deepspeed_is_told(found: dict[str, Any]) -> None:
    ranks = found["reserved"]
    assert {rank["visible"] for rank in ranks} == {"0", "1"}
    for rank in ranks:
        assert rank["accelerator"] == "cuda"
        assert (rank["device"], rank["collectives"]) == ("cuda:0", "cpu:gloo,cuda:nccl")


@pytest.mark.slow
def test_who_reserved_none_computes_on_the_processor(found: dict[str, Any]) -> None:
    for rank in found["not"]:
        assert rank["accelerator"] is None
        assert (rank["device"], rank["collectives"]) == ("cpu", "gloo")


@pytest.mark.slow
def test_a_rank_whose_card_is_not_there_says_so_in_a_line(found: dict[str, Any]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert found["real"].startswith("ClusterError: ")
    assert "PyTorch finds none on its node" in found["real"]
    assert "learner.gpus_per_rank" in found["real"]
    assert "\n" not in found["real"]
