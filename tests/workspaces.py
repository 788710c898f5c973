"""Run folders with tiny data, tokenizers and weights: what tests of stages and roles begin with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from common.config.run import RunConfig
from common.data.own_tokenizer import OwnTokenizer
from common.data.records import Comparison, Demonstration, Prompt, write_jsonl
from common.models.build import build_policy, build_scalar
from common.models.weight_files import save_weights

WORDS = ["open", "close", "read", "write", "the", "file", "name", "list", "of", "a", "path", "all"]


def make_workspace(root: Path) -> RunConfig:
    """A run folder with data, tokenizer, random policy and reward weights; its config."""
    rng = np.random.default_rng(0)

    def phrase(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    pairs = [(f"{phrase(1, 5)} {i}:", phrase(2, 6)) for i in range(200)]
    data = root / "data"
    data.mkdir()
    write_jsonl(
        str(data / "demonstrations.jsonl"),
        [Demonstration(uid="", prompt=p, response=r) for p, r in pairs],
    )
    write_jsonl(str(data / "prompts.jsonl"), [Prompt(uid="", prompt=p) for p, _ in pairs])
    write_jsonl(
        str(data / "comparisons.jsonl"),
        [
            Comparison(
                uid="",
                prompt=p,
                chosen=f"read {r}",
                rejected=f"close {r}",
                labeler="test",
                confidence=1.0,
            )
            for p, r in pairs
        ],
    )
    tokenizer = OwnTokenizer.train((p + r for p, r in pairs), 290)
    values = tiny_recipe(root)
    values["model"]["vocab_size"] = tokenizer.vocab_size
    config = RunConfig.model_validate(values)
    run = config.run_dir
    run.mkdir()
    tokenizer.save(run / "tokenizer.json")
    write_networks(config)
    return config


def tiny_recipe(root: Path) -> dict[str, Any]:
    """A tiny run over the data in `root/data`, but for the size of the vocabulary."""
    data = root / "data"
    return {
        "name": "base",
        "output": str(root),
        "model": {
            "dim": 32,
            "layers": 2,
            "heads": 2,
            "head_dim": 16,
            "context": 64,
        },
        "data": {
            "demonstrations": [str(data / "demonstrations.jsonl")],
            "comparisons": [str(data / "comparisons.jsonl")],
            "prompts": [str(data / "prompts.jsonl")],
            "evaluation": [str(data / "demonstrations.jsonl")],
            "too_long": "skip",
        },
        "learner": {"ranks": 2, "zero_stage": 2, "cpus_per_rank": 0.5, "deadline_s": 120},
        "rollout": {
            "actors": 2,
            "cpus_per_actor": 0.5,
            "lease_size": 4,
            "max_response_tokens": 8,
            "lease_deadline_s": 120,
        },
        "reward_service": {"cpus_per_replica": 0.5},
        "train": {
            "iterations": 4,
            "prompts_per_iteration": 16,
            "minibatches": 2,
            "ppg": {"n_pi": 2, "e_aux": 1, "minibatches": 1},
        },
    }


def write_networks(config: RunConfig) -> None:
    """Random policy and reward model, where the stages would leave them."""
    policy, reward = build_policy(config.model), build_scalar(config.model)
    policy.initialise(1)
    reward.initialise(2)
    for network, path in (
        (policy, config.run_dir / "sft" / "policy.safetensors"),
        (reward, config.run_dir / "reward_model" / "reward.safetensors"),
    ):
        path.parent.mkdir(exist_ok=True)
        save_weights(network.state_dict(), path, {})


def run_copy(config: RunConfig, folder: Path, **sections: dict[str, object]) -> RunConfig:
    """The workspace's run in a folder of its own, with some settings changed."""
    values = config.model_dump(mode="json")
    for name, changes in sections.items():
        values[name] = {**values[name], **changes}
    copied = RunConfig.model_validate({**values, "output": str(folder), "name": "run"})
    copied.run_dir.mkdir(parents=True)
    if config.folder.pretrained_tokenizer.exists():  # a pretrained model begins as it is
        shutil.copytree(config.folder.pretrained_tokenizer, copied.folder.pretrained_tokenizer)
        return copied
    for part in ("tokenizer.json", "sft/policy.safetensors", "reward_model/reward.safetensors"):
        target = copied.run_dir / part
        target.parent.mkdir(exist_ok=True)
        target.write_bytes((config.run_dir / part).read_bytes())
    return copied
