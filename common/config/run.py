"""Typed, frozen, validated configuration. Imports neither torch nor ray.

One section per component; `common.config.recipe` reads and writes it. What cannot be together is
refused here, so that no stage meets an impossible configuration.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SerializeAsAny, field_validator, model_validator

from common.config.base import (
    Conflict,
    Float,
    GpuShare,
    NonNegativeInt,
    NoSwitch,
    PathText,
    PositiveFloat,
    PositiveInt,
    Section,
    require_no_conflict,
)
from common.config.model import (
    ALL_PROJECTIONS,
    PRESETS,
    PROJECTIONS,
    ModelConfig,
    PalmConfig,
    PretrainedConfig,
    TokenizerConfig,
)
from common.config.quickstart import DocstringsConfig, QuickstartConfig
from common.config.stages import EvaluateConfig, RewardModelConfig, SftConfig, TrainConfig
from common.config.trackers import TrackersConfig
from common.config.workers import Labels, RewardServiceConfig, RolloutConfig
from common.run_folder import Reused, RunFolder

_TARGETS = (*PROJECTIONS, ALL_PROJECTIONS)


class SourceConfig(Section):
    """What is taken of one source of prompts."""

    weight: PositiveFloat = 1.0
    """Its share of the prompts, beside the other sources' weights."""
    limit: PositiveInt | None = None
    """Most prompts that are taken of it, the first ones; null is all."""
    epochs: PositiveInt | None = None
    """Times that each of them may be taken; then the other sources share its part. Null is without
    end."""


class CurriculumConfig(Section):
    """Prompts that are left out of policy training while they teach nothing."""

    solved: Float
    """Score from which on a response has solved its prompt."""
    after: PositiveInt = 8
    """Responses to a prompt, over iterations, before it may be left out."""
    always: bool = True
    """Leave out prompts that every one of these responses solved."""
    never: bool = True
    """Leave out prompts that none of them solved."""
    back_after: PositiveInt | None = None
    """Iterations after which such a prompt is asked again, and counted anew; null is never, unless
    fewer prompts are left than an iteration takes: then all are asked."""

    @model_validator(mode="after")
    def _something(self) -> CurriculumConfig:
        if not (self.always or self.never):
            text = "leaves nothing out: set always or never, or leave data.curriculum out"
            require_no_conflict(self, [(("always", "never"), text)])
        return self


class DataConfig(Section):
    """Where the data lies: files of JSON lines, JSON or Parquet, folders of them, or patterns."""

    demonstrations: tuple[PathText, ...] = ()
    """Files of (prompt, response) for the supervised stage. Here and below a path, a URI, a folder
    or a pattern such as ``data/*.jsonl``; or a list of these."""
    comparisons: tuple[PathText, ...] = ()
    """Files of (prompt, chosen, rejected, labeler, confidence) for the reward model."""
    prompts: tuple[PathText, ...] = ()
    """Files of prompts that the policy is trained on."""
    evaluation: tuple[PathText, ...] = ()
    """Files of held-out (prompt, response) for evaluation; the response is the human's."""
    columns: tuple[str, ...] | None = None
    """Further columns of prompts that scorers are given (`Sample.columns`), each of which every
    line has to have; null is all that there are."""
    mixture: dict[str, SourceConfig] | None = None
    """What is taken of each source of prompts; null takes all prompts alike, in epochs over all.
    Each source has a metric of its own."""
    curriculum: CurriculumConfig | None = None
    """Leave prompts out that are always or never solved; null asks all. With a mixture a source
    that has many of them gets less than its share."""
    source_column: str | None = None
    """Column that names a prompt's source in `mixture`; null is its file's name without the
    ending."""
    too_long: Literal["error", "skip", "truncate"] = "error"
    """What to do with a record that has more tokens than there is room for; how many were skipped
    or cut is said."""

    @field_validator("mixture")
    @classmethod
    def _of_something(cls, mixture: Any) -> Any:
        if mixture is not None and not mixture:
            raise ValueError("names no source; name each with its weight, or leave it out")
        return mixture

    @model_validator(mode="after")
    def _lasting(self) -> DataConfig:
        limited = [name for name, of in (self.mixture or {}).items() if of.epochs is not None]
        if self.curriculum is not None and limited:
            text = (
                f"data.mixture.{limited[0]}.epochs with data.curriculum: what is left out would "
                "count, and the source would end early; leave one of them out"
            )
            require_no_conflict(self, [((f"mixture.{limited[0]}.epochs", "curriculum"), text)])
        return self


class ReuseConfig(Section):
    """Results of another run that this one takes by reference; nothing is copied.

    `talipot train --from RUN` sets them. What lies there is compared by content with what the
    run began with.
    """

    tokenizer: PathText | None = None
    """Its tokenizer, a file or a folder; null: the run makes or brings its own."""
    sft: PathText | None = None
    """Folder of its supervised policy, ``sft/`` of that run; null: the run trains its own."""
    reward_model: PathText | None = None
    """Folder of its reward model, ``reward_model/`` of that run; null: the run trains its own."""


