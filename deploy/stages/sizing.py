"""How far a stage has moved what it trains: said at its end, with a warning where that is little.

Small data gives few optimizer steps, and a stage of few steps ends as well as one of many. What it
leaves is what the next stage goes on with, so it is told while it can still be made again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from rich.console import Console

from common.metric_catalogue import Logged
from deploy.screen import say

FEW_STEPS = {"sft": 100, "reward": 50, "train": 20}
"""Optimizer steps below which a stage is said to be short (docs/sizing.md): of models that began
with random weights. A pretrained one may need no more."""
LEAST_FALL = 0.02
"""Share by which the held-out loss should be lower than before the first step."""
LEAST_ACCURACY = 0.55
"""Held-out accuracy of a reward model that is more than a coin."""
LEAST_KL = 0.1
"""Nats per response that a trained policy should be away from its reference."""
_ENDS = 5
"""So many iterations at either end of a run are its beginning and its outcome."""

_ADVICE = {
    "sft": "more demonstrations, sft.epochs, a smaller sft.batch_tokens or a larger sft.lr",
    "reward": "more comparisons, reward_model.epochs, a smaller reward_model.batch_size or a "
    "larger reward_model.lr",
    "train": "more train.iterations or a larger train.lr",
}


def say_moved(
    console: Console, stage: str, steps: int, metrics: Mapping[str, float], *, pretrained: bool
) -> None:
    """Say what a supervised stage was trained on and how its held-out loss changed."""
    before, after = metrics[Logged.HELDOUT_LOSS_BEFORE], metrics[Logged.HELDOUT_LOSS]
    facts = [
        f"{steps:,} optimizer steps",
        f"{metrics[Logged.TOKENS]:,.0f} tokens",
        f"{metrics[Logged.EPOCHS]:g} {'pass' if metrics[Logged.EPOCHS] == 1 else 'passes'}",
        f"held-out loss {before:.3f} -> {after:.3f}",
    ]
    reasons = [] if pretrained else _short(stage, steps)
    if after > (1 - LEAST_FALL) * before:
        reasons.append(f"a held-out loss that was {before:.3f} and is {after:.3f}")
    accuracy = metrics.get(Logged.ACCURACY_HELDOUT)
    if accuracy is not None:
        facts.append(f"held-out accuracy {accuracy:.1%}")
        if accuracy < LEAST_ACCURACY:
            reasons.append(f"a held-out accuracy of {accuracy:.1%}")
    _tell(console, stage, facts, reasons)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """Where a metric of a run began and where it came to; one iteration alone says little."""

    first: float
    last: float
    """Means of so many iterations."""
    of: int


def ends_of(values: Sequence[float]) -> Ends:
    """Return the beginning and the outcome of a metric, of at least one iteration."""
    few = max(1, min(_ENDS, len(values) // 2))
    return Ends(first=fmean(values[:few]), last=fmean(values[-few:]), of=few)


def say_trained(
    console: Console,
    steps: Mapping[int, Mapping[str, float]],
    prompts: int,
    asked: int,
    *,
    pretrained: bool,
) -> None:
    """Say what policy training did, by its log.

    Args:
        console: where to say it.
        steps: the metrics of each iteration.
        prompts: how many different ones there are.
        asked: how many an iteration asks.
        pretrained: the model did not begin with random weights.
    """
    if not steps:
        return
    last = steps[max(steps)]
    taken = round(sum(metrics.get(Logged.POLICY_STEPS, 0.0) for metrics in steps.values()))
    facts = [
        f"{len(steps):,} iterations",
        f"{taken:,} optimizer steps",
        f"{len(steps) * asked / prompts:.3g} passes over {prompts:,} prompts",
    ]
    scores = [m[Logged.SCORE] for _, m in sorted(steps.items()) if Logged.SCORE in m]
    if scores:
        ends = ends_of(scores)
        facts.append(f"score {ends.first:.3f} -> {ends.last:.3f} (means of {ends.of} iterations)")
    reasons, kl = [] if pretrained else _short("train", taken), last.get(Logged.KL)
    if kl is not None:
        facts.append(f"KL {kl:.2f} nats")
        if kl < LEAST_KL:
            reasons.append(f"a KL to the reference of {kl:.2f} nats per response")
    _tell(console, "train", facts, reasons)


def _short(stage: str, steps: int) -> list[str]:
    return [f"only {steps} optimizer steps"] if steps < FEW_STEPS[stage] else []


def _tell(console: Console, stage: str, facts: list[str], reasons: list[str]) -> None:
    say(console, (f"  {stage}: {' · '.join(facts)}", "dim"))
    if reasons:
        say(
            console,
            ("warning ", "bold yellow"),
            f"{stage} moved little ({' and '.join(reasons)}), and what follows goes on with it; "
            f"{_ADVICE[stage]} moves it more (docs/sizing.md)",
        )
