"""Prints what a role's process takes at its peak, beside what `deploy.workers.memory` says it will.

``python -m tests.benchmarks.role_memory ROLE FOLDER OVERRIDE ...``: the role is learner, actor or
reward, the folder a checkpoint, the overrides those of the recipe instruct.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import torch

from actors.generation.decoder_generator import AdapterOnWire, DecoderGenerator
from common.batching import sequence_batch
from common.config.model import checkpoint_of
from common.config.recipe import load_config
from common.config.run import RunConfig
from common.devices import compute_of
from common.logprobs import Sampling
from common.models.networks import compute_in
from common.models.pretrained.checkpoint import Checkpoint
from common.native.frozen import run_natively
from common.wire.trajectory import ScoredTrajectory, to_table
from deploy.workers.memory import needs
from learner.rank import LearnerRank
from learner.zero.state_files import Snapshot
from reward_service.models import ReferencePolicy
from tests.benchmarks.decode import requests

ROLES = ("learner", "actor", "reward")
PROMPT, RESPONSE = 64, 64


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return sum(int(x.split()[1]) * 1024 for x in lines if x.startswith(("RssAnon", "RssShmem")))


class Peak:
    """Bytes of this process that no file stands behind, at their most while the block runs."""

    def __init__(self) -> None:
        self.bytes = self.before = anonymous()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self.bytes = max(self.bytes, anonymous())


def tokens(config: RunConfig, rows: int, length: int) -> list[list[int]]:
    drawn = np.random.default_rng(0).integers(3, config.model.vocab_size, (rows, length))
    return [[int(token) for token in row] for row in drawn]


def scored(config: RunConfig, rows: int) -> pa.Table:
    """Scored trajectories of one length."""
    trajectories = [
        ScoredTrajectory(
            rollout_id=f"{i}",
            group=i // 2,
            prompt_uid="",
            prompt_text="",
            prompt_ids=row[:PROMPT],
            seed=i,
            adapter=config.train.adapter,
            response_ids=row[PROMPT:],
            response_text="",
            behavior_logprobs=[-8.0] * RESPONSE,
            finish_reason="eos",
            policy_version=0,
            weights_fingerprint="",
            actor_id="",
            score=float(i % 3),
            score_components={},
            ref_logprobs=[-8.0] * RESPONSE,
            reward_version=0,
        )
        for i, row in enumerate(tokens(config, rows, PROMPT + RESPONSE))
    ]
    return to_table(trajectories, ScoredTrajectory)


def learner(config: RunConfig, start: str) -> None:
    """Policy phases of two micro-batches, and an auxiliary one where the recipe has it; the disk is
    so slow that a checkpoint is written for as long as they last."""
    rows = 2 * max(1, config.learner.micro_batch_tokens // (PROMPT + RESPONSE))
    table = scored(config, rows)
    rank = LearnerRank(0, 1, compute_of(cpus=1, threads=2))
    rank.connect(rank.listen())
    rank.begin_train(config, start, None, [2])
    rank.policy_phase(0, None, table)
    ended, write = threading.Event(), Snapshot.write

    def slowly(snapshot: Snapshot, folder: Path) -> Path:
        ended.wait()
        return write(snapshot, folder)

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(Snapshot, "write", slowly),
    ):
        rank.begin_save(folder)
        rank.policy_phase(1, None, table)
        if config.train.ppg is not None:
            rank.auxiliary_phase(1)
        ended.set()
        rank.saved()


def actor(config: RunConfig, start: str) -> None:
    """A lease."""

    lora = config.train.lora
    wire = None if lora is None else AdapterOnWire(name=config.train.adapter, lora=lora, base=start)
    generator = DecoderGenerator(
        config.model, start, config.rollout, wire, compute_of(cpus=1, threads=2)
    )
    made = torch.tensor(tokens(config, config.rollout.lease_size, PROMPT))
    asked = [replace(request, adapter=config.train.adapter) for request in requests(made)]
    generator.engine.refresh()
    generator.engine.generate(asked, [RESPONSE // 4] * len(asked))


def reward(config: RunConfig, start: str) -> None:
    """A frozen pass of as many tokens as one may have."""
    reference = ReferencePolicy(config.model, Path(start), Sampling())
    if config.reward_precision == "bf16":
        compute_in(reference.network, torch.bfloat16)
    run_natively(reference.network, config.reward_service.kernels)
    rows = config.reward_service.micro_batch_tokens // (PROMPT + RESPONSE)
    made = tokens(config, rows, PROMPT + RESPONSE)

    with torch.no_grad():
        reference(sequence_batch([r[:PROMPT] for r in made], [r[PROMPT:] for r in made]))


def main(arguments: Sequence[str]) -> None:
    role, folder, *overrides = arguments
    recipe = Path("deploy/recipes/instruct.yaml")
    config = load_config(recipe, [f"model.start={folder}", "model.vocab_size=0", *overrides])
    rows = Checkpoint.open(folder)
    size = rows.facts[rows.embedding].shape[0]
    model = config.model.model_copy(update={"vocab_size": size})
    config = config.model_copy(update={"model": model})
    assert checkpoint_of(config.model) is not None
    estimate = needs(config, "train")[ROLES.index(role)]
    with Peak() as peak:
        {"learner": learner, "actor": actor, "reward": reward}[role](config, folder)
    found = {"peak": peak.bytes, "before": peak.before, "estimate": estimate.each}
    print(json.dumps(found | {"parts": estimate.parts}))


if __name__ == "__main__":
    main(sys.argv[1:])
