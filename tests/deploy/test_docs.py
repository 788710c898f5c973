"""What the docs name must exist: fields, commands, recipes, data, tests, links, dependencies."""

from __future__ import annotations

import ast
import pydoc
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from pydantic import ValidationError

from common import errors
from common.config.draft import Draft
from common.config.model import PretrainedConfig
from common.config.names import fields
from common.config.recipe import load_config
from common.config.run import RunConfig
from common.config.yaml_text import read_yaml
from common.data.records import read_comparisons, read_demonstrations, read_prompts
from common.errors import TalipotError
from deploy.workers.preflight import explain
from tests.deploy.commands import parse

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
FIELDS = {name for name, _, _ in fields()}
SECTIONS = {name.split(".")[0] for name in FIELDS if "." in name}
READERS: dict[str, Callable[[Sequence[str]], Iterator[Any]]] = {
    "demonstrations": read_demonstrations,
    "comparisons": read_comparisons,
    "prompts": read_prompts,
}

page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks whose info string is `language`."""
    text = path.read_text(encoding="utf8")
    return re.findall(rf"^```{re.escape(language)}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(path: Path) -> list[str]:
    """Every `talipot ...` in shell blocks and in the text."""
    lines = [line for block in blocks(path, "sh") for line in block.splitlines()]
    text = path.read_text(encoding="utf8")
    found = [
        line[line.index("talipot ") :] for line in lines if re.search(r"(^|-- )talipot ", line)
    ]
    return found + re.findall(r"`(talipot [a-z][^`]*)`", text)


def is_field(name: str) -> bool:
    """A field or a group of fields; names of components and sources are the user's."""
    return (
        name in FIELDS
        or any(field.startswith(f"{name}.") for field in FIELDS)
        or name.startswith(("reward_service.components.NAME.", "data.mixture.NAME."))
    )


