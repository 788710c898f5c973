"""The engine by itself: one rank in this process, and one in a process of its own."""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from common.config.recipe import load_config
from common.config.run import RunConfig
from common.models.build import build_policy, count_parameters
from common.models.networks import PolicyNetwork
from deploy.workers.preflight import extra_bytes, learner_bytes
from learner.batch.experience import experience
from learner.learner import Learner
from learner.supervised.reward_model import RewardModelStage
from learner.supervised.sft import SftStage
from learner.zero.engine import ZeroEngine
from tests.learner.test_sharding import preferences, sft_data
from tests.scored import trajectories
from tests.workspaces import run_copy

ROOT = Path(__file__).parents[3]

ON_A_MACHINE_WITH_A_GPU = """
import json
import torch

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1

import torch.distributed as dist
from common.devices import compute_of
from learner.zero.engine import ZeroEngine
from common.devices import compute_of
from learner.rank import LearnerRank

rank = LearnerRank(0, 1, compute_of(cpus=1))
rank.connect(rank.listen())
found = {"backend": dist.get_backend()}
for stage in (0, 1, 2, 3):
    network = torch.nn.Linear(3, 1)
    engine = ZeroEngine(
        network, zero_stage=stage, precision="fp32", weight_decay=0.0, max_grad_norm=1.0, eps=1e-8
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
    """What a role computes on follows from what it reserved, never from what the machine has.

    One place asks whether a GPU that was reserved is there.
    """
    packages = ("actors", "common", "deploy", "learner", "reward_service")
    sources = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    sources.remove(ROOT / "common" / "devices.py")
    assert len(sources) > 50
    assert not [str(path) for path in sources if "torch.cuda" in path.read_text(encoding="utf8")]


def test_a_first_start_compiles_nothing(started: tuple[dict[str, Any], Path]) -> None:
    _, folder = started
    trace = folder / "compiled"
    assert not trace.exists(), trace.read_text()
    assert not list(folder.glob("extensions/*"))


def engine_of(network: nn.Module, **settings: Any) -> ZeroEngine:
    defaults = {"zero_stage": 0, "precision": "fp32", "weight_decay": 0.0, "max_grad_norm": 1e9}
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


def policy_loss(engine: ZeroEngine, tokens: Tensor) -> Tensor:
    """A language model's loss and a head's, summed over rows."""
    logits, values = engine(tokens[:, :-1])
    nll = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    return nll + values.square().sum()


def exact_norm(network: PolicyNetwork, tokens: Tensor) -> float:
    """Of the same loss, in float64 and without DeepSpeed."""
    network = copy.deepcopy(network).double()
    logits, values = network(tokens[:, :-1])
    # Logits are fp32 by promise; all sums before them are float64.
    nll = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    ((nll + values.square().sum()) / len(tokens)).backward()
    squares = [p.grad.square().sum() for p in network.parameters() if p.grad is not None]
    return float(torch.stack(squares).sum().sqrt())


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_in_bf16_256_micro_batches_sum_to_the_exact_gradient_norm(
    workspace: RunConfig, zero: int
) -> None:
    """Stated bound: half a percent. The same row 256 times: summands that are small beside their
    sum, which bf16 lets go by."""
    network = build_policy(workspace.model)
    network.initialise(1)
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16().float()
    row = torch.randint(2, 290, (1, 24), generator=torch.Generator().manual_seed(zero))
    expected = exact_norm(network, row)
    engine = engine_of(network, zero_stage=zero, precision="bf16")
    for index in range(256):
        engine.backward(policy_loss(engine, row) / 256, last=index == 255)
    assert engine.step(0.0, "the test") == pytest.approx(expected, rel=5e-3)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_neither_phase_moves_by_the_other_ones_momentum(zero: int) -> None:
    torch.manual_seed(0)
    engine = engine_of(nn.Linear(3, 2), zero_stage=zero, auxiliary=True)

    def steps(count: int, scale: float) -> dict[str, Tensor]:
        for _ in range(count):
            engine.backward(engine(torch.ones(2, 3)).sum() * scale, last=True)
            engine.step(0.1, "the test")
        return engine.full_state()

    def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
        return all(torch.equal(one[name], other[name]) for name in one)

    before = engine.full_state()
    with engine.auxiliary_moments():
        moved = steps(3, 1.0)
    assert not same(moved, before)
    # The paper's reference code: 8 steps of no gradient after an auxiliary phase move nothing.
    assert same(steps(8, 0.0), moved)
    # Its own momentum each phase keeps.
    with engine.auxiliary_moments():
        assert not same(steps(1, 0.0), moved)
    moved = steps(3, -1.0)
    with engine.auxiliary_moments():
        for fragment in dict(engine.fragments()).values():
            assert float(fragment.steps["step"]) == 4
            assert float(fragment.steps["auxiliary_step"]) == 11


@pytest.mark.usefixtures("one_rank")
def test_an_auxiliary_phase_leaves_no_momentum_behind(workspace: RunConfig, tmp_path: Path) -> None:
    """8 steps without a gradient after it: policy and value network stay where they are."""
    config = run_copy(workspace, tmp_path, learner={"ranks": 1})
    sft = config.run_dir / "sft" / "policy.safetensors"
    learner = Learner(config, sft, config.run_dir / "reward_model" / "reward.safetensors", (1,))
    assert learner.value is not None
    batch = experience(trajectories())
    returns_NR = torch.randn(batch.mask_NR.shape, generator=torch.Generator().manual_seed(0))
    learner.memory.add(batch.sequences, returns_NR, batch.versions)
    start = learner.policy.full_state(), learner.value.full_state()
    learner.auxiliary_phase(0)
    moved = learner.policy.full_state(), learner.value.full_state()
    tokens = torch.ones(2, 6, dtype=torch.int64)
    for _ in range(8):
        learner.policy.backward(policy_loss(learner.policy, tokens) * 0.0, last=True)
        learner.policy.step(1e-3, "the test")
        learner.value.backward(learner.value(tokens).sum() * 0.0, last=True)
        learner.value.step(1e-3, "the test")
    after = learner.policy.full_state(), learner.value.full_state()
    for one, two, three in zip(start, moved, after, strict=True):
        assert any(not torch.equal(one[name], two[name]) for name in one)
        for name in two:
            assert torch.equal(two[name], three[name]), name


def bytes_held() -> int:
    """Of all tensors. DeepSpeed's buckets, which gradients pass through, apart: they are of one
    size whatever the model's."""
    return sum(size for size in storages().values() if size < 4 * 50_000_000)


