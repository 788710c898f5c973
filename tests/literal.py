"""The papers' equations, transcribed literally: plain floats, lists and loops.

Slow and obvious on purpose, and sharing no code with `learner`: the tests of the fast path compare
against it. A mask is a list of bools, True = a real response token. A ragged tensor ``[B, R]`` is a
list of rows; whatever stands outside the mask must never be read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Rows = list[list[float]]
Mask = list[list[bool]]


def inside(x: Rows, mask: Mask) -> list[float]:
    """The entries of real response tokens, row by row."""
    return [x[b][t] for b in range(len(x)) for t in range(len(x[b])) if mask[b][t]]


def gae(rewards: Rows, values: Rows, mask: Mask, gamma: float, lam: float) -> tuple[Rows, Rows]:
    """Eq. 16 of arXiv 1506.02438 as the sum it is: ``A_t = sum_l (gamma lambda)^l delta_{t+l}``."""
    advantages, returns = [], []
    for b in range(len(rewards)):
        length = sum(mask[b])
        deltas = []
        for t in range(length):
            value_after = values[b][t + 1] if t + 1 < length else 0.0
            deltas.append(rewards[b][t] + gamma * value_after - values[b][t])
        row = [0.0] * len(rewards[b])
        target = [0.0] * len(rewards[b])
        for t in range(length):
            row[t] = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length))
            target[t] = row[t] + values[b][t]
        advantages.append(row)
        returns.append(target)
    return advantages, returns


def moments(numbers: Sequence[float]) -> tuple[float, float]:
    """Mean and population variance."""
    mean = math.fsum(numbers) / len(numbers)
    return mean, math.fsum((x - mean) ** 2 for x in numbers) / len(numbers)


def whiten(x: Rows, mask: Mask, shift_mean: bool, eps: float) -> Rows:
    """``(x - mean) / sqrt(variance + eps)`` over the mask, plus the mean if it is not shifted."""
    mean, variance = moments(inside(x, mask))
    kept = 0.0 if shift_mean else mean
    return [
        [
            (x[b][t] - mean) / math.sqrt(variance + eps) + kept if mask[b][t] else 0.0
            for t in range(len(x[b]))
        ]
        for b in range(len(x))
    ]


def clip(x: float, low: float, high: float) -> float:
    """x, or the bound that it passed."""
    if x < low:
        return low
    if x > high:
        return high
    return x


def policy_loss(
    logprobs: Rows,
    proximal: Rows,
    advantages: Rows,
    mask: Mask,
    *,
    clip_range: float,
    normalizer: float,
    weights: Rows | None,
) -> dict[str, float]:
    """Eq. 7 of arXiv 1707.06347 (negated), token by token, and the sums logged with it."""
    found = {"loss": 0.0, "clipped": 0.0, "k3": 0.0}
    for b in range(len(logprobs)):
        for t in range(len(logprobs[b])):
            if not mask[b][t]:
                continue
            advantage = advantages[b][t]
            ratio = math.exp(logprobs[b][t]) / math.exp(proximal[b][t])
            limited = clip(ratio, 1 - clip_range, 1 + clip_range)
            weight = 1.0 if weights is None else weights[b][t]
            found["loss"] -= weight * min(ratio * advantage, limited * advantage) / normalizer
            if limited != ratio and (ratio > 1) == (advantage > 0):
                found["clipped"] += 1
            k1 = proximal[b][t] - logprobs[b][t]
            found["k3"] += math.exp(-k1) - 1 + k1
    return found


def value_loss(
    values: Rows,
    old_values: Rows,
    returns: Rows,
    mask: Mask,
    *,
    clip_range: float | None,
    normalizer: float,
) -> tuple[float, int]:
    """``0.5 max((V - R)^2, (V_clipped - R)^2)`` and how often the clipped one was greater."""
    loss, clipped = 0.0, 0
    for b in range(len(values)):
        for t in range(len(values[b])):
            if not mask[b][t]:
                continue
            error = (values[b][t] - returns[b][t]) ** 2
            if clip_range is not None:
                old = old_values[b][t]
                near = clip(values[b][t], old - clip_range, old + clip_range)
                near_error = (near - returns[b][t]) ** 2
                clipped += near_error > error
                error = max(error, near_error)
            loss += 0.5 * error / normalizer
    return loss, clipped


def softmax(logits: Sequence[float]) -> list[float]:
    """Probabilities."""
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / math.fsum(weights) for w in weights]


def entropy(logits: Sequence[float]) -> float:
    """``- sum p log p`` in nats."""
    return -math.fsum(p * math.log(p) for p in softmax(logits))


def kl(p_logits: Sequence[float], q_logits: Sequence[float]) -> float:
    """``KL(p || q) = sum p log(p / q)``."""
    p, q = softmax(p_logits), softmax(q_logits)
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def clone_kl(old: list[Rows], new: list[Rows], mask: Mask, normalizer: float) -> float:
    """The second term of L_joint, arXiv 2009.04416 (without beta_clone): KL(pi_old || pi)."""
    total = 0.0
    for b in range(len(mask)):
        for t in range(len(mask[b])):
            if mask[b][t]:
                total += kl(old[b][t], new[b][t])
    return total / normalizer


def auxiliary_value_loss(v_aux: Rows, v_targ: Rows, mask: Mask, normalizer: float) -> float:
    """L_aux of arXiv 2009.04416: ``0.5 (V_aux - V_targ)^2``."""
    pairs = zip(inside(v_aux, mask), inside(v_targ, mask), strict=True)
    return sum(0.5 * (v - target) ** 2 for v, target in pairs) / normalizer


def shape_rewards(
    scores: Sequence[float], logprobs: Rows, ref_logprobs: Rows, mask: Mask, *, kl_coef: float
) -> Rows:
    """The penalty on every response token, the score on the last of them."""
    shaped = []
    for b in range(len(logprobs)):
        row = [0.0] * len(logprobs[b])
        last = -1
        for t in range(len(row)):
            if mask[b][t]:
                row[t] = -kl_coef * (logprobs[b][t] - ref_logprobs[b][t])
                last = t
        row[last] += scores[b]
        shaped.append(row)
    return shaped


def adaptive_kl(coef: float, kl: float, n: int, target: float, horizon: int) -> float:
    """The next coefficient (section 2.2 of arXiv 1909.08593), of one horizon at most."""
    error = clip((kl - target) / target, -0.2, 0.2)
    return coef * (1 + error * (n / horizon if n < horizon else 1))


def eos_trick(scores: Sequence[float], ended: Sequence[bool], penalty: float) -> list[float]:
    """What never ended scores no more than so many deviations beside the mean of what ended."""
    finished = [score for score, end in zip(scores, ended, strict=True) if end]
    bound = penalty
    if len(set(finished)) > 1:
        mean, variance = moments(finished)
        bound = mean + penalty * math.sqrt(variance)
    elif finished:
        bound = min(penalty, finished[0])
    return [s if end else min(s, bound) for s, end in zip(scores, ended, strict=True)]


def _spread(advantages: Sequence[float], mask: Mask) -> Rows:
    return [[a if real else 0.0 for real in row] for a, row in zip(advantages, mask, strict=True)]


def rloo(rewards: Sequence[float], groups: Sequence[int], mask: Mask) -> Rows:
    """``r_i - 1/(k-1) sum_{j != i} r_j`` over the k responses of a prompt (arXiv 2402.14740)."""
    advantages = []
    for i in range(len(rewards)):
        others = [rewards[j] for j in range(len(rewards)) if j != i and groups[j] == groups[i]]
        advantages.append(rewards[i] - sum(others) / len(others))
    return _spread(advantages, mask)


def grpo(rewards: Sequence[float], groups: Sequence[int], mask: Mask, *, eps: float) -> Rows:
    """``(r_i - mean) / (std + eps)`` over the responses of a prompt (arXiv 2402.03300)."""
    advantages = []
    for i in range(len(rewards)):
        mean, variance = moments(
            [r for r, g in zip(rewards, groups, strict=True) if g == groups[i]]
        )
        advantages.append((rewards[i] - mean) / (math.sqrt(variance) + eps))
    return _spread(advantages, mask)


def reinforce_pp(rewards: Rows, mask: Mask, gamma: float, eps: float) -> Rows:
    """``sum_{k >= t} gamma^(k-t) r_k``, normalised over the batch (arXiv 2501.03262)."""
    togo = []
    for b in range(len(rewards)):
        length = sum(mask[b])
        row = [0.0] * len(rewards[b])
        for t in range(length):
            row[t] = sum(gamma ** (k - t) * rewards[b][k] for k in range(t, length))
        togo.append(row)
    return whiten(togo, mask, True, eps)


# ----------------------------------------------- objectives after PPO


def surrogate_loss(
    logprobs: Rows,
    proximal: Rows,
    advantages: Rows,
    mask: Mask,
    *,
    low: float,
    high: float,
    ratio: str,
    clip_weight: bool,
    dual: float | None,
    aggregation: str,
    longest: int,
) -> float:
    """The negated objectives of GRPO, DAPO, GSPO, CISPO, Dr. GRPO, with a dual clip, in sums."""
    rows = []
    for b in range(len(logprobs)):
        length = sum(mask[b])
        logs = [logprobs[b][t] - proximal[b][t] for t in range(length)]
        terms = []
        for t in range(length):
            rho = math.exp(math.fsum(logs) / length) if ratio == "sequence" else math.exp(logs[t])
            advantage = advantages[b][t]
            held = clip(rho, 1 - low, 1 + high)
            if clip_weight:
                terms.append(held * advantage * logprobs[b][t])
                continue
            objective = min(rho * advantage, held * advantage)
            if dual is not None and advantage < 0:
                objective = max(objective, dual * advantage)
            terms.append(objective)
        rows.append(terms)
    if aggregation == "sequences":
        return -math.fsum(math.fsum(terms) / len(terms) for terms in rows) / len(rows)
    total = -math.fsum(math.fsum(terms) for terms in rows)
    if aggregation == "constant":
        return total / (len(rows) * longest)
    return total / sum(len(terms) for terms in rows)


def mismatch_weights(
    proximal: Rows, behavior: Rows, mask: Mask, *, sequence: bool, leave_out: bool, cap: float
) -> Rows:
    """``min(w, cap)``, or w inside the bounds and 0 outside, by token or by product of tokens."""
    out = [[0.0] * len(row) for row in mask]
    for b in range(len(mask)):
        length = sum(mask[b])
        tokens = [math.exp(proximal[b][t] - behavior[b][t]) for t in range(length)]
        for t in range(length):
            weight = math.prod(tokens) if sequence else tokens[t]
            if leave_out:
                out[b][t] = weight if 1 / cap <= weight <= cap else 0.0
            else:
                out[b][t] = min(weight, cap)
    return out


def dr_grpo(rewards: Sequence[float], groups: Sequence[int], mask: Mask) -> Rows:
    """arXiv 2503.20783: the reward less the mean of its group."""
    advantages = []
    for reward, group in zip(rewards, groups, strict=True):
        peers = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        advantages.append(reward - math.fsum(peers) / len(peers))
    return _spread(advantages, mask)


def overlong(length: int, longest: int, buffer: int, penalty: float) -> float:
    """Equation 13 of arXiv 2503.14476, negated, case by case."""
    if length <= longest - buffer:
        return 0.0
    if length <= longest:
        return penalty * (length - (longest - buffer)) / buffer
    return penalty
