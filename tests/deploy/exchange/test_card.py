"""The model card: facts that the run recorded, and nothing of this machine."""

from __future__ import annotations

import json
from pathlib import Path

from common.config.run import RunConfig
from deploy.exchange.card import add_card, write_card
from deploy.run_folder.inputs import RunInputs
from tests.common.models.pretrained.checkpoints import random_checkpoint


def run_of(folder: Path) -> RunConfig:
    start = random_checkpoint(folder / "smol")
    return RunConfig.model_validate(
        {
            "name": "polite",
            "output": str(folder / "runs"),
            "model": {"start": str(start), "context": 64},
            "train": {
                "iterations": 9,
                "lr": 3e-4,
                "lora": {"rank": 4},
                "critic": {"kind": "pretrained", "start": str(start), "context": 64},
            },
        }
    )


def test_it_says_what_was_read_how_and_what_came_of_it(tmp_path: Path) -> None:
    config = run_of(tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Hello"}\n' * 3, encoding="utf8")
    inputs = RunInputs(config.run_dir)
    reads = {"data.prompts": [prompts], "model.start": [tmp_path / "smol" / "config.json"]}
    inputs.begin("train", config, inputs.look_all(reads))
    fingerprint = inputs.stages["train"].reads["data.prompts"][0].xxh3_128
    lines = [{"stage": "train", "step": step, "metrics": {"kl": step / 100}} for step in (1, 5, 9)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    config.folder.metrics.write_text(text, encoding="utf8")
    card = tmp_path / "README.md"
    write_card(card, config, "train", 5)
    said = card.read_text(encoding="utf8")
    assert said.startswith("# polite\n")
    assert "Policy of iteration 5 of 9" in said
    assert f"| data.prompts | prompts.jsonl | 3 lines | `{fingerprint}` |" in said
    assert "| model.start | config.json |" in said
    assert "| train.lora.rank | 4 |" in said
    assert "| kl | 0.05 |" in said  # of that iteration, not of the last
    assert str(tmp_path) not in said


def test_only_folders_for_others_have_one(tmp_path: Path) -> None:
    config = run_of(tmp_path)
    config.run_dir.mkdir(parents=True)
    config.folder.policy.path.mkdir()
    add_card(config.folder.policy.path, config, "train")
    assert not list(config.folder.policy.path.iterdir())
