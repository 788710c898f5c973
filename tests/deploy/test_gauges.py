"""Ray's metrics of a run: every process tells, of what is in the catalogue, with labels."""

from __future__ import annotations

import itertools
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from common.config.run import RunConfig
from common.live_metrics import Live
from common.metric_catalogue import Logged
from common.metric_facts import LABELS
from deploy import gauges
from deploy.gauges import Gauges, Reading
from deploy.workers.gang import LearnerGang
from learner.batch.trajectory_log import read_log
from tests.deploy.control.runs import Run, stop_idle_pools
from tests.workspaces import run_copy

Labels = tuple[tuple[str, str], ...]
Found = dict[str, dict[Labels, float]]
"""Series -> labels of ours -> value."""


def test_every_metric_has_a_series_of_its_own() -> None:
    series: dict[str, str] = {}
    for metric in [*Logged, *Live]:
        name = metric.facts.series
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name), name
        assert name.endswith("_total") == (metric.facts.kind == "counter")
        assert name not in series, f"{metric} and {series[name]} are both {name}"
        series[name] = str(metric)
        assert set(metric.labels) <= LABELS.keys()


def test_what_varies_is_a_label() -> None:
    reading = Reading.logged("train", "workers_lost/rollout/died", 2)
    assert reading.metric.facts.series == "workers_lost_by_cause_total"
    assert reading.labels == {"stage": "train", "pool": "rollout", "cause": "died"}
    held = Reading.of(Live.HELD_VERSION, 3, "rollout-0")
    assert (held.value, held.labels) == (3.0, {"worker": "rollout-0"})
    with pytest.raises(KeyError):
        Reading.logged("train", "nothing", 1.0)


class Recorder:
    """In place of Ray's gauge: what was set, and when."""

    told: ClassVar[list[tuple[str, dict[str, str], float]]] = []

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.name, self.keys = name, tag_keys

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert tuple(tags) == self.keys
        self.told.append((self.name, tags, value))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Recorder]]:
    Recorder.told = []
    monkeypatch.setattr(gauges, "Gauge", Recorder)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    yield Recorder


def test_every_value_is_told_again_and_again(recorder: type[Recorder]) -> None:
    asked: list[int] = []

    def ask() -> list[Reading]:
        asked.append(1)
        return [Reading.of(Live.CALLS, len(asked), "rollout", "rollout-0")]

    told = Gauges("r", ask, every_s=0.02)
    told.set([Reading.logged("train", "kl", 3.0)])
    deadline = time.monotonic() + 30
    while len(asked) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    told.close()
    once = [value for name, _, value in recorder.told if name == "talipot_kl"]
    assert once.count(3.0) >= 4
    calls = [value for name, _, value in recorder.told if name == "talipot_calls_total"]
    assert calls[-1] == len(asked)
    before = len(recorder.told)
    time.sleep(0.1)
    assert len(recorder.told) == before, "it tells no more"


def test_what_a_whole_line_does_not_say_is_told_no_more(recorder: type[Recorder]) -> None:
    told = Gauges("r", every_s=0.02)
    line = {"staleness/0": 128.0, "auxiliary_seconds": 9.0}
    told.set([Reading.logged("train", name, value) for name, value in line.items()], whole=True)
    told.set([Reading.logged("held_out", "kl", 1.0)], whole=True)
    told.set([Reading.logged("train", "staleness/1", 128.0)], whole=True)
    recorder.told.clear()
    deadline = time.monotonic() + 30
    while len(recorder.told) < 9:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    told.close()
    assert {(name, tags.get("age")) for name, tags, _ in recorder.told} == {
        ("talipot_rollouts_by_age", "1"),
        ("talipot_auxiliary_seconds", None),
        ("talipot_kl", None),
    }


def test_what_is_asked_may_fail_and_telling_goes_on(
    recorder: type[Recorder], capsys: pytest.CaptureFixture[str]
) -> None:
    def ask() -> list[Reading]:
        raise RuntimeError("asked too early")

    told = Gauges("r", ask, every_s=0.02)
    told.set([Reading.logged("train", "kl", 3.0)])
    deadline = time.monotonic() + 30
    while capsys.readouterr().err.count("asked too early") < 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.1)
    before = len(recorder.told)
    time.sleep(0.1)
    assert len(recorder.told) > before
    assert "asked too early" not in capsys.readouterr().err, "once is enough"
    told.close()


# ------------------------------------------------------------------ a real run


def scraped() -> Found:
    """What the node's agent hands to whoever asks, of ours, without Ray's labels."""
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    text = urllib.request.urlopen(url, timeout=10).read().decode()
    found: Found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("ray_talipot_"):
                ours = {k: v for k, v in sample.labels.items() if k in {"run", "stage", *LABELS}}
                series = found.setdefault(sample.name.removeprefix("ray_talipot_"), {})
                series[tuple(sorted(ours.items()))] = sample.value
    return found


