"""Checks on what is learnt: score, distance, updates, entropy, length, values, gradients.

Numbers without a source are our choice, and silent on healthy runs.
"""

from __future__ import annotations

from math import hypot
from statistics import fmean, median, stdev

from common.metric_catalogue import Logged
from deploy.health.history import LASTING, History, Said
from deploy.run_folder.log_lines import Line

_KL_WITHOUT_TARGET = 10.0
"""Nats per response; Ziegler 2019 aimed at 6 to 10."""
_KL_BELOW = -0.05
_WINDOW = 20
_CLIPPED, _CLIPPED_MUCH = 0.3, 0.5
_UPDATE_KL = 0.02
"""Nats per token."""
_MISMATCH_KL = 3e-3
"""Nats per token. NeMo RL's guide names 1e-3; adapters that are merged into bf16 weights are at
1.5e-3 in runs of ours that learn well."""
_ENTROPY_LEFT, _ENTROPY_LEAST = 0.2, 0.1
_LONGER, _CUT, _CUT_MUCH = 1.5, 0.2, 0.5
_WITHOUT_SIGNAL = 0.5
_NORM_JUMP = 10.0


def kl(history: History) -> Said | None:
    """Tell that the policy is far from where it began, where the recipe wants to hold it there."""
    train, found = history.config.train, history.last(Logged.KL, LASTING)
    held = train.kl_coef or train.objective.kl_loss is not None
    target = train.kl_target
    limit = _KL_WITHOUT_TARGET if target is None else 2 * target
    if held and found and min(found) > limit:
        why = (
            "there is no train.kl_target" if target is None else f"twice train.kl_target={target:g}"
        )
        return (
            "warning",
            f"KL to the reference {found[-1]:.1f} nats per response, over {limit:g} ({why}) for "
            f"{LASTING} iterations",
            "read samples for answers that please the reward alone; in the next run raise "
            "train.kl_coef or lower train.lr",
        )
    many = history.last(Logged.KL, _WINDOW)
    if many and fmean(many) < min(_KL_BELOW, -3 * stdev(many) / len(many) ** 0.5):
        return (
            "warning",
            f"KL to the reference {fmean(many):.2f} nats per response, the mean of {_WINDOW} "
            "iterations: below 0 by more than its noise",
            "reference and policy are not computed alike: compare their precision, and which model "
            "the reference is",
        )
    return None


def over_optimisation(history: History) -> Said | None:
    """Tell that the score of training rises while what is held out has fallen from its best.

    (Stiennon 2020, section 4.3.) The held-out metric is `evaluate.metric`, of evaluations that
    asked for as many responses as the last and know their error.
    """
    metric = history.config.evaluate.logged_metric
    told = [
        line
        for line in history.held_out
        if metric in line.metrics
        and Logged.METRIC_ERROR in line.metrics
        and line.metrics.get(Logged.RESPONSES) == history.held_out[-1].metrics.get(Logged.RESPONSES)
    ]
    if len(told) < 3:
        return None
    best = max(told, key=lambda line: line.metrics[metric])
    if not all(_below(line, best, metric) for line in told[-2:]):
        return None
    # What iteration s trained was sampled from version s - 1.
    scored = [line for line in history.iterations if Logged.SCORE in line.metrics]
    before, after = (
        [line.metrics[Logged.SCORE] for line in scored if (line.step > best.step + 1) == later]
        for later in (False, True)
    )
    if not before or not after or fmean(after[-LASTING:]) <= fmean(before[-LASTING:]):
        return None
    return (
        "critical",
        f"held-out {metric} fell from {best.metrics[metric]:.3f} (iteration {best.step}) to "
        f"{told[-1].metrics[metric]:.3f}, by over two standard errors of the difference in two "
        f"evaluations, and the score of training rose to {fmean(after[-LASTING:]):.3f}",
        "stop, and take `--checkpoint best`; then raise train.kl_coef, or train for less",
    )


def _below(line: Line, best: Line, metric: str) -> bool:
    errors = (of.metrics[Logged.METRIC_ERROR] for of in (line, best))
    return line.metrics[metric] < best.metrics[metric] - 2 * hypot(*errors)


def update(history: History) -> Said | None:
    """Tell that one iteration moves the policy further than the clip is meant for."""
    clipped, moved = history.last(Logged.CLIP_FRACTION, 3), history.last(Logged.UPDATE_KL, 3)
    lower = "lower train.lr, or train.e_pi or train.minibatches, the steps on the same rollouts"
    sequences = history.config.train.objective.ratio == "sequence"  # clips much more on purpose
    if clipped and min(clipped) > _CLIPPED and not sequences:
        much = min(clipped) > _CLIPPED_MUCH
        limit = _CLIPPED_MUCH if much else _CLIPPED
        return (
            "critical" if much else "warning",
            f"{clipped[-1]:.0%} of tokens clipped, over {limit:.0%} for 3 iterations",
            lower,
        )
    if moved and min(moved) > _UPDATE_KL:
        return (
            "warning",
            f"one update moves the policy by {moved[-1]:.3f} nats per token, over {_UPDATE_KL:g} "
            "for 3 iterations",
            lower,
        )
    return None


