"""The metrics reference is what the catalogue says."""

from __future__ import annotations

from pathlib import Path

from deploy.metric_docs import metrics_page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def test_the_committed_page_is_the_generated_one() -> None:
    assert PAGE.read_text(encoding="utf8") == metrics_page(), (
        "run: python -m deploy.metric_docs > docs/metrics.md"
    )
