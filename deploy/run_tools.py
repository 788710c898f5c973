"""What can be asked of a run that exists: evaluate, sample, status, scale."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from rich.console import Console

from actors.prompts import encode_prompts, evaluation_requests
from actors.rollout_actor import engine_of
from common.config import RunConfig
from common.data import Prompt, read_demonstrations
from common.errors import ClusterError, ConfigError, DataError
from common.files import is_utf8, write_atomic
from common.palm import PolicyNetwork
from common.tokenizer import Tokenizer
from common.weights import load_weights, torch_dtype
from common.worker_config import threads_of
from deploy.driver import controller_name
from deploy.elastic import Scaled
from deploy.evaluate import Judge, compare, sample_both
from deploy.facts import Status
from deploy.placement import NAMESPACE
from deploy.preflight import explain
from deploy.session import open_session
from deploy.stages import say_fitting, start_pools
from reward_service.scorers import FunctionScorer

_ANSWER_S = 30.0
_WORKERS_SHOWN = 32


def evaluate_run(config: RunConfig, console: Console) -> dict[str, float]:
    """Supervised against trained policy on the evaluation prompts; writes evaluation.json."""
    if not config.data.evaluation:
        raise ConfigError("data.evaluation is empty; evaluate needs held-out prompts")
    judge = _judge(config.evaluate.judge) if config.evaluate.judge else None
    with open_session(config, console) as session:
        prompts, fitting = encode_prompts(
            [
                Prompt(prompt=record.prompt, place=record.place)
                for record in read_demonstrations(config.data.evaluation)
            ],
            session.tokenizer(),
            max_tokens=config.max_prompt_tokens,
            too_long=config.data.too_long,
            limit=config.evaluate.prompts,
        )
        say_fitting(console, fitting)
        pools = start_pools(session, config)
        before, after = sample_both(
            config, session.sft_weights, session.policy_weights, prompts, *pools, label="eval"
        )
    found = compare([p.text for p in prompts], before, after, judge)
    write_atomic(config.run_dir / "evaluation.json", [json.dumps(found, indent=1).encode()])
    return found


def sample_run(config: RunConfig, texts: Sequence[str], sft: bool, seed: int) -> list[str]:
    """One response per prompt, in this process, by `rollout.threads` threads."""
    torch.set_num_threads(threads_of(config.rollout.threads, config.rollout.cpus_per_actor))
    tokenizer = Tokenizer.load(config.run_dir / "tokenizer.json")
    network = PolicyNetwork(config.model)
    folder = "sft" if sft else "policy"
    load_weights(network, config.run_dir / folder / "policy.safetensors")
    network.eval().requires_grad_(False).to(torch_dtype(config.rollout.precision))
    for index, text in enumerate(texts):
        if not text:
            raise DataError(f"prompt {index + 1} is empty; give it at least one character")
        if not is_utf8(text):
            raise DataError(f"prompt {index + 1} is not UTF-8: {text}; give it as UTF-8")
    prompts, _ = encode_prompts(
        [Prompt(uid=str(i), prompt=text) for i, text in enumerate(texts)],
        tokenizer,
        max_tokens=config.max_prompt_tokens,
        too_long="error",
    )
    engine = engine_of(network.palm, tokenizer, config.rollout)
    requests = evaluation_requests(prompts, seed=seed, label="sample")
    return [engine.text(made).strip() for made in engine.generate(requests)]


def status_of(config: RunConfig) -> dict[str, Any]:
    """Live status from the run's controller, else the last lines of its log."""
    controller = _controller(config)
    if controller is None:
        return {"running": False} | _logged(config.run_dir)
    reference: ray.ObjectRef[Status] = controller.status.remote()
    status = ray.get(reference, timeout=_ANSWER_S)
    found = {
        "running": True,
        "iteration": f"{status.iteration}/{status.iterations}",
        "issued": status.issued,
        "trained": status.trained,
        "dropped": status.dropped,
        "in_flight": status.in_flight,
        "rollout_workers": status.rollout_workers,
        "reward_workers": status.reward_workers,
        "worker_failures": status.worker_failures,
        "learner_restarts": status.learner_restarts,
        **status.metrics,
        **status.counts,
    }
    for worker in status.workers[:_WORKERS_SHOWN]:
        place = f" · node {worker.node[:8]} · process {worker.pid}" if worker.pid else ""
        found[worker.name] = f"{worker.state}, {worker.calls} under way{place}"
    if len(status.workers) > _WORKERS_SHOWN:
        found["more workers"] = len(status.workers) - _WORKERS_SHOWN
    return found


def scale_run(config: RunConfig, actors: int | None, replicas: int | None) -> list[Scaled]:
    """Change a running run's numbers of workers; returns at once with what was and what will be.

    Raises:
        ConfigError: neither number is given.
        ClusterError: the run is not running, or its cluster does not grow and has no room.
    """
    if actors is None and replicas is None:
        raise ConfigError("give --actors, --reward-replicas or both")
    controller = _controller(config)
    if controller is None:
        raise ClusterError(
            f"{config.run_dir} is not running here; `talipot train --resume {config.run_dir}` "
            "carries on with it, and --address names its cluster"
        )
    if not config.cluster.autoscales:
        rollout: dict[str, Any] = {"actors": actors} if actors else {}
        reward: dict[str, Any] = {"replicas": replicas} if replicas else {}
        wanted = config.model_copy(
            update={
                "rollout": config.rollout.model_copy(update=rollout),
                "reward_service": config.reward_service.model_copy(update=reward),
            }
        )
        explain(wanted, ray.cluster_resources())  # type: ignore[no-untyped-call]
    reference: ray.ObjectRef[list[Scaled]] = controller.scale.remote(actors, replicas)
    return ray.get(reference, timeout=_ANSWER_S)


def _controller(config: RunConfig) -> Any:
    """The run's controller, if it works on the cluster that is named or on this machine."""
    try:
        ray.init(
            address=config.cluster.address or "auto",
            namespace=NAMESPACE,
            ignore_reinit_error=True,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        controller = ray.get_actor(controller_name(config), namespace=NAMESPACE)
        outcome: ray.ObjectRef[Any] = controller.outcome.remote(0.0)
        ended = ray.get(outcome, timeout=_ANSWER_S)
    except (ConnectionError, ValueError, ray.exceptions.RayActorError, ray.exceptions.RayTaskError):
        return None  # none there, one that dies, or one that keeps what ended its run
    return controller if ended is None else None


def _logged(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return {"logged": "nothing yet"}
    last = json.loads(path.read_text(encoding="utf8").splitlines()[-1])
    finished = (run_dir / "policy" / "policy.safetensors").exists()
    return {"finished": finished, "stage": last["stage"], "step": last["step"], **last["metrics"]}


def _judge(target: str) -> Judge:
    return FunctionScorer(target, role="evaluate.judge", command=True).numbers
