"""Answers of a model to the recipe's prompts, beside the workers, which hold other weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

import ray

from actors.generation.decoder_generator import build_engine
from common.config.run import RunConfig
from common.config.workers import RolloutConfig
from common.data.prompts import EncodedPrompt, evaluation_requests
from common.data.tokenizer import load_tokenizer
from common.devices import compute_of, torch_dtype
from common.models.build import build_decoder
from common.models.weight_files import load_decoder

P = ParamSpec("P")
T = TypeVar("T")


def apart(rollout: RolloutConfig, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a function in a process of its own, whose memory is free again when it has answered.

    It has as many threads as a rollout actor: Ray alone would give it one.
    """

    def on_threads() -> T:
        compute_of(cpus=rollout.cpus_per_actor or 1.0, threads=rollout.threads).apply()
        return function(*args, **kwargs)

    task = ray.remote(num_cpus=0, max_calls=1)(on_threads).options(name=function.__name__)
    result: T = ray.get(task.remote())
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What a model answered, in the prompts' order."""

    texts: list[str]
    lengths: list[int]
    """In tokens."""


def answers(
    config: RunConfig,
    weights: Path,
    prompts: Sequence[EncodedPrompt],
    *,
    label: str,
    greedy: bool = False,
) -> Answers:
    """Answer each prompt once, from the same seeds as workers would under this label.

    Args:
        config: its rollouts say how tokens are sampled, and in which precision.
        weights: of the model.
        prompts: in tokens.
        label: of the requests.
        greedy: take the most probable token each time.
    """
    rollout = config.rollout
    if greedy:
        rollout = rollout.model_copy(update={"temperature": 0.0})
    decoder = build_decoder(config.model)
    load_decoder(decoder, weights)
    decoder = decoder.eval().requires_grad_(False).to(torch_dtype(rollout.precision))
    engine = build_engine(decoder, load_tokenizer(config.folder.tokenizer), rollout)
    made: Answers = Answers(texts=[], lengths=[])
    requests = evaluation_requests(prompts, seed=config.seed, label=label)
    for at in range(0, len(requests), rollout.lease_size):  # as many at once as a worker has
        for response in engine.generate(requests[at : at + rollout.lease_size]):
            made.texts.append(engine.text(response))
            made.lengths.append(len(response.response_ids))
    return made
