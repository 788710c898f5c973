"""Every path of a run has its name in one file, and keeps it: runs of earlier versions are read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
FOLDER = RunFolder(Path("/runs/a"))
PATHS = {
    FOLDER.config: "config.yaml",
    FOLDER.tokenizer: "tokenizer.json",
    FOLDER.inputs: "run.json",
    FOLDER.code: "code",
    FOLDER.data.path: "data",
    FOLDER.data.demonstrations: "data/demonstrations.jsonl",
    FOLDER.data.comparisons: "data/comparisons.jsonl",
    FOLDER.data.prompts: "data/prompts.jsonl",
    FOLDER.data.evaluation: "data/evaluation.jsonl",
    FOLDER.data.harvest: "data/harvest.json",
    FOLDER.sft.weights: "sft/policy.safetensors",
    FOLDER.sft.adapter: "sft/adapter",
    FOLDER.reward_model.weights: "reward_model/reward.safetensors",
    FOLDER.policy.weights: "policy/policy.safetensors",
    FOLDER.policy.adapter: "policy/adapter",
    FOLDER.policy.shape: "policy/model.json",
    FOLDER.checkpoints: "checkpoints",
    FOLDER.checkpoint(20): "checkpoints/step-000020",
    FOLDER.trajectories(3): "trajectories/iteration-000003.parquet",
    FOLDER.lock: "lock",
    FOLDER.status: "status.json",
    FOLDER.metrics: "metrics.jsonl",
    FOLDER.tensorboard: "tensorboard",
    FOLDER.events: "events.jsonl",
    FOLDER.activity: "activity.jsonl",
    FOLDER.result: "result.json",
    FOLDER.evaluation: "evaluation.json",
    FOLDER.summary: "summary.json",
    FOLDER.samples: "samples.jsonl",
    FOLDER.report: "report.html",
}
FILES = {name.rpartition("/")[2] for name in PATHS.values() if "." in name} | {
    "lock",
    "tensorboard",
}
FILES -= {"tokenizer.json"}  # what a checkpoint's folder calls its own


@pytest.mark.parametrize(("path", "name"), PATHS.items(), ids=str)
def test_paths_stay_where_earlier_versions_put_them(path: Path, name: str) -> None:
    assert path == Path("/runs/a") / name
    assert FOLDER.name_of(path) == name


def literals(source: str) -> Iterator[str]:
    """Texts that the code uses, docstrings apart."""
    tree = ast.parse(source)
    said = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
            yield node.value


def test_no_other_file_spells_them() -> None:
    packages = ("actors", "common", "deploy", "learner", "reward_service")
    for path in (p for package in packages for p in (ROOT / package).rglob("*.py")):
        if path != ROOT / "common" / "run_folder.py":
            spelt = {text.rpartition("/")[2] for text in literals(path.read_text("utf8"))} & FILES
            assert not spelt, path
