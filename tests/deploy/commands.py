"""`talipot ...` command lines, read by the real command line's own parser; what they end with."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
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
    program, name, *arguments = shlex.split(command, comments=True)
    assert program == "talipot", command
    group: Any = typer.main.get_command(app)
    context = group.make_context("talipot", [name, *arguments])
    found = group.get_command(context, name)
    assert found is not None, f"no subcommand {name}"
    while hasattr(found, "get_command") and arguments:  # a group of commands
        context = found.make_context(name, arguments[:1], parent=context)
        name, *arguments = arguments
        found = found.get_command(context, name)
        assert found is not None, f"no subcommand {name}"
    if hasattr(found, "get_command"):
        return name, {}
    return name, found.make_context(name, arguments, parent=context).params


def refused(outcome: Outcome, code: int, *says: str) -> None:
    """The whole contract of an error."""
    assert outcome.code == code, outcome
    assert len(outcome.error.splitlines()) == 1, outcome.error
    assert outcome.error.startswith("error ")
    assert "Traceback" not in outcome.error + outcome.out
    for text in says:
        assert text in outcome.error, outcome.error


def start(command: str, path: str, *options: str, address: str = "") -> subprocess.Popen[str]:
    """A real command of its own process."""
    return subprocess.Popen(
        [sys.executable, "-m", "deploy.cli", command, "--config", path, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "RAY_ADDRESS": address},
        # A shell may have started the tests with Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def until_logged(started: subprocess.Popen[str], log: Path) -> None:
    """Wait for the first line of a run's log."""
    deadline = time.monotonic() + 150
    while not (log.exists() and log.stat().st_size):
        assert started.poll() is None, started.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
