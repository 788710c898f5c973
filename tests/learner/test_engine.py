"""The engine by itself: one rank in this process, and one in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from common.config import RunConfig
from common.recipe import load_config
from learner.engine import ZeroEngine
from learner.learner import Learner
from learner.supervised import RewardStage, SftStage
from tests.conftest import run_copy
from tests.learner.test_sharding import preferences, sft_data, trajectories

ROOT = Path(__file__).parents[2]

ON_A_MACHINE_WITH_A_GPU = """
import json
import torch

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1

import torch.distributed as dist
from learner.engine import ZeroEngine
from learner.rank import LearnerRank

rank = LearnerRank(0, 1, 1)
rank.connect(*rank.address(), 60.0)
found = {"backend": dist.get_backend()}
for stage in (0, 1, 2, 3):
    network = torch.nn.Linear(3, 1)
    engine = ZeroEngine(
        network, zero_stage=stage, precision="fp32", weight_decay=0.0, clip=1.0, eps=1e-8
    )
    engine.backward(engine(torch.ones(2, 3)).sum(), last=True)
    found[f"norm {stage}"] = engine.step(0.1, "the test")
    found[f"device {stage}"] = str(engine.device)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What a rank on a machine with a GPU and with an empty cache says, and where compilers would
    leave a trace."""
    folder = tmp_path_factory.mktemp("first start")
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    for compiler in ("gcc", "g++", "cc", "c++", "ninja", "nvcc"):
        script = bin_folder / compiler
        script.write_text(f"#!/bin/sh\necho {compiler} $* >> {folder}/compiled\nexit 1\n")
        script.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{bin_folder}:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    environment.pop("DS_ACCELERATOR", None)
    done = subprocess.run(
        [sys.executable, "-c", ON_A_MACHINE_WITH_A_GPU],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1]), folder


def test_a_visible_gpu_that_nobody_reserved_is_not_used(
    started: tuple[dict[str, Any], Path],
) -> None:
    found, _ = started
    assert found["backend"] == "gloo"
    for stage in range(4):
        assert found[f"device {stage}"] == "cpu"
        # Two rows of ones: the gradients of three weights and the bias are 2 each.
        assert found[f"norm {stage}"] == pytest.approx(4.0)


def test_no_role_asks_which_gpus_can_be_seen() -> None:
    """What a role computes on follows from what it reserved, never from what the machine has."""
    packages = ("actors", "common", "deploy", "learner", "reward_service")
    sources = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    assert len(sources) > 50
    assert not [str(path) for path in sources if "torch.cuda" in path.read_text(encoding="utf8")]


def test_a_first_start_compiles_nothing(started: tuple[dict[str, Any], Path]) -> None:
    _, folder = started
    trace = folder / "compiled"
    assert not trace.exists(), trace.read_text()
    assert not list(folder.glob("extensions/*"))


def engine_of(network: nn.Module, **settings: Any) -> ZeroEngine:
    defaults = {"zero_stage": 0, "precision": "fp32", "weight_decay": 0.0, "clip": 1e9}
    return ZeroEngine(network, **{**defaults, "eps": 1e-8, **settings})


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("eps", "share"), [(1e-8, 1 / 1.01), (1e-5, 1 / 11)])
def test_eps_is_what_adamw_divides_by(eps: float, share: float) -> None:
    network = nn.Linear(1, 1, bias=False)
    before = float(network.weight.detach())
    engine = engine_of(network, eps=eps)
    # A gradient of 1e-6. At the first step AdamW moves by lr * g / (|g| + eps).
    engine.backward(engine(torch.full((1, 1), 1e-6)).sum(), last=True)
    engine.step(0.5, "the test")
    assert before - float(network.weight.detach()) == pytest.approx(0.5 * share, rel=1e-3)


def weights_after(stage: str, config: RunConfig) -> dict[str, Tensor]:
    """A stage's weights after some steps."""
    sft = config.run_dir / "sft" / "policy.safetensors"
    if stage == "sft":
        made = SftStage(config, sft_data(config), [])
        made.advance(2)
        return made.engine.full_state()
    if stage == "reward_model":
        reward = RewardStage(config, preferences(), [], sft, 0)
        reward.advance(2)
        return reward.engine.full_state()
    learner = Learner(config, sft, config.run_dir / "reward_model" / "reward.safetensors", 1)
    learner.policy_phase(trajectories(), 0)
    learner.auxiliary_phase(0)
    assert learner.value is not None
    value = {f"value network {k}": v for k, v in learner.value.full_state().items()}
    return learner.policy.full_state() | value


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("stage", ["sft", "reward_model", "train"])
def test_every_stage_steps_by_its_own_eps(workspace: RunConfig, tmp_path: Path, stage: str) -> None:
    """Where eps is enormous nothing moves; the other stages' settings do not matter."""
    enormous: dict[str, Any] = {"adam_eps": 1e15, "weight_decay": 0.0}
    small: dict[str, Any] = {"adam_eps": 1e-8, "weight_decay": 0.0}
    states = []
    for number, mine in enumerate((enormous, small)):
        others = small if mine is enormous else enormous
        sections = {s: dict(others) for s in ("sft", "reward_model", "train")} | {stage: mine}
        config = run_copy(workspace, tmp_path / str(number), **sections)
        states.append(weights_after(stage, config))
    start = load_file(workspace.run_dir / "sft" / "policy.safetensors")
    if stage == "train":
        for name in start:
            if name.startswith("palm"):
                assert torch.equal(states[0][name], start[name]), name
    different = [n for n in states[0] if not torch.equal(states[0][n], states[1][n])]
    assert len(different) > len(start) / 2


def test_defaults_are_of_models_that_were_not_trained_from_scratch_here() -> None:
    plain = RunConfig()
    assert [plain.sft.adam_eps, plain.reward_model.adam_eps, plain.train.adam_eps] == [1e-8] * 3
    for name in ("quickstart", "quickstart-lora"):
        recipe = load_config(ROOT / "deploy" / "recipes" / f"{name}.yaml", [])
        assert recipe.train.adam_eps == 1e-5