def storages() -> dict[int, int]:
    """Bytes of what all tensors are stored in, by address."""
    gc.collect()  # engines of other tests, which know themselves
    sizes: dict[int, int] = {}
    for found in gc.get_objects():
        if issubclass(type(found), Tensor):
            for tensor in (found, found.grad if found.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    sizes[storage.data_ptr()] = storage.nbytes()
    return sizes


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    ("zero", "precision"), [(0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32")]
)
def test_preflight_counts_what_a_rank_holds(
    workspace: RunConfig, tmp_path: Path, zero: int, precision: str, lora: bool
) -> None:
    """Stated bound: 10 %, with gradients of both networks and moments of both phases."""
    config = run_copy(
        workspace,
        tmp_path,
        learner={"ranks": 1, "zero_stage": zero, "precision": precision},
        train={"lora": {"rank": 4} if lora else None},
    )
    before = bytes_held()
    sft = config.run_dir / "sft" / "policy.safetensors"
    learner = Learner(config, sft, config.run_dir / "reward_model" / "reward.safetensors", (1,))
    assert learner.value is not None
    learner.policy_phase(trajectories(adapter=config.train.adapter), 0)
    learner.auxiliary_phase(0)
    tokens = torch.ones(2, 6, dtype=torch.int64)
    learner.policy.backward(policy_loss(learner.policy, tokens), last=True)
    learner.value.backward(learner.value(tokens).sum(), last=True)
    # The frozen policy is held while an auxiliary phase lasts; an adapter's copy is in fp32.
    adapter = sum(p.numel() for n, p in learner.policy.network.named_parameters() if "lora" in n)
    whole = count_parameters(config.model).total * (2 if precision == "bf16" else 4)
    expected = learner_bytes(config) + extra_bytes(config) - (4 * adapter if lora else whole)
    assert bytes_held() - before == pytest.approx(expected, rel=0.1)
    learner.policy.step(0.0, "the test")
    learner.value.step(0.0, "the test")


def weights_after(stage: str, config: RunConfig) -> dict[str, Tensor]:
    """A stage's weights after some steps."""
    sft = config.run_dir / "sft" / "policy.safetensors"
    if stage == "sft":
        made = SftStage(config, sft_data(config), [])
        made.advance(2)
        return made.engine.full_state()
    if stage == "reward_model":
        reward = RewardModelStage(config, preferences(), [], [], sft, 0)
        reward.advance(2)
        return reward.engine.full_state()
    learner = Learner(config, sft, config.run_dir / "reward_model" / "reward.safetensors", (1,))
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
