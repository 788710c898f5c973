"""What keeps a command from joining a cluster is one line within seconds, in every command."""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import grpc
import pytest
import ray
from ray.core.generated import gcs_service_pb2 as messages
from ray.core.generated import gcs_service_pb2_grpc as services

from common.config.run import RunConfig
from common.errors import ClusterError, StorageError, WorkerError
from deploy.cli.main import main
from deploy.run_folder.lock import writing
from deploy.stages.controller_actor import RemoteController
from deploy.workers import attach
from deploy.workers.attach import Way, ask_cluster, start_cluster
from deploy.workers.guard import closed_token, unguarded
from tests.deploy.workers.test_meeting import outside

ROOT = Path(__file__).parents[3]
HERE = {"ray_version": ray.__version__, "python_version": platform.python_version()}


@contextmanager
def silence() -> Iterator[str]:
    """A port that accepts and never speaks."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@contextmanager
def web() -> Iterator[str]:
    """A web server."""
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@contextmanager
def gcs(versions: dict[str, str], token: str = "", host: str = "127.0.0.1") -> Iterator[str]:
    """What a cluster's head answers a newcomer, on Ray's own protocol; it has no nodes."""

    class Kept(services.InternalKVGcsServiceServicer):  # type: ignore[misc]
        def InternalKVGet(self, request: object, context: grpc.ServicerContext) -> object:
            sent = dict(context.invocation_metadata()).get("authorization", "")
            if token and sent != f"Bearer {token}":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return messages.InternalKVGetReply(value=json.dumps(versions).encode())

    class Nodes(services.NodeInfoGcsServiceServicer):  # type: ignore[misc]
        def GetAllNodeInfo(self, request: object, context: object) -> object:
            return messages.GetAllNodeInfoReply()

    server = grpc.server(futures.ThreadPoolExecutor(2))
    services.add_InternalKVGcsServiceServicer_to_server(Kept(), server)
    services.add_NodeInfoGcsServiceServicer_to_server(Nodes(), server)
    port = server.add_insecure_port(f"{host}:0")
    server.start()
    yield f"{host}:{port}"
    server.stop(None)


def at(address: str) -> RunConfig:
    return RunConfig.model_validate({"cluster": {"address": address}})


def refusal(address: str) -> str:
    """What both ways to join say, in no more than ten seconds."""
    begin = time.monotonic()
    with pytest.raises(ClusterError) as found:
        start_cluster(at(address))
    with pytest.raises(ClusterError) as again:
        ask_cluster(Way(address), lambda: None)
    assert time.monotonic() - begin < 2 * 10
    assert str(again.value) == str(found.value)
    assert len(str(found.value).splitlines()) == 1
    assert f"cluster at {address}" in str(found.value)
    return str(found.value)


@pytest.mark.parametrize(
    ("scheme", "address", "says"),
    [
        ("", "127.0.0.1:1", "connection refused"),
        ("ray://", "127.0.0.1:1", "connection refused"),
        ("http://", "127.0.0.1:1", "an address is HOST:PORT"),
        ("", "no port", "does not answer"),
    ],
)
def test_nobody_is_there(scheme: str, address: str, says: str) -> None:
    assert says in refusal(scheme + address)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_something_else_is_there(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with web() as address:
        assert "not Ray" in refusal(scheme + address)
    monkeypatch.setattr(attach, "_ANSWER_S", 0.5)
    with silence() as address:
        assert "nothing that speaks Ray's protocol" in refusal(scheme + address)


def test_another_version_is_there() -> None:
    with gcs(HERE | {"ray_version": "2.9.1", "python_version": "3.9.18"}) as address:
        said = refusal(address)
    assert "Ray 2.9.1 on Python 3.9.18" in said
    assert f"Ray {ray.__version__} on Python {platform.python_version()}" in said


def test_another_token_is_wanted() -> None:
    with gcs(HERE, token="a" * 32) as address:
        said = refusal(address)
    assert "another token" in said
    assert "RAY_AUTH_TOKEN" in said
    assert "aaaa" not in said


def test_no_node_of_it_is_on_this_machine() -> None:
    with gcs(HERE) as address:
        assert "no node on this machine" in refusal(address)


def command(
    *arguments: str, wait_s: float = 60, **environment: str
) -> tuple[int, list[str], str, float]:
    """A command of its own process: code, error lines, out, seconds."""
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=wait_s,
    )
    return done.returncode, done.stderr.splitlines(), done.stdout, time.monotonic() - begin


@pytest.mark.slow
def test_a_command_ends_at_a_port_that_never_speaks(folder: Path) -> None:
    with silence() as address, writing(folder, "train", address):
        code, error, _, seconds = command("scale", str(folder), "--actors=2")
    assert (code, len(error)) == (5, 1), error
    assert error[0].startswith(f"error cluster at {address} does not answer")
    assert seconds < 30  # five of waiting; the rest is Python's imports on a busy machine


@pytest.mark.parametrize("arguments", [["scale", "--actors", "2"], ["replay"], ["train"]])
def test_every_command_of_a_run_says_that_its_cluster_is_gone(
    folder: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The one that the run is at work on, or that its recipe names."""
    trained = 0 if arguments == ["replay"] else -1
    facts = {"iterations": trained, "weights_hash": ""}
    (folder / "result.json").write_text(json.dumps(facts), encoding="utf8")
    command = ["train", "--resume"] if arguments == ["train"] else [arguments[0]]
    with writing(folder, "train", "127.0.0.1:1"), pytest.raises(SystemExit) as ended:
        main([*command, str(folder), *arguments[1:]])
    assert ended.value.code == 5
    error = capsys.readouterr().err
    assert error.startswith("error cluster at 127.0.0.1:1 does not answer (connection refused)")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_that_waits_for_an_answer_can_be_stopped(
    folder: Path, sent: signal.Signals, code: int
) -> None:
    program = (
        "import sys; from deploy.workers import attach; from deploy.cli.main import main; "
        "attach._ANSWER_S = 60; print('ready', flush=True); main(sys.argv[1:])"
    )
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.settimeout(60)
        port = listening.getsockname()[1]
        with writing(folder, "train", f"127.0.0.1:{port}"):
            started = subprocess.Popen(
                [sys.executable, "-c", program, "scale", str(folder), "--actors=2"],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
            connection, _ = listening.accept()
            time.sleep(0.3)
            started.send_signal(sent)
            _, error = started.communicate(timeout=20)
            connection.close()
    assert started.returncode == code, error
    assert error in ("error terminated\n", "error interrupted\n")


def test_a_cluster_that_dies_while_it_is_asked_holds_nobody(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attach, "_ASK_S", 0.3)
    over = threading.Event()
    begin = time.monotonic()
    with pytest.raises(ClusterError, match=r"answers and then no more for 0 s: it is ending"):
        ask_cluster(Way(attach.own_address()), lambda: over.wait(60))
    assert time.monotonic() - begin < 5
    assert attach.asks()
    over.set()
    with pytest.raises(ray.exceptions.GetTimeoutError):  # its own, which is no cluster's silence
        ask_cluster(Way(attach.own_address()), late)


def late() -> None:
    raise ray.exceptions.GetTimeoutError("late")


def test_no_other_cluster_is_asked_than_the_runs_own(cluster: None) -> None:
    with gcs(HERE) as address, pytest.raises(ClusterError, match="no node on this machine"):
        ask_cluster(Way(address), lambda: pytest.fail("asked"))


@pytest.mark.parametrize(
    ("holder", "given", "way"),
    [
        ("127.0.0.1:7", None, Way("127.0.0.1:7", ours=True)),
        ("10.0.0.1:7", None, Way("10.0.0.1:7", ours=True)),
        ("127.0.0.1:7", "ray://h:1", Way("ray://h:1")),
        ("127.0.0.1:7", "auto", Way("auto", ours=True)),
    ],
)
def test_the_way_to_a_run_is_the_address_in_its_folder(
    tmp_path: Path, holder: str, given: str | None, way: Way
) -> None:
    with writing(tmp_path, "train", holder) as here:
        assert attach.way_to(tmp_path, here, given) == way
    elsewhere = replace(here, host="node-7")
    if given is None and holder.startswith("127"):
        with pytest.raises(ClusterError, match="host node-7, in a cluster that only this host"):
            attach.way_to(tmp_path, elsewhere, given)
    elif given is None:
        assert attach.way_to(tmp_path, elsewhere, given) == Way(holder, ours=False)


def test_a_controller_that_does_not_answer(cluster: None) -> None:
    @ray.remote(num_cpus=0)
    class Silent:
        def status(self) -> None:
            time.sleep(30)

    silent = Silent.remote()
    with pytest.raises(WorkerError, match=r"does not answer within 0 s"):
        RemoteController(silent, RunConfig()).status(within_s=0.2)
    ray.kill(silent)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, "~/.ray/auth_token"),
        ({"RAY_AUTH_TOKEN_PATH": "/secrets/token"}, "/secrets/token"),
        ({"RAY_AUTH_TOKEN": "s3cret"}, "RAY_AUTH_TOKEN of this environment"),
    ],
)
def test_how_to_sign_in_to_the_dashboard_is_said_without_the_token(
    environment: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert attach.sign_in() == "", "nothing is asked"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    hint = attach.sign_in()
    assert "get-auth-token" in hint and says in hint
    assert "s3cret" not in hint


# ------------------------------------------------------------------ the local cluster


@pytest.mark.parametrize("dashboard", [True, False])
def test_a_temporary_folder_that_is_too_long(
    dashboard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 12345)
    # 107 = folder + /ray + /session_0000-00-00_00-00-00_000000_12345 + /sockets + /plasma_store,
    # with the dashboard's longest socket, dash_TaskEventsHead, instead.
    socket_path = len("/ray/session_0000-00-00_00-00-00_000000_12345/sockets/plasma_store")
    longest = 107 - socket_path - (7 if dashboard else 0)
    monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * (longest - 1))
    attach._require_short_paths(dashboard)
    monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * longest)
    with pytest.raises(ClusterError, match=r"RAY_TMPDIR=/x+ is 1 bytes too long.*107 bytes"):
        attach._require_short_paths(dashboard)
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("TMPDIR", "/" + "é" * longest)
    with pytest.raises(ClusterError, match=r"^TMPDIR="):
        attach._require_short_paths(dashboard)


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (OSError("AF_UNIX path too long"), StorageError.exit_code, "AF_UNIX path too long"),
        (OSError(28, "No space left", b"/x\xff"), StorageError.exit_code, "No space left"),
        (OSError(18, "Cross-device link", "/a", None, "/b"), 8, "/a -> /b: Cross-device link"),
        (OSError(), StorageError.exit_code, "file system: OSError"),
        (TimeoutError(), ClusterError.exit_code, "no answer"),
        (ray.exceptions.GetTimeoutError("late"), ClusterError.exit_code, "no answer: late"),
        (ConnectionError("gone"), ClusterError.exit_code, "no answer: gone"),
    ],
)
def test_an_error_of_the_system_says_what_it_knows(
    error: Exception,
    code: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr("deploy.cli.main.app", fail)
    with pytest.raises(SystemExit) as ended:
        main(["config"])
    assert ended.value.code == code
    shown = capsys.readouterr().err
    assert says in shown
    assert "None" not in shown


def test_a_cluster_that_asks_nobody_for_a_token_is_told(cluster: None) -> None:
    host = outside()
    with gcs(HERE, host=host) as address:
        assert f"the cluster at {address} asks nobody for a token" in unguarded(address)
    with gcs(HERE, token="a" * 32, host=host) as address:
        assert unguarded(address) == ""
    with gcs(HERE) as address:
        assert unguarded(address) == "", "nobody else reaches it"
    assert unguarded("") == ""
    assert not attach.own_address().startswith("127.") and unguarded(attach.own_address()) == ""


def test_a_token_that_others_may_read_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray writes it under the user's umask."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert closed_token() == ""
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("secret", encoding="utf8")
    token.chmod(0o644)
    assert "now only you can" in closed_token()
    assert token.stat().st_mode & 0o777 == 0o600 and token.read_text() == "secret"
    assert closed_token() == ""
