"""``make soak``: hundreds of iterations; the memory of every kind of process must stay flat.

Private memory (USS) of controller, learner ranks, rollout actors and reward workers and the bytes
in the object store are read after every few iterations; a line is laid through what was read after
the warm-up. The exit code is 0 only when no line rises by more than `LIMIT_MB` per 100 iterations::

    python -m tests.chaos.soak [ITERATIONS]
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np
import ray
from ray._private.internal_api import node_stats
from rich.console import Console
from rich.table import Table

from tests.chaos.arena import Arena, Campaign
from tests.chaos.faults import TITLES
from tests.workspaces import make_workspace

LIMIT_MB = 1.0
"""Per 100 iterations."""
WARM_UP = 0.5
"""Share of the iterations in which memory may grow: allocators and caches fill."""


def memory(arena: Arena) -> dict[str, float]:
    """MiB by kind of process (the mean over its processes), and of the object store."""
    found = {
        kind: mean(p.memory_full_info().uss for p in arena.processes(title)) / 2**20
        for kind, title in TITLES.items()
    }
    stats = [
        node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], False)
        for node in ray.nodes()
        if node["Alive"]
    ]
    used = sum(each.store_stats.object_store_bytes_used for each in stats)
    return found | {"object store": used / 2**20}


def slope(readings: Sequence[tuple[int, float]]) -> float:
    """MiB per 100 iterations of the straight line through (iteration, MiB)."""
    at, values = zip(*readings, strict=True)
    return 100.0 * float(np.polyfit(at, values, 1)[0])


def main(arguments: Sequence[str]) -> int:
    """Run it; the exit code."""
    iterations = int(arguments[0]) if arguments else 400
    console, root, begin = Console(width=100), Path(tempfile.mkdtemp()), time.monotonic()
    (root / "workspace").mkdir()
    arena = Arena()
    readings: dict[str, list[tuple[int, float]]] = {}
    try:
        campaign = Campaign(
            arena,
            make_workspace(root / "workspace"),
            root / "run",
            train={"iterations": iterations, "checkpoint_every": 20, "max_staleness": 1},
        )
        campaign.start()
        done = 0
        while done < iterations - 5:
            target = done + 5
            campaign.until(lambda target=target: campaign.iteration() >= target)
            done = campaign.iteration()
            for kind, value in memory(arena).items():
                readings.setdefault(kind, []).append((done, value))
        facts = campaign.finish()
    finally:
        arena.close()
    table = Table("memory", "after warm-up, MiB", "at the end, MiB", "MiB per 100 iterations")
    slopes = {}
    for kind, values in readings.items():
        kept = [(at, value) for at, value in values if at >= WARM_UP * iterations]
        slopes[kind] = slope(kept)
        table.add_row(kind, f"{kept[0][1]:.1f}", f"{kept[-1][1]:.1f}", f"{slopes[kind]:+.2f}")
    console.print(table)
    flat = all(value <= LIMIT_MB for value in slopes.values())
    print(
        json.dumps(
            {
                "iterations": iterations,
                "trained": facts["rollouts_trained"],
                "seconds": round(time.monotonic() - begin),
                "flat": flat,
                **{f"slope_{kind}": round(value, 3) for kind, value in slopes.items()},
            }
        ),
        flush=True,
    )
    shutil.rmtree(root)
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
