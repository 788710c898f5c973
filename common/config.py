"""Typed, frozen, validated configuration. Imports neither torch nor ray.

One section per component; `common.recipe` reads and writes it. What cannot be together is refused
here, so that no stage meets an impossible configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from common.model_config import (
    PRESETS,
    Float,
    Fraction,
    LoraConfig,
    ModelConfig,
    NonNegativeFloat,
    NonNegativeInt,
    NoSwitch,
    PathText,
    PositiveFloat,
    PositiveInt,
    Section,
    TokenizerConfig,
)
from common.worker_config import Labels, RewardServiceConfig, RolloutConfig


class DataConfig(Section):
    """Where the data lies: JSONL or Parquet, local paths or URIs."""

    demonstrations: tuple[PathText, ...] = ()
    """Files of (prompt, response) for the supervised stage."""
    comparisons: tuple[PathText, ...] = ()
    """Files of (prompt, chosen, rejected, labeler, confidence) for the reward model."""
    prompts: tuple[PathText, ...] = ()
    """Files of prompts that the policy is trained on."""
    evaluation: tuple[PathText, ...] = ()
    """Files of held-out (prompt, response) for evaluation; the response is the human's."""
    too_long: Literal["error", "skip", "truncate"] = "error"
    """What to do with a record that has more tokens than there is room for; how many were skipped
    or cut is said."""


class LearnerConfig(Section):
    """The gang of DeepSpeed ranks."""

    ranks: PositiveInt = 2
    """Number of learner processes W."""
    zero_stage: Annotated[Literal[0, 1, 2, 3], NoSwitch] = 2
    """DeepSpeed ZeRO stage: 1 shards optimizer states, 2 also gradients, 3 also parameters."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of products in policy training; bf16 keeps trained weights, their gradients, norms and scalar
    heads in fp32."""
    micro_batch_tokens: PositiveInt = 4096
    """Padded tokens that one forward pass of one rank may hold."""
    cpus_per_rank: PositiveFloat = 1.0
    """Cores each rank asks Ray for."""
    threads: PositiveInt | None = None
    """Threads that each rank computes with, as in `rollout`."""
    gpus_per_rank: NonNegativeFloat = 0.0
    """GPUs each rank asks Ray for; nothing computes on them yet, so a recipe leaves it at 0."""
    labels: Labels = Field(default_factory=dict)
    """Labels of the nodes that ranks may be on, as in `rollout`."""
    deadline_s: PositiveFloat = 600.0
    """Longest wait for one call to the gang; then a silent rank is taken for dead."""
    max_restarts: NonNegativeInt = 3
    """Times that one controller builds the gang again after a rank died; then the run stops."""


class SftConfig(Section):
    """The supervised stage (Stiennon 2020, appendix B)."""

    epochs: PositiveFloat = 1.0
    """Passes over the demonstrations."""
    batch_tokens: PositiveInt = 8192
    """Tokens per optimizer step over all ranks, packing included."""
    lr: PositiveFloat = 2e-3
    """Peak learning rate (relative step size for Adafactor)."""
    warmup: Fraction = 0.05
    """Share of the steps that warm up linearly; the rest is a cosine to a tenth."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """adafactor is PaLM's: no factoring, parameter scaling, beta2 = 1 - k^-0.8."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay (AdamW); Adafactor decays by lr squared."""
    adam_eps: PositiveFloat = 1e-8
    """Added to the root of AdamW's second moment. Well below the root mean square of the gradients,
    which falls as models grow, or it eats the steps."""
    z_loss: NonNegativeFloat = 1e-4
    """Coefficient of log^2 Z (PaLM, section 5)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of products, as in `learner`."""
    clip: PositiveFloat = 1.0
    """Largest global gradient norm."""
    start: PathText | None = None
    """Weights of a policy (safetensors) to start from; null starts from random ones."""
    lora: LoraConfig | None = None
    """Train adapters on the weights of `start` instead of all of them; needs `start`."""

    @model_validator(mode="after")
    def _something_to_adapt(self) -> SftConfig:
        if self.lora is not None and self.start is None:
            raise ValueError("lora adapts weights that are there: set start to a policy's weights")
        return self


class RewardModelConfig(Section):
    """The reward model (Stiennon 2020, section 3.4)."""

    epochs: PositiveFloat = 1.0
    """Passes over the comparisons."""
    batch_size: PositiveInt = 64
    """Comparisons per optimizer step."""
    lr: PositiveFloat = 5e-4
    """Peak learning rate (relative step size for Adafactor)."""
    warmup: Fraction = 0.05
    """Share of the steps that warm up linearly; the rest is a cosine to a tenth."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """As in `sft`; networks trained with Adafactor from scratch go on best with it."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay (AdamW); Adafactor decays by lr squared."""
    adam_eps: PositiveFloat = 1e-8
    """As in `sft`."""
    held_out: Annotated[Float, Field(gt=0, lt=1)] = 0.1
    """Share of the comparisons that accuracy is measured on, never trained on."""
    seeds: PositiveInt = 1
    """Models trained from different heads and orders; the most accurate is kept."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of products, as in `learner`."""
    clip: PositiveFloat = 1.0
    """Largest global gradient norm."""
    lora: LoraConfig | None = None
    """Train adapters on the supervised policy instead of all weights."""


