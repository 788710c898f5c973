"""How fast roles are on a device: tokens a second, shares of its limits, an iteration's seconds."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from actors.generation.engine import GenerationEngine
from actors.generation.interface import Generated
from common.config.model import PretrainedConfig
from common.config.run import RunConfig
from common.devices import wait_for
from common.logprobs import Sampling
from common.models.build import build_decoder, build_policy, count_parameters
from common.models.decoder import Decoder
from common.models.networks import compute_in
from common.wire.trajectory import Rollout, RolloutRequest, ScoredTrajectory, extend, to_table
from common.wire.weights import FlatBuffer, Manifest
from learner import actor_critic
from learner.learner import Learner
from reward_service.models import ReferencePolicy, frozen_pass
from tests.benchmarks.vllm_process import Generate, vllm
from tests.gpu.engines import Build
from tests.gpu.shapes import SHAPES, decoder_of, drawn, fill, folder_of
from tests.workspaces import run_copy

PROMPT = 64

OTHERS = {
    "computed": "without graphs",
    "hf": "transformers generate",
    "vllm": "vLLM, compiled, with its graphs",
}
"""What decoding is compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much of it is measured."""

    decode: Sequence[tuple[str, int]]
    """Shapes, and how many sequences are sampled at once."""
    response: int
    learner: tuple[str, int, int]
    """Shape, rows of an iteration, and tokens of a micro-batch."""
    repeats: int


WHOLE = Size(
    decode=(("0.1B", 128), ("1B", 128), ("8B", 128)),
    response=128,
    learner=("1B", 128, 16_384),
    repeats=3,
)
SMALL = Size(decode=(("tiny", 4),), response=8, learner=("tiny", 8, 256), repeats=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One line of the table."""

    key: str
    value: float
    unit: str
    says: str


def figures(
    workspace: RunConfig, root: Path, device: str, build: Build, size: Size
) -> Iterator[Figure]:
    """Measure everything; each part frees what it took."""
    bandwidth, products = limits(torch.device(device), size)
    yield Figure(key="copy", value=bandwidth / 1e9, unit="GB/s", says="read and written by a copy")
    yield Figure(key="product", value=products / 1e12, unit="TFLOP/s", says="of bf16 products")
    for shape, batch in size.decode:
        yield from _decode(shape, batch, root, device, size, bandwidth)
        _free()
    yield from _learner(workspace, root, device, build, size, products)
    _free()


def limits(device: torch.device, size: Size) -> tuple[float, float]:
    """Return bytes a second of a large copy, and operations a second of a large bf16 product."""
    rows = 64 if size is SMALL else 8192
    numbers = torch.empty(rows * rows * 4, dtype=torch.float32, device=device)
    to = torch.empty_like(numbers)
    square = torch.randn(rows, rows, device=device).to(torch.bfloat16)
    copied = min(_seconds(lambda: to.copy_(numbers), device) for _ in range(5))
    multiplied = min(_seconds(lambda: square @ square, device) for _ in range(5))
    return 2 * 4 * numbers.numel() / copied, 2 * rows**3 / multiplied


def _decode(
    shape: str, batch: int, root: Path, device: str, size: Size, bandwidth: float
) -> Iterator[Figure]:
    """Sample, beside others by turns: responses of one length, and of many by ours alone."""
    context, length = PROMPT + size.response, size.response
    decoder = decoder_of(shape, root, device, context)
    weights = sum(p.numel() * p.element_size() for p in decoder.parameters())
    replayed, computed = (
        _engine(decoder, batch, length, graphs=graphs) for graphs in (True, False)
    )
    asked = _requests(batch, SHAPES[shape]["vocab_size"])
    lengths = np.random.default_rng(0).integers(1, length + 1, batch).tolist()
    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: replayed.generate(asked),
        "computed": lambda: computed.generate(asked),
        "hf": _library(folder_of(shape, root), device, asked, length),
        "mixed": lambda: replayed.generate(asked, lengths),
        "mixed computed": lambda: computed.generate(asked, lengths),
    }
    with _vllm(folder_of(shape, root), batch, context) as other:
        if other is not None:
            runs["vllm"] = partial(other, asked, [length] * batch)
        took = _by_turns(runs, device, size.repeats)
    rates = {name: batch * length / seconds for name, seconds in took.items()}
    share = weights * length / took["ours"] / bandwidth
    yield Figure(
        key=f"decode_{shape}",
        value=rates["ours"],
        unit="tokens/s",
        says=f"{batch} x ({PROMPT} + {length}), {share:.0%} of the time that reading weights takes",
    )
    yield Figure(
        key=f"decode_{shape}_mixed_vs_computed",
        value=took["mixed computed"] / took["mixed"],
        unit="x",
        says=f"responses of 1 to {length} tokens: {sum(lengths) / took['mixed']:,.0f} tokens/s",
    )
    for name, says in OTHERS.items():
        if name in rates:
            yield Figure(
                key=f"decode_{shape}_vs_{name}",
                value=rates["ours"] / rates[name],
                unit="x",
                says=f"{says}: {rates[name]:,.0f} tokens/s",
            )