class LearnerConfig(Section):
    """The gang of DeepSpeed ranks."""

    ranks: PositiveInt = 2
    """Number of learner processes W."""
    zero_stage: Annotated[Literal[0, 1, 2, 3], NoSwitch] = 2
    """DeepSpeed ZeRO stage: 1 shards optimizer states, 2 also gradients, 3 also parameters."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number type of products in policy training; bf16 keeps trained weights, their gradients,
    norms and scalar heads in fp32."""
    micro_batch_tokens: PositiveInt = 4096
    """Tokens that one forward pass of one rank may hold: of a pretrained model without padding,
    and a prompt of several responses once; else padded."""
    cpus_per_rank: PositiveFloat | None = None
    """Cores each rank asks Ray for, as in `rollout`."""
    threads: PositiveInt | None = None
    """Threads that each rank computes with, as in `rollout`."""
    gpus_per_rank: GpuShare = 0.0
    """GPUs each rank asks Ray for and computes on: 0, 1, or less of one for a single rank."""
    labels: Labels = Field(default_factory=dict)
    """Labels of the nodes that ranks may be on, as in `rollout`."""
    deadline_s: PositiveFloat = 600.0
    """Longest wait for a call to the gang, or for another micro-batch of it; then a silent rank is
    taken for dead."""
    max_restarts: NonNegativeInt = 3
    """Times that one controller builds the gang again after a rank died; then the run stops."""

    @model_validator(mode="after")
    def _own_gpus(self) -> LearnerConfig:
        if self.ranks > 1 and 0 < self.gpus_per_rank < 1:
            text = (
                f"gpus_per_rank={self.gpus_per_rank:g} with ranks={self.ranks}: NCCL needs a GPU "
                "for each rank; set gpus_per_rank to 1, or ranks to 1"
            )
            require_no_conflict(self, [(("gpus_per_rank", "ranks"), text)])
        return self


class ClusterConfig(Section):
    """The Ray cluster."""

    address: str | None = None
    """Address of a running cluster; null starts one on this machine (or takes RAY_ADDRESS)."""
    dashboard: bool = True
    """Start Ray's dashboard (on 127.0.0.1) with a local cluster."""
    autoscales: bool = False
    """The cluster adds nodes when asked: a recipe that is too large for it as it is may wait."""
    start_timeout_s: PositiveFloat = 120.0
    """Longest wait for workers to start, and for any of a kind to be there."""
    max_restarts: NonNegativeInt = 10
    """Failures of one kind of elastic worker within `restart_window_s`, beside one for each worker,
    that the run outlives. Preempted workers do not count."""
    restart_window_s: PositiveFloat = 600.0
    """Failures longer ago are forgotten, once a worker of the kind has done something since."""
    stop_timeout_s: PositiveFloat = 60.0
    """Longest wait of a terminated command for the run to stop with a checkpoint."""


