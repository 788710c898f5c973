"""Supervised stages: SFT on packed demonstrations, and the reward model on comparisons.

Both advance a given number of optimizer steps at a time, so that the driver owns the loop. A batch
is a function of the step number alone (PaLM, section 5: bitwise determinism).

Shape suffixes: B rows, T positions, P pairs, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.adapter_files import adapter_of, export_merged, save_adapter
from common.batching import sequence_batch
from common.config import RunConfig
from common.data import ShuffledIndex
from common.lora import base_fingerprint, train_adapter
from common.metrics import Metrics, mean, require_finite
from common.model_config import LoraConfig
from common.palm import PolicyNetwork, ScalarNetwork
from common.trajectory import derive_seed
from common.weights import load_weights, save_weights
from learner.engine import ZeroEngine, all_sum, rank, world_size
from learner.experience import Piece, deal
from learner.schedule import warmup_cosine


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPair:
    """A demonstration in tokens."""

    prompt: list[int]
    response: list[int]
    """EOS included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedComparison:
    """A comparison in tokens."""

    prompt: list[int]
    chosen: list[int]
    """EOS included."""
    rejected: list[int]
    """EOS included."""
    confidence: float
    """Probability that `chosen` is the better one, 0.5 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Rows of several documents each. No document attends to another."""

    tokens_BT: Tensor
    """int64; padding is 0."""
    positions_BT: Tensor
    """int64, from 0 in every document."""
    segments_BT: Tensor
    """int64 document number in the row; padding has its own, -1."""
    target_mask_BT: Tensor
    """bool: the *next* token is a response token of the same document (loss on the response)."""


