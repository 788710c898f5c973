"""Services that metrics are sent to: the lines of metrics.jsonl, each once, whatever happens."""

from __future__ import annotations

import importlib.util
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.config.recipe import load_config
from common.config.run import RunConfig
from common.errors import ConfigError
from deploy import trackers
from deploy.run_folder.log_lines import Line, read_lines
from deploy.run_folder.metrics_log import RunLog
from deploy.trackers import Outbox, Step, close_all, outboxes
from deploy.validation.validate import validate

pytestmark = pytest.mark.usefixtures("cluster")  # a run's log sets gauges of Ray
LINES = [
    ("sft", 1, {"loss": 3.0}),
    ("sft", 2, {"loss": 2.5}),
    ("train", 1, {"score": 0.25, "dropped/dead letter": 2.0, "staleness": 0, "staleness/0": 4.0}),
    ("held_out", 0, {"score": 0.5, "pass@1": 0.125}),
    ("train", 2, {"score": 0.75, "kl": 0.5}),
]


def of(folder: Path, **services: dict[str, Any]) -> RunConfig:
    config = RunConfig.model_validate(
        {"name": "tracked", "output": str(folder), "trackers": services}
    )
    config.run_dir.mkdir(parents=True, exist_ok=True)
    return config


def write(config: RunConfig, lines: list[tuple[str, int, dict[str, float]]] = LINES) -> list[str]:
    """Log lines as two commands would, and return what was told."""
    told: list[str] = []
    for part in (lines[:2], lines[2:]):
        log = RunLog(config.run_dir, outboxes(config, told.append))
        for stage, step, metrics in part:
            log.write(stage, step, metrics)
        log.close()
    return told


def logged(config: RunConfig) -> list[Line]:
    return read_lines(config.folder.metrics).lines


# ------------------------------------------------------------------ the services


def test_tensorboard_has_what_the_log_has(tmp_path: Path) -> None:
    config = of(tmp_path)
    write(config)
    board = EventAccumulator(str(config.folder.tensorboard))
    board.Reload()
    found = {
        (tag, event.step): event.value
        for tag in board.Tags()["scalars"]
        for event in board.Scalars(tag)
    }
    assert found == {
        (f"{line.stage}/{name}", line.step): pytest.approx(value)
        for line in logged(config)
        for name, value in line.metrics.items()
    }


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"{package} is not installed"
    )


@needs("trackio")
def test_trackio_has_what_the_log_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trackio.sqlite_storage import SQLiteStorage

    project = f"talipot-test-{tmp_path.parent.name}-{tmp_path.name}"
    config = of(tmp_path, trackio={"project": project})
    trackers.begin(config)
    assert write(config) == []
    ids = json.loads(config.folder.trackers.read_text())
    rows = SQLiteStorage.get_logs(project, ids["trackio"])
    kept = [{k: v for k, v in row.items() if k not in ("timestamp", "step")} for row in rows]
    assert kept == [
        {f"{line.stage}/{name}": value for name, value in line.metrics.items()}
        | {f"{line.stage}/step": line.step}
        for line in logged(config)
    ]
    SQLiteStorage.delete_run(project, ids["trackio"])


@needs("mlflow")
def test_mlflow_has_what_the_log_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file:{tmp_path / 'mlflow'}"
    config = of(tmp_path, mlflow={"experiment": "talipot", "uri": uri})
    trackers.begin(config)
    assert write(config) == []
    run_id = json.loads(config.folder.trackers.read_text())["mlflow"]
    client = MlflowClient(tracking_uri=uri)
    for line in logged(config):
        for name, value in line.metrics.items():
            key = f"{line.stage}/" + name.replace("@", "_").replace("/", ".")
            history = client.get_metric_history(run_id, key)
            assert (line.step, value) in [(m.step, m.value) for m in history]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert len(client.search_runs([client.get_run(run_id).info.experiment_id])) == 1


