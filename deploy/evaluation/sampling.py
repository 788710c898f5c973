"""Responses of policies to held-out prompts: sampled, and scored by the run's own reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import ray
from torch import Tensor

from common.config.run import RunConfig
from common.data.prompts import EncodedPrompt, evaluation_requests
from common.devices import torch_dtype
from common.models.adapter_files import load_peft, put_adapter, require_base
from common.models.adapters import adapter_tensors, add_adapter, base_fingerprint
from common.models.build import build_decoder
from common.models.lora import OFF
from common.models.weight_files import load_decoder
from common.run_folder import PolicyFolder
from common.wire.trajectory import Rollout, RolloutRequest, ScoredTrajectory, from_table
from common.wire.weights import manifest_of
from deploy.control.held_out import collected
from deploy.control.jobs import Weights
from deploy.run_folder.weights import policy_start
from deploy.workers.pool import Pool


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One policy's scored responses to the held-out prompts, in the prompts' order.

    Responses without a score are left out: `prompts` says which prompt each of the others answers.
    """

    prompts: list[int]
    """Index of the prompt that each response answers, ascending."""
    responses: list[str]
    scores: list[float]
    """By the run's own reward."""
    kl: list[float]
    """Sum of (policy_logprobs - ref_logprobs), a one-sample estimate of the KL to the reference.
    Both are without a filter and at the sampling temperature (1 where sampling is greedy)."""
    nll: list[float]
    """Mean of -ref_logprobs: negative log-likelihood per token under the supervised policy."""
    lengths: list[int]
    """Response tokens."""

    def pick(self, rows: Sequence[int]) -> Sampled:
        """Return some of the responses, in the order given."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return Sampled(**{name: [values[i] for i in rows] for name, values in columns.items()})


def policy_weights(config: RunConfig, path: Path, version: int) -> Weights:
    """Return a policy's decoder as weights that actors can load.

    Actors of a run with LoRA hold the supervised policy as a base and load an adapter on it: that
    of the trained policy, or for the supervised policy itself one that changes nothing.

    Raises:
        CheckpointError: the file is missing or torn, or its adapter belongs to another base.
    """
    dtype = torch_dtype(config.rollout.precision)
    lora, name = config.train.lora, config.train.adapter
    decoder = build_decoder(config.model)
    if lora is None:
        load_decoder(decoder, path)
        state: dict[str, Tensor] = dict(decoder.named_parameters())
        fingerprint = ""
    else:
        base = policy_start(config)
        load_decoder(decoder, base)
        fingerprint = base_fingerprint(decoder.state_dict())
        if path.absolute() == base.absolute():
            add_adapter(decoder, name, lora, seed=0)
        else:
            folder = PolicyFolder(path if path.is_dir() else path.parent).adapter
            adapter = load_peft(folder, decoder)
            require_base(adapter, fingerprint, folder)
            put_adapter(decoder, name, adapter)
        state = dict(adapter_tensors(decoder, name))
    manifest, payload = manifest_of(state, version, dtype, fingerprint)
    return Weights(manifest=manifest, payloads=(ray.put(payload),))


def sample(
    config: RunConfig,
    weights: Weights,
    prompts: Sequence[EncodedPrompt],
    rollout: Pool,
    *,
    label: str,
    samples: int = 1,
) -> list[Rollout]:
    """Sample `samples` responses of one policy to each prompt, without scoring them."""
    requests = _requests(config, prompts, label, samples, (config.train.adapter,))
    tables = _run(config, weights, requests, rollout, None)
    rows = [row for table in tables for row in from_table(ray.get(table), Rollout)]
    return sorted(rows, key=lambda row: row.rollout_id)


def sample_scored(
    config: RunConfig,
    weights: Weights,
    prompts: Sequence[EncodedPrompt],
    rollout: Pool,
    reward: Pool,
    *,
    label: str,
    samples: int = 1,
) -> Sampled:
    """Sample one policy, and score its responses by reward and reference policy."""
    requests = _requests(config, prompts, label, samples, (config.train.adapter,))
    return _sampled(_scored(_run(config, weights, requests, rollout, reward)))


def sample_both(
    config: RunConfig,
    sft: Path,
    policy: Path,
    prompts: Sequence[EncodedPrompt],
    rollout: Pool,
    reward: Pool,
    *,
    label: str,
) -> tuple[Sampled, Sampled]:
    """Sample the supervised and the trained policy from the same seeds.

    Where the one is the base of the other's adapter they are sampled side by side: each lease is of
    both, and no weights change in between. Actors of whole weights hold one policy at a time, and
    so do native kernels where the recipe insists on them; then the policies take turns.
    """
    new = config.train.adapter
    if new == OFF or config.rollout.kernels == "native":
        turns = [policy_weights(config, path, at) for at, path in enumerate((sft, policy))]
        before, after = (
            sample_scored(config, weights, prompts, rollout, reward, label=label)
            for weights in turns
        )
        return before, after
    weights = policy_weights(config, policy, 1)
    requests = _requests(config, prompts, label, 1, (OFF, new))
    rows = _scored(_run(config, weights, requests, rollout, reward))
    before, after = (_sampled([r for r in rows if r.adapter == name]) for name in (OFF, new))
    return before, after


def _scored(tables: Sequence[ray.ObjectRef[Any]]) -> list[ScoredTrajectory]:
    """Return the rows of all tables in the order in which they were asked for."""
    rows = [row for table in tables for row in from_table(ray.get(table), ScoredTrajectory)]
    return sorted(rows, key=lambda row: row.rollout_id)


def _sampled(rows: Sequence[ScoredTrajectory]) -> Sampled:
    return Sampled(
        prompts=[row.group for row in rows],
        responses=[row.response_text for row in rows],
        scores=[row.score for row in rows],
        kl=[sum(row.policy_logprobs) - sum(row.ref_logprobs) for row in rows],
        nll=[-sum(row.ref_logprobs) / len(row.ref_logprobs) for row in rows],
        lengths=[len(row.response_ids) for row in rows],
    )


def best_of(sampled: Sampled) -> Sampled:
    """Return, of each prompt that has any, the response with the highest score."""
    best: dict[int, int] = {}
    for row, prompt in enumerate(sampled.prompts):
        if prompt not in best or sampled.scores[row] > sampled.scores[best[prompt]]:
            best[prompt] = row
    return sampled.pick(list(best.values()))


def _requests(
    config: RunConfig,
    prompts: Sequence[EncodedPrompt],
    label: str,
    samples: int,
    adapters: Sequence[str],
) -> list[RolloutRequest]:
    return evaluation_requests(
        prompts, seed=config.seed, label=label, samples=samples, adapters=adapters
    )


def _run(
    config: RunConfig,
    weights: Weights,
    requests: Sequence[RolloutRequest],
    rollout: Pool,
    reward: Pool | None,
) -> list[ray.ObjectRef[Any]]:
    """Take requests through the pools; return the tables of rollouts. Raises as `collected`."""
    tables = collected(config, weights, requests, rollout, reward)
    return [s.table for s in tables]
