"""What of a recipe may change when a run is resumed, and why the rest may not.

Every field is in one of three classes by the longest prefix here that it starts with. A field that
nobody classified is fixed: what is not known to be harmless is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from common.config.run import RunConfig
from common.errors import ConfigError
from deploy.run_folder.paths import anchored

Kind = Literal["free", "rounding", "fixed"]

_ORDER = "sums are taken in another order"
_PLACE = "another processor may sum in another order"
_THREADS = "threads share sums out in another way"
_FOLLOWS = "threads follow unless they are set, and share sums out in another way"
_ASKED = "how an endpoint is asked, not what it answers"

RULES: dict[str, tuple[Kind, str]] = {
    "": ("fixed", "the checkpoint was trained under it"),
    # Where things are, how many work and how long is waited: in synchronous mode results are the
    # same bit for bit (invariant I5); an asynchronous run is not reproducible to begin with.
    "name": ("free", "a run may be moved"),
    "output": ("free", "a run may be moved"),
    "cluster": ("free", "how a cluster is joined and how long it is waited for"),
    "rollout.actors": ("free", "actors change speed, never results"),
    "rollout.gpus_per_actor": ("free", "a reservation"),
    "rollout.lease_deadline_s": ("free", "a deadline"),
    "reward_service.replicas": ("free", "replicas change speed, never results"),
    "reward_service.gpus_per_replica": ("free", "a reservation"),
    "learner.gpus_per_rank": ("free", "a reservation"),
    "learner.deadline_s": ("free", "a deadline"),
    "learner.max_restarts": ("free", "a bound on failures"),
    "train.checkpoint_every": ("free", "how often, not what"),
    "train.keep_checkpoints": ("free", "how many, not what"),
    "reward_service.components.*.token_env": ("free", _ASKED),
    "reward_service.components.*.timeout_s": ("free", _ASKED),
    "reward_service.components.*.max_concurrency": ("free", _ASKED),
    "reward_service.components.*.max_retries": ("free", _ASKED),
    "reward_service.components.*.give_up_after_s": ("free", _ASKED),
    "reward_service.components.*.dead_letters": ("free", "where refused responses go"),
    # Stages that are not policy training: done before it, or after.
    "trackers": ("free", "the run's own log is the same"),
    "evaluate": ("free", "what is asked changes no weight; scores of others are not compared"),
    "data.evaluation": ("free", "comes after training"),
    "data.demonstrations": ("free", "read before training"),
    "data.comparisons": ("free", "read before training"),
    "sft": ("free", "its weights are made"),
    "reward_model": ("free", "its weights are made"),
    "reward_model.model": ("fixed", "the policy was trained by scores of it"),
    "quickstart": ("free", "its data is made"),
    # The same mathematics in another order of summing.
    "cluster.address": ("rounding", _PLACE),
    "learner.labels": ("rounding", _PLACE),
    "rollout.labels": ("rounding", _PLACE),
    "reward_service.labels": ("rounding", _PLACE),
    "learner.threads": ("rounding", _THREADS),
    "rollout.threads": ("rounding", _THREADS),
    "reward_service.threads": ("rounding", _THREADS),
    "learner.cpus_per_rank": ("rounding", _FOLLOWS),
    "rollout.cpus_per_actor": ("rounding", _FOLLOWS),
    "reward_service.cpus_per_replica": ("rounding", _FOLLOWS),
    "learner.ranks": ("rounding", _ORDER),
    "learner.zero_stage": ("rounding", _ORDER),
    "learner.micro_batch_tokens": ("rounding", _ORDER),
    "reward_service.micro_batch_tokens": ("rounding", _ORDER),
    "rollout.slots": ("rounding", _ORDER),
    "rollout.cache_mb": ("rounding", "fewer slots sum in another order"),
    "rollout.prefill_tokens": ("rounding", _ORDER),
    "rollout.kernels": ("rounding", _ORDER),
    "rollout.graphs": ("rounding", "rows of a step are filled up"),
    "reward_service.kernels": ("rounding", _ORDER),
    "rollout.lora": ("rounding", _ORDER),
    "model.activation_checkpointing": ("rounding", "activations are made again"),
    "model.start": ("free", "a checkpoint may be moved; what is in it is compared"),
    "model.logits_mb": ("rounding", _ORDER),
    # Upward only (see `changes`): what was trained was annealed towards the old end.
    "train.iterations": ("rounding", "learning rates anneal towards the new end from here on"),
    # Another run.
    "seed": ("fixed", "every random number of the run derives from it"),
    "preset": ("fixed", "the checkpoint holds a network of another shape"),
    "model": ("fixed", "the checkpoint holds a network of another shape"),
    "reuse": ("free", "a run may be moved; what is in it is compared"),
    "data.prompts": ("fixed", "the run goes through the prompts that it began with"),
    "data.columns": ("fixed", "it decides what scorers are given"),
    "data.mixture": ("fixed", "it decides which prompts come when"),
    "data.curriculum": ("fixed", "it decides which prompts come when"),
    "data.source_column": ("fixed", "it decides which prompts come when"),
    "data.too_long": ("fixed", "it decides which prompts there are"),
    "tokenizer": ("fixed", "the networks know the tokens that the run began with"),
    "learner.precision": ("fixed", "the checkpoint was trained under it"),
    "rollout.lease_size": ("fixed", "rollouts are sampled in batches of it"),
    "rollout.max_response_tokens": ("fixed", "it is part of what is sampled"),
    "rollout.min_response_tokens": ("fixed", "it is part of what is sampled"),
    "rollout.temperature": ("fixed", "it is part of what is sampled"),
    "rollout.top_p": ("fixed", "it is part of what is sampled"),
    "rollout.top_k": ("fixed", "it is part of what is sampled"),
    "rollout.min_p": ("fixed", "it is part of what is sampled"),
    "rollout.stop": ("fixed", "it is part of what is sampled"),
    "rollout.stop_ids": ("fixed", "it is part of what is sampled"),
    "rollout.precision": ("fixed", "it is part of what is sampled"),
    "reward_service.precision": ("fixed", "the policy was trained by scores of it"),
    "reward_service.reference": ("fixed", "the KL was measured to it"),
    "reward_service.components": ("fixed", "the policy was trained by another score"),
    "train": ("fixed", "the checkpoint was trained under it"),
}
"""By prefix of a dotted field; ``*`` is one of the user's own names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One field that differs."""

    field: str
    old: Any
    new: Any
    kind: Kind
    reason: str

    def __str__(self) -> str:
        return f"{self.field}: {self.old} -> {self.new} ({self.reason})"


