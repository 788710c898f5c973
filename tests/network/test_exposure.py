"""What is open to a stranger is what docs/security.md says, and it disturbs no run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.network import exposure
from tests.network.nodes import why_not

if reason := why_not():
    pytest.skip(f"no machines can be made here: {reason}", allow_module_level=True)

PAGE = Path(__file__).parents[2] / "docs" / "security.md"


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_the_page_says_what_a_stranger_gets() -> None:
    ports, disturbed = exposure.everything()
    assert disturbed == []
    assert exposure.table(ports) in PAGE.read_text(encoding="utf8"), exposure.table(ports)
