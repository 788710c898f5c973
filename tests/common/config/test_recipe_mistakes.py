"""Recipes as users write them: what is refused, with its line, and what is meant by what is not."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.config.base import Section
from common.config.draft import named_section_of, section_of
from common.config.model import LoraConfig, PretrainedConfig
from common.config.names import _OF_OTHER_SYSTEMS, fields
from common.config.rewards import HttpComponent, RewardComponent
from common.config.run import RunConfig
from common.config.yaml_text import read_yaml
from tests.common.config.recipes import load, refusal

# -------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train:\n  kl_coef: 1\ndata: {}\ntrain:\n  lr: 1", "r.yaml:4: 'train' is given twice, f"),
        (
            "train:\n  lr: 1\n  e_pi: 2\n  lr: 1",
            "r.yaml:4: 'train.lr' is given twice, first in lin",
        ),
        (
            "train: {ppg: {lr: 1, lr: 1}}",
            "r.yaml:1: 'train.ppg.lr' is given twice, first in line 1",
        ),
        ("rollout: {labels: {a: b, a: b}}", "'rollout.labels.a' is given twice"),
        ("train:\n  'lr': 1\n  \"lr\": 2", "r.yaml:3: 'train.lr' is given twice, first in line 2"),
        ("train:\n  <<: {lr: 1}\n  <<: {e_pi: 2}", "r.yaml:3: 'train.<<' is given twice"),
        ("1: x", "r.yaml:1: unknown key '1'"),
        ("name: x\non: x", "r.yaml:2: unknown key 'on'"),
        ("~: x", "r.yaml:1: unknown key '~'"),
        ("rollout: {labels: {1: a, '1': b}}", "'rollout.labels.1' is given twice"),
        ("? [a]\n: b", "a key is a plain text"),
        ("train: &t\n  ppg: *t", "r.yaml:1: an alias stands within what it stands for"),
        ("train: *t", "r.yaml:1: found undefined alias 't'"),
        ("train:\n\tlr: 1", "r.yaml:2: while scanning for the next token: found character"),
        ("seed: " + "9" * 5000, "is not a valid int"),
        ("name: x\nseed: 2024-13-45", "r.yaml:2: '2024-13-45' is not a valid timestamp"),
        ("seed: !!bool maybe", "r.yaml:1: 'maybe' is not a valid bool"),
        ("seed: !!python/name:os.system", "r.yaml:1: could not determine a constructor"),
        ("name: a\n---\nname: b", "r.yaml:2: expected a single document"),
        ("name: a\x00b", "r.yaml:1: the character '\\x00' is not allowed"),
        ("a: " + "[" * 3000, "nested too deep"),
        ("- 1", "r.yaml:1: a recipe is a mapping of sections, not list"),
        ("train", "r.yaml:1: a recipe is a mapping of sections, not str"),
        ("3", "r.yaml:1: a recipe is a mapping of sections, not int"),
    ],
)
def test_what_yaml_makes_of_it_is_refused_with_its_line(folder: Path, text: str, says: str) -> None:
    assert says in refusal(text)


def test_a_tab_has_its_mend(folder: Path) -> None:
    assert "indent with spaces, not tabs" in refusal("train:\n\tlr: 1")


def test_a_few_aliases_do_not_stand_for_billions_of_values(folder: Path) -> None:
    rows = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]" for n in range(1, 12)]
    assert "use fewer aliases" in refusal("\n".join(rows))


def test_what_is_merged_in_yields_to_what_stands_there(folder: Path) -> None:
    text = "sft: &base {lr: 0.5, max_grad_norm: 3}\nreward_model:\n  <<: *base\n  lr: 0.25\n"
    config = load(text)
    assert (config.sft.lr, config.reward_model.lr, config.reward_model.max_grad_norm) == (
        0.5,
        0.25,
        3,
    )
    # An error in what was merged in names the line where it stands.
    assert "r.yaml:2: reward_model.epochs" in refusal(
        "sft: &base\n  epochs: 0\nreward_model:\n  <<: *base\n"
    )


def test_the_lines_of_a_document() -> None:
    found = read_yaml("a:\n  b: 007\n  c: [x,\n    y]\n", str)
    assert found.values == {"a": {"b": 7, "c": ["x", "y"]}}
    assert found.lines == {
        ("a",): 1,
        ("a", "b"): 2,
        ("a", "c"): 3,
        ("a", "c", "0"): 3,
        ("a", "c", "1"): 4,
    }
    assert found.texts[("a", "b")] == "007"


# -------------------------------------------------------------------------- sections and values


@pytest.mark.parametrize(
    "text",
    [
        "train:\n  # lr: 1\n",
        "train:\ndata:\n  prompts:\n    # - a.jsonl\nrollout:\n  labels:\nmodel:\ntokenizer: ~\n",
        "reward_service:\n  components:\n    # mine: {kind: function}\n",
        "reward_service:\n  components:\n    reward_model:\n",
        "",
        "# nothing\n",
    ],
)
def test_what_holds_only_comments_is_its_defaults(folder: Path, text: str) -> None:
    assert load(text) == RunConfig()


def test_null_stays_a_value_where_it_is_one(folder: Path) -> None:
    config = load("train: {ppg: null, stop_kl: null}\n")
    assert config.train.ppg is None
    assert config.train.stop_kl is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "train:\n  ppg:\n    # n_pi: 2\n",
            "r.yaml:2: train.ppg is empty: write null for none, or {}",
        ),
        (
            "sft:\n  lora:",
            "r.yaml:2: sft.lora is empty: write null for none, or {} for its defaults",
        ),
        ("preset: [tiny]", "r.yaml:1: preset: should be a text, not ['tiny']"),
        ("name: x\npreset: {a: 1}", "r.yaml:2: preset: should be a text"),
        ("preset: 3", "r.yaml:1: preset: preset '3' is unknown; there are tiny, small"),
        ("preset: tiny\nmodel: [1]", "r.yaml:2: model: should be a section, not [1]"),
        ("preset: tiny\nmodel: big", "r.yaml:2: model: should be a section, not 'big'"),
        (
            "train: {lora: {targets: [q, q_proj]}}",
            "train.lora.targets: 'q_proj' is no projection of a palm; there are q, k, v, attn_out,",
        ),
        (
            "preset: tiny\nmodel: {start: folder}",
            "preset 'tiny' is a shape of kind palm, and model is of kind pretrained: leave one",
        ),
        ("preset: tiny\nmodel: {dim: x}", "r.yaml:2: model.dim: should be a whole number"),
        ("name: x\ntrain: 3", "r.yaml:2: train: should be a section, not 3"),
        ("train: [lr]", "r.yaml:1: train: should be a section, not ['lr']"),
        ("data: {prompts: {a: b}}", "data.prompts: should be a list"),
        ("train:\n  lr:", "r.yaml:2: train.lr: should be a number, and not empty"),
        ("train: {lr: yes}", "train.lr: should be a number, not True"),
        ("train: {iterations: true}", "train.iterations: should be a number, not True"),
        ("learner: {zero_stage: true}", "learner.zero_stage: should be a number, not True"),
        ("train: {ppg: false}", "train.ppg: should be a section or null, not False"),
        ("rollout: {labels: [a]}", "rollout.labels: should be a mapping, as {a: b}, not ['a']"),
        ("train: {lora: {targets: []}}", "train.lora.targets: has too few items, not []"),
        ("train: {lr: 2024-11-28}", "train.lr: should be a number"),
        ("train: {lr: 1" + "0" * 400 + "}", "train.lr: should be a number"),
        ("train: {iterations: 1.5}", "train.iterations: should be a whole number"),
        ("rollout: {actors: many}", "rollout.actors: should be a whole number"),
        ("rollout: {actors: {min: 3, max: 2}}", "min=3 exceeds max=2"),
        ("rollout: {actors: {min: 3}}", "rollout.actors.max: is missing"),
        (
            "sft:\n  clip: 1",
            "r.yaml:2: unknown key 'sft.clip'; it is called 'sft.max_grad_norm' now",
        ),
        ("kl_coef: 1", "r.yaml:1: unknown key 'kl_coef'; did you mean 'train.kl_coef'?"),
        (
            "train:\n  kl_coeff: 1",
            "r.yaml:2: unknown key 'train.kl_coeff'; did you mean 'train.kl_",
        ),
        (
            "reward_service: {components: {a: {wait: 1}}}",
            "unknown key 'reward_service.components.a",
        ),
        ("reward_service: {components: {'': {}}}", "reward_service.components"),
        ("reward_service: {components: {a/b: {}}}", "reward_service.components"),
        ("reward_service: {components: {a: {weight: 0}}}", "weight"),
    ],
)
def test_values_of_a_wrong_kind(folder: Path, text: str, says: str) -> None:
    assert says in refusal(text)


def test_fields_beside_a_preset_go_before_it(folder: Path) -> None:
    model = load("preset: tiny\nmodel: {dim: 96}\n").model
    assert (model.dim, model.layers) == (96, 2)


def floats(section: type[Section], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every field of the configuration that may hold a float."""
    for name, info in section.every_field().items():
        here, annotation = (*path, name), info.annotation
        inner, named = section_of(annotation), named_section_of(annotation)
        if named is not None:
            yield from floats(named, (*here, "mine"))
        elif inner is not None:
            yield from floats(inner, here)
        if "float" in str(annotation):
            yield here


