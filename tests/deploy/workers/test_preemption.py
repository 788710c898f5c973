"""Nodes that are drained and killed, on a cluster of their own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from deploy.workers import placement
from tests.deploy.workers.alone import said_by


@pytest.mark.chaos
def test_nodes_come_and_go_and_nothing_is_lost() -> None:
    found = said_by("tests.deploy.workers.preemption")
    notice = found["notice"]
    assert notice == {"left": 1, "lost": 0, "in_time": True, "elsewhere": True}
    late = found["too_long"]
    assert late["losses"] == {"preempted": 1}
    assert late["in_time"], "handed back before the node went"
    assert late["counted"] == 0, "no failure of the worker's"
    assert late["reissued"] == 1
    table = found["table"]
    assert table["rows"] == table["trained"] == 8
    assert table["resampled"].keys() == {"lost"}
    assert (table["lost"], table["reissued"], table["blamed"]) == ({"died": 1}, 1, 0), (
        "a lease that was in work on a node that died is given to another, and not blamed"
    )


def test_without_the_private_interface_a_node_that_goes_is_a_death(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(placement, "state", SimpleNamespace())
    assert placement.leaving_nodes() == {}