class PpgConfig(Section):
    """Phasic Policy Gradient (Cobbe 2020, algorithm 1)."""

    n_pi: PositiveInt = 8
    """Iterations in a phase."""
    e_aux: PositiveInt = 2
    """Epochs of the auxiliary phase."""
    beta_clone: NonNegativeFloat = 1.0
    """Weight of KL(pi_old || pi) in the joint loss, whose value term is in units of values."""
    minibatches: PositiveInt = 4
    """Minibatches per auxiliary epoch and iteration in memory."""
    lr: PositiveFloat = 1e-4
    """Learning rate of the auxiliary phase."""


class TrainConfig(Section):
    """The policy phase (Schulman 2017, Stiennon 2020) and its auxiliary phase."""

    algorithm: Literal["ppo", "rloo", "grpo", "reinforce_pp"] = "ppo"
    """Advantage function; all but ppo need no value network."""
    iterations: PositiveInt = 20
    """Policy phases to run."""
    prompts_per_iteration: PositiveInt = 256
    """Prompts of one iteration."""
    samples_per_prompt: PositiveInt = 1
    """Responses per prompt; rloo and grpo need at least 2."""
    e_pi: PositiveInt = 1
    """Policy epochs per iteration."""
    e_v: PositiveInt = 1
    """Value epochs per iteration."""
    minibatches: PositiveInt = 4
    """Optimizer steps per epoch."""
    lr: PositiveFloat = 3e-4
    """Policy learning rate, annealed linearly to 0 over the run."""
    value_lr: PositiveFloat = 5e-4
    """Value learning rate, annealed likewise."""
    clip_range: PositiveFloat = 0.2
    """epsilon of the clipped objective."""
    value_clip_range: PositiveFloat | None = 0.5
    """Clip of the value update around the old values, as a share of the deviation of the batch's
    returns, or of the root mean square of returns - old values where that is more; null switches
    it off."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    gamma: Fraction = 1.0
    """Discount."""
    gae_lambda: Fraction = 0.95
    """lambda of GAE."""
    kl_coef: NonNegativeFloat = 0.05
    """Weight (first weight, when adaptive) of the per-token KL to the reference policy: per unit
    of the score, or of its deviation under grpo and reinforce_pp, which normalise scores alone."""
    kl_target: PositiveFloat | None = None
    """Target of the adaptive controller in nats per response; null keeps kl_coef fixed."""
    kl_horizon: PositiveInt = 10_000
    """Horizon of the adaptive controller, in rollouts; a batch counts for one horizon at most."""
    missing_eos_penalty: Annotated[Float, Field(le=0)] | None = -1.0
    """A response that never ended scores at most the mean of those that ended plus so many of
    their deviations (the EOS trick); null keeps the scorer's."""
    stop_kl: PositiveFloat | None = 0.1
    """Leave an update's epochs once the mean KL to the proximal policy passes this."""
    value_network: Literal["separate", "shared"] = "separate"
    """Separate beats shared (Stiennon 2020, appendix G.1)."""
    max_staleness: NonNegativeInt = 0
    """0 is synchronous and deterministic; k lets rollouts be k versions old."""
    stale: Literal["wait", "drop"] = "wait"
    """Rollouts that are too old when their turn comes: sample them again, or train without them."""
    behavior_cap: PositiveFloat = 2.0
    """Truncation of proximal/behaviour importance weights: in asynchronous mode, and wherever
    rollouts or learner are not fp32."""
    ppg: PpgConfig | None = PpgConfig()
    """The auxiliary phase; null is plain PPO by the same code."""
    clip: PositiveFloat = 1.0
    """Largest global gradient norm."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    adam_eps: PositiveFloat = 1e-8
    """As in `sft`, for policy and value network. Larger ones calm networks that were trained from
    scratch here: the quickstart's is 1e-5."""
    checkpoint_every: NonNegativeInt = 5
    """Iterations between checkpoints: the most that a death costs. 0 writes one at the end only."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints to keep."""
    lora: LoraConfig | None = None
    """Train adapters of policy and value network on the supervised policy, one frozen base for
    both, instead of all weights. The value network takes over the reward model's adapter when that
    was trained with one."""

    @model_validator(mode="after")
    def _possible(self) -> TrainConfig:
        if self.samples_per_prompt < self.least_responses:
            raise ValueError(
                f"{self.algorithm} compares responses of one prompt: "
                f"set samples_per_prompt to {self.least_responses} or more"
            )
        if self.algorithm != "ppo" and self.ppg is not None:
            raise ValueError(
                f"{self.algorithm} has no value function for an auxiliary phase: set ppg to null"
            )
        if self.lora is not None and self.lora.dropout:
            raise ValueError(
                f"lora.dropout={self.lora.dropout} would make the ratio of PPO noise: set it to 0"
            )
        if self.batch_size % self.minibatches:
            raise ValueError(
                f"batch of {self.batch_size} rollouts is not divisible by "
                f"minibatches={self.minibatches}"
            )
        return self

    @property
    def adapter(self) -> str:
        """Name of the adapter that is trained; empty where all weights are."""
        return "policy" if self.lora else ""

    @property
    def least_responses(self) -> int:
        """Scored responses that a prompt needs to be trained on: 2 where they are compared with
        each other, which a lone one cannot be."""
        return 2 if self.algorithm in ("rloo", "grpo") else 1

    @property
    def batch_size(self) -> int:
        """Rollouts of one iteration."""
        return self.prompts_per_iteration * self.samples_per_prompt


