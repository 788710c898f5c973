"""Recipes and overrides: text fields hold what was written; paths may start at home."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from common.config.recipe import dump_config, load_config, save_config
from common.config.run import RunConfig
from common.errors import ConfigError


def at(config: Any, field: str) -> Any:
    """A dotted field of a configuration."""
    for name in field.split("."):
        config = config[name] if isinstance(config, Mapping) else getattr(config, name)
    return config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("name=007", "007"),
        ("name=2024-11-28", "2024-11-28"),
        ("name=1e3", "1e3"),
        ("name=true", "true"),
        ("name=a=b", "a=b"),
        ('name="007"', "007"),
        ("name=it's", "it's"),
        ('name="a" or "b"', '"a" or "b"'),
        ("output=exp #2", "exp #2"),
        ("output=a: b", "a: b"),
        ("output=[x]", "[x]"),
        ("output=2024", "2024"),
        ("tokenizer.path=007", "007"),
        ("tokenizer.path=null", None),
        ("tokenizer.path=", None),
        ("cluster.address=~", None),
        ("evaluate.judge=", ""),
        ("data.prompts=[1.jsonl, 2024-11-28, 007, no]", ("1.jsonl", "2024-11-28", "007", "no")),
        ("rollout.stop=[no, 1_0, 12:30]", ("no", "1_0", "12:30")),
        ("rollout.labels={zone: 1, spot: true}", {"zone": "1", "spot": "true"}),
        ("seed=007", 7),
        ("train.ppg=null", None),
    ],
)
def test_a_text_given_on_the_command_line_is_the_text(override: str, expected: Any) -> None:
    assert at(load_config(None, [override]), override.partition("=")[0]) == expected


def test_a_name_of_a_component_is_a_text_too() -> None:
    given = "reward_service.components={2024: {kind: function, target: 1e3}}"
    components = load_config(None, [given]).reward_service.components
    assert list(components) == ["2024"]
    assert components["2024"].target == "1e3"
    style = "reward_service.components.style"
    dotted = load_config(None, [f"{style}.kind=function", f"{style}.target=007"])
    assert dotted.reward_service.components["style"].target == "007"


def test_a_text_in_a_recipe_is_the_text_that_was_written(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: 2024-11-28\noutput: 007  # not seven\nseed: 7\n"
        "data: {prompts: [12:30, 0x1f, plain.jsonl]}\n"
        "rollout: &rollout\n  labels: {1: yes}\n",
        encoding="utf8",
    )
    config = load_config(recipe)
    assert (config.name, config.output, config.seed) == ("2024-11-28", "007", 7)
    assert config.data.prompts == ("12:30", "0x1f", "plain.jsonl")
    assert config.rollout.labels == {"1": "yes"}
    assert load_config(None, ["seed=3"]).seed == 3


def test_one_text_is_a_list_of_one(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data:\n  prompts: data/*.jsonl\n  comparisons: 007\n  evaluation: ~/held-out\n"
        "rollout: {stop: END}\n",
        encoding="utf8",
    )
    config = load_config(recipe, ["data.demonstrations=*.jsonl"])
    assert config.data.prompts == ("data/*.jsonl",)
    assert config.data.comparisons == ("007",)
    assert config.data.demonstrations == ("*.jsonl",)
    assert config.data.evaluation == (os.path.expanduser("~/held-out"),)
    assert config.rollout.stop == ("END",)
    assert load_config(recipe, ["data.prompts=[a, b]"]).data.prompts == ("a", "b")
    assert load_config(recipe, ["data.prompts='a b'"]).data.prompts == ("a b",)
    assert load_config(recipe, ["data.prompts=null"]).data.prompts == ()


def test_a_pattern_without_quotes_is_told_from_an_alias(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data:\n  prompts: *.jsonl\n", encoding="utf8")
    with pytest.raises(
        ConfigError, match=r"yaml:2: .*; a text that begins with \* stands in quotes"
    ):
        load_config(recipe)


def test_null_is_never_a_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name: should be a text"):
        load_config(None, ["name=null"])
    assert load_config(None, ['name="null"']).name == "null"


@given(name=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0")))
def test_any_folder_name_is_a_runs_name_and_comes_back(name: str) -> None:
    if name in ("", ".", ".."):
        with pytest.raises(ConfigError):
            load_config(None, given={"name": name})
        return
    config = load_config(None, given={"name": name, "output": f"/{name}"})
    assert config.run_dir == Path(f"/{name}") / name
    assert RunConfig.model_validate(yaml.safe_load(dump_config(config))) == config


def test_what_is_given_wins_over_recipe_and_overrides(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: a\ncluster: {address: 'b:1', autoscales: true}\n", encoding="utf8")
    config = load_config(recipe, ["name=c"], {"name": "007", "cluster.address": "d: 1"})
    assert (config.name, config.cluster.address, config.cluster.autoscales) == ("007", "d: 1", True)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a"])
def test_a_name_is_one_folder(name: str) -> None:
    with pytest.raises(ConfigError, match="one folder"):
        load_config(None, [f"name={name}"])


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    overrides = ["output=~/runs", "data.prompts=[~/a.jsonl, b/~c]", "sft.start=~/w.safetensors"]
    config = load_config(None, [*overrides, "tokenizer.path=~/t.json"])
    assert config.run_dir == Path("/home/me/runs/run")
    assert config.data.prompts == ("/home/me/a.jsonl", "b/~c")
    assert config.sft.start == "/home/me/w.safetensors"
    assert config.tokenizer.path == "/home/me/t.json"


def test_a_recipe_with_a_mark_at_its_start(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(b"\xef\xbb\xbfname: first\n")
    assert load_config(recipe).name == "first"


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(None, ["name=a\udcff"])


def test_a_recipe_is_saved_whole_or_not_at_all(tmp_path: Path) -> None:
    path, before = tmp_path / "config.yaml", tmp_path / "before"
    save_config(RunConfig(seed=1), path)
    before.hardlink_to(path)
    save_config(RunConfig(seed=2), path)  # renamed into place, never written over
    assert load_config(path) == RunConfig(seed=2)
    assert load_config(before) == RunConfig(seed=1)
    assert {p.name for p in tmp_path.iterdir()} == {"config.yaml", "before"}
