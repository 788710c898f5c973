"""A real HTTP reward endpoint on this machine that misbehaves as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Rows = Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What the endpoint answers."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    silent_s: float = 0.0
    """Silence before the answer."""
    drip_s: float = 0.0
    """Pause before each byte of the body."""
    missing: int = 0
    """Bytes promised and never sent."""
    hang_up: bool = False
    """Close the connection without a word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request as it arrived."""

    at: float
    """`time.monotonic()` of its arrival."""
    authorization: str | None
    body: Any

    @property
    def ids(self) -> list[str]:
        """The rollouts it asks for."""
        return [row["rollout_id"] for row in self.body["requests"]]


Behaviour = Callable[[int, Rows], Reply]
"""The number of the call (from 0) and its rows -> the answer. May block."""


DOWN = Reply(status=500)


def scores(pairs: Sequence[tuple[Any, Any]]) -> Reply:
    """An answer with these (rollout_id, score)."""
    rows = [{"rollout_id": rollout_id, "score": score} for rollout_id, score in pairs]
    return Reply(body=json.dumps({"scores": rows}).encode())


def fine(number: int, rows: Rows) -> Reply:
    """Behaves: the score of a response is the number that it spells."""
    return scores([(row["rollout_id"], float(row["response"])) for row in rows])


def always(reply: Reply) -> Behaviour:
    """The same answer to every call."""
    return lambda number, rows: reply


def first(*replies: Reply) -> Behaviour:
    """These answers to the first calls, then all is fine."""

    def behave(number: int, rows: Rows) -> Reply:
        return replies[number] if number < len(replies) else fine(number, rows)

    return behave


class Endpoint:
    """The server, from `with` to the end of its block."""

    def __init__(self, behave: Behaviour) -> None:
        self.behave = behave
        self.calls: list[Call] = []
        self.peak = 0
        """Most requests that were ever under way at once."""
        self._under_way = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                endpoint.answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                """Tests print nothing."""

        class Server(ThreadingHTTPServer):
            request_queue_size = 256

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/score"

    def __enter__(self) -> Endpoint:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def gaps(self) -> list[float]:
        """Seconds between the arrivals of successive calls."""
        return [b.at - a.at for a, b in zip(self.calls, self.calls[1:], strict=False)]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Note the call, let it behave, send what it says."""
        length = int(handler.headers["Content-Length"])
        body = json.loads(handler.rfile.read(length))
        with self._lock:
            number = len(self.calls)
            authorization = handler.headers["Authorization"]
            self.calls.append(Call(at=time.monotonic(), authorization=authorization, body=body))
            self._under_way += 1
            self.peak = max(self.peak, self._under_way)
        try:
            reply = self.behave(number, body["requests"])
            self._closing.wait(reply.silent_s)
        finally:
            # Before the answer leaves: with it in hand the client may call again at once.
            with self._lock:
                self._under_way -= 1
        if reply.hang_up or self._closing.is_set():
            handler.close_connection = True
            return
        try:
            self._send(handler, reply)
        except (BrokenPipeError, ConnectionResetError):
            handler.close_connection = True  # The client had enough, as some tests want it to.

    def _send(self, handler: BaseHTTPRequestHandler, reply: Reply) -> None:
        handler.send_response(reply.status)
        for name, value in reply.headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(reply.body) + reply.missing))
        handler.end_headers()
        if not reply.drip_s:
            handler.wfile.write(reply.body)
        else:
            for byte in reply.body:
                self._closing.wait(reply.drip_s)
                handler.wfile.write(bytes([byte]))
        if reply.missing:
            handler.close_connection = True
