"""The stranger finds what is open: each of its ways in is tried at a door that has no lock."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch.distributed as dist

from tests.deploy.workers.test_attach import HERE, gcs
from tests.network.stranger import ask, methods, over_grpc, routes

KEPT, NODES = (
    "/ray.rpc.InternalKVGcsService/InternalKVGet",
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
)


class Page(BaseHTTPRequestHandler):
    """Answers one route to everybody, one to nobody, and has no others."""

    def do_GET(self) -> None:
        status = {"/nodes": 200, "/events": 401}.get(self.path, 404)
        self.send_response(status)
        self.end_headers()

    do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def page() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_it_asks_for_all_that_ray_serves() -> None:
    """Names by which somebody could run a program, or read what runs."""
    for route in (
        ("POST", "/api/jobs/"),
        ("GET", "/nodes"),
        ("POST", "/get_or_create_runtime_env"),
    ):
        assert route in routes()
    for name in (
        "InternalKVGcsService/InternalKVPut",
        "CoreWorkerService/PushTask",
        "NodeManagerService/RequestWorkerLease",
        "RayletDriver/Init",
    ):
        assert any(method.endswith(name) for method in methods()), name


def test_an_open_head_answers_and_a_locked_method_refuses() -> None:
    """The double locks one of its two methods."""
    with gcs(HERE) as address:
        host, _, port = address.rpartition(":")
        assert over_grpc(host, int(port)) == (True, {KEPT, NODES})
    with gcs(HERE, token="a" * 32) as address:
        host, _, port = address.rpartition(":")
        assert over_grpc(host, int(port)) == (True, {NODES})


def test_an_open_page_answers_and_a_locked_one_refuses(page: int) -> None:
    assert ask("127.0.0.1", page) == {"speaks": "HTTP", "answers": ["GET /nodes 200"]}


def test_the_store_of_a_meeting_is_read() -> None:
    store = dist.TCPStore(  # type: ignore[attr-defined]  # documented, and not exported
        "127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5), wait_for_workers=False
    )
    assert ask("127.0.0.1", store.port) == {"speaks": "torch", "answers": ["its keys"]}
