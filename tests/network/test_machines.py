"""The machines that are not there, and a learner whose ranks are on two of them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.network.nodes import Hosts, Node, debian, kubernetes, unresolvable, until, why_not
from tests.network.switch import Switch

if reason := why_not():
    pytest.skip(f"no machines can be made here: {reason}", allow_module_level=True)

SEND = """
import socket, sys
with socket.create_connection(("10.77.0.1", 5000), 20) as link:
    link.sendall(bytes(int(sys.argv[1])))
"""
RECEIVE = """
import socket
with socket.create_server(("10.77.0.1", 5000)) as server:
    print("listening", flush=True)
    link, _ = server.accept()
    count = 0
    while part := link.recv(1 << 20):
        count += len(part)
    print(count, flush=True)
"""
NAME = "import socket; print(socket.gethostbyname(socket.gethostname()))"


@pytest.fixture
def switch() -> Iterator[Switch]:
    made = Switch(0)
    yield made
    made.close()


@pytest.fixture
def two(switch: Switch) -> Iterator[tuple[Node, Node]]:
    nodes = [Node(switch, f"n{i}", f"10.77.0.{i}", debian, {}) for i in (1, 2)]
    yield nodes[0], nodes[1]
    for node in nodes:
        if node.on:
            node.power_off()


def sent(two: tuple[Node, Node], tmp_path: Path, size: int) -> tuple[int, float]:
    """Bytes that arrive, and seconds."""
    log = tmp_path / "received.txt"
    receiving = two[0].start([sys.executable, "-c", RECEIVE], log)
    while "listening" not in log.read_text():
        time.sleep(0.02)
    begin = time.monotonic()
    assert two[1].say([sys.executable, "-c", SEND, str(size)]) == ""
    receiving.wait(30)
    seconds = time.monotonic() - begin
    count = int(log.read_text().split()[-1])
    log.unlink()
    return count, seconds


def test_links_carry_delay_lose_and_are_cut(
    two: tuple[Node, Node], switch: Switch, tmp_path: Path
) -> None:
    link = switch.links[two[1].address]
    size = 1_000_000
    count, quick = sent(two, tmp_path, size)
    assert count == size and switch.lost == 0
    link.delay_s = 0.1
    count, seconds = sent(two, tmp_path, size)
    assert count == size and seconds > quick + 0.3, "the handshake alone takes two ways"
    link.delay_s, link.loss = 0.0, 0.05
    count, _ = sent(two, tmp_path, size)
    assert count == size and switch.lost > 10, "TCP sends again what was lost"
    link.loss, link.up = 0.0, False
    carried = switch.carried
    said = two[1].say([sys.executable, "-c", SEND.replace(", 20)", ", 0.5)"), "1"])
    assert "TimeoutError" in said and switch.carried == carried
    link.up = True
    assert sent(two, tmp_path, size)[0] == size


@pytest.mark.parametrize(
    ("hosts", "address"),
    [(debian, "127.0.1.1"), (kubernetes, "10.77.0.1"), (unresolvable, "gaierror")],
)
def test_a_machine_knows_its_name_as_its_kind_does(
    switch: Switch, hosts: Hosts, address: str
) -> None:
    node = Node(switch, "alpha", "10.77.0.1", hosts, {})
    try:
        assert node.say(["hostname"]) == "alpha\n"
        assert address in node.say([sys.executable, "-c", NAME])
        assert len(node.say(["ls", "/dev/shm"])) == 0
        log = Path("/dev/null")
        running = node.start(["sleep", "60"], log)
        until(lambda: [p.name() for p in node.processes()] == ["sleep"], 10, "it does not run")
    finally:
        node.power_off()
    assert running.wait(10) != 0, "its power went"


@pytest.mark.chaos
@pytest.mark.timeout(400)
def test_ranks_on_two_debian_machines_train_as_on_one() -> None:
    """The whole campaign is `make network`."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.network.run", "0", "host names: debian"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 lost, 0 doubled, weights equal" in done.stdout
