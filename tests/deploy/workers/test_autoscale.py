"""The size that a run chooses for itself, and the room it asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.autoscaler._private.constants import (
    AUTOSCALER_RESOURCE_REQUEST_CHANNEL as REQUESTS,
)
from ray.experimental.internal_kv import _internal_kv_get

from common.config.recipe import load_config
from common.config.run import RunConfig
from common.config.workers import ActorBounds
from common.errors import ConfigError
from deploy.workers.autoscale import Load, Trend, decide
from deploy.workers.placement import release_room, request_room, room
from deploy.workers.pool import Pool
from deploy.workers.scaling import Elastic

BOUNDS = ActorBounds(min=2, max=9)
SHORT = Load(learner_waits=0.6, actors_busy=0.55)
EVEN = Load(learner_waits=0.15, actors_busy=0.7)
IDLE = Load(learner_waits=0.01, actors_busy=0.3)
CROWD = Load(learner_waits=0.5, actors_busy=0.1)


def after(size: int, *loads: Load) -> int:
    trend = Trend()
    for load in loads:
        size, trend = decide(size, BOUNDS, load, trend)
    return size


@pytest.mark.parametrize(
    ("loads", "size"),
    [
        ([SHORT] * 2, 4),
        ([SHORT] * 3, 5),
        ([SHORT] * 6, 6),
        ([EVEN] * 20, 4),
        ([IDLE] * 3, 3),
        ([CROWD] * 3, 3),
        ([SHORT, SHORT, EVEN, SHORT, SHORT], 4),
        ([SHORT, SHORT, IDLE, SHORT, SHORT], 4),
        ([IDLE] * 100, 2),
        ([SHORT] * 100, 9),
    ],
)
def test_agreeing_iterations_change_the_size(loads: list[Load], size: int) -> None:
    assert after(4, *loads) == size


shares = st.floats(0, 1)


@given(
    st.lists(st.builds(lambda w, b: Load(learner_waits=w, actors_busy=b), shares, shares)),
    st.integers(1, 20),
)
def test_whatever_is_measured_the_bounds_hold(loads: list[Load], size: int) -> None:
    trend = Trend()
    for load in loads:
        before = size
        size, trend = decide(size, BOUNDS, load, trend)
        assert BOUNDS.min <= size <= BOUNDS.max
        if BOUNDS.min <= before <= BOUNDS.max:
            assert abs(size - before) <= max(1, before // 4)


@given(shares, shares, st.integers(2, 9))
def test_a_steady_load_moves_the_size_one_way(waits: float, busy: float, size: int) -> None:
    load, trend, sizes = Load(learner_waits=waits, actors_busy=busy), Trend(), [size]
    for _ in range(30):
        size, trend = decide(size, BOUNDS, load, trend)
        sizes.append(size)
    assert sizes in (sorted(sizes), sorted(sizes, reverse=True))


def test_a_recipe_gives_a_number_or_bounds() -> None:
    assert load_config(None, ["rollout.actors=3"]).rollout.actors_at_start == 3
    bounded = load_config(None, ["rollout.actors={min: 2, max: 8}"]).rollout
    assert (bounded.actors_at_start, bounded.actors) == (2, ActorBounds(min=2, max=8))
    for wrong in ("{min: 3, max: 2}", "{min: 0, max: 2}", "{min: 1}", "many"):
        with pytest.raises(ConfigError, match=r"rollout\.actors"):
            load_config(None, [f"rollout.actors={wrong}"])


def test_a_run_between_bounds_scales_itself(tmp_path: Path) -> None:
    overrides = [f"output={tmp_path}", "name=x", "rollout.actors={min: 2, max: 3}"]
    config = load_config(None, overrides)
    config.run_dir.mkdir()
    pool = Pool(kind="rollout", make=lambda name: None, max_failures=0)
    pool.scale(2)
    elastic = Elastic(config, pool, None)
    busy = {"seconds": 10.0, "collect_seconds": 6.0, "generate_seconds": 11.0, "load_seconds": 1.0}
    sizes = []
    for _ in range(7):
        elastic.adapt(busy)
        sizes.append(pool.target)
    assert sizes == [2, 2, 3, 3, 3, 3, 3]
    (line,) = (config.run_dir / "events.jsonl").read_text(encoding="utf8").splitlines()
    assert '"from 2 to 3"' in line


@pytest.mark.parametrize(
    "labels", ["{region: ''}", "{'': a}", "{a: 'in()'}", "{a: 'b c'}", "{a: '!!b'}"]
)
def test_labels_that_ray_would_refuse_are_refused_with_the_recipe(labels: str) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.labels"):
        load_config(None, [f"rollout.labels={labels}"])


OVERRIDES = [
    "learner={ranks: 2, cpus_per_rank: 4, labels: {ray.io/market-type: on-demand}}",
    "rollout.labels={ray.io/market-type: '!on-demand'}",
    "cluster.autoscales=true",
]


def wide() -> RunConfig:
    """Actors ask for GPUs too."""
    config = load_config(None, OVERRIDES)
    rollout = config.rollout.model_copy(update={"gpus_per_actor": 1.0})
    return config.model_copy(update={"rollout": rollout})


def test_the_room_of_a_run_is_that_of_all_its_workers() -> None:
    bundles, selectors = room(wide(), 3, 1)
    assert bundles == [{"CPU": 4.0}] * 2 + [{"CPU": 1.0, "GPU": 1.0}] * 3 + [{"CPU": 1.0}]
    stable, spot = {"ray.io/market-type": "on-demand"}, {"ray.io/market-type": "!on-demand"}
    assert selectors == [stable] * 2 + [spot] * 3 + [{}]


def test_the_autoscaler_is_told(cluster: None) -> None:
    def told() -> list[dict[str, float]]:
        """The standing request, where the autoscaler of such a cluster reads it."""
        found: list[dict[str, float]] = json.loads(_internal_kv_get(REQUESTS))
        return found

    config = wide()
    request_room(config, 3, 1)
    assert told() == room(config, 3, 1)[0]
    request_room(config, 1, 1)
    assert len(told()) == 2 + 1 + 1
    release_room()
    assert told() == []