@page
def test_fields_exist(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf8"), flags=re.M | re.S)
    named = re.findall(r"`([a-z_]+\.[A-Za-z_.]+?)(?:[:=] ?[^`]*)?`", text)
    for name in named:
        if name.split(".")[0] in SECTIONS and not name.endswith(".json"):  # a file, tokenizer.json
            assert is_field(name), name


def test_commands_exist() -> None:
    every = [command for path in PAGES for command in commands(path)]
    assert {command.split()[1] for command in every} >= {"quickstart", "sft", "train", "sample"}
    for command in every:
        _, parameters = parse(command)
        load_config(None, parameters.get("overrides") or [])


@page
def test_recipes_load(path: Path, tmp_path: Path) -> None:
    for index, block in enumerate(blocks(path, "yaml recipe")):
        recipe = tmp_path / f"{index}.yaml"
        recipe.write_text(block, encoding="utf8")
        config = load_config(recipe)
        assert config != RunConfig()
        on_nodes = config.cluster.address or config.rollout.labels or config.learner.labels
        if not on_nodes and not isinstance(config.model, PretrainedConfig):
            explain(config, {"CPU": 2.0})  # room on a small machine, or ClusterError


@pytest.mark.parametrize("recipe", ["quickstart", "quickstart-lora"])
def test_built_in_recipes_have_room_on_two_cores(recipe: str) -> None:
    explain(load_config(ROOT / "deploy" / "recipes" / f"{recipe}.yaml"), {"CPU": 2.0})


@page
def test_data_examples_are_read(path: Path, tmp_path: Path) -> None:
    for kind, read in READERS.items():
        for block in blocks(path, f"jsonl {kind}"):
            file = tmp_path / f"{kind}.jsonl"
            file.write_text(block, encoding="utf8")
            assert len(list(read([str(file)]))) == len(block.splitlines())


def test_every_kind_of_data_has_an_example() -> None:
    guide = ROOT / "docs" / "own-data-and-reward.md"
    assert all(blocks(guide, f"jsonl {kind}") for kind in READERS)


@page
def test_tests_and_files_that_are_named_exist(path: Path) -> None:
    text = path.read_text(encoding="utf8")
    for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        tree = ast.parse((ROOT / file).read_text(encoding="utf8"))
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert not name or name in names, f"{file}::{name}"
    for source in re.findall(r"`((?:common|actors|learner|reward_service|deploy)/[\w/.]*)`", text):
        assert (ROOT / source).exists(), source
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (path.parent / link).exists(), link


@page
def test_python_names_that_are_named_exist(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf8"), flags=re.M | re.S)
    for name in re.findall(r"`((?:common|actors|learner|reward_service|deploy)(?:\.\w+)+)`", text):
        # `learner.ranks` is a field of the recipe, `common.models.palm.PaLM` a name of ours.
        if not is_field(name):
            assert pydoc.locate(name) is not None, name


def test_every_dependency_has_its_reason_and_no_other() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
    extras = [one for extra in project["optional-dependencies"].values() for one in extra]
    wanted = {Requirement(text).name for text in (*project["dependencies"], *extras)}
    text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf8")
    listed = re.findall(r"^\| `([\w-]+)(?:\[\w+\])?` \| \S", text, re.MULTILINE)
    assert sorted(listed) == sorted(wanted)


def test_every_error_has_its_exit_code() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf8")
    listed = {name: int(code) for code, name in re.findall(r"^\| (\d+) \| `(\w+)`", text, re.M)}
    defined = {
        kind.__name__: kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, TalipotError) and kind is not TalipotError
    }
    assert listed == defined


HAND_WRITTEN = [path for path in PAGES if "do not edit" not in path.read_text(encoding="utf8")]
_VALUE = r"(-?\d[\d_.]*(?:e-?\d+)?|null|true|false)"


def claims(text: str) -> set[tuple[str, str]]:
    """What a text says to be the value of a field: ``field`` with a value in brackets after it, or
    a value that is called the default."""
    found = re.findall(rf"`([a-z_]+(?:\.[a-z_]+)+)`[^`.|]{{0,60}}?\({_VALUE}\b(?![-%])", text)
    found += re.findall(
        rf"`([a-z_]+(?:\.[a-z_]+)+)`[^`.|]{{0,60}}?\b{_VALUE}[, ]+(?:the|by) default", text
    )
    return {(name, value) for name, value in found if name in FIELDS}


@pytest.mark.parametrize("path", HAND_WRITTEN, ids=lambda path: path.name)
def test_defaults_that_are_named_are_those_of_the_code(path: Path) -> None:
    text = " ".join(path.read_text(encoding="utf8").split())
    defaults = {name: default for name, default, _ in fields()}
    for name, value in claims(text):
        assert yaml.safe_load(value) == defaults[name], f"{name}: {value}"


@pytest.mark.parametrize("path", HAND_WRITTEN, ids=lambda path: path.name)
def test_the_configuration_page_is_the_only_home_of_defaults(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf8"), flags=re.M | re.S)
    for sentence in re.split(r"(?<=[.:;|])\s+", text):
        if re.search(r"\bdefaults?\b", sentence):
            assert not re.search(r"\d", sentence), sentence


@page
def test_values_that_are_named_can_be_set(path: Path) -> None:
    """``field: value`` and ``field=value`` in the text, where the value is one and no stand-in."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf8"), flags=re.M | re.S)
    for name, value in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:: |=)([^` ]+|[\[{][^`]+)`", text):
        if name in FIELDS and not re.fullmatch(r"[kKN]|[A-Z_]+", value):
            draft = Draft(RunConfig, path.name)
            draft.override(tuple(name.split(".")), read_yaml(value, str), name)
            try:
                RunConfig.model_validate(draft.values)
            except ValidationError as error:
                # Settings that must go together are not all in one name.
                assert all(item["loc"] in ((), ("train",)) for item in error.errors()), name


def test_a_wrong_default_is_found() -> None:
    assert claims("every `train.checkpoint_every` iterations (0, the default, writes") == {
        ("train.checkpoint_every", "0")
    }
    assert claims("`train.ppg.n_pi` is 9 by default") == {("train.ppg.n_pi", "9")}
    assert claims("`train.lr` and `train.e_pi` (Schulman 2017)") == set()


def test_a_field_that_does_not_exist_is_found() -> None:
    assert is_field("train.kl_coef")
    assert is_field("train.ppg")
    assert not is_field("train.kl_coeff")