FLOATS = list(floats(RunConfig))
COMPONENTS = {
    "function": {"target": "m:f"},
    "http": {"target": "http://x/"},
    "judge": {"target": "http://x/", "model": "m", "rubric": "r"},
}
"""What each kind of component needs."""


def test_every_float_field_was_found() -> None:
    names = {".".join(path) for path in FLOATS}
    assert len(names) > 40
    assert names >= {
        "train.missing_eos_penalty",
        "train.lora.alpha",
        "reward_service.components.mine.weight",
        "quickstart.label_noise",
        "sft.warmup",
        "model.logits_mb",
        "cluster.stop_timeout_s",
    }


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("path", FLOATS, ids=".".join)
def test_no_float_is_infinite_or_no_number(path: tuple[str, ...], value: float) -> None:
    values: Any = value
    for outer, name in reversed([("", path[0]), *itertools.pairwise(path)]):
        values = {name: values}
        if outer == "mine":
            kinds = [
                kind for kind in COMPONENTS if name in RewardComponent.kinds[kind].model_fields
            ]
            values |= {"kind": kinds[0], **COMPONENTS[kinds[0]]}
    with pytest.raises(ValueError, match=r"finite number|greater than|less than"):
        RunConfig.model_validate(values)


# -------------------------------------------------------------------------- overrides


