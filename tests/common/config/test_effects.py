"""Settings that change nothing under the others are refused, and resolved recipes are recipes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from common.config.draft import annotation_of
from common.config.earlier import saved_config, settings_as_of_now
from common.config.effects import RULES
from common.config.recipe import dump_config, load_config, save_config
from common.config.run import RunConfig
from common.errors import ConfigError
from tests.common.config.recipes import load, refusal

# -------------------------------------------------------------------------- settings without effect

GRPO = ["train.algorithm=grpo", "train.samples_per_prompt=2", "train.ppg=null"]
FUNCTION = "reward_service.components.mine={kind: function, target: 'm:f'}"
HTTP = "reward_service.components.mine={kind: http, target: 'http://x/'}"


def component(kind: str, field: str) -> tuple[str, str]:
    return kind, f"reward_service.components.mine.{field}"


IDLE = [
    *[
        (GRPO, f"train.{setting}", "ppo")
        for setting in (
            "gae_lambda=0.9",
            "gae_lambda=0.95",  # given is given, the default or not
            "value_lr=1e-3",
            "e_v=2",
            "value_clip_range=0.1",
            "value_clip_range=null",
            "value_network=shared",
            "value_lambda=1",
            "gae_length_alpha=0.05",
            "value_warmup=2",
            "gamma=0.9",
        )
    ],
    (["train.value_network=shared"], "train.e_v=2", "value_network=separate"),
    (["train.value_network=shared"], "train.value_lr=1e-3", "value_network=separate"),
    (["train.algorithm=rloo", *GRPO[1:]], "train.gamma=1", "reinforce_pp"),
    ([], "train.stale=drop", "max_staleness is above 0"),
    ([], "train.stale=wait", "max_staleness is above 0"),
    ([], "train.behavior_cap=3", "max_staleness is above 0"),
    ([], "train.behavior_level=sequence", "max_staleness is above 0"),
    ([], "train.behavior_outside=mask", "max_staleness is above 0"),
    (["train.objective.clip=weight"], "train.objective.dual_clip=3", "no bound of its own"),
    ([], "train.kl_horizon=50", "kl_target"),
    (["train.kl_coef=0"], "train.kl_target=0.5", "kl_coef"),
    ([], "rollout.lora=unmerged", "train.lora"),
    (["rollout.temperature=0"], "rollout.top_p=0.9", "temperature"),
    (["rollout.temperature=0"], "rollout.top_k=9", "temperature"),
    (["rollout.temperature=0"], "rollout.min_p=0.1", "temperature"),
    (["sft.optimizer=adafactor"], "sft.weight_decay=0.1", "adamw"),
    (["sft.optimizer=adafactor"], "sft.adam_eps=1e-5", "adamw"),
    (["reward_model.optimizer=adafactor"], "reward_model.weight_decay=0.1", "adamw"),
    (["reward_model.optimizer=adafactor"], "reward_model.adam_eps=1e-5", "adamw"),
    (["tokenizer.path=t.json"], "tokenizer.vocab_size=999", "tokenizer is trained"),
    (["tokenizer.path=t.json"], "tokenizer.words=spaced", "tokenizer is trained"),
    (["cluster.address=auto"], "cluster.dashboard=false", "local cluster"),
    (["reward_service.components.mine={}"], "reward_service.components.mine.target=x", "http"),
    *[
        ([FUNCTION], f"reward_service.components.mine.{setting}", "kind http")
        for setting in (
            "token_env=T",
            "timeout_s=10",
            "max_concurrency=2",
            "batch_size=3",
            "max_retries=0",
            "give_up_after_s=3",
            "dead_letters=f",
        )
    ],
]


@pytest.mark.parametrize(("under", "setting", "says"), IDLE, ids=lambda v: str(v)[:40])
def test_a_setting_without_effect_is_refused(under: list[str], setting: str, says: str) -> None:
    load_config(None, under)  # it is not the others that are refused
    with pytest.raises(ConfigError) as error:
        load_config(None, [*under, setting])
    message, name = str(error.value), setting.split("=")[0]
    assert message.startswith(f"override '{setting}': {name} has no effect here: ")
    assert says in message
    assert message.endswith("; leave it out")


def test_in_a_file_it_is_refused_with_its_line(folder: Path) -> None:
    text = "train:\n  algorithm: grpo\n  samples_per_prompt: 2\n  ppg: null\n  gae_lambda: 0.95\n"
    assert refusal(text).startswith("r.yaml:5: train.gae_lambda has no effect here: ")
    both = refusal(text + "  stale: drop\n")
    assert "r.yaml:5: train.gae_lambda" in both
    assert "r.yaml:6: train.stale" in both
    assert both.endswith("leave them out")


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.gae_lambda=0.9", "train.e_v=2", "train.value_lr=1e-3", "train.gamma=0.9"],
        ["train.value_network=shared", "train.value_clip_range=0.1"],
        [
            "train.algorithm=reinforce_pp",
            "train.ppg=null",
            "train.gamma=0.9",
        ],
        ["train.max_staleness=1", "train.stale=drop", "train.behavior_cap=3"],
        ["rollout.precision=bf16", "train.behavior_cap=3", "train.behavior_outside=mask"],
        ["train.objective.dual_clip=3", "train.value_warmup=2", "train.value_lambda=1"],
        ["learner.precision=bf16", "train.behavior_cap=3"],
        ["train.kl_target=1", "train.kl_horizon=5"],
        ["train.lora={rank: 2}", "rollout.lora=unmerged"],
        ["rollout.top_p=0.9", "rollout.top_k=9", "rollout.min_p=0.1"],
        ["sft.weight_decay=0.1", "sft.adam_eps=1e-5", "reward_model.weight_decay=0"],
        ["tokenizer.vocab_size=999", "tokenizer.words=identifiers"],
        ["cluster.dashboard=false"],
        ["rollout.gpus_per_actor=1", "reward_service.gpus_per_replica=0.5"],
        ["rollout.gpus_per_actor=0", "learner.gpus_per_rank=0"],
        [HTTP, "reward_service.components.mine.max_retries=2"],
    ],
    ids=lambda v: v[0],
)
def test_where_it_has_an_effect_it_is_taken(overrides: list[str]) -> None:
    load_config(None, overrides)


def test_a_kind_of_model_that_is_none(folder: Path) -> None:
    assert "r.yaml:1: model.kind: should be 'palm' or 'pretrained', not 'bert'" in refusal(
        "model: {kind: bert}"
    )
    assert load("model: {kind: palm, dim: 96}") == load("model: {dim: 96}")


def test_a_kind_of_component_that_is_none(folder: Path) -> None:
    says = refusal("reward_service: {components: {a: {kind: [x]}}}")
    assert "a.kind: should be 'model', 'function', 'http' or 'judge', not ['x']" in says
    assert "a.kind: should be" in refusal("reward_service: {components: {a: {kind: }}}")


def test_a_preset_beside_a_whole_model(folder: Path) -> None:
    text = yaml.safe_dump({"model": RunConfig().model.model_dump()})
    says = "preset has no effect here: every field of model is given"
    assert says in refusal(text, "preset=tiny")
    assert says in refusal(text, "preset=tiny", saved=True)


def test_where_it_runs_is_no_part_of_the_recipe(folder: Path) -> None:
    config = load_config(None, ["cluster.dashboard=false"], {"cluster.address": "auto"})
    assert config.cluster.address == "auto"


def test_rules_are_of_fields_that_exist() -> None:
    for rule in RULES:
        for name in rule.fields:
            assert annotation_of(RunConfig, tuple(name.split("."))) is not None, name


# -------------------------------------------------------------------------- resolved recipes

VARIANTS = [[], GRPO, [FUNCTION], ["rollout.actors={min: 1, max: 3}", "train.lora={}"]]


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_a_resolved_recipe_is_a_recipe(folder: Path, overrides: list[str]) -> None:
    config = load_config(None, overrides)
    save_config(config, folder / "r.yaml")
    assert load_config("r.yaml") == config
    assert load_config("r.yaml", saved=True) == config


def test_what_a_run_saved_is_no_wish_but_an_override_of_it_is(folder: Path) -> None:
    # Of a version that took such settings without a word.
    text = "train: {behavior_cap: 3, stale: drop}\n"
    assert load(text, saved=True).train.behavior_cap == 3
    says = refusal(text, "train.stale=wait", saved=True)
    assert says.startswith("override 'train.stale=wait': train.stale has no effect here")
    assert "behavior_cap" not in says


def test_a_run_of_before_goes_on_as_it_was(folder: Path) -> None:
    values = yaml.safe_load(dump_config(RunConfig()))
    assert saved_config(values) == RunConfig()
    del values["train"]["adam_eps"]  # which was 1e-5 when there was no such setting
    del values["reward_service"]["precision"]  # likewise, whatever the learner's
    for section in ("sft", "reward_model", "train"):
        assert values[section].pop("max_grad_norm") == 1
        values[section]["clip"] = 3  # as it was called
    assert saved_config(values).train.adam_eps == 1e-5
    assert saved_config(values).reward_service.precision == "fp32"
    assert load(yaml.safe_dump(values), saved=True) == saved_config(values)
    assert saved_config(values).train.max_grad_norm == 3
    assert saved_config(values).sft.max_grad_norm == 3
    assert saved_config(values).reward_model.max_grad_norm == 3
    refused = refusal(yaml.safe_dump(values))  # a recipe, which nobody saved
    assert "unknown key 'train.clip'; it is called 'train.max_grad_norm' now" in refused
    for section in ("sft", "reward_model", "train"):
        values[section]["max_grad_norm"] = values[section].pop("clip")
    assert load(yaml.safe_dump(values)).train.adam_eps == RunConfig().train.adam_eps


def test_settings_that_a_stage_recorded_are_called_what_they_are_now() -> None:
    recorded = {"sft.clip": 1.0, "model.dim": 64}
    now = {"sft.max_grad_norm": 1.0, "model.dim": 64, "model.kind": "palm"}
    assert settings_as_of_now(recorded) == settings_as_of_now(now) == now
    assert settings_as_of_now({"tokenizer.words": "spaced"}) == {"tokenizer.words": "spaced"}


def test_a_resolved_recipe_that_was_changed_is_asked_about_the_rest(folder: Path) -> None:
    values = yaml.safe_load(dump_config(load_config(None, ["train.value_lr=1e-3"])))
    values["train"] |= {"algorithm": "grpo", "samples_per_prompt": 2, "ppg": None}
    message = refusal(yaml.safe_dump(values))
    assert "train.value_lr has no effect here" in message
    assert "gae_lambda" not in message  # written by us, and the default


def test_components_have_the_fields_of_their_kind(folder: Path) -> None:
    for kind, target in (("model", ""), ("function", "m:f"), ("http", "http://x/")):
        given = {"kind": kind, **({"target": target} if target else {})}
        values = {"reward_service": {"components": {"a": given}}}
        component = load(yaml.safe_dump(values)).reward_service.components["a"]
        assert component.kind == kind
        assert ("max_retries" in component.model_dump()) == (kind == "http")
        assert ("target" in component.model_dump()) == (kind != "model")


def test_a_recipe_of_before_gave_every_component_every_field(folder: Path) -> None:
    values = yaml.safe_load(dump_config(RunConfig()))
    unused = {"target": "", "token_env": "", "timeout_s": 10.0, "dead_letters": ""}
    values["reward_service"]["components"] = {"a": {"kind": "model", "weight": 1.0, **unused}}
    assert (
        saved_config(values)
        == load(yaml.safe_dump(values))
        == load(yaml.safe_dump(values), saved=True)
    )
    values["reward_service"]["components"]["a"]["timeout_s"] = 5.0
    assert saved_config(values) == load(yaml.safe_dump(values), saved=True)
    assert "components.a.timeout_s has no effect here: kind is model" in refusal(
        yaml.safe_dump(values)
    )
