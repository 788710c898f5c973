"""Supervised fine-tuning: language modelling on the responses of packed demonstrations.

Shape suffixes: B rows, T positions, N target tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from common.config.model import checkpoint_of
from common.config.run import RunConfig
from common.devices import onto
from common.metric_catalogue import Logged
from common.metrics import Metrics, mean
from common.models.adapter_files import adapter_of, export_merged
from common.models.build import build_policy
from common.models.pretrained.writing import take_tokenizer
from common.models.weight_files import policy_folder, save_policy
from common.randomness import ShuffledIndex, derive_seed
from learner.batch.dealing import Share
from learner.optimisation import Loss, Sums
from learner.start_weights import policy_start
from learner.supervised.columns import Drawn
from learner.supervised.examples import EncodedPair
from learner.supervised.packing import Packed, pack, packed_batch
from learner.supervised.stage import SupervisedStage
from learner.zero.process_group import rank, world_size

_ADAPTER = "sft"


class SftStage(SupervisedStage):
    """The supervised policy (Stiennon 2020, appendix B; z-loss of PaLM, section 5)."""

    name = "sft"

    def __init__(
        self,
        config: RunConfig,
        training: Sequence[EncodedPair],
        held_out: Sequence[EncodedPair],
    ) -> None:
        """Begin with random weights, or those of `sft.start` or a checkpoint (a collective)."""
        settings = config.sft
        start = checkpoint_of(config.model) if settings.start is None else Path(settings.start)
        self._start = start
        network = build_policy(config.model, empty=True)
        seed = derive_seed(config.seed, "policy") >> 1
        if start is None:
            weights = network.first_weights(seed)
        else:
            network.value.initialise(seed)
            weights = policy_start(network, start).items()
        super().__init__(config, settings, network, weights, _ADAPTER, config.seed)
        order = ShuffledIndex(len(training), derive_seed(config.seed, "sft") >> 1)
        drawn = order.next_batch(math.ceil(settings.epochs * len(training)))
        self._pairs, self._held_out = Drawn(training, drawn), held_out
        self._rows = pack(self._pairs, config.model.context)
        self.rows_per_step = max(world_size(), settings.batch_tokens // config.model.context)
        self.total_steps = max(1, len(self._rows) // self.rows_per_step)

    @torch.no_grad()
    def evaluate(self) -> Metrics:
        """Return the mean negative log-likelihood of held-out response tokens (a collective)."""
        rows = pack(self._held_out, self.config.model.context)
        sums = Sums()
        for first in range(0, len(rows), self.rows_per_step):
            part = rows[first : first + self.rows_per_step]
            for share in self._deal(part):
                sums.add(self._loss(self._packed(self._held_out, part, share), 1.0).sums)
        total = sums.over_ranks()
        return {Logged.HELDOUT_LOSS: mean(total["nll"], total["count"])}

    def export(self, folder: Path) -> None:
        """Write all weights; of adapters also ``adapter/`` (a collective)."""
        lora, model = self.config.sft.lora, self.config.model
        trained = self.engine.full_state(frozen=lora is None)
        if rank() == 0:
            with policy_folder(folder, self._start) as target:
                if lora is None:
                    save_policy(trained, target, model, self._start)
                else:
                    assert self._start is not None  # the recipe sees to that
                    adapter = adapter_of(trained, _ADAPTER, lora, self._base_fingerprint)
                    export_merged(adapter, trained, self._start, target, model)
                if self._start is not None and self._start.is_dir():
                    take_tokenizer(self.config.folder.tokenizer, target)

    def _losses(self, step: int) -> Iterator[tuple[Loss, bool]]:
        first = step * self.rows_per_step
        rows = self._rows[first : first + self.rows_per_step]
        tokens = float(sum(self._pairs[i].targets for row in rows for i in row))
        for share in self._deal(rows):
            yield self._loss(self._packed(self._pairs, rows, share), tokens), share.last

    def _metrics(self, totals: dict[str, float], steps: int) -> Metrics:
        return {
            Logged.LOSS: mean(totals.get("nll", 0.0), totals.get("count", 0.0)),
            "tokens": mean(steps * self.rows_per_step * self.config.model.context, 1),
        }

    def _deal(self, rows: Sequence[Sequence[int]]) -> list[Share]:
        return self.shards.deal(range(len(rows)), [self.config.model.context] * len(rows))

    def _packed(
        self, pairs: Sequence[EncodedPair], rows: Sequence[Sequence[int]], share: Share
    ) -> Packed | None:
        """Return the rows of a micro-batch; None for a filler."""
        if not share.real:
            return None
        return packed_batch(pairs, [rows[i] for i in share.rows], self.config.model.context)

    def _loss(self, batch: Packed | None, tokens: float) -> Loss:
        """Return the loss of a micro-batch, with its sums of nll and of target tokens."""
        device = self.engine.device
        if batch is None:
            logits_BTV, _ = self.engine(torch.zeros(1, 2, dtype=torch.int64))
            none = torch.zeros((), device=device)
            return Loss(logits_BTV.sum() * 0.0, {"nll": none, "count": none})
        # The mask marks positions whose next token is a target: never the last column.
        targets_BT = batch.target_mask_BT
        following_N = onto(batch.tokens_BT.roll(-1, dims=1)[targets_BT], device)

        def read(logits_NV: Tensor, part: slice) -> Tensor:
            """Columns: negative log-likelihood and log Z."""
            log_z_N = logits_NV.logsumexp(-1)
            chosen_N = logits_NV.gather(-1, following_N[part, None]).squeeze(-1)
            return torch.stack((log_z_N - chosen_N, log_z_N), dim=-1)

        columns_N2, _ = self.engine(
            batch.tokens_BT,
            positions_BT=batch.positions_BT,
            segments_BT=batch.segments_BT,
            predict_BT=targets_BT,
            read=read,
        )
        nll_N, log_z_N = columns_N2.unbind(-1)
        nll, z_loss = nll_N.sum(), self.config.sft.z_loss * log_z_N.square().sum()
        count = torch.tensor(float(len(following_N)), device=device)
        return Loss((nll + z_loss) / tokens, {"nll": nll.detach(), "count": count})
