"""Which settings change nothing under which others.

A recipe that gives one is refused (`common.config.recipe`): whoever wrote it believes that it does
something. What counts are kinds and switches (an algorithm, a mode, an optimizer, a null), not
sizes: `ppg` with fewer iterations than `n_pi`, or `clip_range` with one step per update, is no
mistake of a recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.config.algorithms import ALGORITHMS, Needs
from common.config.run import RunConfig
from common.config.yaml_text import Key
from common.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Rule:
    """When some fields have an effect."""

    fields: tuple[str, ...]
    """Dotted names."""
    effective: Callable[[RunConfig], bool]
    when: str
    """In words that follow "has no effect here:"."""


def _under(has: Callable[[Needs], bool]) -> str:
    """Return the setting of the algorithms that have something."""
    return f"train.algorithm={' or '.join(n for n, needs in ALGORITHMS.items() if has(needs))}"


WHILE_TRAINING = ("samples", "solved", "greedy", "metric", "patience")
"""Settings of `evaluate` that are about evaluation while the policy is trained."""
_GROUPS = _under(lambda needs: needs.least_responses > 1)
_VALUES, _TOKENS = _under(lambda needs: needs.values), _under(lambda needs: needs.tokens)
_ADAMW = "Adafactor knows no such setting; it has one under optimizer=adamw"

RULES = (
    Rule(
        (
            "train.gae_lambda",
            "train.value_lambda",
            "train.gae_length_alpha",
            "train.value_network",
            "train.value_clip_range",
        ),
        lambda c: c.train.needs.values,
        f"only {_VALUES} has a value function",
    ),
    Rule(
        ("train.e_v", "train.value_lr", "train.value_warmup"),
        lambda c: c.train.separate_values,
        f"it has one under {_VALUES} with train.value_network=separate",
    ),
    Rule(
        ("train.gamma",),
        lambda c: c.train.needs.tokens,
        f"it has one under {_TOKENS}; others do not look at single tokens",
    ),
    Rule(
        ("train.kl_horizon",),
        lambda c: c.train.kl_target is not None,
        "it has one where train.kl_target is set",
    ),
    Rule(
        ("train.kl_target",),
        lambda c: c.train.kl_target is None or c.train.kl_coef > 0,
        "the adaptive controller multiplies train.kl_coef, which is 0; it has one above 0",
    ),
    Rule(
        ("train.dynamic_sampling",),
        lambda c: c.train.least_responses > 1,
        f"responses of one prompt are compared under {_GROUPS} alone; it has one there",
    ),
    Rule(
        ("train.stale",),
        lambda c: c.train.max_staleness > 0,
        "nothing is stale in synchronous mode; it has one where train.max_staleness is above 0",
    ),
    Rule(
        ("train.behavior_cap", "train.behavior_level", "train.behavior_outside"),
        lambda c: c.corrects_mismatch,
        "importance weights are 1 in synchronous mode in fp32; it has one where "
        "train.max_staleness is above 0, or rollout.precision or learner.precision is bf16",
    ),
    Rule(
        ("train.objective.dual_clip",),
        lambda c: c.train.objective.clip == "objective",
        "a clipped weight has no bound of its own; it has one under train.objective.clip=objective",
    ),
    Rule(
        ("rollout.lora",),
        lambda c: c.train.lora is not None,
        "it has one where train.lora is set",
    ),
    Rule(
        ("rollout.top_p", "rollout.top_k", "rollout.min_p"),
        lambda c: c.rollout.temperature > 0,
        "the most probable token is taken at rollout.temperature=0; it has one above 0",
    ),
    Rule(
        ("sft.weight_decay", "sft.adam_eps"),
        lambda c: c.sft.optimizer == "adamw",
        _ADAMW,
    ),
    Rule(
        ("reward_model.weight_decay", "reward_model.adam_eps"),
        lambda c: c.reward_model.optimizer == "adamw",
        _ADAMW,
    ),
    Rule(
        ("tokenizer.vocab_size", "tokenizer.words"),
        lambda c: c.tokenizer.path is None and c.model.kind != "pretrained",
        "the tokenizer of tokenizer.path or of a checkpoint is taken as it is; it has one where a "
        "tokenizer is trained",
    ),
    Rule(
        tuple(f"evaluate.{name}" for name in WHILE_TRAINING),
        lambda c: c.evaluate.every > 0,
        "nothing is evaluated while the policy is trained; it has one with evaluate.every above 0",
    ),
    Rule(
        ("data.source_column",),
        lambda c: c.data.mixture is not None,
        "prompts are taken of all sources alike; it has one with data.mixture",
    ),
    Rule(
        ("cluster.dashboard",),
        lambda c: not c.cluster.address,
        "the cluster of cluster.address has its own; it has one with a local cluster",
    ),
)

NOT_EVALUATED = (
    *("sft", "reward_model", "train", "quickstart", "tokenizer", "preset", "evaluate.best_of"),
    *("evaluate.every", *(f"evaluate.{name}" for name in WHILE_TRAINING)),
    *("data.demonstrations", "data.comparisons", "data.prompts"),
)
"""What the evaluation of a finished run does not look at, or must not find changed."""


def require_evaluated(overrides: Sequence[str]) -> None:
    """Refuse overrides that an evaluation does not look at.

    Raises:
        ConfigError: naming the first.
    """
    for override in overrides:
        field = override.partition("=")[0]
        if any(field == name or field.startswith(f"{name}.") for name in NOT_EVALUATED):
            raise ConfigError(
                f"override '{override}': {field} has no effect on an evaluation, which takes the "
                "run's policies as they are; leave it out"
            )


def without_effect(config: RunConfig) -> dict[Key, str]:
    """Return the fields that change nothing in this recipe, each with when it would."""
    return {
        tuple(name.split(".")): rule.when
        for rule in RULES
        if not rule.effective(config)
        for name in rule.fields
    }
