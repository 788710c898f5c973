"""Runs of a controller in this process with real workers, and what is done to them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import ray

from common.config.run import RunConfig
from common.data.prompts import EncodedPrompt
from common.data.tokenizer import load_tokenizer
from deploy.control.controller import Controller
from deploy.run_folder.weights import policy_start, reward_weights
from deploy.stages.encoding import read_encoded_prompts, read_held_out
from deploy.workers.gang import LearnerGang
from deploy.workers.placement import reward_pool, rollout_pool
from deploy.workers.pool import Pool


def prompts_of(config: RunConfig) -> list[EncodedPrompt]:
    tokenizer = load_tokenizer(config.folder.tokenizer)
    return read_encoded_prompts(config.data.prompts, tokenizer, config)[0]


def held_out_of(config: RunConfig) -> list[EncodedPrompt]:
    """What is asked while training goes on."""
    if not config.evaluate.every:
        return []
    return read_held_out(load_tokenizer(config.folder.tokenizer), config)[0]


_IDLE: dict[str, tuple[Pool, Pool]] = {}
"""Pools of finished runs by what they were made for; starting workers is what tests wait for."""


class Run:
    """A controller in this process, with real workers."""

    count = 0

    def __init__(
        self,
        config: RunConfig,
        gang: LearnerGang,
        stop_after: int | None = None,
        *,
        start: bool = True,
    ) -> None:
        Run.count += 1
        tokenizer, begins = config.folder.tokenizer.absolute(), policy_start(config).absolute()
        needed = config.reward_service.needs_model
        model = reward_weights(config).absolute() if needed else None
        self.key = (
            f"{config.rollout.actors} {config.train.max_staleness > 0} {config.train.lora} "
            f"{config.rollout.lora} {config.model} "
            f"{config.reward_service.model_dump_json()}"
        )
        name = f"run{Run.count}"
        idle: tuple[Pool, Pool] | None = _IDLE.pop(self.key, None) if start else None
        self.pools = idle or (
            rollout_pool(config, name, tokenizer, begins, start=start),
            reward_pool(config, name, tokenizer, begins, model, start=start),
        )
        self.begins = self.count_pools()
        self.controller = Controller(
            config, prompts_of(config), gang, *self.pools, stop_after, held_out_of(config)
        )

    def count_pools(self) -> list[tuple[int, int]]:
        """Failures and wanted sizes: pools in which something changed are not used again."""
        return [(pool.failures, pool.target) for pool in self.pools]

    def __enter__(self) -> Controller:
        return self.controller

    def __exit__(self, *_: object) -> None:
        busy = [w.busy for pool in self.pools for w in pool.workers.values()]
        if busy and not any(busy) and self.count_pools() == self.begins:
            _IDLE[self.key] = self.pools
            return
        for pool in self.pools:
            pool.stop()


def stop_idle_pools() -> None:
    """End the workers of finished runs."""
    for pools in _IDLE.values():
        for pool in pools:
            pool.stop()
    _IDLE.clear()


def finish(config: RunConfig, gang: LearnerGang, stop_after: int | None = None) -> dict[str, Any]:
    with Run(config, gang, stop_after) as controller:
        facts = controller.run()
    assert facts["rollouts_issued"] == facts["rollouts_trained"] + facts["rollouts_dropped"]
    return facts


def kill_worker(controller: Controller, kind: str) -> None:
    """SIGKILL one worker's process while the run goes on."""
    pool = controller.collector.rollout if kind == "rollout" else controller.collector.reward
    assert pool is not None
    worker = next(iter(pool.workers.values()))
    pid = ray.get(worker.handle.__ray_call__.remote(lambda _: os.getpid()))
    os.kill(pid, signal.SIGKILL)


def when(condition: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    """Act once, from another thread, as soon as a condition holds."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.005)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread
