"""The tasks of `talipot quickstart`: how each is run, and how its results are shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rich.console import Console

from common.config.run import RunConfig
from deploy.evaluation.presentation import Presentation
from deploy.instruct.outcome import IN_REPORT as INSTRUCT_REPORT
from deploy.instruct.outcome import show_outcome as show_instruct
from deploy.quickstart.outcome import IN_REPORT as DOCSTRINGS_REPORT
from deploy.quickstart.outcome import show_outcome as show_docstrings
from deploy.reasoning.outcome import presentation
from deploy.reasoning.outcome import show_outcome as show_reasoning
from deploy.reasoning.task import settings_of

if TYPE_CHECKING:
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
    from deploy.quickstart.pipeline import run_quickstart

    show_docstrings(session.console, run_quickstart(session))


def _prepare_instruct(config: RunConfig, console: Console) -> None:
    from deploy.instruct.pipeline import prepare

    prepare(config, console)


def _missing_of_instruct(config: RunConfig) -> str:
    from deploy.exchange.packaged import to_import

    return to_import(config)


def _run_instruct(session: Session) -> None:
    from deploy.instruct.pipeline import run_instruct

    show_instruct(session.console, run_instruct(session))


def _prepare_reasoning(config: RunConfig, console: Console) -> None:
    from deploy.reasoning.pipeline import prepare

    prepare(config, console)


def _missing_of_reasoning(config: RunConfig) -> str:
    from deploy.reasoning.pipeline import missing

    return missing(config)


def _run_reasoning(session: Session) -> None:
    from deploy.reasoning.pipeline import run_reasoning

    show_reasoning(session.console, run_reasoning(session))


TASKS: Final = {
    "docstrings": Task(
        _nothing, _nothing_missing, _run_docstrings, lambda config: DOCSTRINGS_REPORT
    ),
    "instruct": Task(
        _prepare_instruct, _missing_of_instruct, _run_instruct, lambda config: INSTRUCT_REPORT
    ),
    "reasoning": Task(
        _prepare_reasoning,
        _missing_of_reasoning,
        _run_reasoning,
        lambda config: presentation(list(settings_of(config).families)),
    ),
}
"""By `quickstart.kind`."""


def task_of(config: RunConfig) -> Task:
    """Return the task that a recipe is of."""
    return TASKS[config.quickstart.kind]
