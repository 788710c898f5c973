"""What SFT and the reward model have in common: a network, its engine, and optimizer steps.

A stage advances a given number of steps at a time, so that the driver owns the loop. A batch is a
function of the step number alone (PaLM, section 5: bitwise determinism).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from common.config.run import RunConfig
from common.config.stages import RewardModelConfig, SftConfig
from common.errors import CheckpointError
from common.metric_catalogue import Logged
from common.metrics import Metrics, mean
from common.models.adapters import attach_adapter
from common.models.filling import Weights
from common.models.networks import PolicyNetwork, ScalarNetwork
from learner.algorithms.schedule import warmup_cosine
from learner.batch.shards import Shards
from learner.optimisation import Loss, accumulate
from learner.start_weights import fingerprint
from learner.zero import state_files
from learner.zero.engine import ZeroEngine

_NORM: Final = "gradient norm"
_STEPS: Final = "steps"


class SupervisedStage(ABC):
    """One supervised stage on this rank."""

    name: str
    """In errors."""
    total_steps: int
    """Steps of the whole stage."""

    def __init__(
        self,
        config: RunConfig,
        settings: SftConfig | RewardModelConfig,
        network: PolicyNetwork | ScalarNetwork,
        weights: Weights,
        adapter: str,
        seed: int,
    ) -> None:
        """Hand the network over to its engine (a collective).

        Args:
            config: the run's.
            settings: this stage's section of it.
            network: what is trained.
            weights: those that it begins with; where an adapter is trained, those of files.
            adapter: name of the adapter, where one is trained.
            seed: of that adapter.
        """
        self.config, self.step = config, 0
        self._sums: dict[str, float] = {}
        """Of losses, of what was measured, of gradient norms and of steps: all since the last call
        that was `anew`."""
        self._settings = settings
        self._base_fingerprint = ""
        """Of the frozen weights that an adapter is trained on."""
        if settings.lora is not None:
            self._base_fingerprint = fingerprint(network.decoder, dict(weights))
            attach_adapter(network, adapter, settings.lora, seed)
        self.engine = ZeroEngine(
            network,
            weights,
            zero_stage=config.learner.zero_stage,
            precision=settings.precision,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            optimizer=settings.optimizer,
            eps=settings.adam_eps,
        )
        self.shards = Shards(
            seed=config.seed,
            budget=config.learner.micro_batch_tokens,
            device=self.engine.device,
        )

    def advance(self, steps: int, *, anew: bool = True) -> Metrics:
        """Take up to `steps` optimizer steps (a collective); returns metrics.

        Args:
            steps: to take.
            anew: whether the metrics are of these steps alone. Otherwise also of those before, back
                to the last call that was `anew`, which may have been before a checkpoint.

        Raises:
            TrainingError: a loss or gradient is not finite.
        """
        settings = self._settings
        sums = self._sums = {} if anew else self._sums
        for _ in range(min(steps, self.total_steps - self.step)):
            where = f"{self.name} step {self.step}"
            losses = self._losses(self.step)
            loss, measured = accumulate(self.engine, losses, f"{self.name} loss", where)
            factor = warmup_cosine(self.step, self.total_steps, warmup=settings.warmup)
            norm = self.engine.step(settings.lr * factor, where)
            self.step += 1
            for key, value in {"loss": loss, **measured, _NORM: norm, _STEPS: 1.0}.items():
                sums[key] = sums.get(key, 0.0) + value
        count = round(sums.get(_STEPS, 0.0))
        return self._metrics(sums, count) | {
            Logged.GRADIENT_NORM: mean(sums.get(_NORM, 0.0), count)
        }

    def save(self, folder: Path) -> dict[str, object]:
        """Write the engine (a collective); returns what belongs into the checkpoint's JSON."""
        state_files.save(self.engine, folder)
        return {"step": self.step, "base": self._base_fingerprint, "sums": self._sums}

    def load(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Read what `save` wrote (a collective), on any number of ranks.

        Raises:
            CheckpointError: of another shape, or adapters of another base.
        """
        if state["base"] != self._base_fingerprint:
            raise CheckpointError(f"{folder}: its adapters belong to another base model")
        state_files.load(self.engine, folder)
        self._go_to(state["step"])
        self._sums = state.get("sums", {})  # missing in checkpoints of earlier versions

    def _go_to(self, step: int) -> None:
        """Let the next batch be that of a step."""
        self.step = step

    @abstractmethod
    def evaluate(self) -> Metrics:
        """Measure the network on held-out data (a collective)."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the trained weights (a collective)."""

    @abstractmethod
    def _losses(self, step: int) -> Iterator[tuple[Loss, bool]]:
        """Yield the losses of this rank's micro-batches of a step, and whether each is the last."""

    @abstractmethod
    def _metrics(self, totals: dict[str, float], steps: int) -> Metrics:
        """Return the metrics of some steps, from sums of their losses and of what was measured."""