def mismatch(history: History) -> Said | None:
    """Tell that sampler and learner compute other probabilities."""
    found = history.last(Logged.MISMATCH_KL, 3)
    if history.config.train.max_staleness or not found or min(found) <= _MISMATCH_KL:
        return None  # an older policy is another one, and is corrected for
    return (
        "warning",
        f"sampler and learner differ by {found[-1]:.2g} nats per token, over {_MISMATCH_KL:g} for "
        "3 iterations",
        "set rollout.precision and learner.precision alike; train.behavior_level says how what is "
        "left is corrected",
    )


def entropy(history: History) -> Said | None:
    """Tell that the policy has stopped to try other answers."""
    start, found = history.first(Logged.ENTROPY), history.last(Logged.ENTROPY, LASTING)
    if len(start) < LASTING or len(history.iterations) <= LASTING or not found:
        return None
    least = max(_ENTROPY_LEFT * fmean(start), min(_ENTROPY_LEAST, 0.5 * fmean(start)))
    if max(found) >= least:
        return None
    return (
        "warning",
        f"entropy {found[-1]:.3f} nats per token, under {least:.3f} for {LASTING} iterations "
        f"(it began with {fmean(start):.2f})",
        "set train.entropy_coef, or clip_high above clip_range (train.objective); a lower train.lr "
        "keeps it longer",
    )


def length(history: History) -> Said | None:
    """Tell that responses grow, or are cut at the limit."""
    start = history.first(Logged.RESPONSE_LENGTH)
    found = history.last(Logged.RESPONSE_LENGTH, LASTING)
    most = history.config.rollout.max_response_tokens
    if len(history.iterations) > 2 * LASTING and found and min(found) > _LONGER * fmean(start):
        return (
            "warning",
            f"responses of {found[-1]:.0f} tokens, over {_LONGER:g} times the {fmean(start):.0f} "
            f"of the start for {LASTING} iterations",
            "read the longest samples; train.objective.overlong makes length cost something",
        )
    cut = [1 - share for share in history.last(Logged.EOS_SHARE, LASTING)]
    at_first = [1 - share for share in history.first(Logged.EOS_SHARE)]
    if not cut or min(cut) <= (limit := max(_CUT, min(_LONGER * fmean(at_first), _CUT_MUCH))):
        return None
    return (
        "warning",
        f"{cut[-1]:.0%} of responses are cut at {most} tokens, over {limit:.0%} for "
        f"{LASTING} iterations",
        "raise rollout.max_response_tokens; a lower train.missing_eos_penalty makes an answer "
        "without an end cost more",
    )


def signal(history: History) -> Said | None:
    """Tell that scores do not tell responses apart."""
    train = history.config.train
    equal = history.last(Logged.EQUAL_GROUPS, LASTING)
    spread = history.last(Logged.SCORE_DEVIATION, LASTING)
    if train.batch_size > 1 and spread and max(spread) < 1e-6:
        return (
            "critical",
            f"all responses of an iteration had one score, for {LASTING} iterations",
            "look at the reward with `talipot validate`: it gives every response the same",
        )
    if train.needs.least_responses > 1 and equal and min(equal) > _WITHOUT_SIGNAL:
        return (
            "warning",
            f"{equal[-1]:.0%} of prompts have responses of one score, over {_WITHOUT_SIGNAL:.0%} "
            f"for {LASTING} iterations: nothing is learnt from them",
            "train.dynamic_sampling takes others in their place, data.curriculum leaves them out; "
            "or take easier or harder prompts",
        )
    return None


def value(history: History) -> Said | None:
    """Tell that the value function explains nothing."""
    explained = history.last(Logged.EXPLAINED_VARIANCE, LASTING * 2)
    if len(history.iterations) > 4 * LASTING and explained and max(explained) < 0:
        return (
            "warning",
            f"the value function explains {explained[-1]:.2f} of the returns' variance, below 0 "
            f"for {2 * LASTING} iterations: worse than a constant",
            "raise train.value_lr, let values learn alone first (train.value_warmup), or take an "
            "algorithm without values (grpo, rloo)",
        )
    return None


def gradient(history: History) -> Said | None:
    """Tell that gradients jump."""
    norms = [
        line.metrics[Logged.GRADIENT_NORM]
        for line in history.iterations
        if Logged.GRADIENT_NORM in line.metrics
    ]
    if len(norms) > LASTING * 2 and norms[-1] > _NORM_JUMP * (usual := median(norms[:-1])) > 0:
        return (
            "warning",
            f"gradient norm {norms[-1]:.2g}, over {_NORM_JUMP:g} times its median {usual:.2g}",
            "look at this iteration's samples and scores; it was cut to train.max_grad_norm",
        )
    return None
