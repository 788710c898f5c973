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
