"""Policy training in a real terminal of 80 columns: no frame is cut, none lacks its figures."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import yaml

from tests.workspaces import make_workspace

ROOT = Path(__file__).resolve().parents[2]
MOVE_UP = re.compile(rb"\x1b\[\d*A")
ESCAPE = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


def recorded(command: list[str], columns: int) -> bytes:
    """All that a program writes to a terminal of this width, to its end."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
    environment.pop("COLUMNS", None)
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=ROOT
    )
    os.close(theirs)
    found = b""
    while True:
        try:
            part = os.read(ours, 65_536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        found += part
    os.close(ours)
    assert process.wait(timeout=60) == 0, found.decode(errors="replace")
    return found


@pytest.mark.journey
def test_no_frame_is_cut_and_every_one_has_score_and_kl(tmp_path: Path) -> None:
    config = make_workspace(tmp_path)
    values = config.model_dump(mode="json")
    values["train"] |= {"iterations": 8}
    values["learner"] |= {"cpus_per_rank": 0.4}
    values["rollout"] |= {"cpus_per_actor": 0.4}
    values["reward_service"] |= {"cpus_per_replica": 0.4}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values), encoding="utf8")
    command = [sys.executable, "-m", "deploy.cli", "train", "--config", str(recipe)]
    raw = recorded(command, 80)
    assert b"\xe2\x80\xa6" not in raw, "an ellipsis: something was cut"
    seen = set()
    for frame in MOVE_UP.split(raw):
        text = ESCAPE.sub(b"", frame).decode().replace("\r", "\n")
        text = text.partition("  train: ")[0]  # what is said of the whole at the end
        drawn = [line.rstrip() for line in text.splitlines() if "/8" in line or "score" in line]
        assert max(map(len, drawn), default=0) <= 80, drawn
        if (done := re.search(r"(\d)/8", text)) and int(done[1]) >= 2:
            seen.add(int(done[1]))
            assert "score" in text and "KL" in text, text
    assert len(seen) >= 3, "frames of several iterations were looked at"
