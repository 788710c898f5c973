"""A program of somebody who has no token: it asks every port for everything that Ray serves.

``python -m tests.network.stranger '[["10.77.0.1", 6379], ...]'`` prints what it was given, as JSON:
by port what is spoken there, and which questions were answered otherwise than by a refusal.
"""

from __future__ import annotations

import http.client
import importlib
import json
import pkgutil
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import grpc
import ray
from ray.core import generated

PASSWORDS = ("", "Bearer 00000000000000000000000000000000")
"""What is said instead of the token: nothing, and a wrong one."""
_WAIT_S = 3.0
_ROUTE = re.compile(r'routes\.(get|post|put|patch|delete)\(\s*f?"(/[^"]*)"')
_NOT_IN_PYTHON = [
    f"/ray.rpc.ObjectManagerService/{name}" for name in ("Push", "Pull", "FreeObjects")
]
_NOT_THERE = (404, 405)
_REFUSED = (401, 403)
_NOBODY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
_METRICS = b"# HELP"
"""What Prometheus servers answer with, whatever they are asked."""
_STORE = """
import sys, torch.distributed as dist
from datetime import timedelta
wait = {"timeout": timedelta(seconds=3), "wait_for_workers": False}
dist.TCPStore(sys.argv[1], int(sys.argv[2]), is_master=False, **wait).num_keys()
"""
_STORE_S = 20.0
_ODD = bytes(range(256)) * 4


def routes() -> list[tuple[str, str]]:
    """Method and path of everything that Ray's HTTP servers answer, as its source says."""
    found = {("GET", "/"), ("GET", "/metrics"), ("POST", "/get_or_create_runtime_env"),
             ("POST", "/delete_runtime_env_if_possible")}  # fmt: skip
    for file in (Path(ray.__file__).parent / "dashboard").rglob("*.py"):
        for method, path in _ROUTE.findall(file.read_text(encoding="utf8")):
            found.add((method.upper(), re.sub(r"\{[^}]*\}", "x", path)))
    return sorted(found - {("GET", "/favicon.ico")})


def methods() -> list[str]:
    """Full names of all gRPC methods that Ray's protocol files define."""
    found = list(_NOT_IN_PYTHON)
    for module in pkgutil.iter_modules(generated.__path__):
        if module.name.endswith("_pb2"):
            of = importlib.import_module(f"ray.core.generated.{module.name}").DESCRIPTOR
            for service in of.services_by_name.values():
                found += [f"/{service.full_name}/{method.name}" for method in service.methods]
    return sorted(found)


def over_http(host: str, port: int) -> tuple[bool, set[str]]:
    """Whether HTTP is spoken there, and what is answered to whom."""
    answered, spoken = set[str](), False
    for password in PASSWORDS:
        headers = {"Connection": "close", "Content-Type": "application/json"}
        if password:
            headers["Authorization"] = password
        for method, path in routes():
            link = http.client.HTTPConnection(host, port, timeout=_WAIT_S)
            body = json.dumps({"entrypoint": "id"}) if method in ("POST", "PUT") else None
            try:
                link.request(method, path, body, headers)
                answer = link.getresponse()
                status, begin = answer.status, answer.read()[: len(_METRICS)]
            except (OSError, http.client.HTTPException) as error:
                if not spoken:
                    return False, answered
                answered.add(f"{method} {path} {type(error).__name__}")
                continue
            finally:
                link.close()
            spoken = True
            if begin == _METRICS:
                answered.add("metrics")
            elif status not in (*_NOT_THERE, *_REFUSED):
                answered.add(f"{method} {path} {status}")
    return spoken, answered


def over_grpc(host: str, port: int) -> tuple[bool, set[str]]:
    """Whether gRPC is spoken there, and what is answered to whom."""
    answered, spoken = set[str](), False
    for password in PASSWORDS:
        metadata = [("authorization", password)] if password else []
        channel = grpc.insecure_channel(f"{host}:{port}", [("grpc.enable_http_proxy", 0)])
        for name in methods():
            try:
                channel.unary_unary(name)(b"", timeout=_WAIT_S, metadata=metadata)
                answered.add(name)
            except grpc.RpcError as error:
                code = error.code()
                if code in _NOBODY and not spoken:
                    return False, answered
                if code not in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED):
                    answered.add(f"{name} {code.name}")
            spoken = True
        channel.close()
    return spoken, answered


def over_torch(host: str, port: int) -> tuple[bool, set[str]]:
    """Whether the store of a meeting is there."""
    with suppress(subprocess.TimeoutExpired):  # it waits for ever where nobody answers
        done = subprocess.run(
            [sys.executable, "-c", _STORE, host, str(port)], capture_output=True, timeout=_STORE_S
        )
        if done.returncode == 0:
            return True, {"its keys"}
    return False, set()


def heard(host: str, port: int) -> str:
    """What is said there to somebody who says nothing, or something odd."""
    said = b""
    for words in (b"", _ODD):
        with socket.create_connection((host, port), _WAIT_S) as link, suppress(OSError):
            link.sendall(words)
            link.settimeout(_WAIT_S)
            said += link.recv(1024)
    return "says something unasked" if said else "says nothing"


def ask(host: str, port: int) -> dict[str, object]:
    """Try everything at one port; what is spoken, and what is answered."""
    try:
        socket.create_connection((host, port), _WAIT_S).close()
    except OSError:
        return {"speaks": "closed", "answers": []}
    for name, way in (("HTTP", over_http), ("gRPC", over_grpc), ("torch", over_torch)):
        spoken, answered = way(host, port)
        if spoken:
            return {"speaks": name, "answers": sorted(answered)}
    return {"speaks": heard(host, port), "answers": []}


def asked(targets: Iterator[tuple[str, int]]) -> dict[str, dict[str, object]]:
    """Try everything at every port."""
    with ThreadPoolExecutor(16) as pool:
        there = list(targets)
        return dict(
            zip(
                (f"{host}:{port}" for host, port in there),
                pool.map(lambda at: ask(*at), there),
                strict=True,
            )
        )


if __name__ == "__main__":
    print(json.dumps(asked((host, port) for host, port in json.loads(sys.argv[1]))))
