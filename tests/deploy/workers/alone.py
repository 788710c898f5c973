"""Programs with a cluster of their own: Ray is one cluster per process, and the suite has one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


def said_by(module: str) -> dict[str, Any]:
    """Run a module of tests as a program; what it printed last, which is JSON."""
    # A folder of its own: Ray notes the machine's newest cluster in its temporary folder.
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        done = subprocess.run(
            [sys.executable, "-m", module],
            cwd=ROOT,
            env=os.environ | {"RAY_TMPDIR": folder},
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said
