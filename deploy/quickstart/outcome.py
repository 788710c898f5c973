"""What the quickstart achieved: its records, and how they are shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploy.evaluation.intervals import Interval
from deploy.evaluation.presentation import (
    KL,
    NLL,
    RESPONSE_LENGTH,
    SCORE,
    Measure,
    Presentation,
)
from deploy.evaluation.results import PolicyComparison, figures_of
from deploy.screen import say

Side = Literal["sft", "policy", "best_of_n", "human"]
"""Who wrote the lines: a policy, the supervised one with the best of N samples, or people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the judges say of one side's lines."""

    judge_conformance: Interval
    """Share of the lines that ruff has nothing against (PEP 257)."""
    rouge_l: Interval
    """ROUGE-L to the human line."""
    distinct: float
    """Share of the lines that differ."""
    quality: float | None = None
    """The labeler's opinion without noise; nobody asks for that of people's lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The policies compared with each other, and every side judged."""

    comparison: PolicyComparison
    """By the labeler's quality."""
    verdicts: Mapping[Side, Verdict]
    kl_best_of_n: float | None = None

    def figures(self) -> dict[str, float]:
        """Return all figures by their keys in ``summary.json``."""
        figures = figures_of(self.comparison)
        if self.kl_best_of_n is not None:
            figures["kl_best_of_n"] = self.kl_best_of_n
        for side, verdict in self.verdicts.items():
            figures |= figures_of(verdict, side)
        return figures


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A whole quickstart."""

    reward_model_accuracy: float
    sft_heldout_loss: float
    comparisons: int
    comparison_ties: int
    trained: Mapping[str, Any]
    """The controller's facts on policy training."""
    evaluation: Evaluation
    seconds: Mapping[str, float]
    """Wall time of each stage, and of all of them under ``pipeline``."""

    def figures(self) -> dict[str, Any]:
        """Return all figures by their keys in ``summary.json``."""
        return {
            "reward_model_accuracy": self.reward_model_accuracy,
            "sft_heldout_loss": self.sft_heldout_loss,
            "comparisons": self.comparisons,
            "comparison_ties": self.comparison_ties,
            **self.trained,
            **self.evaluation.figures(),
            **{f"seconds_{name}": seconds for name, seconds in self.seconds.items()},
        }


_JUDGED = (
    Measure("judge_conformance", "PEP 257 conformance (ruff)", "{:.1%}", "higher"),
    Measure("rouge_l", "ROUGE-L to the human line", "{:.3f}", "higher"),
    Measure("quality", "labeler's quality", "{:.3f}"),
    Measure("distinct", "distinct lines", "{:.1%}"),
    RESPONSE_LENGTH,
    NLL,
)
ON_SCREEN = Presentation(sides={"sft": "supervised", "policy": "policy"}, rows=_JUDGED, tiles=())
IN_REPORT = Presentation(
    sides={"human": "people's lines", "sft": "supervised", "policy": "trained policy"},
    rows=(*_JUDGED, SCORE),
    tiles=(
        KL,
        Measure("reward_model_accuracy", "reward model, held-out accuracy", "{:.1%}"),
        Measure("rollouts_trained", "rollouts trained", "{:,}"),
        Measure("rollouts_dropped", "rollouts dropped", "{:,}"),
        Measure("seconds_pipeline", "seconds for everything", "{:.0f}"),
    ),
    stages=("harvest", "tokenizer", "sft", "comparisons", "reward", "train", "evaluate"),
    samples_note=(
        "held-out signatures, evenly spaced over all of them in alphabetical order; nothing was "
        "picked. ✓ and ✗: does ruff find that the line keeps to PEP 257? The number is the reward "
        "model's score."
    ),
)


def show_outcome(console: Console, outcome: Outcome) -> None:
    """Show what the judges say of both policies, and what it took."""
    judged = ON_SCREEN.table(outcome.figures())
    table = Table(
        title="What the judges say of held-out signatures", title_justify="left", box=None
    )
    for column in ("", *judged.columns):
        table.add_column(column, justify="right" if column else "left")
    for title, (supervised, policy) in judged.rows:
        table.add_row(title, supervised.value, Text(policy.value, "bold"))
    console.print(table)
    comparison, trained = outcome.evaluation.comparison, outcome.trained
    rate = comparison.win_rate
    say(
        console,
        "win rate ",
        (f"{rate.mean:.1%}", "bold"),
        f" ({rate.low:.1%} to {rate.high:.1%}, ties {comparison.ties_share:.1%} left out; "
        f"{comparison.pairs_judged} of {comparison.pairs_asked} prompts judged) · "
        f"KL {comparison.kl:.1f} nats · "
        f"{trained['rollouts_trained']} of {trained['rollouts_issued']} rollouts trained, "
        f"{trained['rollouts_dropped']} dropped · {outcome.seconds['pipeline']:.0f} s",
    )
