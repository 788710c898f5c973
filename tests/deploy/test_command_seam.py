"""A new command is one function: its options, output, errors and exit codes come with it."""

from __future__ import annotations

import pytest

from common.errors import DataError
from deploy.cli.shared import app, console
from deploy.screen import say
from tests.deploy.commands import Outcome, Run, parse


def test_a_command_of_ones_own(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "registered_commands", [*app.registered_commands])

    @app.command()
    def greet(name: str, twice: bool = False) -> None:
        """Greet somebody."""
        if name == "nobody":
            raise DataError("nobody: there is no such person; greet somebody")
        say(console, "hello " * (1 + twice), (name, "bold"))

    assert parse("talipot greet ada --twice") == ("greet", {"name": "ada", "twice": True})
    assert run("greet", "ada").out == "hello ada\n"
    missing = "error nobody: there is no such person; greet somebody\n"
    assert run("greet", "nobody") == Outcome(3, missing, "")
    assert run("greet", "ada", "--loud").code == 2
