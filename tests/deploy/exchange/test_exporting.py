"""`talipot export`: what one process makes of a checkpoint is what the learner itself exports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from common.config.run import RunConfig
from common.errors import CheckpointError, ConfigError, DataError
from deploy.exchange.exporting import export_run
from deploy.run_folder import checkpoints
from tests.learner.test_lora_training import LORA, Gang, gangs
from tests.workspaces import run_copy

__all__ = ["gangs"]
pytestmark = pytest.mark.usefixtures("cluster")


def trained(workspace: RunConfig, folder: Path, gang: Gang, *, lora: bool, zero: int) -> RunConfig:
    """A run after two iterations, with a checkpoint of both and the policy that it came to."""
    config = run_copy(
        workspace,
        folder,
        learner={"zero_stage": zero},
        train={"lora": LORA if lora else None, "iterations": 4, "lr": 3e-3, "stop_kl": None},
    )
    gang.begin(config)
    for iteration in (1, 2):
        gang.train(config, first=iteration, count=1)

        def fill(where: Path, iteration: int = iteration) -> dict[str, Any]:
            learner = gang.call("save", str(where))
            return {
                "iteration": iteration,
                "config": config.model_dump(mode="json"),
                "learner": learner,
            }

        checkpoints.write(config.run_dir, iteration, fill, keep=2)
    gang.call("export_policy", str(config.folder.policy.path))
    return config


def tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(folder.rglob("*.safetensors")):
        for name, tensor in load_file(path).items():
            yield f"{path.relative_to(folder)} {name}", tensor


def assert_same(left: Path, right: Path) -> None:
    ours, theirs = dict(tensors(left)), dict(tensors(right))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize(("zero", "lora"), [(0, True), (1, False), (2, True), (3, False)])
def test_a_checkpoint_becomes_what_the_learner_exports(
    workspace: RunConfig, gangs: dict[int, Gang], tmp_path: Path, zero: int, lora: bool
) -> None:
    config = trained(workspace, tmp_path / "runs", gangs[2], lora=lora, zero=zero)
    final = config.folder.policy.path
    for checkpoint in ("2", "latest", "final"):
        export_run(config, tmp_path / checkpoint, checkpoint, "folder", None)
        assert_same(tmp_path / checkpoint, final)
        assert (tmp_path / checkpoint / "model.json").read_bytes() == (
            final / "model.json"
        ).read_bytes()
    export_run(config, tmp_path / "before", "1", "merged", None)
    assert not (tmp_path / "before" / "adapter").exists()
    first, last = dict(tensors(tmp_path / "before")), dict(tensors(final))
    assert any(not torch.equal(first[name], last[name]) for name in first)
    assert "iteration 1 of 4" in (tmp_path / "before" / "README.md").read_text().lower()
    if lora:
        export_run(config, tmp_path / "alone", "latest", "adapter", None)
        assert_same(tmp_path / "alone", final / "adapter")
        assert (tmp_path / "alone" / "adapter_config.json").exists()


def test_what_cannot_be_exported_is_refused_in_a_line(
    workspace: RunConfig, gangs: dict[int, Gang], tmp_path: Path
) -> None:
    config = trained(workspace, tmp_path / "runs", gangs[1], lora=False, zero=0)
    (tmp_path / "there").mkdir()
    for target, checkpoint, form, precision, error, words in (
        ("there", "1", "folder", None, ConfigError, "exists already"),
        ("out", "1", "zip", None, ConfigError, "--to zip: should be folder, merged, adapter"),
        ("out", "1", "adapter", None, ConfigError, r"trained without adapters \(train.lora\)"),
        ("out", "first", "folder", None, ConfigError, "should be a number, latest, best or final"),
        ("out", "7", "folder", None, CheckpointError, "no such checkpoint; there are 1"),
        ("out", "1", "folder", "bf16", ConfigError, "weights of a PaLM are exported in fp32"),
    ):
        with pytest.raises(error, match=words):
            export_run(config, tmp_path / target, checkpoint, form, precision)
    (config.folder.checkpoint(1) / "policy" / "rank-00000.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="step-000001: damaged"):
        export_run(config, tmp_path / "out", "1", "folder", None)
    fresh = run_copy(workspace, tmp_path / "fresh")
    with pytest.raises(DataError, match=r"not finished.*--checkpoint latest"):
        export_run(fresh, tmp_path / "out", "final", "folder", None)
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        export_run(fresh, tmp_path / "out", "latest", "folder", None)
    assert not (tmp_path / "out").exists()
