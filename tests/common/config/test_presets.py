"""Named settings of `train`: what a paper sets, beneath what the recipe says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from common.config.presets import PRESETS, PresetName
from common.config.recipe import dump_config, load_config
from common.config.run import RunConfig
from common.errors import ConfigError

GROUPS = {"samples_per_prompt": 8, "prompts_per_iteration": 32, "kl_coef": 0.0, "ppg": None}
PAPERS: dict[str, dict[str, Any]] = {
    "ppo": {"algorithm": "ppo", "ppg": None, "clip_range": 0.2},
    "ppg": {"algorithm": "ppo", "ppg.n_pi": 8, "ppg.beta_clone": 1.0, "clip_range": 0.2},
    "grpo": {
        **GROUPS,
        "algorithm": "grpo",
        "clip_range": 0.2,
        "objective.aggregation": "sequences",
        "objective.kl_loss.coef": 0.04,
        "objective.kl_loss.estimator": "k3",
    },
    "dr_grpo": {**GROUPS, "algorithm": "dr_grpo", "objective.aggregation": "constant"},
    "dapo": {
        **GROUPS,
        "algorithm": "grpo",
        "clip_range": 0.2,
        "objective.clip_high": 0.28,
        "objective.aggregation": "tokens",
        "objective.kl_loss": None,
    },
    "gspo": {
        **GROUPS,
        "algorithm": "grpo",
        "clip_range": 3e-4,
        "objective.clip_high": 4e-4,
        "objective.ratio": "sequence",
        "objective.aggregation": "sequences",
    },
}


def at(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = getattr(value, name)
    return value


def test_every_name_has_settings() -> None:
    assert set(PRESETS) == set(get_args(PresetName)) == set(PAPERS)


@pytest.mark.parametrize("name", PAPERS)
def test_a_preset_sets_what_its_paper_says(name: str) -> None:
    train = load_config(None, [f"train.preset={name}"]).train
    assert {path: at(train, path) for path in PAPERS[name]} == PAPERS[name]
    assert train.batch_size == RunConfig().train.batch_size


@pytest.mark.parametrize("name", PAPERS)
def test_what_it_sets_is_shown_and_read_back(name: str, tmp_path: Path) -> None:
    config = load_config(None, [f"train.preset={name}"])
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_config(config), encoding="utf8")
    assert f"algorithm: {PAPERS[name]['algorithm']}" in dump_config(config)
    assert load_config(saved, saved=True) == config


def test_what_is_given_goes_before_it(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "train: {preset: dapo, kl_coef: 0.1, objective: {aggregation: sequences}}", encoding="utf8"
    )
    train = load_config(recipe, ["train.samples_per_prompt=4"]).train
    assert (train.kl_coef, train.samples_per_prompt) == (0.1, 4)
    assert (train.objective.aggregation, train.objective.clip_high) == ("sequences", 0.28)


def test_another_preset_on_the_command_line(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("train: {preset: dapo}", encoding="utf8")
    assert load_config(recipe, ["train.preset=gspo"]).train.objective.clip_high == 4e-4


def test_an_unknown_name_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"train\.preset") as caught:
        load_config(None, ["train.preset=dappo"])
    assert "dapo" in str(caught.value)
    assert "\n" not in str(caught.value)
