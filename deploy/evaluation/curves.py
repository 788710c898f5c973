"""The curves of a run: which metrics are drawn, in what order, under which titles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from common.metric_catalogue import Logged
from common.metric_names import logged_as
from deploy.evaluation.charts import MOST_MARKS, Series, line_chart
from deploy.run_folder.log_lines import Line

_CURVES: dict[str, tuple[tuple[Logged, str], ...]] = {
    "sft": (
        (Logged.LOSS, "Loss, nats per token"),
        (Logged.HELDOUT_LOSS, "Loss on held-out data, nats per token"),
        (Logged.TOKENS_PER_SECOND, "Tokens per second"),
    ),
    "reward": (
        (Logged.LOSS, "Loss"),
        (Logged.HELDOUT_LOSS, "Loss on held-out comparisons"),
        (Logged.ACCURACY, "Accuracy on training batches"),
        (Logged.ACCURACY_HELDOUT, "Accuracy on held-out comparisons"),
    ),
    "held_out": (
        (Logged.SCORE, "Score per response"),
        (Logged.PASS_AT, "Prompts solved, pass@{k}"),
        (Logged.SOURCE_SCORE, "Score of the source {source}"),
        (Logged.GREEDY_SCORE, "Mean score, greedily"),
        (Logged.GREEDY_SOLVED, "Prompts solved, greedily"),
        (Logged.KL, "KL to the reference policy, nats per response"),
        (Logged.RESPONSE_LENGTH, "Response length, tokens"),
        (Logged.EOS_SHARE, "Share of responses that end"),
    ),
    "train": (
        (Logged.SCORE, "Score per response"),
        (Logged.COMPONENT, "Component of the score: {component}"),
        (Logged.SOURCE_SCORE, "Score of the source {source}"),
        (Logged.KL, "KL to the reference policy, nats per response"),
        (Logged.ENTROPY, "Entropy, nats per token"),
        (Logged.RESPONSE_LENGTH, "Response length, tokens"),
        (Logged.EOS_SHARE, "Share of responses that end"),
        (Logged.EXPLAINED_VARIANCE, "Explained variance of the value network"),
        (Logged.VALUE_LOSS, "Value loss"),
        (Logged.CLIP_FRACTION, "Share of clipped tokens"),
        (Logged.UPDATE_KL, "KL of one update, nats per token"),
        (Logged.AUXILIARY_VALUE_LOSS, "Auxiliary value loss"),
        (Logged.AUXILIARY_CLONE_KL, "KL that cloning allowed, nats per token"),
        (Logged.STALENESS, "Staleness, versions"),
        (Logged.TOKENS_PER_SECOND, "Sampled tokens per second and actor"),
        (Logged.SECONDS, "Seconds per iteration"),
    ),
}
_TITLES = {
    "sft": "Supervised policy",
    "reward": "Reward model",
    "train": "Policy",
    "held_out": "Held-out prompts while the policy was trained",
}
_AT_THE_END = (Logged.HELDOUT_LOSS, Logged.ACCURACY_HELDOUT)
"""Measured once, where the recipe does not ask for more."""
_COMPONENT = Logged.COMPONENT.partition("{")[0]

Steps = dict[int, Mapping[str, float]]
"""The metrics of each step of a stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One curve of a page."""

    title: str
    svg: Markup


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """The curves of one stage."""

    stage: str
    title: str
    note: str
    charts: list[Chart] = field(default_factory=list)
    still: list[str] = field(default_factory=list)
    """What was left out, as its values did not differ, with the value."""
    marks: str = ""
    """What the ticks on the axis say, or why there are none."""


def steps_of(lines: Sequence[Line], stage: str) -> Steps:
    """Return a stage's steps in their order; of one that was logged twice, the later line."""
    steps: Steps = {line.step: line.metrics for line in lines if line.stage == stage}
    return dict(sorted(steps.items()))


def series_of(steps: Steps) -> Iterator[tuple[str, str, list[int], list[float]]]:
    """Yield name, title, steps and values of what is drawn of a policy's training, in its order."""
    yield from _series("train", steps)


def sections(lines: Sequence[Line]) -> list[Section]:
    """Draw the curves of each stage that say something."""
    found = []
    for stage in _CURVES:
        steps = steps_of(lines, stage)
        if not steps:
            continue
        marks = [s for s in steps if Logged.AUXILIARY_SECONDS in steps[s]]
        section = Section(
            stage=stage, title=_TITLES[stage], note=_note(stage, steps), marks=_marks(marks)
        )
        for name, title, at, values in _series(stage, steps):
            if name == Logged.STALENESS and not any(values):
                continue  # a synchronous run has none
            series = Series(title=title, steps=at, values=values, marks=marks)
            if series.says_something:
                section.charts.append(Chart(title=title, svg=line_chart(series)))
            else:
                section.still.append(f"{title[0].lower()}{title[1:]}: {values[-1]:.4g}")
        found.append(section)
    return found


def _series(stage: str, steps: Steps) -> Iterator[tuple[str, str, list[int], list[float]]]:
    for metric, title in _CURVES[stage]:
        names = {str(metric): title}
        if metric is Logged.COMPONENT:
            parts = sorted({n for m in steps.values() for n in m if n.startswith(_COMPONENT)})
            labels = [name.removeprefix(_COMPONENT) for name in parts]
            # A single one is the score.
            names = {
                name: title.format(component=label)
                for name, label in zip(parts, labels, strict=True)
                if len(parts) > 1
            }
        elif metric.labels:
            there = sorted({n for m in steps.values() for n in m}, key=_natural)
            names = {
                name: title.format(**found)
                for name in there
                if (found := _labels(metric, name)) is not None
            }
        for name, text in names.items():
            at = [step for step in steps if name in steps[step]]
            if at and (len(at) > 1 or metric not in _AT_THE_END):
                yield name, text, at, [float(steps[step][name]) for step in at]


def _labels(metric: Logged, name: str) -> Mapping[str, str] | None:
    """Return the labels of a metric that is logged under this name; None where it is another's."""
    try:
        found, labels = logged_as(name)
    except KeyError:  # of a version that had others
        return None
    return labels if found is metric else None


def _natural(name: str) -> tuple[int, str]:
    """Sort pass@8 before pass@16."""
    return len(name), name


def plural(number: float, what: str) -> str:
    """Write a number of things."""
    return f"{number:g} {what}" if number == 1 else f"{number:g} {what}s"


def _marks(marks: Sequence[int]) -> str:
    if len(marks) > MOST_MARKS:
        return f"An auxiliary phase ran {len(marks)} times."
    return "Ticks on the axis: an auxiliary phase ran." if marks else ""


def _note(stage: str, steps: Steps) -> str:
    """Say what a supervised stage was trained on and how far it came, as it logged that."""
    if stage == "train":
        return ""
    last, facts = steps[max(steps)], [f"{max(steps):,} optimizer steps"]
    if Logged.TOKENS in last:
        facts.append(f"{last[Logged.TOKENS]:,.0f} tokens")
    if Logged.EPOCHS in last:
        facts.append(plural(last[Logged.EPOCHS], "epoch"))
    if Logged.HELDOUT_LOSS in last:
        before = last.get(Logged.HELDOUT_LOSS_BEFORE)
        since = "" if before is None else f"{before:.3f} → "
        facts.append(f"held-out loss {since}{last[Logged.HELDOUT_LOSS]:.3f}")
    if Logged.ACCURACY_HELDOUT in last:
        facts.append(f"held-out accuracy {last[Logged.ACCURACY_HELDOUT]:.1%}")
    return " · ".join(facts) + "."
