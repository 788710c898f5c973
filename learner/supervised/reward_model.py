"""The reward model on comparisons (Stiennon 2020, section 3.4).

Shape suffixes: B sequences, T positions, P pairs of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.batching import sequence_batch
from common.config.run import RunConfig
from common.devices import onto
from common.metric_catalogue import Logged
from common.metrics import Metric, Metrics, mean
from common.models.adapter_files import adapter_of, save_adapter
from common.models.build import build_scalar
from common.models.networks import ScalarNetwork
from common.models.weight_files import policy_folder, save_scalar, save_weights
from common.randomness import ShuffledIndex, derive_seed
from common.run_folder import RewardModelFolder
from learner.batch.dealing import Share
from learner.optimisation import Loss, Sums
from learner.start_weights import reward_start
from learner.supervised.columns import lengths_of
from learner.supervised.examples import EncodedComparison, EncodedPair
from learner.supervised.stage import SupervisedStage
from learner.zero.process_group import rank

_ADAPTER = "reward"


class RewardModelStage(SupervisedStage):
    """Pairwise training of a scalar network that starts as the supervised policy."""

    name = "reward model"

    def __init__(
        self,
        config: RunConfig,
        training: Sequence[EncodedComparison],
        held_out: Sequence[EncodedComparison],
        reported: Sequence[EncodedComparison],
        start: Path,
        seed: int,
    ) -> None:
        """Begin with a decoder and a head drawn from a seed, or a classifier's (a collective).

        Args:
            config: the run's.
            training: comparisons to train on.
            held_out: comparisons that accuracy is measured on.
            reported: likewise, which no choice is made by; may be none.
            start: the supervised policy, or the checkpoint of a model of its own.
            seed: which of `reward_model.seeds` models this is.
        """
        settings = config.reward_model
        model_seed = derive_seed(config.seed, "reward model", seed) >> 1
        self._model, self._start = settings.model or config.model, start
        network = build_scalar(self._model, empty=True)
        weights = reward_start(network, start, model_seed).items()
        super().__init__(config, settings, network, weights, _ADAPTER, model_seed)
        self._training, self._held_out, self._reported = training, held_out, reported
        self._seed = model_seed
        self._go_to(0)
        comparisons = math.ceil(settings.epochs * len(training))
        self.total_steps = max(1, comparisons // settings.batch_size)

    def _go_to(self, step: int) -> None:
        super()._go_to(step)
        position = step * self.config.reward_model.batch_size
        self._order = ShuffledIndex(len(self._training), self._seed, position)

    @torch.no_grad()
    def evaluate(self) -> Metrics:
        """Return accuracy and loss on held-out comparisons (a collective).

        At the end of the stage also the accuracy on those that nothing is chosen by.
        """
        accuracy, loss = self._evaluated(self._held_out)
        found: Metrics = {Logged.ACCURACY_HELDOUT: accuracy, Logged.HELDOUT_LOSS: loss}
        if self._reported and self.step == self.total_steps:
            found[Logged.ACCURACY_REPORTED], _ = self._evaluated(self._reported)
        return found

    def _evaluated(self, comparisons: Sequence[EncodedComparison]) -> tuple[Metric, Metric]:
        """Return accuracy and loss; a tie can be said neither rightly nor wrongly."""
        sums = Sums()
        for share in self._deal(comparisons, range(len(comparisons))):
            margins_P = self._margins(comparisons, share)
            loss_P = self._pair_losses(comparisons, share, margins_P)
            confident = torch.tensor([comparisons[i].confidence > 0.5 for i in share.rows])
            right_P = onto(confident, margins_P.device) & (margins_P > 0)
            sums.add({"right": right_P.sum() * share.real, "loss": loss_P.sum() * share.real})
        decided = sum(comparison.confidence > 0.5 for comparison in comparisons)
        total = sums.over_ranks()
        return mean(total["right"], max(1, decided)), mean(total["loss"], len(comparisons))

    @torch.no_grad()
    def shift(self, reference: Sequence[EncodedPair]) -> Metrics:
        """Shift the head so that reference responses have mean score 0 (a collective).

        Returns:
            The mean that they had.
        """
        lengths, sums = [len(p.prompt) + len(p.response) for p in reference], Sums()
        for share in self.shards.deal(range(len(reference)), lengths):
            pairs = [reference[i] for i in share.rows]
            scores_B = self._scores([p.prompt for p in pairs], [p.response for p in pairs])
            sums.add({"scores": scores_B.sum() * share.real})
        before = sums.over_ranks()["scores"] / len(reference)
        network = self.engine.network
        assert isinstance(network, ScalarNetwork)
        network.head.offset += before
        return {Logged.REFERENCE_MEAN: mean(before, 1)}

    def export(self, folder: Path) -> None:
        """Write the reward model (a collective).

        Adapter and head, or all weights: those of a pretrained model as a folder like the one that
        it started from.
        """
        lora, model, start = self.config.reward_model.lora, self._model, self._start
        trained = self.engine.full_state(frozen=lora is None)
        if rank() != 0:
            return
        with policy_folder(folder, None if lora else start) as target:
            path = RewardModelFolder(target).weights
            if lora is not None:
                head = {k: tensor for k, tensor in trained.items() if k.startswith("head.")}
                adapter = adapter_of(trained, _ADAPTER, lora, self._base_fingerprint)
                save_adapter(adapter, head, path, model)
            elif start.is_dir():
                save_scalar(trained, target, start)
            else:
                save_weights(trained, path, {"model": model.model_dump_json()})

    def _losses(self, step: int) -> Iterator[tuple[Loss, bool]]:
        rows = self._order.next_batch(self.config.reward_model.batch_size)
        for share in self._deal(self._training, rows):
            margins_P = self._margins(self._training, share)
            loss = self._pair_losses(self._training, share, margins_P).sum() / len(rows)
            right = (margins_P > 0).sum() * share.real
            yield Loss(loss * share.real, {"right": right}), share.last

    def _metrics(self, totals: dict[str, float], steps: int) -> Metrics:
        pairs = steps * self.config.reward_model.batch_size
        return {
            Logged.LOSS: mean(totals.get("loss", 0.0), steps),
            Logged.ACCURACY: mean(totals.get("right", 0.0), pairs),
        }

    def _scores(self, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
        """Scores ``[B]`` at each last response token, before any padding."""
        batch = sequence_batch(prompts, responses)
        values_BT: Tensor = self.engine(
            batch.tokens_BT, lengths_B=batch.lengths_B, prompts_B=batch.prompts_B
        )
        return values_BT.gather(1, onto(batch.last_B, values_BT.device)[:, None]).squeeze(1)

    def _margins(self, comparisons: Sequence[EncodedComparison], share: Share) -> Tensor:
        """Score of chosen minus score of rejected ``[P]``, both sides in one forward pass."""
        pairs = [comparisons[i] for i in share.rows]
        scores_B = self._scores(
            [c.prompt for c in pairs] * 2,
            [c.chosen for c in pairs] + [c.rejected for c in pairs],
        )
        chosen_P, rejected_P = scores_B.chunk(2)
        return chosen_P - rejected_P

    def _pair_losses(
        self, comparisons: Sequence[EncodedComparison], share: Share, margins_P: Tensor
    ) -> Tensor:
        """``-c log sigmoid(m) - (1-c) log sigmoid(-m)``; confidence 1 is Stiennon's loss."""
        confidence = torch.tensor([comparisons[i].confidence for i in share.rows])
        confidence_P = onto(confidence, margins_P.device)
        likely_P, unlikely_P = F.logsigmoid(margins_P), F.logsigmoid(-margins_P)
        return -confidence_P * likely_P - (1 - confidence_P) * unlikely_P

    def _deal(self, comparisons: Sequence[EncodedComparison], rows: Sequence[int]) -> list[Share]:
        return self.shards.deal(rows, dict(lengths_of(comparisons, rows)))
