"""What `instruct` achieved: its records, and how they are shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploy.evaluation.intervals import Interval
from deploy.evaluation.presentation import Measure, Presentation
from deploy.evaluation.results import RecipeOutcome, figures_of, keyed
from deploy.instruct.instructions import KINDS
from deploy.screen import say

Side = Literal["before", "taught", "after"]
"""The model as it came, after the supervised stage where there is one, and the trained policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was found of one side.

    Accuracies are shares of prompts of which every instruction is followed, judged strictly.
    Answers are greedy, as in IFEval, where nothing else is said.
    """

    judge_accuracy: Interval
    """On held-out topics."""
    judge_accuracy_kinds: Interval
    """On kinds of instructions that training never asked for."""
    judge_accuracy_combinations: Interval
    """On pairs of trained kinds that training never asked for together."""
    judge_accuracy_sampled: Interval
    """On held-out topics, sampled at the temperature of training."""
    instruction_accuracy: Interval
    """Of single instructions, on held-out topics."""
    score: float
    """Mean of the run's own reward on all held-out prompts."""
    response_length: float
    """In tokens, on held-out topics."""
    distinct: float
    """Share of the answers that differ."""
    text_nll: float
    """Negative log-likelihood of text that has nothing to do with the task, nats per token."""
    capitals_known: Interval
    """Share of countries whose capital is in the answer, a second task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """All sides judged."""

    verdicts: Mapping[Side, Verdict]
    follows: Mapping[Side, Mapping[str, Interval]]
    """Share of the instructions of each kind that are followed, on all held-out prompts."""
    judge_accuracy_rise: Interval
    """After less before, prompt by prompt, on held-out topics."""
    judge_accuracy_sampled_rise: Interval
    """The same of sampled answers."""
    kl: float
    """Of the trained policy to what its training began with, nats per response."""

    def figures(self) -> dict[str, float]:
        """Return all figures by their keys in ``summary.json``."""
        figures = {"kl": self.kl}
        for name in ("judge_accuracy_rise", "judge_accuracy_sampled_rise"):
            figures |= keyed(name, getattr(self, name))
        for side, verdict in self.verdicts.items():
            figures |= figures_of(verdict, side)
            for kind, share in self.follows[side].items():
                figures |= keyed(f"follows_{kind}", share, side)
        return figures


Outcome = RecipeOutcome[Evaluation]
"""A whole run of the recipe."""


_JUDGED = (
    Measure("judge_accuracy", "prompts followed, held-out topics", "{:.1%}", "higher"),
    Measure("instruction_accuracy", "instructions followed, held-out topics", "{:.1%}", "higher"),
    Measure("judge_accuracy_sampled", "prompts followed, sampled", "{:.1%}", "higher"),
    Measure("judge_accuracy_combinations", "held-out combinations", "{:.1%}", "higher"),
    Measure("judge_accuracy_kinds", "held-out kinds", "{:.1%}", "higher"),
    Measure("capitals_known", "capitals of countries known", "{:.1%}", "higher"),
    Measure("text_nll", "NLL of other text, nats per token", "{:.3f}"),
    Measure("response_length", "answer, tokens", "{:.1f}"),
)
_KINDS = tuple(
    Measure(
        f"follows_{name}",
        f"{name.replace('_', ' ')}{'' if kind.trained else ' (held out)'}",
        "{:.0%}",
        "higher",
    )
    for name, kind in KINDS.items()
)
_SIDES = {"before": "as it came", "taught": "taught", "after": "trained"}
IN_REPORT = Presentation(
    sides=_SIDES,
    rows=(*_JUDGED, *_KINDS, Measure("score", "score by the run's own reward", "{:.3f}")),
    tiles=(
        Measure("judge_accuracy_after", "prompts followed (IFEval's checkers)", "{:.1%}"),
        Measure("judge_accuracy_before", "before training", "{:.1%}"),
        Measure("kl", "KL to where training began, nats", "{:.1f}"),
        Measure("rollouts_trained", "rollouts trained", "{:,}"),
        Measure("rollouts_dropped", "rollouts dropped", "{:,}"),
        Measure("resident_gb", "GB of memory at most", "{:.1f}"),
        Measure("seconds_pipeline", "seconds for everything", "{:.0f}"),
    ),
    stages=("import", "data", "answer", "sft", "train", "evaluate", "elsewhere"),
    samples_note=(
        "held-out prompts, evenly spaced over all of them; nothing was picked. ✓ and ✗: do "
        "IFEval's checkers find that every instruction is followed? The number is the run's own "
        "reward."
    ),
    sample_titles=("as it came", "trained"),
)


def show_outcome(console: Console, outcome: Outcome) -> None:
    """Show what the judge says of both policies, what was lost, and what it took."""
    figures = outcome.figures()
    judged = Presentation(sides=_SIDES, rows=_JUDGED, tiles=()).table(figures)
    table = Table(
        title="What IFEval's checkers say of held-out prompts", title_justify="left", box=None
    )
    for column in ("", *judged.columns):
        table.add_column(column, justify="right" if column else "left")
    for title, (*earlier, after) in judged.rows:
        table.add_row(title, *(cell.value for cell in earlier), Text(after.value, "bold"))
    console.print(table)
    found, trained = outcome.evaluation, outcome.trained
    rise = found.judge_accuracy_rise
    say(
        console,
        "prompts followed: ",
        (f"{100 * rise.mean:+.1f} points", "bold"),
        f" ({100 * rise.low:+.1f} to {100 * rise.high:+.1f}) · KL {found.kl:.1f} nats · "
        f"{trained['rollouts_trained']} of {trained['rollouts_issued']} rollouts trained, "
        f"{trained['rollouts_dropped']} dropped · {outcome.resident_gb:.1f} GB · "
        f"{outcome.seconds['pipeline']:.0f} s",
    )
