"""Rollouts without a score, in every algorithm and mode, over stops, resumes and restarts."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from common.errors import RewardError
from tests.deploy.control.refusals import Notes, Watched, Workshop, cuts, expected, reasons, recipe

ALGORITHMS = ("ppo", "grpo", "rloo", "reinforce_pp")


@pytest.fixture(scope="module")
def workshop(cluster: None) -> Iterator[Workshop]:
    yield Workshop()


def settle(controller: Watched, gang: Notes) -> None:
    """What holds of every run that has ended well."""
    ledger, config = controller.ledger, controller.config
    ledger.check()
    assert (ledger.in_flight, ledger.refused) == (0, 0)
    rows = [rollout_id for ids in gang.rows().values() for rollout_id in ids]
    assert len(rows) == len(set(rows)) == ledger.trained, "each trained at most once"
    assert ledger.issued == ledger.trained + sum(ledger.dropped.values())
    assert ledger.issued == config.train.iterations * config.train.batch_size
    assert cuts(controller.leases, config.rollout.lease_size) == {1}
    for iteration, versions in gang.trained.items():
        assert all(0 <= iteration - v <= config.train.max_staleness for _, v in versions)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example("grpo", 2, 2, 0.3, 1, 1, {2: 12}, None)
@given(
    algorithm=st.sampled_from(ALGORITHMS),
    staleness=st.sampled_from([0, 2]),
    samples=st.sampled_from([2, 4]),
    share=st.sampled_from([0.0, 0.1, 0.3, 0.6]),
    seed=st.integers(0, 2**20),
    every=st.integers(0, 2),
    dies=st.dictionaries(st.integers(0, 5), st.integers(1, 12), max_size=3),
    stop=st.none() | st.integers(1, 10),
)
def test_every_rollout_is_trained_once_or_dropped_with_its_reason(
    workshop: Workshop,
    algorithm: str,
    staleness: int,
    samples: int,
    share: float,
    seed: int,
    every: int,
    dies: dict[int, int],
    stop: int | None,
) -> None:
    """Whatever dies or is stopped when, the rows trained are those of the requests alone."""
    with tempfile.TemporaryDirectory() as folder:
        config = recipe(
            Path(folder),
            seed,
            algorithm=algorithm,
            max_staleness=staleness,
            prompts_per_iteration=12 // samples,
            samples_per_prompt=samples,
            checkpoint_every=every,
        )
        wanted = expected(config, share)
        gang = Notes(dies)
        controller = workshop.controller(config, gang, share, stop_at_lease=stop or -1)
        try:
            finished = controller.run()["finished"]
            if not finished:
                controller = workshop.controller(config, gang, share)
                finished = controller.run()["finished"]
        except RewardError as error:
            assert "has nothing to train on" in str(error) or "every rollout of" in str(error)
            assert not all(wanted.values())
            return
        assert finished
        assert all(wanted.values())
        assert gang.rows() == wanted
        settle(controller, gang)
        assert controller.ledger.dropped == reasons(config, share)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_that_ended_for_want_of_scores_can_be_resumed(
    workshop: Workshop, algorithm: str, tmp_path: Path
) -> None:
    """The checkpoint knows dead letters of iterations ahead. They stay dropped where others of
    their iteration are left; where none are, all of it is sampled once more."""
    config = recipe(tmp_path, 3, algorithm=algorithm, max_staleness=2, checkpoint_every=1)
    gang = Notes()
    controller = workshop.controller(config, gang, 1.0, first=2)
    with pytest.raises(RewardError, match=r"iteration 2 .*given up.*the last: refused"):
        controller.run()
    assert controller.iteration == 2
    resumed = workshop.controller(config, gang, 0.0)
    assert resumed.run()["finished"]
    rows, whole = gang.rows(), expected(config, 0.0)
    assert (rows[0], rows[1]) == (whole[0], whole[1])
    for iteration in (2, 3):
        assert rows[iteration]
        assert set(rows[iteration]) <= set(whole[iteration])
    ledger = resumed.ledger
    assert ledger.trained == sum(map(len, rows.values()))
    assert ledger.issued == ledger.trained + sum(ledger.dropped.values())