def until(holds: Callable[[Found], Any], run: str) -> Found:
    """Ask until it holds: Ray passes values on every ten seconds."""
    deadline = time.monotonic() + 90
    found: Found = {}
    while True:
        for name, values in scraped().items():
            # What a process told last stays, when it tells no more.
            own = {k: v for k, v in values.items() if ("run", run) in k}
            found[name] = {**found.get(name, {}), **own}
        found = {name: values for name, values in found.items() if values}
        if holds(found):
            return found
        assert time.monotonic() < deadline, sorted(found)
        time.sleep(0.5)


def tokens_of(found: Found, role: str) -> float:
    """Of all processes of a role."""
    tokens = found.get("tokens_total", {})
    return sum(value for labels, value in tokens.items() if ("role", role) in labels)


def named_told(workspace: RunConfig, folder: Path) -> RunConfig:
    """A run of a name and a reward service that no other test has: idle workers are taken over."""
    copied = run_copy(workspace, folder, train={"iterations": 2}, learner={"ranks": 2})
    config = copied.model_copy(
        update={
            "name": "told",
            "reward_service": copied.reward_service.model_copy(
                update={"micro_batch_tokens": copied.reward_service.micro_batch_tokens + 1}
            ),
        }
    )
    copied.run_dir.rename(config.run_dir)
    return config


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_controller_actors_reward_workers_and_ranks_tell(
    workspace: RunConfig, tmp_path: Path
) -> None:
    config = named_told(workspace, tmp_path)
    gang = LearnerGang(config, "told")
    with Run(config, gang) as controller:
        assert controller.run()["finished"]
        # Each process tells by its own clock.
        found = until(
            lambda f: (
                {"held_version", "policy_version", "health"} <= f.keys()
                and max(f["policy_version"].values()) == 2
                and len(f["busy_seconds_total"]) == 5
                and all(
                    value > 0
                    for labels, value in f["calls_total"].items()
                    if ("role", "rollout") not in labels
                )
                and len({tokens_of(f, role) for role in ("rollout", "reward", "learner")}) == 1
            ),
            "told",
        )
    gang.stop()
    stop_idle_pools()

    def of(series: str, **labels: str) -> float:
        (value,) = (
            value for given, value in found[series].items() if labels.items() <= dict(given).items()
        )
        return value

    for role, worker in (
        ("rollout", "rollout-0"),
        ("rollout", "rollout-1"),
        ("reward", "reward-0"),
        ("learner", "learner-0"),
        ("learner", "learner-1"),
    ):
        assert of("resident_bytes", role=role, worker=worker) > 5e7
        # One actor may have sampled all, before the other had started.
        worked = of("calls_total", role=role, worker=worker) > 0
        assert worked or role == "rollout"
        assert (of("busy_seconds_total", role=role, worker=worker) > 0) == worked
    assert of("resident_bytes", role="controller") > 5e7
    logged = [read_log(config.run_dir, i)[0]["response_ids"].to_pylist() for i in range(2)]
    assert tokens_of(found, "rollout") == sum(len(ids) for rows in logged for ids in rows)
    for cause in ("died", "hung", "unstarted", "preempted", "corrupt"):
        assert of("workers_lost_by_cause_total", pool="rollout", cause=cause) == 0
    assert of("learner_restarts_total") == of("dropped_total", reason="dead letter") == 0
    last = controller.metrics
    assert of("score", stage="train") == pytest.approx(last["score"])
    assert of("kl", stage="train") == pytest.approx(last["kl"])
    assert of("health", check="kl", severity="critical") == 0
    known = {metric.facts.series for metric in [*Logged, *Live]}
    assert found.keys() <= known


@pytest.mark.chaos
@pytest.mark.usefixtures("cluster")
def test_no_value_is_absent_in_iterations_of_a_minute(workspace: RunConfig, tmp_path: Path) -> None:
    """Ray forgets a value that is told once within half a minute; a run's are there throughout."""
    components = {"slow": {"kind": "function", "target": "tests.rewards:in_a_minute"}}
    copied = run_copy(
        workspace,
        tmp_path,
        train={"iterations": 2, "ppg": None},
        rollout={"lease_size": 16},
        reward_service={"components": components, "replicas": 1},
    )
    config = copied.model_copy(update={"name": "minutes"})
    copied.run_dir.rename(config.run_dir)
    gang = LearnerGang(config, "minutes")
    looks: list[tuple[float, set[tuple[str, Labels]]]] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(5.0):
            own = {
                (name, labels)
                for name, values in scraped().items()
                for labels in values
                if ("run", "minutes") in labels
            }
            looks.append((time.monotonic(), own))

    thread = threading.Thread(target=look)
    with Run(config, gang) as controller:
        thread.start()
        try:
            assert controller.run()["finished"]
            last = time.monotonic()
        finally:
            ended.set()
            thread.join()
    gang.stop()
    stop_idle_pools()
    assert controller.metrics["seconds"] > 55
    looks = [(at, own) for at, own in looks if at < last]
    assert len(looks) >= 20
    names = {name for name, _ in looks[-1][1]}
    assert {"score", "busy_seconds_total", "held_version", "workers_lost_by_cause_total"} <= names
    for (_, before), (at, after) in itertools.pairwise(looks):
        gone = before - after
        assert gone == set(), f"{last - at:.0f} s before the end"