@needs("wandb")
def test_wandb_has_what_the_log_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    config = of(tmp_path, wandb={"project": "talipot"})
    trackers.begin(config)
    assert write(config) == []
    found = []
    paths = (config.run_dir / "wandb").glob("*/wandb/offline-run-*/*.wandb")
    for path in sorted(paths, key=lambda path: path.stat().st_ctime_ns):
        assert path.stem == f"run-{json.loads(config.folder.trackers.read_text())['wandb']}"
        for raw in leveldb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(raw)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                found.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in items})
    kept = [{k: v for k, v in row.items() if not k.startswith("_")} for row in found]
    assert kept == [
        {f"{line.stage}/{name}": value for name, value in line.metrics.items()}
        | {f"{line.stage}/step": line.step}
        for line in logged(config)
    ]


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """What a file in LevelDB's log format holds: blocks of 32 KiB, of parts with a head of 7 bytes
    (checksum, length, whole/first/middle/last); W&B's begin with a head of 7 bytes of its own."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


# ------------------------------------------------------------------ one that is missing, down, slow


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.trackers.find_spec", lambda _: None)
    config = of(tmp_path, mlflow={"experiment": "e"})
    says = (
        "trackers.mlflow: the package mlflow is not installed; run `pip install mlflow-skinny`, "
        "or leave it out"
    )
    with pytest.raises(ConfigError) as told:
        trackers.begin(config)
    assert str(told.value) == says
    recipe = tmp_path / "r.yaml"
    recipe.write_text("trackers: {mlflow: {experiment: e}}\n", encoding="utf8")
    assert says in map(str, validate(recipe).errors())
    with pytest.raises(ConfigError, match=r"trackers\.wandb\.project"):
        load_config(recipe, ["trackers.wandb={entity: us}"])


class Fickle:
    """A service that fails some of the first calls."""

    run_id = "r"

    def __init__(self, failures: int = 0) -> None:
        self.failures, self.took, self.closed = failures, list[Step](), False

    def log(self, step: Step) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError("503: come again")
        self.took.append(step)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("deploy.trackers._RETRY_S", (0.01,))
    yield


def steps(count: int) -> list[Step]:
    return [Step(stage="train", step=n, time=0.0, metrics={"score": n}) for n in range(count)]


@pytest.mark.usefixtures("quick")
def test_what_fails_is_sent_again_in_order_and_once() -> None:
    told: list[str] = []
    service, opened = Fickle(failures=3), 0

    def open_it() -> Fickle:
        nonlocal opened
        opened += 1
        if opened == 1:
            raise ConnectionError("no route")
        return service

    box = Outbox("x", open_it, told.append)
    for step in steps(5):
        box.put(step)
    until(lambda: len(service.took) == 5)
    close_all([box])
    assert service.took == steps(5) and service.closed and told == [] and opened == 2


@pytest.mark.usefixtures("quick")
def test_a_service_that_stays_down_is_told_with_the_count() -> None:
    told: list[str] = []
    service = Fickle(failures=10**9)
    box = Outbox("x", lambda: service, told.append)
    for step in steps(4):
        box.put(step)
    begin = time.monotonic()
    close_all([box])
    assert time.monotonic() - begin < 5
    assert told == [
        "trackers.x: 4 lines were not sent (OSError: 503: come again); they stand in metrics.jsonl"
    ]
    assert service.closed


def test_a_service_that_hangs_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.trackers._END_S", 0.5)
    told: list[str] = []
    forever = threading.Event()

    class Hangs(Fickle):
        def log(self, step: Step) -> None:
            forever.wait(60)

    box = Outbox("x", Hangs, told.append)
    other = Outbox("y", Hangs, told.append)
    begin = time.monotonic()
    for step in steps(3):
        box.put(step)
        other.put(step)
    assert time.monotonic() - begin < 0.1
    close_all([box, other])
    assert time.monotonic() - begin < 5
    says = "3 lines were not sent; they stand in metrics.jsonl"
    assert told == [f"trackers.x: {says}", f"trackers.y: {says}"]
    forever.set()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_service_that_refuses_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, config: RunConfig) -> Fickle:
        raise PermissionError("no key for you")

    monkeypatch.setattr("deploy.trackers._open", refuse)
    monkeypatch.setattr("deploy.trackers.find_spec", lambda _: True)
    with pytest.raises(ConfigError, match=r"trackers\.trackio: .*PermissionError: no key for you"):
        trackers.begin(of(tmp_path, trackio={"project": "p"}))


def test_a_service_that_never_answers_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = threading.Event()

    def wait(name: str, config: RunConfig) -> Fickle:
        hangs.wait(60)
        raise ConnectionError

    monkeypatch.setattr("deploy.trackers._open", wait)
    monkeypatch.setattr("deploy.trackers.find_spec", lambda _: True)
    monkeypatch.setattr("deploy.trackers.BEGIN_S", 0.2)
    try:
        with pytest.raises(ConfigError, match=r"cannot be reached \(TimeoutError: no answer"):
            trackers.begin(of(tmp_path, trackio={"project": "p"}))
    finally:
        hangs.set()
