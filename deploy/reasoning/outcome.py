"""What `reasoning` achieved: its records, and how they are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploy.evaluation.intervals import Interval
from deploy.evaluation.presentation import Measure, Presentation
from deploy.evaluation.results import RecipeOutcome, keyed
from deploy.screen import say

Side = Literal["came", "before", "after"]
"""The model as it came, what policy training began with (taught, where there is a supervised
stage), and the trained policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the library says of one side's answers to one family."""

    accuracy: Interval
    """Share of held-out questions that are answered right, greedily."""
    sampled: Interval
    """The same of answers that are sampled at the temperature of training."""
    form: float
    """Share of greedy answers that are in the form in which the library reads them."""
    response_length: float
    """Of greedy answers, in tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """All sides judged."""

    found: Mapping[Side, Mapping[str, Found]]
    """By family."""
    rise: Mapping[str, Interval]
    """After less before, question by question, greedily."""
    rise_sampled: Mapping[str, Interval]
    questions: Mapping[str, int]
    """Held-out questions of each family."""
    overlapping: Mapping[str, int]
    """Those that were left out since training has them too."""
    kl: float
    """Of the trained policy to what its training began with, nats per response."""

    def figures(self) -> dict[str, Any]:
        """Return all figures by their keys in ``summary.json``.

        Each is a mapping from family; for the report each stands under a key of its own as well.
        """
        figures: dict[str, Any] = {
            "kl": self.kl,
            "questions": dict(self.questions),
            "overlapping": dict(self.overlapping),
            **_mapped("judge_accuracy_rise", self.rise),
            **_mapped("judge_accuracy_sampled_rise", self.rise_sampled),
        }
        for side, families in self.found.items():
            accuracy = {family: found.accuracy for family, found in families.items()}
            sampled = {family: found.sampled for family, found in families.items()}
            figures |= _mapped("judge_accuracy", accuracy, side)
            figures |= _mapped("judge_accuracy_sampled", sampled, side)
            for family, found in families.items():
                figures |= keyed(f"right_{family}", found.accuracy, side)
                figures |= keyed(f"right_sampled_{family}", found.sampled, side)
                figures |= keyed(f"form_{family}", found.form, side)
                figures |= keyed(f"response_length_{family}", found.response_length, side)
        return figures


Outcome = RecipeOutcome[Evaluation]
"""A whole run of the recipe."""


def _mapped(name: str, values: Mapping[str, Interval], side: str = "") -> dict[str, Any]:
    """Return the figures of families under one key each: a value, and both ends of its interval."""
    keys = [keyed(name, value, side) for value in values.values()]
    return {key: dict(zip(values, (of[key] for of in keys), strict=True)) for key in keys[0]}


_SIDES = {"came": "as it came", "before": "taught", "after": "trained"}


def presentation(families: Sequence[str]) -> Presentation:
    """Return how the results of these families are shown."""
    rows = []
    for family in families:
        title = family.replace("_", " ")
        rows += [
            Measure(f"right_{family}", f"{title}: right", "{:.1%}", "higher"),
            Measure(f"right_sampled_{family}", f"{title}: right, sampled", "{:.1%}", "higher"),
            Measure(f"form_{family}", f"{title}: in the asked form", "{:.1%}"),
        ]
    tiles = [
        Measure(f"right_{family}_{side}", f"{family.replace('_', ' ')}, {when}", "{:.1%}")
        for family in families
        for side, when in (("before", "before policy training"), ("after", "after"))
    ]
    return Presentation(
        sides=_SIDES,
        rows=tuple(rows),
        tiles=(
            *tiles,
            Measure("kl", "KL to where training began, nats", "{:.1f}"),
            Measure("rollouts_trained", "rollouts trained", "{:,}"),
            Measure("rollouts_dropped", "rollouts dropped", "{:,}"),
            Measure("seconds_pipeline", "seconds for everything", "{:.0f}"),
        ),
        stages=("import", "data", "sft", "train", "evaluate"),
        samples_note=(
            "held-out questions, evenly spaced over all of them; nothing was picked. ✓ and ✗: does "
            "the library's verifier call the greedy answer right? The number is its score."
        ),
        sample_titles=("taught", "trained"),
    )


def show_outcome(console: Console, outcome: Outcome) -> None:
    """Show what the library says of all sides, and what it took."""
    found, trained = outcome.evaluation, outcome.trained
    figures = outcome.figures()
    judged = presentation(list(found.rise)).table(figures)
    table = Table(
        title="What reasoning-gym's verifiers say of held-out questions",
        title_justify="left",
        box=None,
    )
    for column in ("", *judged.columns):
        table.add_column(column, justify="right" if column else "left")
    for title, (*earlier, after) in judged.rows:
        table.add_row(title, *(cell.value for cell in earlier), Text(after.value, "bold"))
    console.print(table)
    for family, rise in found.rise.items():
        out = found.overlapping[family]
        say(
            console,
            f"{family}: ",
            (f"{100 * rise.mean:+.1f} points", "bold"),
            f" ({100 * rise.low:+.1f} to {100 * rise.high:+.1f}) by policy training, on "
            f"{found.questions[family]} held-out questions"
            + (f" ({out} more are in training too, and left out)" if out else ""),
        )
    say(
        console,
        f"KL {found.kl:.1f} nats · {trained['rollouts_trained']} of {trained['rollouts_issued']} "
        f"rollouts trained, {trained['rollouts_dropped']} dropped · {outcome.resident_gb:.1f} GB · "
        f"{outcome.seconds['pipeline']:.0f} s",
    )
