"""What of a recipe may change when a run is resumed, and why the rest may not.

Every field is in one of three classes by the longest prefix here that it starts with. A field that
nobody classified is fixed: what is not known to be harmless is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from common.config import RunConfig
from common.errors import ConfigError

Kind = Literal["free", "rounding", "fixed"]

RULES: dict[str, tuple[Kind, str]] = {
    "": ("fixed", "the checkpoint was trained under it"),
    # Where things are and how many work: results are the same bit for bit (invariant I5).
    "name": ("free", "a run may be moved"),
    "output": ("free", "a run may be moved"),
    "cluster": ("free", "the cluster changes no result"),
    "rollout.actors": ("free", "actors change speed, never results"),
    "rollout.cpus_per_actor": ("free", "a reservation"),
    "rollout.gpus_per_actor": ("free", "a reservation"),
    "rollout.lease_deadline_s": ("free", "a deadline"),
    "rollout.labels": ("free", "where workers are, not what they do"),
    "reward_service.labels": ("free", "where workers are, not what they do"),
    "learner.labels": ("free", "where workers are, not what they do"),
    "reward_service.replicas": ("free", "replicas change speed, never results"),
    "reward_service.cpus_per_replica": ("free", "a reservation"),
    "reward_service.gpus_per_replica": ("free", "a reservation"),
    "learner.cpus_per_rank": ("free", "a reservation"),
    "learner.deadline_s": ("free", "a deadline"),
    "learner.max_restarts": ("free", "a bound on failures"),
    "train.checkpoint_every": ("free", "how often, not what"),
    "train.keep_checkpoints": ("free", "how many, not what"),
    # Stages that are not policy training: done before it, or after.
    "evaluate": ("free", "comes after training"),
    "data.evaluation": ("free", "comes after training"),
    "sft": ("free", "its weights are made"),
    "reward_model": ("free", "its weights are made"),
    "quickstart": ("free", "its data is made"),
    # The same mathematics in another order of summing.
    "learner.ranks": ("rounding", "sums are taken in another order"),
    "learner.zero_stage": ("rounding", "sums are taken in another order"),
    "learner.micro_batch_tokens": ("rounding", "sums are taken in another order"),
    "learner.gpus_per_rank": ("rounding", "another processor sums in another order"),
    "reward_service.micro_batch_tokens": ("rounding", "sums are taken in another order"),
    "rollout.slots": ("rounding", "sums are taken in another order"),
    "rollout.cache_mb": ("rounding", "fewer slots sum in another order"),
    "rollout.prefill_tokens": ("rounding", "sums are taken in another order"),
    "rollout.kernels": ("rounding", "sums are taken in another order"),
    "rollout.lora": ("rounding", "sums are taken in another order"),
    "model.activation_checkpointing": ("rounding", "activations are made again"),
    "model.logits_mb": ("rounding", "sums are taken in another order"),
    # Upward only (see `changes`): what was trained was annealed towards the old end.
    "train.iterations": ("rounding", "learning rates anneal towards the new end from here on"),
}


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


def changes(saved: RunConfig, new: RunConfig, trained: int) -> list[Change]:
    """The fields that differ from those a checkpoint of `trained` iterations was written under."""
    old_fields = dict(_flat(saved.model_dump(mode="json")))
    new_fields = dict(_flat(new.model_dump(mode="json")))
    if not new.model.vocab_size:  # 0 is the tokenizer's
        new_fields["model.vocab_size"] = old_fields["model.vocab_size"]
    found = []
    for field in sorted(old_fields.keys() | new_fields.keys()):
        old, wanted = old_fields.get(field, "absent"), new_fields.get(field, "absent")
        if old == wanted:
            continue
        kind, reason = RULES[max((p for p in RULES if _within(field, p)), key=len)]
        if field == "train.iterations" and wanted < trained:
            kind, reason = "fixed", f"{trained} are trained already"
        found.append(Change(field=field, old=old, new=wanted, kind=kind, reason=reason))
    return found


def require_resumable(
    saved: RunConfig, new: RunConfig, trained: int, run_dir: object
) -> list[Change]:
    """The changes, all of them allowed.

    Raises:
        ConfigError: naming every field that cannot change, with both values.
    """
    found = changes(saved, new, trained)
    fixed = [str(change) for change in found if change.kind == "fixed"]
    if fixed:
        raise ConfigError(
            f"{run_dir} cannot go on under another recipe: {'; '.join(fixed)}; take these back, or "
            "give the new run another name"
        )
    return found


def _within(field: str, prefix: str) -> bool:
    return not prefix or field == prefix or field.startswith(f"{prefix}.")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
