"""`talipot train --from RUN`: results of another run by reference, compared by content."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from common.config.recipe import load_config, save_config
from common.config.run import RunConfig
from common.errors import ConfigError, DataError
from deploy.run_folder.folder import config_of
from deploy.run_folder.inputs import RunInputs
from deploy.run_folder.reads import reads_of
from deploy.run_folder.reuse import reused_from
from deploy.run_folder.tokenizer import run_tokenizer
from deploy.run_folder.weights import policy_start, reward_weights
from deploy.stages.preparation import require_own
from tests.deploy.commands import Run
from tests.workspaces import run_copy

GRPO = ["train.algorithm=grpo", "train.samples_per_prompt=4"]


@pytest.fixture
def source(workspace: RunConfig, tmp_path: Path) -> RunConfig:
    """A run with tokenizer, supervised policy and reward model."""
    config = run_copy(workspace, tmp_path)
    save_config(config, config.folder.config)
    return config


def fresh(source: RunConfig, *overrides: str) -> RunConfig:
    """A new run from it, as it is after the command that began it: with a recipe of its own."""
    config = reused_from(source.run_dir, None, ["name=grpo", *GRPO, *overrides], {})
    config.run_dir.mkdir(exist_ok=True)
    save_config(config, config.folder.config)
    return config_of(config.run_dir)


def begun(config: RunConfig) -> RunInputs:
    """Its manifest after training has begun, with a checkpoint."""
    inputs = RunInputs(config.run_dir)
    facts, _ = inputs.check("train", reads_of("train", config))
    inputs.begin("train", config, facts)
    (config.folder.checkpoint(1)).mkdir(parents=True)
    return RunInputs(config.run_dir)


def refusal(config: RunConfig) -> str:
    with pytest.raises(DataError) as refused:
        RunInputs(config.run_dir).check("train", reads_of("train", config))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_everything_but_the_policy_is_the_other_runs(source: RunConfig) -> None:
    config = fresh(source)
    assert (config.name, config.train.algorithm, config.model) == ("grpo", "grpo", source.model)
    assert config.run_dir.parent == source.run_dir.parent
    assert policy_start(config) == policy_start(source)
    assert reward_weights(config) == reward_weights(source)
    fingerprints = {
        run_tokenizer(c.run_dir, c, lambda: None).fingerprint() for c in (source, config)
    }
    assert len(fingerprints) == 1
    assert sorted(p.name for p in config.run_dir.iterdir()) == ["config.yaml"]
    reads = begun(config).stages["train"].reads
    assert {"reuse.tokenizer", "reuse.sft", "reuse.reward_model", "data.prompts"} <= reads.keys()


def test_a_run_of_a_run_takes_from_the_first(source: RunConfig) -> None:
    second = fresh(source)
    third = reused_from(second.run_dir, None, ["name=third"], {})
    assert policy_start(third) == policy_start(source)
    assert third.train.algorithm == "grpo"


def test_another_recipe_with_the_same_results(source: RunConfig, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: other\nseed: 7\nmodel: {dim: 32, layers: 2}\n")
    config = reused_from(source.run_dir, recipe, [f"output={tmp_path}"], {})
    assert (config.seed, config.reuse.sft) == (7, str(source.folder.sft.path))


def test_a_changed_source_is_one_line(source: RunConfig) -> None:
    config = fresh(source)
    begun(config)
    weights = policy_start(source)
    old = weights.read_bytes()
    weights.write_bytes(old[:-1] + b"x")
    assert "reuse.sft" in refusal(config)
    assert "since `train` read it" in refusal(config)
    weights.write_bytes(old)
    gone = config.model_copy(
        update={"reuse": config.reuse.model_copy(update={"reward_model": None})}
    )
    assert "reuse.reward_model is not taken any more" in refusal(gone)


def test_a_moved_source_is_one_line_until_it_is_named(source: RunConfig, tmp_path: Path) -> None:
    config = fresh(source)
    begun(config)
    moved = shutil.move(source.run_dir, tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"reuse\.sft: .*no such results.*reuse\.sft=PATH"):
        reads_of("train", config)
    with pytest.raises(DataError, match=r"reuse\.tokenizer: .*no such tokenizer"):
        run_tokenizer(config.run_dir, config, lambda: None)
    names = {"tokenizer": "tokenizer.json", "sft": "sft", "reward_model": "reward_model"}
    overrides = [f"reuse.{field}={moved}/{name}" for field, name in names.items()]
    found = config_of(config.run_dir, overrides)
    facts, _ = RunInputs(config.run_dir).check("train", reads_of("train", found))
    assert facts["reuse.sft"][0].path.startswith(str(moved))


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        ([], ConfigError, "give the new run a name of its own"),
        (["name=new", "sft.lr=1"], ConfigError, "sft.lr has no effect here"),
        (["name=new", "reward_model.epochs=2"], ConfigError, "reward_model.epochs has no effect"),
        (["name=new", "train.algoritm=grpo"], ConfigError, "train.algorithm"),
    ],
)
def test_what_cannot_begin_is_one_line(
    source: RunConfig, overrides: list[str], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        reused_from(source.run_dir, None, overrides, {})


def test_a_source_without_results_is_one_line(source: RunConfig) -> None:
    policy_start(source).unlink()
    with pytest.raises(DataError, match="no supervised policy yet; run `talipot sft` there first"):
        fresh(source)


def test_stages_do_not_write_into_the_other_run(source: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"reuse\.sft: this run takes it from .*/sft"):
        require_own("sft", fresh(source).reuse.sft)
    require_own("sft", source.reuse.sft)


def test_resume_and_from_do_not_go_together(source: RunConfig, run: Run) -> None:
    done = run("train", "--from", str(source.run_dir), "--resume", str(source.run_dir))
    assert (done.code, "leave --config and --from out" in done.error) == (2, True)


def test_a_run_of_an_earlier_version_reuses_nothing(source: RunConfig) -> None:
    text = source.folder.config.read_text()
    start = text.index("reuse:")
    source.folder.config.write_text(text[:start] + text[text.index("tokenizer:\n  path", start) :])
    assert load_config(source.folder.config, saved=True).reuse.sft is None
