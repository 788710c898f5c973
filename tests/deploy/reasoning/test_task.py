"""What the recipe `reasoning` asks: sides that share nothing, settings that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config.recipe import load_config
from common.config.run import RunConfig
from common.data.records import read_prompts
from common.errors import ConfigError, DataError
from common.reasoning_tasks import family_of
from deploy.reasoning.task import held_out, require_tasks, taught, with_data

RECIPE = Path("deploy/recipes/reasoning.yaml")


def recipe(*overrides: str) -> RunConfig:
    return load_config(RECIPE, list(overrides))


def test_the_recipe_names_data_of_each_family_on_each_side() -> None:
    config = with_data(recipe("quickstart={prompts: 30, demonstrations: 20, held_out_prompts: 10}"))
    sides = (config.data.prompts, config.data.demonstrations, config.data.evaluation)
    families = list(config.quickstart.families)  # type: ignore[attr-defined]
    # Words have demonstrations of their own number.
    for names, sizes in zip(sides, ((30, 30), (20, 60), (10, 10)), strict=True):
        assert [family_of(name) for name in names] == families
        assert [len(list(read_prompts([name]))) for name in names] == [*sizes]
    assert len({name for names in sides for name in names}) == 3 * len(families)
    assert {name: of.weight for name, of in (config.data.mixture or {}).items()} == {
        "spiral_matrix": 2.0,
        "word_sequence_reversal": 3.0,
    }
    assert not any(own in name for own in ("weight", "demons") for n in sides for name in n)
    other = with_data(recipe("seed=1")).data
    assert not {*other.prompts} & {*with_data(recipe()).data.prompts}
    assert with_data(config) == config


def test_no_held_out_question_is_in_training() -> None:
    few = "families: {chain_sum: {max_terms: 2, max_digits: 1, chat: false}}"
    config = with_data(
        recipe(f"quickstart={{prompts: 50, demonstrations: 20, held_out_prompts: 100, {few}}}")
    )
    [part] = held_out(config)
    data = config.data
    seen = {prompt.prompt for prompt in read_prompts([*data.prompts, *data.demonstrations])}
    asked = [prompt.prompt for prompt in part.prompts]
    every = {prompt.prompt for prompt in read_prompts(data.evaluation)}
    assert not seen & {*asked}
    assert len(asked) == len({*asked})
    assert part.overlapping == len(every & seen) > 5
    assert len(asked) + part.overlapping == len(every)
    config = with_data(recipe(f"quickstart={{prompts: 3000, held_out_prompts: 5, {few}}}"))
    with pytest.raises(ConfigError, match=r"families\.chain_sum: training has every held-out que"):
        held_out(config)


@pytest.mark.parametrize(
    ("override", "wrong"),
    [
        ("quickstart.families={}", r"quickstart\.families: names no family; name one"),
        (
            "quickstart.families={gcd: {demonstrations: -1}}",
            r"gcd: demonstrations is -1; it is a number from 0 up",
        ),
        ("quickstart.families={gcd: {weight: 0}}", r"gcd: weight is 0; it is a number above 0"),
        ("quickstart.families={gcd: {weight: yes}}", r"gcd: weight is True; it is a number above"),
        (
            "quickstart.families={gcd: {seed: 3}}",
            r"quickstart\.families: gcd: 'seed' follows from the recipe's seed and sizes; take it ",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(override: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        recipe(override)


def test_other_data_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.prompts has no effect here: the recipe reaso"):
        with_data(recipe("data.prompts=[a.jsonl]"))
    chosen = with_data(recipe("data.curriculum={solved: 1}")).data
    assert chosen.curriculum is not None
    assert chosen.prompts == with_data(recipe()).data.prompts


@pytest.mark.parametrize(
    ("families", "kind", "wrong"),
    [
        ("{chain_sun: {}}", DataError, "has no family 'chain_sun'; did you mean 'chain_sum'"),
        ("{gcd: {max: 3}}", DataError, "gcd has no option 'max'; "),
        (
            "{propositional_logic: {}}",
            ConfigError,
            r"families\.propositional_logic: gives no answers of its own to imitate; give it",
        ),
    ],
)
def test_families_that_cannot_be_are_refused_before_anything_starts(
    families: str, kind: type[Exception], wrong: str
) -> None:
    with pytest.raises(kind, match=wrong):
        require_tasks(recipe(f"quickstart.families={families}"))


def test_a_family_without_demonstrations_is_not_imitated() -> None:
    families = "{gcd: {demonstrations: 0}, propositional_logic: {demonstrations: 0}, lcm: {}}"
    config = recipe(f"quickstart={{demonstrations: 5, families: {families}}}")
    require_tasks(config)
    assert taught(config) == {"lcm": 5}
    assert [family_of(name) for name in with_data(config).data.demonstrations] == ["lcm"]
    assert len(with_data(config).data.prompts) == 3
