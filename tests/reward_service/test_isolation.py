"""A reward function in processes of its own: what it costs when code behaves badly."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.config.recipe import load_config
from common.config.rewards import FunctionComponent, IsolationConfig
from common.errors import ConfigError, RewardError
from reward_service.isolation import IsolatedScorer
from reward_service.samples import Sample
from reward_service.scorers import FunctionScorer
from reward_service.service import SCORERS

HERE = "tests.reward_service.isolated_rewards"
Make = Callable[..., IsolatedScorer]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[IsolatedScorer] = []

    def start(function: str = "strange", **settings: Any) -> IsolatedScorer:
        limits = {"timeout_s": 20.0, "memory_mb": 1024, "processes": 1, "failed_score": None}
        made.append(IsolatedScorer(f"{HERE}:{function}", **{**limits, **settings}))
        return made[-1]

    yield start
    for scorer in made:
        scorer.close()
    until = time.monotonic() + 30
    while any("reward_service.isolation" in command for command in children()):
        assert time.monotonic() < until, "a process outlived its scorer"
        time.sleep(0.05)


def children() -> list[str]:
    """Commands of all processes that this one has started and that run."""
    commands = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            commands.append(" ".join(process.cmdline()))
    return commands


def said(*responses: str) -> list[Sample]:
    return [
        Sample(prompt="p", response=response, rollout_id=str(i), tokens=(i, 2), columns={"a": [1]})
        for i, response in enumerate(responses)
    ]


def test_it_scores_as_without_isolation(make: Make) -> None:
    samples = said("abc", "tells", "prints", "prints errors", "abcd")
    assert make().score(samples) == [
        result for sample in samples for result in FunctionScorer(f"{HERE}:strange").score([sample])
    ]


@pytest.mark.parametrize("function", ["waits", "texts"])
def test_every_form_of_function(make: Make, function: str) -> None:
    results = make(function).score(said("p", "q"))
    expected = FunctionScorer(f"{HERE}:{function}").score(said("p", "q"))
    assert [r.score for r in results] == [r.score for r in expected]


@pytest.mark.parametrize(
    ("response", "why"),
    [
        ("exits 3", "its process ended with exit code 3"),
        ("exits 0", "its process ended with exit code 0"),
        ("kills", "its process was ended by SIGKILL"),
        ("takes 4000", "took more than 1024 MiB"),
    ],
)
def test_bad_behaviour_costs_its_own_response_alone(make: Make, response: str, why: str) -> None:
    before, bad, after = make().score(said("abc", response, "abcd"))
    assert (before.score, bad.score, after.score) == (3.0, None, 4.0)
    assert bad.error == f"reward function {HERE}:strange: {why}"


def test_what_takes_too_long_is_ended(make: Make) -> None:
    scorer = make(timeout_s=0.5)
    begin = time.monotonic()
    bad, after = scorer.score(said("loops", "abcd"))
    assert bad.error is not None and "took more than 0.5 s" in bad.error
    assert after.score == 4.0
    assert time.monotonic() - begin < 15


def test_a_failure_may_have_a_score(make: Make) -> None:
    (result,) = make(failed_score=-1.0).score(said("exits 9"))
    assert (result.score, result.error) == (-1.0, None)
    assert result.reason == "its process ended with exit code 9"


def test_code_that_reads_its_input_gets_none(make: Make) -> None:
    assert make().score(said("reads"))[0].score == 0.0


def test_no_process_leaves_an_open_pipe(make: Make) -> None:
    scorer = make()
    scorer.score(said("abc"))
    before = psutil.Process().num_fds()
    scorer.score(said("exits 1", "abc", "kills", "leaves"))
    time.sleep(1.0)  # the last one ends after its answer
    assert scorer.score(said("abc"))[0].score == 3.0
    assert psutil.Process().num_fds() <= before


def test_what_it_started_ends_with_it(make: Make, tmp_path: Path) -> None:
    noted = tmp_path / "pid"
    (result,) = make().score(said(f"starts {noted}"))
    assert result.score is None
    started = int(noted.read_text(encoding="utf8"))
    until = time.monotonic() + 10
    while psutil.pid_exists(started) and psutil.Process(started).status() != "zombie":
        assert time.monotonic() < until, "it outlived the process that started it"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("response", "message"),
    [("raises", "raised ValueError: no such answer .*isolated_rewards.py:"), ("nothing", "nan")],
)
def test_the_functions_own_faults_are_errors_of_the_run(
    make: Make, response: str, message: str
) -> None:
    with pytest.raises(RewardError, match=message):
        make().score(said("abc", response))


@pytest.mark.parametrize("target", ["nowhere:f", f"{HERE}:stranger", f"{HERE}:three"])
def test_what_cannot_be_called_is_told_before_anything_is_scored(target: str) -> None:
    with pytest.raises(ConfigError, match=target.replace(".", r"\.")):
        IsolatedScorer(target, timeout_s=1, memory_mb=512, processes=1, failed_score=None)


def test_several_score_at_once(make: Make) -> None:
    scorer = make(processes=3)
    results = scorer.score(said(*["sleeps 0.4"] * 6))
    assert len({r.score for r in results}) == 3, "each process scored some"


def test_a_recipe_names_it_in_one_word_or_in_full() -> None:
    part = "reward_service.components.rules={kind: function, target: 'a:b', isolation: %s}"
    for text, expected in (
        ("process", IsolationConfig()),
        ("{timeout_s: 2, failed_score: 0}", IsolationConfig(timeout_s=2, failed_score=0)),
        ("null", None),
    ):
        component = load_config(None, [part % text]).reward_service.components["rules"]
        assert isinstance(component, FunctionComponent)
        assert component.isolation == expected
    with pytest.raises(ConfigError, match="isolation"):
        load_config(None, [part % "thread"])


def test_a_reward_worker_has_it(make: Make) -> None:
    component = FunctionComponent(target=f"{HERE}:strange", isolation=IsolationConfig())
    scorer = SCORERS[FunctionComponent](component)
    assert isinstance(scorer, IsolatedScorer)
    assert scorer.score(said("abc"))[0].score == 3.0
    scorer.close()
