"""A run's folder as a run would leave it, and the live page's server over it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from common.config.recipe import save_config
from common.config.run import RunConfig
from common.data.own_tokenizer import OwnTokenizer
from common.run_folder import RunFolder
from common.wire.trajectory import ScoredTrajectory, to_table
from deploy.run_folder.activity import Activity, Span
from deploy.watch.runs import WatchedRun
from deploy.watch.server import serve
from learner.batch.trajectory_log import Learnt, write_log
from tests.deploy.served import in_a_thread
from tests.workspaces import run_copy

DONE = (
    ("rollout-0", "loading", 0.0, 1.0),
    ("rollout-0", "sampling", 1.0, 6.0),
    ("learner", "learning", 6.0, 9.0),
    ("learner", "publishing", 9.0, 10.0),
)
"""What is done in each iteration of ten seconds: who, what, from when, until when."""


def run_folder(workspace: RunConfig, folder: Path, iterations: int = 6) -> RunConfig:
    """A run of some iterations that is not at work."""
    config = run_copy(workspace, folder, train={"iterations": 500})
    save_config(config, config.run_dir / "config.yaml")
    activity = Activity(config.folder.activity)
    for iteration in range(1, iterations + 1):
        log(config, "train", iteration, metrics_of(iteration))
        begin = 90.0 + 10 * iteration
        for worker, what, since, until in DONE:
            span = Span(worker=worker, what=what, begin=begin + since, end=begin + until)
            activity.add(span)
        if iteration % 2 == 0:
            log(config, "held_out", iteration, {"score": iteration / 20, "responses": 8.0})
    activity.close()
    event(config, "rollout-0", "started", "after 2.0 s", 100.0)
    event(config, "rollout-1", "started", "after 2.1 s", 100.1)
    event(config, "rollout-1", "died", "killed by signal 9", 130.0)
    event(config, "rollout-2", "started", "after 3.0 s", 134.0)
    return config


def metrics_of(iteration: int) -> dict[str, float]:
    """What an iteration logs, with figures that no rounding makes equal."""
    return {
        "score": 0.1 * iteration + 1 / 7,
        "kl": iteration / 3,
        "entropy": 2.0 / iteration,
        "response_length": 7.0 + iteration / 9,
        "component/model": 0.5 * iteration,
        "component/short": -iteration / 11,
        "seconds": 3.0,
        "learn_seconds": 2.0,
        "tokens_per_second": 100.0 + iteration,
        "workers/rollout": 2.0,
        "workers_lost/rollout": float(iteration > 3),
    }


def log(config: RunConfig, stage: str, step: int, metrics: dict[str, float]) -> None:
    """Append a line of metrics."""
    line = {"stage": stage, "step": step, "time": 100.0 + 10 * step, "metrics": metrics}
    with config.folder.metrics.open("a", encoding="utf8") as file:
        file.write(json.dumps(line) + "\n")


def event(config: RunConfig, worker: str, what: str, detail: str, at: float) -> None:
    """Append a line of events."""
    line = {"time": at, "worker": worker, "what": what, "detail": detail}
    with config.folder.events.open("a", encoding="utf8") as file:
        file.write(json.dumps(line) + "\n")


def log_samples(
    config: RunConfig,
    iteration: int,
    texts: Sequence[str],
    prompt: str = "open the:",
    scores: Sequence[float] | None = None,
) -> list[ScoredTrajectory]:
    """Log an iteration's responses; token t of row i has the advantage i - t, and half a nat."""
    scores = [index / 7 for index in range(len(texts))] if scores is None else scores
    tokenizer = OwnTokenizer.load(config.folder.tokenizer)
    rows = [
        ScoredTrajectory(
            rollout_id=f"{iteration:06d}-{index:06d}",
            group=index,
            prompt_uid="p",
            prompt_text=prompt,
            prompt_ids=[5],
            seed=index,
            response_ids=[*(ids := tokenizer.encode(text)), 1],
            response_text=text,
            behavior_logprobs=[-1.0] * (len(ids) + 1),
            finish_reason="eos",
            policy_version=iteration,
            weights_fingerprint="f",
            actor_id="a",
            score=scores[index],
            score_components={"model": scores[index], "short": 0.25},
            ref_logprobs=[-1.5] * (len(ids) + 1),
            reward_version=0,
        )
        for index, text in enumerate(texts)
    ]
    mask = torch.zeros(len(rows), max(len(row.response_ids) for row in rows), dtype=torch.bool)
    for i, row in enumerate(rows):
        mask[i, : len(row.response_ids)] = True
    numbers = torch.arange(len(rows))[:, None] - torch.arange(mask.shape[1])[None] * 1.0
    learnt = Learnt(
        learner_logprobs_NR=numbers,
        rewards_NR=numbers.double(),
        kl_penalties_NR=numbers.double(),
        values_NR=numbers,
        advantages_NR=numbers,
        mask_NR=mask,
    )
    path = RunFolder(config.run_dir).trajectories(iteration)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_log(path, to_table(rows, ScoredTrajectory), learnt, iteration, config)
    return rows


@contextmanager
def served(folders: Sequence[Path], host: str = "127.0.0.1") -> Iterator[str]:
    """The address of a server over these runs."""
    runs = [WatchedRun(folder) for folder in folders]
    with in_a_thread(lambda say: serve(runs, host, 0, say)) as address:
        yield address
