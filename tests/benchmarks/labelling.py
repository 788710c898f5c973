"""How long a labelling page takes with a large round: 100,000 pairs, eight people at once.

``python -m tests.benchmarks.labelling`` (two minutes). People read for a while between answers;
beside that stands a round of 300 pairs, asked in the same way.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from tests.deploy.feedback.labelers import Simulated, at_work
from tests.deploy.feedback.rounds import plain, round_in, served

PEOPLE, SECONDS, READS_S = 8, 40.0, 0.5


def asked(pairs: int) -> np.ndarray:
    """Seconds of each request while eight people answer pairs of such a round."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        made = round_in(run, plain(pairs), overlap=2, overlap_share=0.2)

        def reads(_: str, text: str) -> float:
            time.sleep(READS_S / 2)  # called for each side
            return len(text)

        people = [Simulated(run=run, name=f"p{i}", quality=reads) for i in range(PEOPLE)]
        with served(run, made), at_work(people, together=True):
            time.sleep(SECONDS)
        return np.array([took for who in people for took in who.seconds[2:]])


def main() -> None:
    """Print both, and their ratio."""
    found = {pairs: asked(pairs) for pairs in (300, 100_000)}
    for pairs, seconds in found.items():
        p50, p99 = (1000 * np.quantile(seconds, share) for share in (0.5, 0.99))
        print(f"{pairs:>7,} pairs: p50 {p50:.1f} ms, p99 {p99:.1f} ms of {len(seconds):,} requests")
    small, large = (np.quantile(seconds, 0.99) for seconds in found.values())
    print(f"p99 of the large round is {large / small:.2f} times that of the small one")


if __name__ == "__main__":
    main()
