"""What the log says of each token: as `talipot samples` shows it, and as the sums have it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from common.config.recipe import save_config
from common.config.run import RunConfig
from common.data.tokenizer import load_tokenizer
from common.run_folder import RunFolder
from common.wire.trajectory import LEARNT
from deploy.run_folder.folder import config_of
from deploy.samples import Sample, read_iteration
from learner.batch.trajectory_log import Learnt
from learner.learner import Learner
from tests import literal
from tests.scored import trajectories
from tests.workspaces import run_copy

pytestmark = pytest.mark.usefixtures("one_rank")
ROWS = 24


def logged(workspace: RunConfig, folder: Path, **train: object) -> RunConfig:
    """A run whose first iteration was trained on, and logged."""
    config = run_copy(workspace, folder, learner={"ranks": 1}, train={"kl_coef": 0.1, **train})
    save_config(config, config.run_dir / "config.yaml")
    learner = Learner(config, config.run_dir / "sft" / "policy.safetensors", None, (1,))
    path = RunFolder(config.run_dir).trajectories(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    learner.policy_phase(trajectories(ROWS), 0, path)
    return config


def samples(config: RunConfig) -> list[Sample]:
    tokenizer = load_tokenizer(config.folder.tokenizer)
    logged = read_iteration(config_of(config.run_dir))
    return logged.samples(order="first", number=ROWS, tokenizer=tokenizer)


def gae_error(shown: list[Sample], config: RunConfig) -> float:
    """How far the advantages are from the literal GAE of the rewards and values that are shown."""
    rewards = [[t.reward or 0.0 for t in sample.tokens] for sample in shown]
    values = [[t.value or 0.0 for t in sample.tokens] for sample in shown]
    mask = [[True] * len(sample.tokens) for sample in shown]
    train = config.train
    raw, _ = literal.gae(rewards, values, mask, train.gamma, train.gae_lambda)
    expected = literal.inside(literal.whiten(raw, mask, True, 1e-8), mask)
    found = [t.advantage for sample in shown for t in sample.tokens]
    assert None not in found
    return max(abs((a or 0.0) - b) for a, b in zip(found, expected, strict=True))


def test_advantages_follow_from_the_rewards_and_values_that_are_shown(
    workspace: RunConfig, tmp_path: Path
) -> None:
    config = logged(workspace, tmp_path)
    shown = samples(config)
    assert len(shown) == ROWS
    assert gae_error(shown, config) < 1e-5
    for sample in shown:
        whole = sum((t.reward or 0.0) - (t.kl_penalty or 0.0) for t in sample.tokens)
        penalties = sum(t.kl_penalty or 0.0 for t in sample.tokens)
        own = sum((t.learner_logprob or 0.0) - t.ref_logprob for t in sample.tokens)
        assert penalties == pytest.approx(-0.1 * own, abs=1e-5)
        if sample.finish_reason == "eos":
            assert whole == pytest.approx(sample.score, abs=1e-5)


@pytest.mark.parametrize("name", ["rewards_NR", "values_NR", "advantages_NR"])
def test_a_column_that_is_off_by_one_is_seen(
    workspace: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    columns = Learnt.columns

    def shifted(self: Learnt) -> list[object]:
        moved = torch.roll(getattr(self, name), 1, dims=1)
        return columns(replace(self, **{name: moved}))

    monkeypatch.setattr(Learnt, "columns", shifted)
    config = logged(workspace, tmp_path)
    assert gae_error(samples(config), config) > 1e-2


def test_without_a_value_function_there_are_no_values(workspace: RunConfig, tmp_path: Path) -> None:
    config = logged(workspace, tmp_path, algorithm="rloo", samples_per_prompt=2, ppg=None)
    shown = samples(config)
    assert {t.value for sample in shown for t in sample.tokens} == {None}
    rewards = [sum(t.reward or 0.0 for t in sample.tokens) for sample in shown]
    groups = [i // 2 for i in range(ROWS)]
    mask = [[True] * len(sample.tokens) for sample in shown]
    expected = literal.inside(literal.rloo(rewards, groups, mask), mask)
    found = [t.advantage for sample in shown for t in sample.tokens]
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_log_of_an_earlier_version_shows_what_it_has(
    workspace: RunConfig, tmp_path: Path
) -> None:
    config = logged(workspace, tmp_path)
    path = RunFolder(config.run_dir).trajectories(0)
    old = pq.read_table(path).drop_columns([field.name for field in LEARNT])
    pq.write_table(old, path)
    for sample in samples(config):
        for token in sample.tokens:
            assert token.behavior_logprob <= 0.0
            assert (token.learner_logprob, token.reward, token.value, token.advantage) == (
                (None,) * 4
            )
