"""What stages begin with is compared with the library, by one rank while the others wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from common.config.model import PretrainedConfig
from common.errors import CheckpointError
from common.models.build import build_policy, build_scalar
from common.models.pretrained.decoder import PretrainedDecoder
from deploy.workers.calls import start_function
from deploy.workers.gang import LearnerGang
from learner import start_weights
from learner.rank import LearnerRank
from learner.start_weights import critic_start, policy_start, reward_start
from tests.common.models.pretrained.tiny import reference, saved

STARTS: dict[str, Callable[[PretrainedConfig, Path], Any]] = {
    "policy": lambda model, path: policy_start(build_policy(model, empty=True), path),
    "critic": lambda model, path: critic_start(build_scalar(model, empty=True), path),
    "reward model": lambda model, path: reward_start(build_scalar(model, empty=True), path, 0),
}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("network", STARTS)
def test_what_the_library_computes_otherwise_is_refused(
    network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(reference("llama"), tmp_path / "model")
    model, begin = PretrainedConfig(start=str(path), context=32), STARTS[network]
    begin(model, path)
    logits = PretrainedDecoder.logits
    monkeypatch.setattr(PretrainedDecoder, "logits", lambda *given: logits(*given) * 1.01)
    with pytest.raises(CheckpointError, match="transformers computes other logits"):
        begin(model, path)


def alone(_: LearnerRank) -> tuple[str | None, int]:
    """In a rank: work that takes longer than ranks are patient; what it gave, and how often they
    met."""
    met, whole, patience = 0, start_weights.all_sum, start_weights._MEET_S

    def counted(*given: Any) -> Any:
        nonlocal met
        met += 1
        return whole(*given)

    def work() -> str:
        time.sleep(0.5)
        return "found"

    start_weights.all_sum, start_weights._MEET_S = counted, 0.05  # type: ignore[misc]
    try:
        return start_weights._by_rank_0(work), met
    finally:
        start_weights.all_sum, start_weights._MEET_S = whole, patience  # type: ignore[misc]


@pytest.mark.usefixtures("cluster")
def test_one_rank_works_while_the_others_meet_it(gangs: dict[int, LearnerGang]) -> None:
    (found, met), (nothing, waited) = ray.get(
        [start_function(rank, alone) for rank in gangs[2].ranks]
    )
    assert (found, nothing) == ("found", None)
    assert met == waited > 3, "no collective lasts as long as the work"
