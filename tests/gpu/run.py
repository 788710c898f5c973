"""``python -m tests.gpu.run [OUT]``: checks and measures every role on this machine's GPU.

It writes ``OUT/gpu.json`` and prints a table. Where there is no GPU it says so, and that is all.
``--device cpu --small`` runs the same on the processor with a tiny model: what tests do.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.gpu.engines import engine_of, prepare

NONE = "no GPU here: nothing was measured"


def main(arguments: Sequence[str]) -> int:
    """Run everything; returns 1 where a check does not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.run", description=__doc__)
    parser.add_argument("out", nargs="?", default="build", help="folder of gpu.json")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--small", action="store_true", help="a tiny model, once")
    chosen = parser.parse_args(arguments)
    if chosen.device.startswith("cuda") and not torch.cuda.is_available():
        print(NONE)
        return 0
    begin = time.perf_counter()
    engine = prepare(chosen.device)
    card = platform.machine()
    if chosen.device.startswith("cuda"):
        card = torch.cuda.get_device_name(chosen.device)
    print(f"{card}, PyTorch {torch.__version__}, learner by {engine}")
    with tempfile.TemporaryDirectory() as root:
        found = _measured(Path(root), chosen.device, engine, small=chosen.small)
    found |= {
        "card": card,
        "torch": str(torch.__version__),
        "engine": engine,
        "seconds": time.perf_counter() - begin,
    }
    out = Path(chosen.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.json").write_text(json.dumps(found, indent=1), encoding="utf8")
    broken = [name for name, check in found["checks"].items() if not check["holds"]]
    print(f"{found['seconds']:.0f} s; {out / 'gpu.json'}")
    if broken:
        print(f"{len(broken)} checks do not hold: {'; '.join(broken)}")
    return int(bool(broken))


def _measured(root: Path, device: str, engine: str, *, small: bool) -> dict[str, dict[str, object]]:
    """Check, then measure; each line is printed as it is known."""
    # They import DeepSpeed, which `prepare` has told what to compute with.
    from common.devices import Compute
    from learner.rank import LearnerRank
    from learner.zero.process_group import disconnect
    from tests.gpu.correct import checks
    from tests.gpu.speed import SMALL, WHOLE, figures
    from tests.workspaces import make_workspace

    on_card = device.startswith("cuda")
    collectives = "cpu:gloo,cuda:nccl" if on_card else "gloo"
    compute = Compute(device=device, threads=torch.get_num_threads(), collectives=collectives)
    rank = LearnerRank(0, 1, compute)
    rank.connect(rank.listen())
    build = engine_of(engine, device)
    said: dict[str, dict[str, object]] = {"checks": {}, "figures": {}}
    try:
        workspace = make_workspace(_made(root / "workspace"))
        for check in checks(workspace, _made(root / "checks"), device, build):
            holds = "ok" if check.holds else "NO"
            print(f"{holds}  {check.name}: off by {check.off:.2g}, at most {check.bound:g}")
            said["checks"][check.name] = {
                "off": check.off,
                "bound": check.bound,
                "holds": check.holds,
            }
        size = SMALL if small else WHOLE
        for figure in figures(workspace, _made(root / "speed"), device, build, size):
            print(f"{figure.key:<30} {figure.value:>12,.3f} {figure.unit:<9} {figure.says}")
            said["figures"][figure.key] = {
                "value": figure.value,
                "unit": figure.unit,
                "says": figure.says,
            }
    finally:
        disconnect()
    return said


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