def test_of_two_overrides_the_last_counts(folder: Path) -> None:
    assert load("train: {lr: 3}", "train.lr=1", "train.lr=2").train.lr == 2


def test_a_section_given_to_an_override_keeps_what_it_does_not_name(folder: Path) -> None:
    train = load("train:\n  iterations: 7\n  ppg: {n_pi: 4}\n", "train={ppg: {e_aux: 3}}").train
    assert (train.iterations, train.ppg and (train.ppg.n_pi, train.ppg.e_aux)) == (7, (4, 3))
    # The user's own names are the value of one field: given again, they are others.
    text = "reward_service: {components: {a: {}}}"
    config = load(text, "reward_service.components={b: {weight: 2}}")
    assert [*config.reward_service.components] == ["b"]


@pytest.mark.parametrize(
    ("text", "overrides", "says"),
    [
        (
            "",
            ["train=3", "train.lr=1"],
            "override 'train.lr=1': train is 3 (override 'train=3'), a",
        ),
        (
            "name: x\ntrain: 3",
            ["train.lr=1"],
            "override 'train.lr=1': train is 3 (r.yaml:2), and no",
        ),
        ("data: {prompts: [a]}", ["data.prompts.0=b"], "data.prompts is ['a'] (r.yaml:1), and not"),
        ("", ["train.=1"], "write it as section.field=value"),
        ("", ["a..b=1"], "write it as section.field=value"),
        ("", [".lr=1"], "write it as section.field=value"),
        ("", ["=1"], "write it as section.field=value"),
        ("", ["train.lr"], "write it as section.field=value"),
        (
            "",
            ["train.ppg={lr: 1, lr: 2}"],
            "override 'train.ppg={lr: 1, lr: 2}': 'lr' is given twi",
        ),
        ("", ["train.lr=["], "override 'train.lr=[': while parsing"),
        ("", ["train.lr=-1"], "override 'train.lr=-1': train.lr: should be greater than 0, not -1"),
        ("train: {lr: -1}", ["train.e_pi=2"], "r.yaml:1: train.lr: should be greater than 0"),
        ("", ["leaner.ranks=1"], "unknown key 'leaner'; did you mean 'learner'?"),
    ],
)
def test_overrides_that_cannot_be(folder: Path, text: str, overrides: list[str], says: str) -> None:
    assert says in refusal(text, *overrides)


