"""A cluster of its own with two pretended GPUs; run as a program, prints JSON.

Ray believes what it is told of GPUs, and gives each worker those that it reserved.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import ray

from common.config.recipe import load_config
from common.devices import ACCELERATOR, Compute
from deploy.workers import hosted_rank
from deploy.workers.calls import start
from deploy.workers.gang import LearnerGang


class Probe:
    """In the place of a rank: what it is told, and what it finds around it."""

    def __init__(
        self, identity: object, rank: int, world: int, compute: Compute, *_: object
    ) -> None:
        self.compute = compute

    def listen(self, host: str = "") -> int:
        return 0

    def connect(self, *_: object) -> None:
        pass

    def facts(self) -> dict[str, Any]:
        return {
            "device": self.compute.device,
            "collectives": self.compute.collectives,
            "accelerator": os.environ.get(ACCELERATOR),
            "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        }


def ranks_with(gpus: float, folder: Path) -> list[dict[str, Any]]:
    recipe = [f"output={folder}", "learner.ranks=2", f"learner.gpus_per_rank={gpus}"]
    gang = LearnerGang(load_config(None, recipe), f"cards-{gpus}")
    found: list[dict[str, Any]] = ray.get([start(rank, Probe.facts) for rank in gang.ranks])
    gang.stop()
    return found


def real_rank(folder: Path) -> str:
    """What a rank says that reserved a GPU which is none."""
    recipe = [f"output={folder}", "learner.ranks=1", "learner.gpus_per_rank=1"]
    try:
        LearnerGang(load_config(None, recipe), "cards-real")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> None:
    ray.init(
        address="local",
        num_cpus=8,
        num_gpus=2,
        include_dashboard=False,
        namespace="talipot",
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    folder = Path.cwd()
    rank = hosted_rank.LearnerRank
    hosted_rank.LearnerRank = Probe  # type: ignore[assignment,misc]
    found: dict[str, Any] = {
        "reserved": ranks_with(1.0, folder),
        "not": ranks_with(0.0, folder),
    }
    hosted_rank.LearnerRank = rank  # type: ignore[misc]
    print(json.dumps(found | {"real": real_rank(folder)}))
    ray.shutdown()


if __name__ == "__main__":
    main()
