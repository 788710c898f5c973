"""`talipot ...` command lines, read by the real command line's own parser; what they end with."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import typer.main

from deploy.cli.main import app


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended and what it showed."""

    code: int
    error: str
    out: str


Run = Callable[..., Outcome]


def parse(command: str) -> tuple[str, dict[str, Any]]:
    """The subcommand and its parameters; nothing runs. Raises what the command line raises."""
    program, name, *arguments = shlex.split(command)
    assert program == "talipot", command
    group: Any = typer.main.get_command(app)
    context = group.make_context("talipot", [name, *arguments])
    found = group.get_command(context, name)
    assert found is not None, f"no subcommand {name}"
    return name, found.make_context(name, arguments, parent=context).params


def refused(outcome: Outcome, code: int, *says: str) -> None:
    """The whole contract of an error."""
    assert outcome.code == code, outcome
    assert len(outcome.error.splitlines()) == 1, outcome.error
    assert outcome.error.startswith("error ")
    assert "Traceback" not in outcome.error + outcome.out
    for text in says:
        assert text in outcome.error, outcome.error
