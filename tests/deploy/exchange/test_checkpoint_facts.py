"""`talipot config` on a checkpoint: its generation defaults, and what a run does with each."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from common.models.pretrained.config_files import GENERATION
from tests.common.models.pretrained.checkpoints import random_checkpoint
from tests.deploy.commands import Run
from tests.deploy.conftest import run

__all__ = ["run"]


def test_defaults_stand_beside_what_the_run_uses(run: Run, tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "model")
    defaults = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "eos_token_id": [258, 256],
        "repetition_penalty": 1.1,
        "transformers_version": "5",
    }
    (path / GENERATION).write_text(json.dumps(defaults))
    start, reference = f"model.start={path}", f"reward_service.reference={{start: {path}x}}"
    outcome = run("config", start, "model.context=64", "rollout.top_p=0.8", reference)
    assert outcome.code == 0
    assert yaml.safe_load(outcome.out)["rollout"]["top_p"] == 0.8, "still a recipe"
    said = [line[2:].strip() for line in outcome.out.splitlines() if line.startswith("#")]
    assert said == [
        f"model.start {path}: llama, vocab_size 272, max_position_embeddings 64 (config.json)",
        "generation_config.json: do_sample true is not used: rollout.temperature is 1.0",
        "generation_config.json: temperature 0.6 is not used: rollout.temperature is 1.0",
        "generation_config.json: top_p 0.9 is not used: rollout.top_p is 0.8",
        "generation_config.json: eos_token_id [258, 256] ends a response",
        "generation_config.json: repetition_penalty 1.1 is not used: no setting of a run does this",
        "a response ends with 258 <|im_end|>, 256 ab",
        f"reward_service.reference.start: {path}x: no such checkpoint folder; check the path",
    ]


def test_a_model_of_ours_has_none(run: Run) -> None:
    assert "#" not in run("config").out
