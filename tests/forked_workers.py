"""Workers of the tests' Ray cluster as forks of one process, which has imported what they need.

A worker imports for two to three seconds before it does anything, and the tests start hundreds.
::

    raylet --starts--> SHIM, in Python's place --arguments, environment, files--> this program
                                                  fork: Ray's default_worker.py, as it is

What is forked has no state but modules. Whatever else Ray starts with Python runs as ever, and so
do the workers of all commands that tests start in processes of their own.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PRELOADED = (
    "actors.generation.decoder_generator",
    "actors.rollout_actor",
    "common.models.pretrained.decoder",
    "jsonschema",
    "learner.rank",
    "requests",
    "reward_service.service",
    "torch._dynamo",
    "transformers.models.llama.modeling_llama",
)
"""With torch, DeepSpeed and more that they import, PyTorch's optimizers its compiler too; not Ray,
whose C++ would not survive a fork."""
SHIM = """
import json, os, socket, sys
python, place, *arguments = sys.argv[1:]
if not arguments or not arguments[0].endswith("default_worker.py"):
    os.execv(python, [python, *arguments])
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(place)
    told = json.dumps([arguments, dict(os.environ), os.getcwd()]).encode()
    socket.send_fds(connection, [b"!"], [0, 1, 2])
    connection.sendall(told)
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)
"""


@contextmanager
def forking() -> Iterator[str]:
    """Run this program; give what stands in Python's place (`sys.executable`) as Ray starts."""
    with tempfile.TemporaryDirectory(prefix="forks-") as folder:
        place, shim, python = (Path(folder, name) for name in ("socket", "shim.py", "python"))
        shim.write_text(SHIM, encoding="utf8")
        command = f'exec "{sys.executable}" -SE "{shim}" "{sys.executable}" "{place}" "$@"'
        python.write_text(f"#!/bin/sh\n{command}\n", encoding="utf8")
        python.chmod(0o755)
        program = [sys.executable, "-m", "tests.forked_workers", str(place)]
        root = Path(__file__).parents[1]
        with subprocess.Popen(program, stdout=subprocess.PIPE, cwd=root) as server:
            assert server.stdout is not None
            assert b"ready\n" in iter(server.stdout.readline, b"")
            try:
                yield str(python)
            finally:
                server.kill()


def serve(place: str) -> None:
    """Fork a worker for each connection, as long as the tests run."""
    before, parent = set(os.environ), os.getppid()
    for name in PRELOADED:
        importlib.import_module(name)
    assert threading.active_count() == 1, "a fork would lose the other threads"
    assert "ray" not in sys.modules
    gc.collect()
    gc.freeze()  # each worker's collections would go through all of that, and so copy it
    added = {name: value for name, value in os.environ.items() if name not in before}
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system buries them
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(place)
        listening.listen(64)
        listening.settimeout(1.0)
        print("ready", flush=True)
        while os.getppid() == parent:
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                continue
            with connection:
                told, files = receive(connection)
            if os.fork() == 0:
                listening.close()
                arguments, environment, folder = json.loads(told)
                become_worker(arguments, added | environment, folder, files)
            for file in files:
                os.close(file)


def receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    """What the shim sent, and its three files."""
    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    return b"".join(iter(lambda: connection.recv(1 << 16), b"")), files


def become_worker(
    arguments: list[str], environment: dict[str, str], folder: str, files: list[int]
) -> None:
    """What the raylet wanted to start, in this process."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    random.seed()
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    serve(sys.argv[1])
