"""Health checks over whole runs that were recorded: silent where all is well, else in time."""

from __future__ import annotations

import pytest

from deploy.health.checks import verdicts
from tests.deploy.recorded_history import growing, recorded

HEALTHY = ("quickstart-s0", "quickstart-s1", "quickstart-s2")


@pytest.mark.parametrize("name", HEALTHY)
def test_a_whole_quickstart_is_healthy(name: str) -> None:
    found = {(v.check, v.iteration) for history in growing(name) for v in verdicts(history)}
    assert found == set()
    assert len([line for line in recorded(name)[1] if line.stage == "train"]) == 32


def test_over_optimisation_is_told_before_the_judge_has_lost_five_points() -> None:
    """A policy without KL that follows its reward model; the judge is who labelled for that."""
    said, best, worst = None, 0.0, 1.0
    for history in growing("pushed"):
        if not history.held_out:
            continue
        quality = history.held_out[-1].metrics["component/quality"]
        best, worst = max(best, quality), min(worst, quality)
        wrong = {verdict.check for verdict in verdicts(history)}
        if said is None and "over-optimisation" in wrong:
            said = best - quality
    assert best - worst > 0.05, "it did lose more"
    assert said is not None
    assert 0.0 < said < 0.05
