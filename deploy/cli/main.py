"""The command line: commands stand in files beside this one; how one ends in `deploy.exits`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from deploy.cli import feedback, loop, recipes, runs  # noqa: F401  (their commands are registered)
from deploy.cli.shared import app, errors
from deploy.exits import run_to_end

__all__ = ["app", "main"]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command line, and turn errors into one line and an exit code."""
    run_to_end(app, arguments, errors)
