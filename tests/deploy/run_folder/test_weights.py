"""Where a pretrained run's weights lie, and what each stage reads of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.config.run import RunConfig
from common.errors import CheckpointError, ConfigError, DataError
from deploy.run_folder.inputs import RunInputs, settings_of
from deploy.run_folder.reads import is_given, reads_of
from deploy.run_folder.weights import (
    final_policy,
    policy_start,
    require_checkpoints,
    require_embedded,
    reward_start,
    reward_weights,
)
from tests.common.models.pretrained.checkpoints import random_checkpoint


@pytest.fixture
def start(tmp_path: Path) -> Path:
    return random_checkpoint(tmp_path / "model", max_shard_size="40KB")


def run_of(folder: Path, start: Path, **sections: Any) -> RunConfig:
    model = {"start": str(start), "context": 64}
    values = {"name": "run", "output": str(folder), "model": model, **sections}
    return RunConfig.model_validate(values)


def test_a_run_begins_as_its_checkpoint_until_it_has_a_supervised_policy(
    tmp_path: Path, start: Path
) -> None:
    config = run_of(tmp_path, start)
    assert policy_start(config) == start
    assert reward_start(config) == start
    assert final_policy(config) == config.folder.policy.path
    random_checkpoint(config.folder.sft.path)
    assert policy_start(config) == reward_start(config) == config.folder.sft.path


def test_a_reward_model_may_be_a_checkpoint_of_its_own(tmp_path: Path, start: Path) -> None:
    own = random_checkpoint(tmp_path / "judge", labels=1)
    config = run_of(
        tmp_path, start, reward_model={"model": {"kind": "pretrained", "start": str(own)}}
    )
    assert reward_weights(config) == reward_start(config) == own
    assert set(reads_of("train", config)) >= {"model.start", "reward_model.model.start"}
    random_checkpoint(config.folder.reward_model.path, labels=1)
    assert reward_weights(config) == config.folder.reward_model.path


def test_stages_read_every_file_that_a_model_depends_on(tmp_path: Path, start: Path) -> None:
    config = run_of(tmp_path, start)
    read = {Path(path).name for path in reads_of("sft", config)["model.start"]}
    assert read >= {"config.json", "tokenizer.json", "chat_template.jinja"}
    assert len([name for name in read if name.startswith("model-")]) > 1
    assert is_given("model.start")
    assert not is_given("sft/model.safetensors")
    random_checkpoint(config.folder.sft.path)
    names = set(reads_of("reward", config))
    assert "sft/model.safetensors" in names
    assert "model.start" not in names


def test_another_checkpoint_under_the_same_path_is_noticed(tmp_path: Path, start: Path) -> None:
    config = run_of(tmp_path, start, reward_service=FUNCTION)
    inputs = RunInputs(config.run_dir)
    reads = {"model.start": reads_of("sft", config)["model.start"]}
    inputs.begin("sft", config, inputs.look_all(reads))
    random_checkpoint(config.folder.sft.path)
    assert RunInputs(config.run_dir).standing() == ["sft"]
    RunInputs(config.run_dir).check("sft", reads)
    random_checkpoint(start, seed=5, max_shard_size="40KB")
    with pytest.raises(DataError, match=r"model.start: .*model-00001-of-.* changed"):
        RunInputs(config.run_dir).check("sft", reads)


def test_the_path_itself_is_no_setting(tmp_path: Path, start: Path) -> None:
    """The same bytes under another path are no change."""
    moved = start.rename(tmp_path / "elsewhere")
    there, here = (
        settings_of("sft", run_of(tmp_path, path)) for path in (tmp_path / "model", moved)
    )
    assert there == here


@pytest.mark.parametrize("field", ["model", "reward_model", "critic", "reference"])
def test_every_checkpoint_is_looked_at_before_any_work(
    tmp_path: Path, start: Path, field: str
) -> None:
    bad = {"kind": "pretrained", "start": str(tmp_path / "owner" / "name"), "context": 64}
    sections: dict[str, Any] = {
        "model": {"model": bad},
        "reward_model": {"reward_model": {"model": bad}},
        "critic": {"train": {"critic": bad}},
        "reference": {"reward_service": {"reference": bad}},
    }[field]
    values = run_of(tmp_path, start).model_dump(mode="json") | sections
    require_checkpoints(run_of(tmp_path, start))
    with pytest.raises(CheckpointError, match="hf download owner/name --local-dir FOLDER"):
        require_checkpoints(RunConfig.model_validate(values))


def test_a_context_and_a_tokenizer_must_fit_the_model(tmp_path: Path, start: Path) -> None:
    longer = run_of(tmp_path, start).model_dump(mode="json")
    longer["model"]["context"] = 65
    with pytest.raises(ConfigError, match=r"model.context=65 is longer .* at most 64"):
        require_checkpoints(RunConfig.model_validate(longer))
    require_embedded(run_of(tmp_path, start), 272)
    with pytest.raises(ConfigError, match="embeds 272 tokens, and the tokenizer has 273"):
        require_embedded(run_of(tmp_path, start), 273)


@pytest.mark.parametrize("field", ["train.critic", "reward_service.reference"])
def test_what_reads_the_policys_tokens_must_fit_them(
    tmp_path: Path, start: Path, field: str
) -> None:
    """Another policy has more tokens and a longer context than this critic or reference."""
    section, name = field.split(".")
    own = {"kind": "pretrained", "start": str(start), "context": 16}
    values = run_of(tmp_path, start).model_dump(mode="json")
    values[section] |= {name: own}
    values["model"] = {"kind": "palm", "context": 65}
    config = RunConfig.model_validate(values)
    with pytest.raises(ConfigError, match=r"model.context=65 is longer .* at most 64"):
        require_checkpoints(config)
    with pytest.raises(ConfigError, match=rf"{field}.start .*: embeds 272 tokens, .* has 273"):
        require_embedded(config, 273)


FUNCTION = {"components": {"length": {"kind": "function", "target": "a:b"}}}
