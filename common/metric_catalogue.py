"""Every metric that a run logs: its name, kind, unit, labels and meaning.

Who measures writes under these names, the run's log accepts no others, the report chooses its
curves by them, and docs/metrics.md is written from here. What varies within one metric (a pool, a
cause, a component) is a label: it stands in braces in the name here, and as its value in the names
that are written.
"""

from __future__ import annotations

from common.metric_facts import Catalogue, counter, gauge

_VALUES = "where the algorithm has a value function"
_NETWORK = "with a separate value network"
_AUXILIARY = "after an auxiliary phase"
_HTTP = "with a component of kind http"
_SUPERVISED_END = "at the end of the stage"
_HELD_OUT = "at the end of the stage, and each `evaluate_every` steps"


class Logged(Catalogue):
    """The metrics, by the names that are written to metrics.jsonl."""

    # Supervised stages.
    LOSS = gauge(
        "loss",
        "nats",
        "loss per response token (sft), per comparison (reward)",
        "sft",
        "reward",
        look_for="should fall",
    )
    HELDOUT_LOSS = gauge(
        "heldout_loss",
        "nats",
        "the same on data that is never trained on",
        "sft",
        "reward",
        look_for="a rise while `loss` falls is overfitting",
        when=_HELD_OUT,
    )
    HELDOUT_LOSS_BEFORE = gauge(
        "heldout_loss_before",
        "nats",
        "the same before the first step",
        "sft",
        "reward",
        look_for="well above `heldout_loss`, or the stage has learnt little",
        when=_SUPERVISED_END,
    )
    TOKENS = gauge(
        "tokens",
        "tokens",
        "tokens of the data that was trained on, all passes together",
        "sft",
        "reward",
        when=_SUPERVISED_END,
    )
    EPOCHS = gauge(
        "epochs", "passes", "passes over the data", "sft", "reward", when=_SUPERVISED_END
    )
    ACCURACY = gauge("accuracy", "share", "comparisons whose chosen side scores higher", "reward")
    ACCURACY_HELDOUT = gauge(
        "accuracy_heldout",
        "share",
        "the same on comparisons that are never trained on",
        "reward",
        when=_HELD_OUT,
    )
    ACCURACY_REPORTED = gauge(
        "accuracy_reported",
        "share",
        "the same on comparisons that nothing is chosen by (`split: valid2`)",
        "reward",
        when="at the end of the stage, where there are such comparisons",
    )
    REFERENCE_MEAN = gauge(
        "reference_mean",
        "score",
        "mean score of demonstrations, before the scores are shifted to make it 0",
        "reward",
        when=_SUPERVISED_END,
    )

    # What the policy does.
    SCORE = gauge(
        "score", "score", "mean score of a response", "train", "held_out", look_for="should rise"
    )
    PASS_AT = gauge(
        "pass@{k}",
        "share",
        "prompts of which one of k responses has at least the score `evaluate.solved`, estimated "
        "without bias (Chen 2021)",
        "held_out",
        series="pass_at",
        look_for="pass@1 that rises while others fall: variety is lost",
        when="with `evaluate.solved`",
    )
    GREEDY_SCORE = gauge(
        "greedy_score",
        "score",
        "mean score of greedy responses, one to each prompt",
        "held_out",
        look_for="should rise",
        when="with `evaluate.greedy`",
    )
    GREEDY_SOLVED = gauge(
        "greedy_solved",
        "share",
        "prompts whose greedy response has at least the score `evaluate.solved`",
        "held_out",
        look_for="should rise",
        when="with `evaluate.greedy` and `evaluate.solved`",
    )
    PROMPTS_TRAINED = gauge(
        "prompts_trained",
        "prompts",
        "prompts of which responses were trained on",
        look_for="below `train.prompts_per_iteration`, prompts were given up or had no signal",
    )
    PROMPTS_LEFT_OUT = gauge(
        "prompts_left_out",
        "prompts",
        "prompts that were not asked since they were always or never solved",
        look_for="nearly all of them: harder prompts would teach more",
        when="with `data.curriculum`",
    )
    RESPONSES = gauge("responses", "responses", "responses that were asked for", "held_out")
    UNSCORED = gauge(
        "unscored", "responses", "responses that the reward service gave up", "held_out"
    )
    UNJUDGED = gauge(
        "unjudged/{component}",
        "responses",
        "responses of which what is `evaluation_only` said nothing",
        "held_out",
        when="with `evaluation_only`",
        look_for="0, or its `component/NAME` is of the others alone",
    )
    EVALUATE_SECONDS = gauge(
        "evaluate_seconds", "s", "what this evaluation took, no part of `seconds`", "held_out"
    )
    SCORE_DEVIATION = gauge(
        "score_deviation", "score", "standard deviation of the scores of all responses"
    )
    EQUAL_GROUPS = gauge(
        "equal_groups",
        "share",
        "prompts whose responses all have one score",
        when="with several samples a prompt",
        look_for="above a half little is learnt by comparing them",
    )
    METRIC_ERROR = gauge(
        "metric_error",
        "1",
        "standard error of `evaluate.metric` over prompts",
        "held_out",
    )
    SOURCE_SCORE = gauge(
        "score/{source}",
        "score",
        "mean score of responses to prompts of one source",
        "train",
        "held_out",
        series="score_by_source",
        when="with `data.mixture`",
    )
    COMPONENT = gauge(
        "component/{component}",
        "score",
        "mean of one part of the score, without its weight; of held-out prompts also what is "
        "`evaluation_only`, by a judge with `against` the win rate",
        "train",
        "held_out",
    )
    COMPONENT_PART = gauge(
        "component/{component}/{part}",
        "score",
        "mean of what a reward function's `Score` calls a part of it",
        "train",
        "held_out",
        series="component_part",
        when="with a function that returns parts",
    )
    KL = gauge(
        "kl",
        "nats per response",
        "distance from the supervised policy, of whole distributions whatever `rollout.top_p` "
        "and its like leave out",
        "train",
        "held_out",
        look_for="a steep rise with the score is over-optimisation",
    )
    KL_COEF = gauge(
        "kl_coef", "1", "weight of the KL in the rewards; constant without `train.kl_target`"
    )
    ENTROPY = gauge(
        "entropy",
        "nats per token",
        "of the whole distribution at temperature 1",
        look_for="falls; not to 0",
    )
    RESPONSE_LENGTH = gauge(
        "response_length",
        "tokens",
        "mean length of a response",
        "train",
        "held_out",
        look_for="a drift to one length",
    )
    EOS_SHARE = gauge("eos_share", "share", "responses that end", "train", "held_out")

    # Sampler against learner.
    RATIO_DEVIATION = gauge(
        "ratio_deviation",
        "1",
        "largest deviation of a probability ratio between sampler and learner from 1",
        look_for="about 0 in synchronous mode in fp32",
    )
    MISMATCH_KL = gauge(
        "mismatch_kl",
        "nats per token",
        "distance between sampler and learner",
        look_for="about 0 in synchronous mode in fp32; elsewhere importance weights correct it, "
        "as far as `train.behavior_cap`",
    )
    MISMATCH_RATIO = gauge(
        "mismatch_ratio",
        "1",
        "largest factor between two probabilities of one token by sampler and learner",
        look_for="about 1 in synchronous mode in fp32",
    )
    STALENESS = gauge(
        "staleness",
        "versions",
        "age of the oldest rollout trained",
        look_for="at most `train.max_staleness`",
    )
    STALENESS_COUNT = gauge(
        "staleness/{age}", "rollouts", "rollouts trained, by age", series="rollouts_by_age"
    )

    # Updates.
    LR = gauge("lr", "1", "learning rate of the policy")
    POLICY_LOSS = gauge("policy_loss", "1", "clipped objective, less the entropy bonus")
    POLICY_STEPS = gauge("policy_steps", "steps", "optimizer steps of the policy in this iteration")
    CLIP_FRACTION = gauge(
        "clip_fraction", "share", "tokens whose ratio is clipped, of responses that teach something"
    )
    UPDATE_KL = gauge(
        "update_kl",
        "nats per token",
        "distance of the policy from the one before this update, on the same responses",
    )
    GRADIENT_NORM = gauge(
        "gradient_norm",
        "1",
        "mean norm of the gradients, before they are cut to `max_grad_norm`",
        "sft",
        "reward",
        "train",
    )
    STOPPED_BY_KL = gauge("stopped_by_kl", "1", "1 = the epochs were left early at `train.stop_kl`")
    EXPLAINED_VARIANCE = gauge(
        "explained_variance",
        "share",
        "variance of the returns that the value function explains",
        look_for="towards 1",
        when=_VALUES,
    )
    VALUE_LOSS = gauge("value_loss", "1", "clipped value loss", when=_NETWORK)
    VALUE_CLIP_FRACTION = gauge(
        "value_clip_fraction", "share", "tokens whose value is clipped", when=_NETWORK
    )
    AUXILIARY_VALUE_LOSS = gauge(
        "auxiliary/value_loss",
        "1",
        "loss of the policy's own value head, of the last epoch",
        when=_AUXILIARY,
    )
    AUXILIARY_CLONE_KL = gauge(
        "auxiliary/clone_kl",
        "nats per token",
        "distance of the policy from the one before the phase, in the last epoch",
        when=_AUXILIARY,
    )
    AUXILIARY_CLONE_KL_FIRST = gauge(
        "auxiliary/clone_kl_first",
        "nats per token",
        "the same before the first step",
        look_for="exactly 0",
        when=_AUXILIARY,
    )
    AUXILIARY_SEPARATE_VALUE_LOSS = gauge(
        "auxiliary/separate_value_loss",
        "1",
        "loss of the value network",
        when=f"{_AUXILIARY}, {_NETWORK}",
    )

    # Time.
    SECONDS = gauge("seconds", "seconds", "the whole iteration")
    COLLECT_SECONDS = gauge(
        "collect_seconds", "seconds", "waiting for rollouts", look_for="where the time goes"
    )
    LEARN_SECONDS = gauge(
        "learn_seconds", "seconds", "the policy phase", look_for="where the time goes"
    )
    AUXILIARY_SECONDS = gauge(
        "auxiliary_seconds", "seconds", "the auxiliary phase", when=_AUXILIARY
    )
    PUBLISH_SECONDS = gauge(
        "publish_seconds", "seconds", "laying out new weights", look_for="where the time goes"
    )
    GENERATE_SECONDS = gauge("generate_seconds", "seconds", "sampling, summed over actors")
    LOAD_SECONDS = gauge("load_seconds", "seconds", "loading weights, summed over actors")
    SCORE_SECONDS = gauge("score_seconds", "seconds", "scoring, summed over reward workers")
    TOKENS_PER_SECOND = gauge(
        "tokens_per_second",
        "tokens per second",
        "trained in a supervised stage; sampled by one actor in policy training",
        "sft",
        "train",
    )

    # Workers.
    POLICY_VERSION = gauge(
        "policy_version", "versions", "version of the weights that was published last"
    )
    WORKERS = gauge("workers/{pool}", "workers", "workers at the end of the iteration")
    ACTOR_WEIGHTS = gauge("actor_weights", "bytes", "weights that a rollout actor holds")
    ACTOR_CACHE = gauge(
        "actor_cache", "bytes", "most that keys and values took of one rollout actor"
    )
    SCALE_SECONDS = gauge(
        "scale_seconds/{pool}",
        "seconds",
        "from the last command that added workers to the first result of one of them",
        when="after such a command",
    )
    WORKERS_LOST = counter(
        "workers_lost/{pool}",
        "workers",
        "workers lost, whatever the cause",
    )
    WORKERS_LOST_BY = counter(
        "workers_lost/{pool}/{cause}",
        "workers",
        "workers lost, by cause",
        when="once one was",
        series="workers_lost_by_cause",
    )
    WORKERS_DRAINED = counter(
        "workers_drained/{pool}",
        "workers",
        "workers that left when they were asked to",
        when="once one did",
    )
    LEARNER_RESTARTS = counter(
        "learner_restarts", "restarts", "times that the learner was built again"
    )
    LEASES_REISSUED = counter("leases_reissued", "leases", "leases given to another worker")
    LATE_COMMITS = counter(
        "late_commits", "rollouts", "results that came second and were discarded"
    )
    DROPPED = counter(
        "dropped/{reason}",
        "rollouts",
        "rollouts that were not trained",
        when="once one was dropped",
    )
    RESAMPLED = counter(
        "resampled/{reason}", "rollouts", "rollouts that were sampled again", when="once one was"
    )
    WEIGHTS_RELOADED = counter(
        "weights_reloaded", "slices", "slices of weights that arrived corrupted and were read again"
    )
    HTTP_REQUESTS = counter(
        "http/{component}/requests",
        "requests",
        "tries sent to the remote endpoint, over all reward workers",
        when=_HTTP,
    )
    HTTP_RETRIES = counter(
        "http/{component}/retries", "requests", "tries after a first", when=_HTTP
    )
    HTTP_FAILURES = counter(
        "http/{component}/failures", "requests", "tries that failed", when=_HTTP
    )
    HTTP_DEAD_LETTERS = counter(
        "http/{component}/dead_letters", "responses", "responses given up", when=_HTTP
    )
    HTTP_CIRCUIT_OPENED = counter(
        "http/{component}/circuit_opened",
        "times",
        "times that requests were held back after failures in a row",
        when=_HTTP,
    )
