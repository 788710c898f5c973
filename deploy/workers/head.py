"""Whether the head of the cluster still answers.

Ray ends a program that has not heard from its head (the GCS) for a minute, from within, with lines
of its own and the exit code 1. This notices before that.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Final

import grpc
import psutil
from ray._private import worker as ray_worker
from ray._private.node import Node
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

_ANSWER_S: Final = 2.0
_LOOK_S: Final = 1.0
_SILENT_S: Final = 40.0
"""Below the minute after which Ray ends a program (`gcs_rpc_server_reconnect_timeout_s`)."""
_NO_ANSWER: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
_ESSENTIAL: Final = ("gcs_server", "raylet")


class HeadWatch:
    """Looks, in a thread of its own, until it is stopped.

    A head is silent only once it has answered: this program may not be able to ask it although it
    is well, because it is reached by another way (`ray://`) or speaks TLS.
    """

    def __init__(self, lost: Callable[[str], None]) -> None:
        """Prepare it; `start` begins.

        Args:
            lost: called in that thread, once, with what has happened. The program's own threads
                may hang in calls of Ray's by then.
        """
        self._lost, self._stopped = lost, threading.Event()

    def start(self, address: str) -> None:
        """Begin to look.

        Args:
            address: of the GCS, as ``host:port``.
        """
        threading.Thread(target=self._look, args=[address], name="head", daemon=True).start()

    def stop(self) -> None:
        """Look no more; the cluster may end."""
        self._stopped.set()

    def _look(self, address: str) -> None:
        answered: float | None = None
        while not self._stopped.wait(_LOOK_S):
            why = ended_here()
            if not why:
                if code_of(address) not in _NO_ANSWER:
                    answered = time.monotonic()
                elif answered is not None and time.monotonic() - answered > _SILENT_S:
                    why = f"the head of the cluster at {address} is silent for {_SILENT_S:.0f} s"
            if why and not self._stopped.is_set():
                self._lost(why)
                return


def code_of(address: str) -> grpc.StatusCode:
    """Return how a cluster's head answers a question that no token is sent with.

    Args:
        address: where its GCS listens, as ``host:port``.
    """
    channel = grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)])
    with contextlib.closing(channel):
        try:
            gcs_service_pb2_grpc.InternalKVGcsServiceStub(channel).InternalKVGet(
                gcs_service_pb2.InternalKVGetRequest(namespace=b"cluster", key=b"CLUSTER_METADATA"),
                timeout=_ANSWER_S,
            )
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
    return grpc.StatusCode.OK


def ended_here() -> str:
    """Return which of Ray's processes that this program has started is gone, and how it ended.

    Empty where none is, or where this program has joined the cluster of others.
    """
    node: Node | None = ray_worker._global_node
    if node is None:
        return ""
    for name in _ESSENTIAL:
        for started in node.all_processes.get(name, []):
            if (code := started.process.poll()) is not None:
                how = f"signal {-code}" if code < 0 else f"exit code {code}"
                return f"a process of the local cluster has ended: {name}, by {how}"
    return ""


def end_here() -> None:
    """Kill what is left of a local cluster that this program has started; nobody else would."""
    node: Node | None = ray_worker._global_node
    if node is None or not node.is_head():
        return
    left: list[psutil.Process] = []
    for raylet in node.all_processes.get("raylet", []):
        with contextlib.suppress(psutil.NoSuchProcess):
            left += psutil.Process(raylet.process.pid).children(recursive=True)
    node.kill_all_processes(check_alive=False, allow_graceful=False, wait=False)
    for child in left:  # Ray's agents would stay for a minute
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