def changes(
    saved: RunConfig, new: RunConfig, trained: int, by_content: Collection[str] = ()
) -> list[Change]:
    """Return the fields that differ from those of a checkpoint of `trained` iterations.

    Fields in `by_content` name files of which more is known than their paths: they may be moved. A
    relative path is one from the working folder: recipes of before kept them as they were given.
    """
    old_fields = dict(flat(anchored(saved).model_dump(mode="json")))
    new_fields = dict(flat(anchored(new).model_dump(mode="json")))
    if not new.model.vocab_size:  # 0 is the tokenizer's
        new_fields["model.vocab_size"] = old_fields["model.vocab_size"]
    changed = []
    for field in sorted(old_fields.keys() | new_fields.keys()):
        old, wanted = old_fields.get(field, "absent"), new_fields.get(field, "absent")
        if old == wanted:
            continue
        kind, reason = RULES[prefix_of(field)]
        if field in by_content:
            kind, reason = "free", "what the files hold is compared"
        if field == "train.iterations" and wanted < trained:
            kind, reason = "fixed", f"{trained} are trained already"
        changed.append(Change(field=field, old=old, new=wanted, kind=kind, reason=reason))
    return changed


def prefix_of(field: str) -> str:
    """Return the prefix whose rule holds for a dotted field; "" where no rule names it."""
    return max((prefix for prefix in RULES if within(field, prefix)), key=len)


def require_resumable(
    saved: RunConfig,
    new: RunConfig,
    trained: int,
    run_dir: object,
    by_content: Collection[str] = (),
) -> list[Change]:
    """Return the changes, all of them allowed; `by_content` as in `changes`.

    Raises:
        ConfigError: naming every field that cannot change, with both values.
    """
    changed = changes(saved, new, trained, by_content)
    fixed = [str(change) for change in changed if change.kind == "fixed"]
    if fixed:
        raise ConfigError(
            f"{run_dir} cannot go on under another recipe: {'; '.join(fixed)}; take these back, or "
            "give the new run another name"
        )
    return changed


def within(field: str, prefix: str) -> bool:
    """Whether a dotted field is what a prefix names, or part of it; all are part of ""."""
    before, star, after = prefix.partition("*")
    if star:
        return field.startswith(before) and field.endswith(after)
    return not prefix or field == prefix or field.startswith(f"{prefix}.")


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted field and its value."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
