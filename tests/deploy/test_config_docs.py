"""The configuration reference is what the code says."""

from __future__ import annotations

from pathlib import Path

from common.config.names import fields
from common.config.rewards import RewardComponent
from common.config.run import SourceConfig
from deploy.config_docs import reference_page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


def test_the_committed_page_is_the_generated_one() -> None:
    assert PAGE.read_text(encoding="utf8") == reference_page(), (
        "run: python -m deploy.config_docs > docs/configuration.md"
    )


def test_every_field_has_a_row_with_a_meaning() -> None:
    rows = [line for line in reference_page().splitlines() if line.startswith("| `")]
    meanings = {row.split("`")[1]: row.split(" | ", 2)[2].strip(" |") for row in rows}
    expected = [name for name, _, _ in fields()]
    expected += [f"reward_service.components.NAME.{n}" for n in RewardComponent.every_field()]
    expected += [f"data.mixture.NAME.{n}" for n in SourceConfig.every_field()]
    for name in expected:
        assert meanings[name], name
