"""What may change on resume: every field has a rule, and the rules say what they should."""

from __future__ import annotations

import pytest

from common.config import RunConfig
from common.errors import ConfigError
from common.recipe import fields, load_config
from deploy.changes import RULES, changes, require_resumable


def changed(*overrides: str, trained: int = 3) -> dict[str, str]:
    found = changes(RunConfig(), load_config(None, overrides), trained)
    return {change.field: change.kind for change in found}


@pytest.mark.parametrize(
    ("override", "kind"),
    [
        ("rollout.actors=5", "free"),
        ("cluster.dashboard=false", "free"),
        ("train.checkpoint_every=1", "free"),
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


def test_rules_are_of_fields_that_exist() -> None:
    names = [name for name, _, _ in fields()]
    for prefix in RULES:
        assert any(n == prefix or n.startswith(f"{prefix}.") or not prefix for n in names), prefix
