"""The reward model on comparisons (Stiennon 2020, section 3.4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.batching import sequence_batch
from common.config.run import RunConfig
from common.metrics import Metrics, mean, require_finite
from common.models.adapter_files import adapter_of, save_adapter
from common.models.build import build_policy, build_scalar
from common.models.networks import ScalarNetwork
from common.models.weight_files import load_weights
from common.randomness import ShuffledIndex, derive_seed
from common.run_folder import RewardModelFolder
from learner.algorithms.schedule import warmup_cosine
from learner.batch.experience import Piece, deal
from learner.supervised.export import adapt_network, export_network
from learner.supervised.packing import EncodedComparison, EncodedPair
from learner.zero.engine import ZeroEngine
from learner.zero.process_group import all_sum, rank, world_size


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
        network = build_scalar(config.model)
        policy = build_policy(config.model)
        load_weights(policy, sft)
        network.decoder.load_state_dict(policy.decoder.state_dict())
        network.head.initialise(self.seed)
        self._base = adapt_network(network, "reward", settings.lora, self.seed)
        self.engine = ZeroEngine(
            network,
            zero_stage=config.learner.zero_stage,
            precision=settings.precision,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
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
        path, settings = RewardModelFolder(folder).weights, self.config.reward_model.lora
        if settings is None:
            export_network(self.engine, path, self.config)
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