def test_every_field_is_named_once() -> None:
    names = [name for name, _, _ in fields()]
    assert len(set(names)) == len(names)
    assert "rollout.actors" in names
    assert "train.ppg.n_pi" in names
    assert {"train.lora", "train.lora.rank"} <= {*names}
    assert not any(name.startswith("reward_service.components.") for name in names)


def test_all_mistakes_of_a_recipe_are_told_at_once_and_none_is_made_up(folder: Path) -> None:
    """Fields that are nothing, fields that clash, idle ones: each by its own line."""
    text = """
        train:
          lr: fast
          learning_rat: 1
          minibatches: 7
          prompts_per_iteration: 100
        rollout:
          lease_size: many
          stop: [""]
          lora: unmerged
          kernels: native
        sft: {lr: -1, lora: {rank: 2}}
        reward_model: {optimizer: adafactor, adam_eps: 1}
        learner: {ranks: 50}
        """
    said = refusal(textwrap.dedent(text)).split("; r.yaml")
    expected = [
        "train.lr: should be a number, not 'fast'",
        "unknown key 'train.learning_rat'",
        "train: batch of 100 rollouts is not divisible by minibatches=7",
        "rollout.lease_size: should be a whole number, not 'many'",
        "rollout: kernels=native computes no adapter",
        "stop: an empty text would end every response",
        "sft.lr: should be greater than 0, not -1",
        "reward_model.adam_eps has no effect here",
        "sft.lora adapts weights that are there",
    ]
    for words in expected:
        assert sum(words in line for line in said) == 1, (words, said)
    # What was left out is blamed for nothing: nobody knows what 50 ranks would share.
    assert not any("lease_size=" in line or "ranks=" in line for line in said)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.learning_rate", "'train.lr'"),
        ("sft.learning_rate", "'sft.lr'"),
        ("train.cliprange", "'train.clip_range'"),
        ("train.num_generations", "'train.samples_per_prompt'"),
        ("rollout.max_new_tokens", "'rollout.max_response_tokens'"),
        ("train.max_new_tokens", "'rollout.max_response_tokens'"),
        ("model.num_hidden_layers", "'model.layers'"),
        ("learning_rate", "'sft.lr', 'reward_model.lr' or 'train.lr'"),
        ("data.train_files", "'data.prompts'"),
        ("train.lora.lora_alpha", "'train.lora.alpha'"),
        ("train.kl_koef", "'train.kl_coef'"),
        ("train.lease_size", "'rollout.lease_size'"),
    ],
)
def test_what_other_systems_call_a_field_is_known(folder: Path, key: str, meant: str) -> None:
    assert f"unknown key '{key}'; did you mean {meant}?" in refusal("", f"{key}=1")


def test_every_known_name_of_other_systems_leads_to_a_field() -> None:
    ours = {name.rpartition(".")[2] for name, _, _ in fields()} | set(LoraConfig.model_fields)
    ours |= set(PretrainedConfig.model_fields) | set(HttpComponent.model_fields)
    assert _OF_OTHER_SYSTEMS.keys() <= ours


@pytest.mark.parametrize("algorithm", ["rloo", "grpo", "reinforce_pp"])
def test_algorithms_without_values_have_no_auxiliary_phase(folder: Path, algorithm: str) -> None:
    chosen = f"train:\n  algorithm: {algorithm}\n  samples_per_prompt: 2\n"
    assert load(chosen).train.ppg is None
    assert load(chosen + "  ppg: null\n").train.ppg is None
    assert load("", f"train.algorithm={algorithm}", "train.samples_per_prompt=2").train.ppg is None
    assert load(chosen, "train.algorithm=ppo").train.ppg is not None
    says = f"{algorithm} has no value function for an auxiliary phase: leave ppg out"
    assert says in refusal(chosen + "  ppg: {n_pi: 4}\n")
