"""What may change on resume: every field has a rule, and the rules say what they should."""

from __future__ import annotations

import pytest

from common.config.names import fields
from common.config.recipe import load_config
from common.config.rewards import RewardComponent
from common.config.run import RunConfig
from common.errors import ConfigError
from deploy.run_folder.resume_rules import RULES, changes, prefix_of, require_resumable


def changed(*overrides: str, trained: int = 3) -> dict[str, str]:
    found = changes(RunConfig(), load_config(None, overrides), trained)
    return {change.field: change.kind for change in found}


@pytest.mark.parametrize(
    ("override", "kind"),
    [
        ("rollout.actors=5", "free"),
        ("cluster.dashboard=false", "free"),
        ("train.checkpoint_every=1", "free"),
        ("learner.cpus_per_rank=4", "rounding"),  # its threads share sums out
        ("learner.threads=2", "rounding"),
        ("rollout.threads=2", "rounding"),
        ("reward_service.threads=2", "rounding"),
        ("reward_service.precision=bf16", "fixed"),
        ("rollout.cpus_per_actor=4", "rounding"),
        ("reward_service.cpus_per_replica=4", "rounding"),
        ("rollout.labels.zone=a", "rounding"),
        ("cluster.address=auto", "rounding"),
        ("learner.deadline_s=5", "free"),
        ("rollout.lease_deadline_s=5", "free"),
        ("reward_service.replicas=3", "free"),
        ("learner.ranks=1", "rounding"),
        ("learner.zero_stage=3", "rounding"),
        ("train.iterations=30", "rounding"),
        ("train.iterations=2", "fixed"),
        ("seed=1", "fixed"),
        ("model.dim=64", "fixed"),
        ("train.algorithm=reinforce_pp", "fixed"),
        ("train.prompts_per_iteration=512", "fixed"),
        ("train.max_staleness=1", "fixed"),
        ("rollout.temperature=0.5", "fixed"),
        ("rollout.lease_size=32", "fixed"),
    ],
)
def test_a_field_is_what_it_should_be(override: str, kind: str) -> None:
    more = ["train.ppg=null"] if "algorithm" in override else []
    assert changed(override, *more)[override.split("=")[0]] == kind


def test_how_an_adapter_is_sampled_from_only_rounds() -> None:
    lora = load_config(None, ["train.lora={}"])
    other = load_config(None, ["train.lora={}", "rollout.lora=unmerged"])
    assert [c.kind for c in changes(lora, other, 3)] == ["rounding"]


def test_nothing_changed_and_a_vocabulary_left_to_the_tokenizer_are_no_change() -> None:
    assert changed() == {}
    saved = load_config(None, ["model.vocab_size=290"])
    assert changes(saved, RunConfig(), 1) == []


def test_all_that_cannot_change_is_named_at_once() -> None:
    new = load_config(None, ["seed=1", "train.lr=0.5", "rollout.actors=4"])
    with pytest.raises(ConfigError, match=r"seed: 0 -> 1.*train.lr: 0.0003 -> 0.5") as error:
        require_resumable(RunConfig(), new, 1, "runs/x")
    assert "actors" not in str(error.value)


def test_how_an_endpoint_is_asked_may_change_but_not_what_counts() -> None:
    name = "reward_service.components.my.judge"
    values = {"kind": "http", "target": "http://x/"}

    def under(**more: object) -> RunConfig:
        components = {"my.judge": {**values, **more}}
        return RunConfig.model_validate({"reward_service": {"components": components}})

    asked = under(timeout_s=99, max_retries=9, give_up_after_s=999, dead_letters="f", token_env="T")
    names = ("timeout_s", "max_retries", "give_up_after_s", "dead_letters", "token_env")
    found = {c.field: c.kind for c in changes(under(), asked, 3)}
    assert found == {f"{name}.{field}": "free" for field in names}
    for more in ({"weight": 2}, {"target": "http://y/"}):
        assert [c.kind for c in changes(under(), under(**more), 3)] == ["fixed"]


def test_every_field_was_classified_by_somebody() -> None:
    every = [name for name, _, _ in fields()]
    every += [f"reward_service.components.mine.{name}" for name in RewardComponent.every_field()]
    assert [name for name in every if not prefix_of(name)] == []


def test_what_computes_never_counts_as_changing_no_bit() -> None:
    """Each field that is said to be free, and why it may be; another one needs a reason here."""
    free = {name for name, _, _ in fields() if RULES[prefix_of(name)][0] == "free"}
    beside = ("sft.", "reward_model.", "quickstart.", "evaluate.", "trackers.", "cluster.")
    assert {name for name in free if not name.startswith(beside)} == {
        "name",
        "output",
        *("data.evaluation", "data.demonstrations", "data.comparisons"),
        *("rollout.actors", "rollout.gpus_per_actor", "rollout.lease_deadline_s"),
        *("reward_service.replicas", "reward_service.gpus_per_replica"),
        *("learner.gpus_per_rank", "learner.deadline_s", "learner.max_restarts"),
        *("train.checkpoint_every", "train.keep_checkpoints"),
        "model.start",  # a path, and what lies there is compared
        *("reuse.tokenizer", "reuse.sft", "reuse.reward_model"),  # likewise
    }


def test_rules_are_of_fields_that_exist() -> None:
    names = [name for name, _, _ in fields()]
    names += [f"reward_service.components.*.{name}" for name in RewardComponent.every_field()]
    for prefix in RULES:
        assert any(n == prefix or n.startswith(f"{prefix}.") or not prefix for n in names), prefix