def _engine(decoder: Decoder, slots: int, length: int, *, graphs: bool = True) -> GenerationEngine:
    return GenerationEngine(
        decoder,
        eos_ids=(),
        sampling=Sampling(),
        max_tokens=length,
        slots=slots,
        prefill_tokens=slots * PROMPT,
        kernels="torch",
        graphs=graphs,
    )


def _library(
    folder: Path, device: str, asked: Sequence[RolloutRequest], length: int
) -> Callable[[], None]:
    """What `transformers` generates of the same shape."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig.from_pretrained(folder), dtype=torch.bfloat16
        ).eval()
    prompts = torch.tensor([request.prompt_ids for request in asked], device=device)

    def generate() -> None:
        with torch.no_grad():
            model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                top_k=0,
                min_new_tokens=length,
                max_new_tokens=length,
                pad_token_id=0,
                eos_token_id=None,
            )

    return generate


@contextmanager
def _vllm(folder: Path, sequences: int, tokens: int) -> Iterator[Generate | None]:
    """vLLM with random weights; None where this Python has none, or it does not start."""
    with ExitStack() as stack:
        other: Generate | None = None
        if importlib.util.find_spec("vllm") is not None:
            beside = vllm(
                folder,
                sequences,
                tokens,
                python=Path(sys.executable),
                environment=os.environ,
                options={"load_format": "dummy", "gpu_memory_utilization": 0.4},
            )
            try:
                other = stack.enter_context(beside)
            except RuntimeError as error:
                print(f"{folder.name}: {error}; nothing is compared with it")
        yield other


def _learner(
    workspace: RunConfig, root: Path, device: str, build: Build, size: Size, products: float
) -> Iterator[Figure]:
    """Whole iterations, with all roles on the device: sample, score, learn, publish."""
    shape, rows, tokens = size.learner
    config = _config(workspace, root, shape, tokens, size)
    with (
        mock.patch.object(actor_critic, "ZeroEngine", build),
        mock.patch.object(actor_critic, "policy_start", lambda network, _: dict(drawn(network))),
    ):
        learner = Learner(config, Path(config.model.start), None, (0,))  # type: ignore[attr-defined]
    with torch.device(device):
        actor = build_decoder(config.model)
    named = list(actor.named_parameters())
    buffer = FlatBuffer(named, torch.bfloat16, device=device)
    frozen = ReferencePolicy.__new__(ReferencePolicy)
    with torch.device(device):
        frozen.network = build_policy(config.model).eval().requires_grad_(False)
    frozen.sampling = Sampling()
    fill(frozen.network)
    compute_in(frozen.network, torch.bfloat16)
    _publish(learner, buffer)  # what actors begin with; memory is taken once
    engine = _engine(actor.eval().requires_grad_(False), rows, size.response)
    spent: list[Mapping[str, float]] = []
    for iteration in range(1 + size.repeats):
        spent.append(_iteration(iteration, config, learner, engine, frozen, buffer, rows, device))
    took = {name: median(each[name] for each in spent[1:]) for name in spent[0]}
    count = count_parameters(config.model).total
    # A pass before the first step, and one with its backward in each epoch.
    work = (2 + 6 * config.train.e_pi) * count * rows * (PROMPT + size.response)
    rate = work / took["learn"]
    yield Figure(
        key="learner_mfu",
        value=rate / products,
        unit="",
        says=f"{shape}, {rows} x ({PROMPT} + {size.response}): {rate / 1e12:,.1f} TFLOP/s",
    )
    sent = 2 * count / took["publish"] / 1e9
    yield Figure(
        key="sync", value=took["publish"], unit="s", says=f"{sent:,.1f} GB/s, hashed at both ends"
    )
    listed = ", ".join(f"{name} {value:.2f}" for name, value in took.items())
    yield Figure(key="iteration", value=sum(took.values()), unit="s", says=listed)


def _iteration(
    iteration: int,
    config: RunConfig,
    learner: Learner,
    engine: GenerationEngine,
    frozen: ReferencePolicy,
    buffer: FlatBuffer,
    rows: int,
    device: str,
) -> dict[str, float]:
    """Return the seconds of each part."""
    took: dict[str, float] = {}
    asked = _requests(rows, config.model.vocab_size, seed=iteration)
    at, budget = torch.device(device), config.reward_service.micro_batch_tokens
    made: list[Generated] = []
    logprobs: list[list[float]] = []
    took["sample"] = _seconds(lambda: made.extend(engine.generate(asked)), at)
    rollouts = [
        extend(
            request,
            Rollout,
            response_ids=sampled.response_ids,
            response_text="",
            behavior_logprobs=sampled.logprobs,
            unfiltered_logprobs=sampled.unfiltered,
            finish_reason=sampled.finish_reason,
            policy_version=iteration,
            weights_fingerprint="",
            actor_id="",
        )
        for request, sampled in zip(asked, made, strict=True)
    ]
    took["score"] = _seconds(
        lambda: logprobs.extend(frozen_pass(rollouts, budget, None, frozen)[1]), at
    )
    scored = [
        extend(
            rollout,
            ScoredTrajectory,
            score=float(i % 3),
            score_components={},
            ref_logprobs=reference,
            reward_version=0,
        )
        for i, (rollout, reference) in enumerate(zip(rollouts, logprobs, strict=True))
    ]
    table = to_table(scored, ScoredTrajectory)
    took["learn"] = _seconds(lambda: learner.policy_phase([table], iteration), at)
    took["publish"] = _seconds(lambda: _publish(learner, buffer), at)
    return took


def _config(workspace: RunConfig, root: Path, shape: str, tokens: int, size: Size) -> RunConfig:
    config = run_copy(
        workspace,
        root / "speed",
        learner={
            "ranks": 1,
            "zero_stage": 0,
            "precision": "bf16",
            "micro_batch_tokens": tokens,
        },
        rollout={"precision": "bf16", "max_response_tokens": size.response},
        reward_service={
            "components": {"length": {"kind": "function", "target": "a:b"}},
            "micro_batch_tokens": tokens,
        },
        train={"value_network": "shared", "ppg": None, "minibatches": 1},
    )
    values = config.model_dump(mode="json")
    values["model"] = PretrainedConfig(
        start=str(folder_of(shape, root)),
        context=PROMPT + size.response,
        vocab_size=SHAPES[shape]["vocab_size"],
        activation_checkpointing=True,
    ).model_dump(mode="json")
    return RunConfig.model_validate(values)


def _publish(learner: Learner, buffer: FlatBuffer) -> None:
    facts, payload = learner.networks.publish()
    manifest = Manifest(
        policy_version=1, total=facts.total, layout=facts.layout, slices=(facts.slice,)
    )
    buffer.load(manifest, [payload])


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    wait_for(device)
    begin = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - begin


def _by_turns(
    runs: Mapping[str, Callable[[], object]], device: str, repeats: int
) -> dict[str, float]:
    """Median seconds of each, after one that is not counted."""
    took: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(1 + repeats):
        for name, run in runs.items():
            seconds = _seconds(run, torch.device(device))
            if turn:
                took[name].append(seconds)
    return {name: median(found) for name, found in took.items()}


def _requests(count: int, vocabulary: int, seed: int = 0) -> list[RolloutRequest]:
    drawn = np.random.default_rng(seed).integers(3, vocabulary, (count, PROMPT))
    return [
        RolloutRequest(
            rollout_id=f"{seed:06d}-{i:06d}",
            group=i,
            prompt_uid="",
            prompt_text="",
            prompt_ids=[int(token) for token in row],
            seed=i,
        )
        for i, row in enumerate(drawn)
    ]


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