def _folder_name(name: str) -> str:
    """Accept whatever a folder can be called: a run is found by where it lies."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError("should be the name of one folder, without slashes")
    return name


class RunConfig(Section):
    """A complete recipe."""

    name: Annotated[str, AfterValidator(_folder_name)] = "run"
    """Name of the run and of its folder."""
    output: PathText = "runs"
    """Folder that holds the runs."""
    seed: NonNegativeInt = 0
    """Every random number of the run derives from it."""
    preset: str | None = None
    """A named model shape (tiny, small, palm-8b, palm-62b, palm-540b); fields of `model` that are
    given too go before it."""
    model: SerializeAsAny[ModelConfig] = PalmConfig()
    data: DataConfig = DataConfig()
    reuse: ReuseConfig = ReuseConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    learner: LearnerConfig = LearnerConfig()
    sft: SftConfig = SftConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward_service: RewardServiceConfig = RewardServiceConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    quickstart: SerializeAsAny[QuickstartConfig] = DocstringsConfig()
    cluster: ClusterConfig = ClusterConfig()
    trackers: TrackersConfig = TrackersConfig()

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        name, model = values.get("preset"), values.get("model") or {}
        if not isinstance(name, str) or name not in PRESETS or not isinstance(model, Mapping):
            return values  # the fields say themselves what they should be
        kind, shape = ModelConfig.kind_of(model), type(PRESETS[name])
        if kind is not None and kind is not shape:
            raise ValueError(
                f"preset '{name}' is a shape of kind {shape.model_fields['kind'].default}, and "
                f"model is of kind {kind.model_fields['kind'].default}: leave one of them out"
            )
        return {**values, "model": PRESETS[name].model_dump() | dict(model), "preset": None}

    @field_validator("preset")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in PRESETS:
            raise ValueError(f"preset '{name}' is unknown; there are {', '.join(PRESETS)}")
        return name

    @model_validator(mode="after")
    def _possible(self) -> RunConfig:
        conflicts = [*self._sizes_that_clash(), *self._unknown_projections()]
        random = self.sft.start is None and not self.pretrained
        if self.sft.lora is not None and random:
            text = (
                "sft.lora adapts weights that are there: set sft.start to a policy's weights, or "
                "model.start to a checkpoint's folder"
            )
            conflicts.append((("sft.lora", "sft.start", "model.start"), text))
        conflicts += self._evaluations_of_nothing()
        require_no_conflict(self, conflicts)
        return self

    def _evaluations_of_nothing(self) -> Iterator[Conflict]:
        evaluate, components = self.evaluate, self.reward_service.components
        kind, _, name = evaluate.metric.partition("/")
        if kind == "score" and name and self.data.mixture is None:
            text = f"evaluate.metric={evaluate.metric}: without data.mixture nothing has a source"
            yield ("evaluate.metric", "data.mixture"), text
        if kind == "component" and name.partition("/")[0] not in components:
            text = (
                f"evaluate.metric={evaluate.metric}: reward_service.components has "
                f"{', '.join(components)}; name one of these"
            )
            yield ("evaluate.metric",), text
        if not evaluate.every:
            for idle in (name for name in components if name not in self.reward_service.scoring):
                field = f"reward_service.components.{idle}.evaluation_only"
                text = f"{field}: nothing is evaluated; set evaluate.every, or leave '{idle}' out"
                yield (field, "evaluate.every"), text

    def _sizes_that_clash(self) -> Iterator[Conflict]:
        rollout, train, ranks = self.rollout, self.train, self.learner.ranks
        batch = ("train.prompts_per_iteration", "train.samples_per_prompt")
        if rollout.max_response_tokens >= self.model.context:
            text = (
                f"rollout.max_response_tokens={rollout.max_response_tokens} leaves no room "
                f"for a prompt in model.context={self.model.context}"
            )
            yield ("rollout.max_response_tokens", "model.context", "preset"), text
        if train.batch_size % rollout.lease_size:
            text = (
                f"train: batch of {train.batch_size} rollouts is not divisible by "
                f"rollout.lease_size={rollout.lease_size}: set that to "
                f"{math.gcd(train.batch_size, rollout.lease_size)}"
            )
            yield (*batch, "rollout.lease_size"), text
        if train.minibatches * ranks > train.batch_size:
            text = (
                f"learner.ranks={ranks} x train.minibatches={train.minibatches} exceeds the batch "
                f"of {train.batch_size} rollouts"
            )
            yield (*batch, "train.minibatches", "learner.ranks"), text
        if rollout.lease_size % train.samples_per_prompt:
            text = (
                f"rollout.lease_size={rollout.lease_size} is not divisible by "
                f"train.samples_per_prompt={train.samples_per_prompt}"
            )
            yield ("rollout.lease_size", "train.samples_per_prompt"), text

    def _unknown_projections(self) -> Iterator[Conflict]:
        """Find targets that a PaLM does not have; a checkpoint's are known when it is read."""
        if not isinstance(self.model, PalmConfig):
            return
        for section in ("sft", "reward_model", "train"):
            lora = getattr(self, section).lora
            unknown = [t for t in lora.targets if t not in _TARGETS] if lora else []
            if unknown:
                text = (
                    f"{section}.lora.targets: '{unknown[0]}' is no projection of a palm; there are "
                    f"{', '.join(_TARGETS)}"
                )
                yield (f"{section}.lora.targets",), text

    @property
    def pretrained(self) -> bool:
        """Whether the policy's model is a checkpoint that somebody brought."""
        return isinstance(self.model, PretrainedConfig)

    @property
    def corrects_mismatch(self) -> bool:
        """Whether sampled log-probabilities may differ from the learner's.

        Then importance weights correct for it: rollouts may be older than what is trained, or one
        of the two computes in bf16. Otherwise the two agree to 1e-4 (invariant I1).
        """
        precisions = {self.rollout.precision, self.learner.precision}
        return self.train.max_staleness > 0 or precisions != {"fp32"}

    @property
    def reward_precision(self) -> Literal["fp32", "bf16"]:
        """Precision of the reward service's products."""
        return self.reward_service.precision or self.learner.precision

    @property
    def run_dir(self) -> Path:
        """``output/name``."""
        return Path(self.output) / self.name

    @property
    def folder(self) -> RunFolder:
        """Every path in the run's folder."""
        paths = {name: path and Path(path) for name, path in self.reuse.model_dump().items()}
        return RunFolder(self.run_dir, Reused(**paths))

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens of the context that are left for a prompt."""
        return self.model.context - self.rollout.max_response_tokens