def pack(pairs: Sequence[EncodedPair], length: int) -> list[list[int]]:
    """Indices of pairs per row, first fit over the open rows in order; none is split.

    Only the last 16 rows are kept open, which keeps packing linear and rows over 95 % full.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index, pair in enumerate(pairs):
        size = len(pair.prompt) + len(pair.response)
        for row in range(max(0, len(rows) - 16), len(rows)):
            if size <= room[row]:
                rows[row].append(index)
                room[row] -= size
                break
        else:
            rows.append([index])
            room.append(length - size)
    return rows


def packed_batch(
    pairs: Sequence[EncodedPair], rows: Sequence[Sequence[int]], length: int
) -> Packed:
    """Tensors of packed rows."""
    shape = (len(rows), length)
    tokens, positions = (
        torch.zeros(shape, dtype=torch.int64),
        torch.zeros(shape, dtype=torch.int64),
    )
    segments = torch.full(shape, -1)
    target = torch.zeros(shape, dtype=torch.bool)
    for row, members in enumerate(rows):
        at = 0
        for segment, index in enumerate(members):
            pair = pairs[index]
            ids = [*pair.prompt, *pair.response]
            end = at + len(ids)
            tokens[row, at:end] = torch.tensor(ids)
            positions[row, at:end] = torch.arange(len(ids))
            segments[row, at:end] = segment
            target[row, at + len(pair.prompt) - 1 : end - 1] = True
            at = end
    return Packed(
        tokens_BT=tokens,
        positions_BT=positions,
        segments_BT=segments,
        target_mask_BT=target,
    )


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
        network = PolicyNetwork(config.model)
        network.initialise(derive_seed(config.seed, "policy") >> 1)
        if settings.start is not None:
            load_weights(network, Path(settings.start))
        self._base = _adapt(network, "sft", settings.lora, config.seed)
        self.engine = ZeroEngine(
            network,
            zero_stage=config.learner.zero_stage,
            precision=settings.precision,
            weight_decay=settings.weight_decay,
            clip=settings.clip,
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
            _export(self.engine, folder / "policy.safetensors", self.config)
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


class RewardStage:
    """Pairwise reward model (Stiennon 2020, section 3.4)."""

    def __init__(
        self,
        config: RunConfig,
        train: Sequence[EncodedComparison],
        held_out: Sequence[EncodedComparison],
        sft: Path,
        seed: int,
    ) -> None:
        self.config = config
        self.train = train
        self.held_out = held_out
        settings = config.reward_model
        self.seed = derive_seed(config.seed, "reward model", seed) >> 1
        network = ScalarNetwork(config.model)
        policy = PolicyNetwork(config.model)
        load_weights(policy, sft)
        network.palm.load_state_dict(policy.palm.state_dict())
        network.head.initialise(self.seed)
        self._base = _adapt(network, "reward", settings.lora, self.seed)
        self.engine = ZeroEngine(
            network,
            zero_stage=config.learner.zero_stage,
            precision=settings.precision,
            weight_decay=settings.weight_decay,
            clip=settings.clip,
            optimizer=settings.optimizer,
            eps=settings.adam_eps,
        )
        self.total_steps = max(1, math.ceil(settings.epochs * len(train)) // settings.batch_size)
        self._order = ShuffledIndex(len(train), self.seed)
        self.step = 0

    def advance(self, steps: int) -> Metrics:
        """Up to `steps` optimizer steps; mean loss and accuracy on their own batches."""
        settings = self.config.reward_model
        total = torch.zeros(2, dtype=torch.float64)
        first, norm = self.step, 0.0
        while self.step < min(first + steps, self.total_steps):
            rows = self._order.next_batch(settings.batch_size)
            where = f"reward model step {self.step}"
            pieces = self._deal(self.train, rows)
            for index, piece in enumerate(pieces):
                margins = self._margins(self.train, piece)
                loss = self._pair_loss(self.train, piece, margins).sum() / len(rows)
                loss = loss * piece.real
                require_finite("reward model loss", float(loss.detach()), where)
                self.engine.backward(loss, last=index == len(pieces) - 1)
                right = float((margins > 0).sum()) * piece.real
                total += torch.tensor(
                    [float(loss.detach()) * len(rows), right], dtype=torch.float64
                )
            factor = warmup_cosine(self.step, self.total_steps, warmup=settings.warmup)
            norm += self.engine.step(settings.lr * factor, where)
            self.step += 1
        done = self.step - first
        loss_sum, right = all_sum(total).tolist()
        pairs = done * settings.batch_size
        return {
            "loss": mean(loss_sum, pairs),
            "accuracy": mean(right, pairs),
            "gradient_norm": mean(norm, done),
        }

    @torch.no_grad()
    def evaluate(self) -> Metrics:
        """Held-out accuracy and loss."""
        total = torch.zeros(2, dtype=torch.float64)
        for piece in self._deal(self.held_out, range(len(self.held_out))):
            margins = self._margins(self.held_out, piece)
            loss = self._pair_loss(self.held_out, piece, margins).sum()
            total += torch.tensor([float((margins > 0).sum()), float(loss)]) * piece.real
        right, loss_sum = all_sum(total).tolist()
        count = len(self.held_out)
        return {
            "accuracy_heldout": mean(right, count),
            "heldout_loss": mean(loss_sum, count),
        }

    @torch.no_grad()
    def shift(self, reference: Sequence[EncodedPair]) -> Metrics:
        """Shift the head so that reference responses have mean score 0; returns the old mean."""
        lengths = [len(p.prompt) + len(p.response) for p in reference]
        total = torch.zeros(1, dtype=torch.float64)
        for piece in deal(
            range(len(reference)),
            lengths,
            ranks=world_size(),
            rank=rank(),
            budget=self.config.learner.micro_batch_tokens,
        ):
            scores = self._scores(
                [reference[i].prompt for i in piece.rows],
                [reference[i].response for i in piece.rows],
            )
            total += float(scores.sum()) * piece.real
        before = float(all_sum(total)) / len(reference)
        network = self.engine.network
        assert isinstance(network, ScalarNetwork)
        network.head.offset += before
        return {"reference_mean": mean(before, 1)}

    def export(self, folder: Path) -> None:
        """Write ``reward.safetensors``: all weights, or adapter and head (a collective)."""
        path, settings = folder / "reward.safetensors", self.config.reward_model.lora
        if settings is None:
            _export(self.engine, path, self.config)
            return
        trained = self.engine.full_state(frozen=False)
        if rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            head = {name: tensor for name, tensor in trained.items() if name.startswith("head.")}
            adapter = adapter_of(trained, "reward", settings, self._base)
            save_adapter(adapter, head, path, self.config.model)

    def _scores(self, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
        """Scores ``[B]`` at each last response token, before any padding."""
        batch = sequence_batch(prompts, responses)
        values_BT: Tensor = self.engine(batch.tokens_BT.to(self.engine.device))
        last = batch.last_B.to(values_BT.device)
        return values_BT.gather(1, last[:, None]).squeeze(1)

    def _margins(self, data: Sequence[EncodedComparison], piece: Piece) -> Tensor:
        """Score of chosen minus score of rejected ``[P]``, both sides in one forward pass."""
        pairs = [data[i] for i in piece.rows]
        scores = self._scores(
            [c.prompt for c in pairs] * 2,
            [c.chosen for c in pairs] + [c.rejected for c in pairs],
        )
        chosen, rejected = scores.chunk(2)
        return chosen - rejected

    def _pair_loss(
        self, data: Sequence[EncodedComparison], piece: Piece, margins: Tensor
    ) -> Tensor:
        """``-c log sigmoid(m) - (1-c) log sigmoid(-m)``; confidence 1 is Stiennon's loss."""
        confidence = torch.tensor([data[i].confidence for i in piece.rows], device=margins.device)
        return -confidence * F.logsigmoid(margins) - (1 - confidence) * F.logsigmoid(-margins)

    def _deal(self, data: Sequence[EncodedComparison], rows: Sequence[int]) -> list[Piece]:
        lengths = [2 * (len(c.prompt) + max(len(c.chosen), len(c.rejected))) for c in data]
        return deal(
            rows,
            lengths,
            ranks=world_size(),
            rank=rank(),
            budget=self.config.learner.micro_batch_tokens,
        )


def _adapt(
    network: PolicyNetwork | ScalarNetwork, name: str, settings: LoraConfig | None, seed: int
) -> str:
    """Train adapters where they are asked for; the base's fingerprint."""
    if settings is None:
        return ""
    base = base_fingerprint(network.state_dict())
    train_adapter(network, name, settings, seed)
    return base


def _export(engine: ZeroEngine, path: Path, config: RunConfig) -> None:
    state = engine.full_state()
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_weights(state, path, {"model": config.model.model_dump_json()})
