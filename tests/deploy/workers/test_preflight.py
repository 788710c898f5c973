"""Preflight: what a recipe needs against what there is, in words."""

from __future__ import annotations

import pytest

from common.config.recipe import load_config
from common.config.run import RunConfig
from common.errors import ClusterError, ConfigError
from common.models.build import count_parameters
from deploy.workers.preflight import (
    explain,
    extra_bytes,
    learner_bytes,
    require_trainable,
    sharing,
)
from deploy.workers.reservations import reservations


def recipe(*overrides: str) -> RunConfig:
    return load_config(None, ["model.vocab_size=512", *overrides])


WHOLE = (
    "learner.cpus_per_rank=1",
    "rollout.cpus_per_actor=1",
    "reward_service.cpus_per_replica=1",
)


def test_what_fits_is_explained() -> None:
    lines = explain(recipe(), {"CPU": 8.0, "memory": 2.0**34})
    text = "\n".join(lines)
    for said in ("2 learner ranks: 2 CPU, all placed together", "2 rollout actors", "ZeRO 2"):
        assert said in text
    assert "needed 5 CPU and 0 GPU; the cluster has 8 and 0" in text


@pytest.mark.parametrize(
    ("overrides", "resources", "says"),
    [
        (WHOLE, {"CPU": 4.0}, "needs 5 CPU and the cluster has 4"),
        ((), {}, "needs 5 CPU and the cluster has 0"),
        (("preset=palm-8b",), {"CPU": 9.0, "memory": 2.0**30}, "raise learner.zero_stage"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_mend(
    overrides: tuple[str, ...], resources: dict[str, float], says: str
) -> None:
    with pytest.raises(ClusterError, match=says):
        explain(recipe(*overrides), resources)


def test_gpus_that_are_not_there() -> None:
    rollout = recipe().rollout.model_copy(update={"gpus_per_actor": 1.0})
    config = recipe().model_copy(update={"rollout": rollout})
    with pytest.raises(ClusterError, match="needs 2 GPU and the cluster has 0"):
        explain(config, {"CPU": 9.0})


def test_bytes_of_each_zero_stage_by_hand() -> None:
    ranks = 4
    base = recipe(f"learner.ranks={ranks}")
    parameters = 2 * count_parameters(base.model).total  # policy and value network
    expected = {
        0: 16 * parameters,
        1: (4 + 4 + 8 / ranks) * parameters,
        2: (4 + 4 / ranks + 8 / ranks) * parameters,
        3: 16 / ranks * parameters,
    }
    for stage, size in expected.items():
        config = recipe(f"learner.ranks={ranks}", f"learner.zero_stage={stage}")
        assert learner_bytes(config) == pytest.approx(size)
    shared = recipe(f"learner.ranks={ranks}", "train.value_network=shared", "learner.zero_stage=0")
    assert learner_bytes(shared) == pytest.approx(8 * parameters)


@pytest.mark.parametrize("greedy", ["temperature=0", "top_k=1", "min_p=1"])
def test_there_is_nothing_to_learn_from_greedy_samples(greedy: str) -> None:
    with pytest.raises(ConfigError, match=rf"^rollout\.{greedy} always takes the most probable"):
        require_trainable(recipe(f"rollout.{greedy}"))


@pytest.mark.parametrize("sampled", ["temperature=0.1", "top_k=2", "top_k=0", "min_p=0.9"])
def test_what_samples_is_trainable(sampled: str) -> None:
    require_trainable(recipe(f"rollout.{sampled}"))


LORA = "train.lora={rank: 8}"


def test_an_adapter_of_8b_is_counted_as_one_and_fits() -> None:
    """Two networks of 8.6 billion numbers, trained whole: 160.8 GiB; their adapters: a base."""
    shape = ("preset=palm-8b", "model.vocab_size=256000", "train.ppg=null")
    whole = recipe(*shape)
    assert learner_bytes(whole) / 2**30 == pytest.approx(160.8, abs=0.1)
    both = (*shape, LORA, "reward_model.lora={rank: 8}")
    small = recipe(*both)
    parameters = 8_631_000_000
    # The base in fp32, once; adapters of 18 million numbers for each of two networks.
    assert learner_bytes(small) == pytest.approx(4 * parameters, rel=0.02)
    with pytest.raises(ClusterError, match=r"train\.lora"):
        explain(whole, {"CPU": 9.0, "memory": 40 * 2.0**30})
    explain(small, {"CPU": 9.0, "memory": 80 * 2.0**30})
    rounded = recipe(*both, "learner.precision=bf16")
    assert learner_bytes(rounded) == pytest.approx(2 * parameters, rel=0.03)
    # A reward model of whole weights gives the value network a base of its own.
    apart = recipe(*shape, LORA)
    assert learner_bytes(apart) == pytest.approx(8 * parameters, rel=0.02)


def test_adapters_by_hand() -> None:
    """A: rank x inputs for each segment, B: rows x rank; gradients and moments of these alone."""
    shape = {"dim": 64, "layers": 2, "heads": 2, "head_dim": 32, "ff_mult": 4}
    model = [f"model.{name}={size}" for name, size in shape.items()]
    config = recipe(
        *model,
        "train.lora={rank: 4, targets: [q, ff_out]}",
        "train.ppg=null",
        "train.value_network=shared",
        "learner.zero_stage=0",
    )
    adapter = 2 * 4 * ((64 + 64) + (256 + 64))
    base = count_parameters(config.model).total
    assert learner_bytes(config) == 16 * adapter + 4 * base
    assert extra_bytes(config) == 0


def test_an_auxiliary_phase_has_moments_and_a_frozen_policy() -> None:
    base = recipe("learner.ranks=4", "learner.zero_stage=2")
    whole = count_parameters(base.model).total
    copies, moments, frozen = 4 * 2 * whole / 4, 8 * 2 * whole / 4, 4 * whole
    assert extra_bytes(base) == pytest.approx(copies + moments + frozen)
    without = recipe("learner.ranks=4", "learner.zero_stage=2", "train.ppg=null")
    assert extra_bytes(without) == pytest.approx(copies)


# ------------------------------------------------------------------ reservations


def test_workers_that_outnumber_the_cores_reserve_fractions_and_leave_room_for_as_many() -> None:
    small = reservations(recipe(), 2.0)
    assert (small.rank, small.actor, small.replica) == (0.2, 0.2, 0.2)
    text = "\n".join(explain(recipe(), {"CPU": 2.0}))
    assert "needed 1 CPU and 0 GPU; the cluster has 2 and 0" in text
    explain(recipe("rollout.actors=2"), {"CPU": 2.0})
    assert sharing(recipe(), 2.0) == (
        "5 workers take turns on 2 cores and reserve 0.2 of one each (cpus_per_* say otherwise)"
    )
    assert sharing(recipe(), 5.0) == sharing(recipe(*WHOLE), 2.0) == ""
    assert reservations(recipe(), 5.0).rank == 1.0


@pytest.mark.parametrize(
    ("overrides", "cores", "expected"),
    [
        (("learner.cpus_per_rank=0.5",), 2.0, (0.5, 0.166, 0.166)),
        (("learner.cpus_per_rank=1",), 2.0, (1.0, 1.0, 1.0)),  # full: refused as it was
        (("rollout.actors={min: 1, max: 17}",), 2.0, (0.05, 0.05, 0.05)),
        (("rollout.actors=4000",), 2.0, (0.001, 0.001, 0.001)),
        (("cluster.autoscales=true",), 2.0, (1.0, 1.0, 1.0)),
        (("learner.cpus_per_rank=4",), 64.0, (4.0, 1.0, 1.0)),
    ],
)
def test_explicit_reservations_are_kept_and_the_others_share_the_rest(
    overrides: tuple[str, ...], cores: float, expected: tuple[float, float, float]
) -> None:
    each = reservations(recipe(*overrides), cores)
    assert (each.rank, each.actor, each.replica) == expected
