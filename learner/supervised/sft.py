"""Supervised stages: SFT on packed demonstrations, and the reward model on comparisons.

Both advance a given number of optimizer steps at a time, so that the driver owns the loop. A batch
is a function of the step number alone (PaLM, section 5: bitwise determinism).

Shape suffixes: B rows, T positions, P pairs, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config.run import RunConfig
from common.metrics import Metrics, mean, require_finite
from common.models.adapter_files import adapter_of, export_merged
from common.models.build import build_policy
from common.models.weight_files import load_weights
from common.randomness import ShuffledIndex, derive_seed
from common.run_folder import PolicyFolder
from learner.algorithms.schedule import warmup_cosine
from learner.batch.experience import deal
from learner.supervised.export import adapt_network, export_network
from learner.supervised.packing import EncodedPair, Packed, pack, packed_batch
from learner.zero.engine import ZeroEngine
from learner.zero.process_group import all_sum, rank, world_size


class SftStage:
    """Language modelling on responses (Stiennon 2020, appendix B; z-loss of PaLM, section 5)."""

    def __init__(
        self,
        config: RunConfig,
        train: Sequence[EncodedPair],
        held_out: Sequence[EncodedPair],
    ) -> None:
        self.config = config
        self.train = train
        self.held_out = held_out
        settings = config.sft
        network = build_policy(config.model)
        network.initialise(derive_seed(config.seed, "policy") >> 1)
        if settings.start is not None:
            load_weights(network, Path(settings.start))
        self._base = adapt_network(network, "sft", settings.lora, config.seed)
        self.engine = ZeroEngine(
            network,
            zero_stage=config.learner.zero_stage,
            precision=settings.precision,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            optimizer=settings.optimizer,
            eps=settings.adam_eps,
        )
        length = config.model.context
        order = ShuffledIndex(len(train), derive_seed(config.seed, "sft") >> 1)
        shuffled = [train[i] for i in order.next_batch(math.ceil(settings.epochs * len(train)))]
        self._pairs = shuffled
        self._rows = pack(shuffled, length)
        self.rows_per_step = max(world_size(), settings.batch_tokens // length)
        self.total_steps = max(1, len(self._rows) // self.rows_per_step)
        self.step = 0

    def advance(self, steps: int) -> Metrics:
        """Up to `steps` optimizer steps; returns their mean loss."""
        settings = self.config.sft
        total = torch.zeros(3, dtype=torch.float64)
        norm = 0.0
        first = self.step
        while self.step < min(first + steps, self.total_steps):
            at = self.step * self.rows_per_step
            rows = self._rows[at : at + self.rows_per_step]
            where = f"sft step {self.step}"
            batch = self._batch(self._pairs, rows)
            normalizer = self._target_count(rows)
            for piece, last in batch:
                loss, nll, count = self._loss(piece, normalizer)
                require_finite("sft loss", float(loss.detach()), where)
                self.engine.backward(loss, last=last)
                total += torch.tensor([nll, count, 0.0], dtype=torch.float64)
            factor = warmup_cosine(self.step, self.total_steps, warmup=settings.warmup)
            norm += self.engine.step(settings.lr * factor, where)
            self.step += 1
        done = self.step - first
        nll, count, _ = all_sum(total).tolist()
        return {
            "loss": mean(nll, count),
            "gradient_norm": mean(norm, done),
            "tokens": mean(done * self.rows_per_step * self.config.model.context, 1),
        }

    @torch.no_grad()
    def evaluate(self) -> Metrics:
        """Mean negative log-likelihood of held-out response tokens."""
        rows = pack(self.held_out, self.config.model.context)
        total = torch.zeros(2, dtype=torch.float64)
        for at in range(0, len(rows), self.rows_per_step):
            for piece, _ in self._batch(self.held_out, rows[at : at + self.rows_per_step]):
                _, nll, count = self._loss(piece, 1.0)
                total += torch.tensor([nll, count], dtype=torch.float64)
        nll, count = all_sum(total).tolist()
        return {"heldout_loss": mean(nll, count)}

    def export(self, folder: Path) -> None:
        """Write ``policy.safetensors``; of adapters also ``adapter/`` (a collective)."""
        if self.config.sft.lora is None:
            export_network(self.engine, PolicyFolder(folder).weights, self.config)
            return
        trained = self.engine.full_state(frozen=False)
        if rank() == 0:
            start = Path(self.config.sft.start or "")
            adapter = adapter_of(trained, "sft", self.config.sft.lora, self._base)
            export_merged(adapter, trained, start, folder, self.config.model)

    def _target_count(self, rows: Sequence[Sequence[int]]) -> float:
        return float(sum(len(self._pairs[i].response) for row in rows for i in row))

    def _batch(
        self, pairs: Sequence[EncodedPair], rows: Sequence[Sequence[int]]
    ) -> list[tuple[Packed | None, bool]]:
        """This rank's micro-batches (None = a filler) and whether each is the last."""
        length = self.config.model.context
        pieces = deal(
            range(len(rows)),
            [length] * len(rows),
            ranks=world_size(),
            rank=rank(),
            budget=self.config.learner.micro_batch_tokens,
        )
        return [
            (
                packed_batch(pairs, [rows[i] for i in p.rows], length) if p.real else None,
                index == len(pieces) - 1,
            )
            for index, p in enumerate(pieces)
        ]

    def _loss(self, batch: Packed | None, normalizer: float) -> tuple[Tensor, float, float]:
        """Loss to differentiate, and this micro-batch's sums of nll and of target tokens."""
        device = self.engine.device
        if batch is None:
            logits, _ = self.engine(torch.zeros(1, 2, dtype=torch.int64, device=device))
            return logits.sum() * 0.0, 0.0, 0.0
        at = batch.target_mask_BT.to(device)
        logits, _ = self.engine(
            batch.tokens_BT.to(device),
            positions_BT=batch.positions_BT.to(device),
            segments_BT=batch.segments_BT.to(device),
            predict_BT=at,
        )
        # The mask marks positions whose next token is a target: never the last column.
        following = batch.tokens_BT.roll(-1, dims=1).to(device)[at]
        nll = F.cross_entropy(logits, following, reduction="sum")
        z = logits.logsumexp(-1).square().sum()
        loss = (nll + self.config.sft.z_loss * z) / normalizer
        return loss, float(nll.detach()), float(at.sum())