class EvaluateConfig(Section):
    """Comparison of two policies on held-out prompts."""

    prompts: PositiveInt = 512
    """Held-out prompts."""
    judge: str = ""
    """``package.module:function`` that scores (prompts, responses) for the win rate; empty takes
    the run's own reward, which the policy was trained on."""
    best_of: NonNegativeInt = 0
    """Samples per prompt of the quickstart's best-of-N line; 0 leaves it out."""


class QuickstartConfig(Section):
    """Data of the quickstart, harvested from the user's own Python environment."""

    demonstrations: PositiveInt = 20_000
    """Harvested pairs for the supervised stage and the prompts."""
    held_out: PositiveInt = 1_000
    """Harvested pairs that only the judges see."""
    comparisons: PositiveInt = 4_000
    """Comparisons that the labeler labels."""
    label_noise: Annotated[Float, Field(ge=0, lt=0.5)] = 0.05
    """Share of labels flipped at random."""
    human_share: Fraction = 0.35
    """Share of comparisons of a sample of the supervised policy with the human line."""
    borrowed_share: Fraction = 0.15
    """Share of comparisons of the human line with one about another function: equally fluent, so
    only what the line is about decides. The rest compares two samples."""

    @model_validator(mode="after")
    def _shares(self) -> QuickstartConfig:
        if self.human_share + self.borrowed_share > 1:
            raise ValueError("human_share and borrowed_share are more than everything together")
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
    """Whatever a folder can be called: a run is found by where it lies, under any name."""
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
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    learner: LearnerConfig = LearnerConfig()
    sft: SftConfig = SftConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward_service: RewardServiceConfig = RewardServiceConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    quickstart: QuickstartConfig = QuickstartConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        name, model = values.get("preset"), values.get("model") or {}
        if not isinstance(name, str) or name not in PRESETS or not isinstance(model, Mapping):
            return values  # the fields say themselves what they should be
        return {**values, "model": PRESETS[name].model_dump() | dict(model), "preset": None}

    @field_validator("preset")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in PRESETS:
            raise ValueError(f"preset '{name}' is unknown; there are {', '.join(PRESETS)}")
        return name

    @model_validator(mode="after")
    def _possible(self) -> RunConfig:
        if self.rollout.max_response_tokens >= self.model.context:
            raise ValueError(
                f"rollout.max_response_tokens={self.rollout.max_response_tokens} leaves no room "
                f"for a prompt in model.context={self.model.context}"
            )
        if self.train.batch_size % self.rollout.lease_size:
            raise ValueError(
                f"train: batch of {self.train.batch_size} rollouts is not divisible by "
                f"rollout.lease_size={self.rollout.lease_size}"
            )
        if self.train.minibatches * self.learner.ranks > self.train.batch_size:
            raise ValueError(
                f"learner.ranks={self.learner.ranks} x train.minibatches="
                f"{self.train.minibatches} exceeds the batch of {self.train.batch_size} rollouts"
            )
        if self.rollout.lease_size % self.train.samples_per_prompt:
            raise ValueError(
                f"rollout.lease_size={self.rollout.lease_size} is not divisible by "
                f"train.samples_per_prompt={self.train.samples_per_prompt}"
            )
        return self

    @property
    def corrects_mismatch(self) -> bool:
        """Whether sampled log-probabilities may differ from the learner's, so that importance
        weights correct for it: rollouts may be older than what is trained, or one of the two
        computes in bf16. Otherwise the two agree to 1e-4 (invariant I1)."""
        precisions = {self.rollout.precision, self.learner.precision}
        return self.train.max_staleness > 0 or precisions != {"fp32"}

    @property
    def reward_precision(self) -> Literal["fp32", "bf16"]:
        """Of the reward service's products."""
        return self.reward_service.precision or self.learner.precision

    @property
    def run_dir(self) -> Path:
        """``output/name``."""
        return Path(self.output) / self.name

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens of the context that are left for a prompt."""
        return self.model.context - self.rollout.max_response_tokens
