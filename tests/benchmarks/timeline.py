"""Where an iteration's time goes: two learner ranks, two rollout actors and a reward worker."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import ray

from common.config.run import RunConfig
from common.data.own_tokenizer import OwnTokenizer
from common.data.prompts import EncodedPrompt
from common.models.build import build_policy, build_scalar
from common.models.weight_files import save_weights
from deploy.control.controller import Controller
from deploy.workers.gang import LearnerGang
from deploy.workers.placement import reward_pool, rollout_pool
from tests.benchmarks.measure import PROMPT, RESPONSE, SHAPE, Result, start_ray

ITERATIONS = 7
PARTS = ("wait for rollouts", "learn", "publish", "other")


def recipe(folder: Path, staleness: int) -> RunConfig:
    """Shape S; four policy epochs make learning the longer side."""
    return RunConfig.model_validate(
        {
            "name": f"staleness-{staleness}",
            "output": str(folder),
            "model": SHAPE.model_dump(),
            "learner": {"ranks": 2, "zero_stage": 2, "cpus_per_rank": 0.4, "precision": "bf16"},
            "rollout": {
                "actors": 2,
                "cpus_per_actor": 0.4,
                "lease_size": 64,
                "max_response_tokens": RESPONSE,
                "precision": "bf16",
            },
            "reward_service": {"cpus_per_replica": 0.2},
            "train": {
                "iterations": ITERATIONS,
                "prompts_per_iteration": 128,
                "minibatches": 2,
                "e_pi": 2,
                "lr": 1e-5,
                "stop_kl": None,
                "ppg": None,
                "max_staleness": staleness,
            },
        }
    )


def networks(config: RunConfig) -> list[Path]:
    """Random policy and reward model, where the stages would leave them; a tokenizer too."""
    config.run_dir.mkdir(parents=True)
    tokenizer = OwnTokenizer.train(iter(["a tokenizer of letters"]), 270)
    tokenizer.save(config.run_dir / "tokenizer.json")
    policy, reward = build_policy(config.model), build_scalar(config.model)
    policy.initialise(0)
    reward.initialise(1)
    names = ("sft/policy.safetensors", "reward_model/reward.safetensors")
    paths = [config.run_dir / name for name in names]
    for network, path in zip((policy, reward), paths, strict=True):
        path.parent.mkdir()
        save_weights(network.state_dict(), path, {})
    return paths


def seconds(folder: Path, staleness: int) -> dict[str, float]:
    """Medians over the iterations after warm-up."""
    config = recipe(folder, staleness)
    paths = networks(config)
    rng = np.random.default_rng(0)
    prompts = [
        EncodedPrompt(uid=str(i), text="", ids=rng.integers(2, 2048, PROMPT).tolist())
        for i in range(128 * ITERATIONS)
    ]
    start_ray(2**30)
    gang = LearnerGang(config, config.name)
    pools = (
        rollout_pool(config, config.name, config.run_dir / "tokenizer.json", paths[0]),
        reward_pool(config, config.name, config.run_dir / "tokenizer.json", *paths),
    )
    Controller(config, prompts, gang, *pools).run()
    for pool in pools:
        pool.stop()
    gang.stop()
    ray.shutdown()
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line)["metrics"] for line in lines][2:]
    return {
        key: median(row[key] for row in rows)
        for key in (
            *("seconds", "collect_seconds", "learn_seconds", "publish_seconds"),
            *("generate_seconds", "score_seconds", "load_seconds"),
        )
    }


def run() -> tuple[list[Result], dict[str, dict[str, float]]]:
    """The learner's idle share, and both timelines."""
    with tempfile.TemporaryDirectory() as folder:
        found = {
            name: seconds(Path(folder), staleness)
            for name, staleness in (("synchronous", 0), ("asynchronous", 1))
        }
    idle = {name: t["collect_seconds"] / t["seconds"] for name, t in found.items()}
    return [
        Result(
            key="learner_idle_async",
            value=idle["asynchronous"],
            metric="learner idle, asynchronous (staleness 1)",
            ours=f"{idle['asynchronous']:.0%} of an iteration",
            baseline=f"{idle['synchronous']:.0%} synchronous",
        )
    ], found
