"""Settings of the stages: what each trains, and how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import Field, model_validator

from common.config.algorithms import ALGORITHMS, AlgorithmName, Needs
from common.config.base import (
    Conflict,
    Float,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Section,
    require_no_conflict,
)
from common.config.model import LoraConfig, PretrainedConfig
from common.config.objectives import ObjectiveConfig
from common.config.presets import PRESETS, PresetName, beneath


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
    """Number type of products, as in `learner`."""
    max_grad_norm: PositiveFloat = 1.0
    """Largest global gradient norm."""
    evaluate_every: NonNegativeInt = 0
    """Optimizer steps from one look at the held-out demonstrations to the next, beside those before
    the first step and after the last; 0 is these alone."""
    checkpoint_every_s: PositiveFloat = 600.0
    """Seconds from one checkpoint of this stage to the next, kept until it is done; what goes on
    after a failure has lost about as much."""
    start: PathText | None = None
    """Weights of a policy (safetensors) to start from; null starts from random ones."""
    lora: LoraConfig | None = None
    """Train adapters on the weights of `start`, or of the checkpoint that `model.start` names,
    instead of all of them."""


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
    keep_seeds: bool = False
    """Keep the models of all seeds, in ``reward_seeds/``: `talipot feedback propose RUN` can ask
    people where they disagree."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number type of products, as in `learner`."""
    max_grad_norm: PositiveFloat = 1.0
    """Largest global gradient norm."""
    evaluate_every: NonNegativeInt = 0
    """As in `sft`, of the held-out comparisons."""
    checkpoint_every_s: PositiveFloat = 600.0
    """As in `sft`."""
    lora: LoraConfig | None = None
    """Train adapters on what the reward model starts as instead of all weights."""
    model: PretrainedConfig | None = None
    """A model of its own: another checkpoint, of another size or family, with its own tokenizer;
    null starts as the supervised policy."""


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

    preset: PresetName | None = None
    """What a paper sets, of the fields that the recipe leaves out; null: the defaults below."""
    algorithm: AlgorithmName = "ppo"
    """Advantage function; all but ppo need no value network."""
    iterations: PositiveInt = 20
    """Policy phases to run."""
    prompts_per_iteration: PositiveInt = 256
    """Prompts of one iteration."""
    samples_per_prompt: PositiveInt = 1
    """Responses per prompt; rloo and grpo need at least 2."""
    dynamic_sampling: NonNegativeInt = 0
    """Rounds of an iteration in which prompts whose responses all have one score are replaced by
    others (DAPO); 0 replaces none. Penalties (`missing_eos_penalty`, `objective.overlong`) are no
    part of that score."""
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
    objective: ObjectiveConfig = ObjectiveConfig()
    """What is maximised, where it is not PPO's clipped objective."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    gamma: Fraction = 1.0
    """Discount."""
    gae_lambda: Fraction = 0.95
    """lambda of GAE."""
    value_lambda: Fraction | None = None
    """lambda of the value function's targets; null is gae_lambda (VC-PPO: 1)."""
    gae_length_alpha: PositiveFloat | None = None
    """lambda of a response of n tokens becomes 1 - 1 / (alpha n) (VAPO: 0.05); null is
    gae_lambda for all."""
    value_warmup: NonNegativeInt = 0
    """Iterations at the beginning in which the value function alone learns."""
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
    behavior_level: Literal["token", "sequence"] = "token"
    """Whose probabilities these weights compare: of single tokens, or of whole responses."""
    behavior_outside: Literal["truncate", "mask"] = "truncate"
    """What lies beyond the cap: weights as large as it, or none at all; a mask leaves out what is
    below 1 / cap too."""
    ppg: PpgConfig | None = PpgConfig()
    """The auxiliary phase; null is plain PPO by the same code. Where it is left out, algorithms
    without a value function have none."""
    max_grad_norm: PositiveFloat = 1.0
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
    critic: PretrainedConfig | None = None
    """A model of its own for the value network, of another size or family, that reads the policy's
    tokens; null starts as the reward model, or as the supervised policy where there is none."""
    lora: LoraConfig | None = None
    """Train adapters of policy and value network on the supervised policy, one frozen base for
    both, instead of all weights. The value network takes over the reward model's adapter when that
    was trained with one."""

    @model_validator(mode="before")
    @classmethod
    def _no_phase_without_values(cls, values: Any) -> Any:
        """Leave the auxiliary phase out where the algorithm has no value function to learn."""
        name = values.get("algorithm") if isinstance(values, Mapping) else None
        needs = ALGORITHMS.get(name) if isinstance(name, str) else None
        if needs is None or needs.values or "ppg" in values:
            return values
        return {**values, "ppg": None}

    @model_validator(mode="before")  # runs before the one above
    @classmethod
    def _as_preset(cls, values: Any) -> Any:
        """Put a preset beneath what is given."""
        name = values.get("preset") if isinstance(values, Mapping) else None
        preset = PRESETS.get(cast("PresetName", name)) if isinstance(name, str) else None
        return values if preset is None else beneath(values, preset)

    @model_validator(mode="after")
    def _possible(self) -> TrainConfig:
        conflicts: list[Conflict] = []
        if self.samples_per_prompt < self.least_responses:
            text = (
                f"{self.algorithm} compares responses of one prompt: "
                f"set samples_per_prompt to {self.least_responses} or more"
            )
            conflicts.append((("algorithm", "samples_per_prompt"), text))
        if self.ppg is not None and not self.needs.values:
            text = (
                f"{self.algorithm} has no value function for an auxiliary phase: leave ppg out, "
                "or set it to null where the recipe has it"
            )
            conflicts.append((("algorithm", "ppg"), text))
        if self.lora is not None and self.lora.dropout:
            text = (
                f"lora.dropout={self.lora.dropout} would make the ratio of PPO noise: set it to 0"
            )
            conflicts.append((("lora.dropout",), text))
        if self.batch_size % self.minibatches:
            text = (
                f"batch of {self.batch_size} rollouts is not divisible by "
                f"minibatches={self.minibatches}"
            )
            fields = ("prompts_per_iteration", "samples_per_prompt", "minibatches")
            conflicts.append((fields, text))
        require_no_conflict(self, conflicts)
        return self

    @property
    def adapter(self) -> str:
        """Name of the adapter that is trained; empty where all weights are."""
        return "policy" if self.lora else ""

    @property
    def needs(self) -> Needs:
        """What the algorithm needs of a run."""
        return ALGORITHMS[self.algorithm]

    @property
    def least_responses(self) -> int:
        """Scored responses that a prompt needs to be trained on."""
        return self.needs.least_responses

    @property
    def separate_values(self) -> bool:
        """Whether a network of its own learns values."""
        return self.needs.values and self.value_network == "separate"

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
    every: NonNegativeInt = 0
    """Iterations of policy training from one evaluation on these prompts to the next, the first
    before it and the last after it, by the run's own reward; 0 is none."""
    samples: PositiveInt = 1
    """Responses to each prompt in these."""
    solved: Float | None = None
    """Score from which on a response has solved its prompt, for pass@k of these; null is none."""
    greedy: bool = False
    """Answer each prompt once more with the most probable token each time."""
    metric: str = "score"
    """Which of their metrics says what version is the best: score, greedy_score, pass@K,
    greedy_solved, score/SOURCE, of a source of the held-out prompts, or component/NAME, of a part
    of the score or of what is `evaluation_only`."""
    patience: PositiveInt | None = None
    """Of these evaluations, how many in a row may bring no better score before training ends; null
    trains all iterations."""

    @model_validator(mode="after")
    def _measured(self) -> EvaluateConfig:
        conflicts: list[Conflict] = []
        name, _, of = self.metric.partition("@")
        known = {"score": (), "greedy_score": ("greedy",), "greedy_solved": ("greedy", "solved")}
        if name == "pass":
            powers = [str(2**n) for n in range(self.samples.bit_length())]
            if of not in powers:
                shown = ", ".join(f"pass@{k}" for k in powers)
                text = f"metric={self.metric}: with samples={self.samples} there are {shown}"
                conflicts.append((("metric", "samples"), text))
            needs: tuple[str, ...] = ("solved",)
        elif self.metric in known:
            needs = known[self.metric]
        elif self.metric.startswith(("score/", "component/")) and not self.metric.endswith("/"):
            needs = ()
        else:
            text = (
                f"metric={self.metric} is none of {', '.join(known)}, pass@K, score/SOURCE and "
                "component/NAME; name one of these"
            )
            conflicts.append((("metric",), text))
            needs = ()
        missing = [field for field in needs if getattr(self, field) in (None, False)]
        if missing:
            text = f"metric={self.metric} is measured with {missing[0]} alone: set that too"
            conflicts.append((("metric", missing[0]), text))
        require_no_conflict(self, conflicts)
        return self

    @property
    def logged_metric(self) -> str:
        """The name that `metric` is logged under: a slash in a source's name is a colon there."""
        name, slash, of = self.metric.partition("/")
        return name + slash + (of.replace("/", ":") if name == "score" else of)
