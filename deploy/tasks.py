"""The tasks of `talipot quickstart`: how each is run, and how its results are shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from rich.console import Console

from common.config.run import RunConfig
from deploy.evaluation.presentation import Presentation
from deploy.exchange.packaged import to_import
from deploy.instruct.outcome import IN_REPORT as INSTRUCT_REPORT
from deploy.instruct.outcome import show_outcome as show_instruct
from deploy.instruct.pipeline import prepare as prepare_instruct
from deploy.instruct.pipeline import run_instruct
from deploy.quickstart.outcome import IN_REPORT as DOCSTRINGS_REPORT
from deploy.quickstart.outcome import show_outcome as show_docstrings
from deploy.quickstart.pipeline import run_quickstart
from deploy.reasoning.outcome import presentation
from deploy.reasoning.outcome import show_outcome as show_reasoning
from deploy.reasoning.pipeline import missing as missing_of_reasoning
from deploy.reasoning.pipeline import prepare as prepare_reasoning
from deploy.reasoning.pipeline import run_reasoning
from deploy.reasoning.task import settings_of
from deploy.stages.session import Session


@dataclass(frozen=True, slots=True)
class Task:
    """A task as the command line knows it."""

    prepare: Callable[[RunConfig, Console], None]
    """Makes what has to be there before a session opens."""
    missing: Callable[[RunConfig], str]
    """Says what of that it will make, in one line; empty where all is there."""
    run: Callable[[Session], None]
    """Takes it from its data to its results, and shows these."""
    report: Callable[[RunConfig], Presentation]
    """How the report of a recipe shows them."""


def _nothing(config: RunConfig, console: Console) -> None:
    """Make nothing."""


def _nothing_missing(config: RunConfig) -> str:
    return ""


def _run_docstrings(session: Session) -> None:
    show_docstrings(session.console, run_quickstart(session))


def _run_instruct(session: Session) -> None:
    show_instruct(session.console, run_instruct(session))


def _run_reasoning(session: Session) -> None:
    show_reasoning(session.console, run_reasoning(session))


TASKS: Final = {
    "docstrings": Task(
        _nothing, _nothing_missing, _run_docstrings, lambda config: DOCSTRINGS_REPORT
    ),
    "instruct": Task(prepare_instruct, to_import, _run_instruct, lambda config: INSTRUCT_REPORT),
    "reasoning": Task(
        prepare_reasoning,
        missing_of_reasoning,
        _run_reasoning,
        lambda config: presentation(list(settings_of(config).families)),
    ),
}
"""By `quickstart.kind`."""


def task_of(config: RunConfig) -> Task:
    """Return the task that a recipe is of."""
    return TASKS[config.quickstart.kind]
