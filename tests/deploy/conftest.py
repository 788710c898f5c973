"""What tests of commands and of pools share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from deploy.cli.main import main
from tests.deploy.commands import Outcome, Run
from tests.deploy.control.simulated import Rig


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process."""

    def call(*arguments: str) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        shown = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, shown.err, shown.out)

    return call


@pytest.fixture
def rig(cluster: None) -> Iterator[Callable[..., Rig]]:
    """Makes rigs, and stops them after the test."""
    made: list[Rig] = []

    def make(size: int, **settings: Any) -> Rig:
        made.append(Rig(size, **settings))
        return made[-1]

    yield make
    for one in made:
        one.stop()
