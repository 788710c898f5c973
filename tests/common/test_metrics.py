"""Metrics that are made of others."""

from __future__ import annotations

from common.metrics import component_means, read


def test_a_component_is_averaged_over_the_responses_that_have_it() -> None:
    said = [{"length": 1.0, "style": 4.0}, {"length": 3.0, "style/commas": 5.0}, {"length": 5.0}]
    assert read(component_means(said)) == {
        "component/length": 3.0,
        "component/style": 4.0,
        "component/style/commas": 5.0,
    }
    assert component_means([]) == {}
