"""Every random number of a run: functions of the run's seed and of what the number is for.

Nothing here has a state of its own. A number does not depend on which worker, batch or order it is
drawn in, so a run gives the same results on any cluster and goes on where it stopped.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray


def derive_seed(*parts: int | str) -> int:
    """Return a uint64 that is a pure function of its parts."""
    text = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[Any]) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each pair of a seed and a position; the two broadcast.

    SplitMix64 (Steele 2014), a counter-based generator: the numbers of one rollout do not depend on
    the actor, slot or batch that samples it.
    """
    with np.errstate(over="ignore"):
        z: NDArray[np.uint64] = seeds.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15) * (
            positions.astype(np.uint64) + np.uint64(1)
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    words: NDArray[np.uint64] = z >> np.uint64(11)
    return words.astype(np.float64) * np.float64(2.0**-53)


def shuffled_order(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of `n` items in `epoch`: a permutation, and a function of its arguments.

    Sorts raw Philox words: NumPy promises raw streams to stay the same between versions, but not
    the stream of `Generator.permutation`.
    """
    words = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


class ShuffledIndex:
    """An endless stream of indices below `n`, each once per epoch; one integer resumes it."""

    def __init__(self, n: int, seed: int, position: int = 0) -> None:
        if n < 1 or position < 0:
            raise ValueError(f"need n >= 1 and position >= 0, got n={n}, position={position}")
        self._n, self._seed, self._position = n, seed, position
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    @property
    def position(self) -> int:
        """Indices handed out since the start of epoch 0."""
        return self._position

    def next_batch(self, k: int) -> list[int]:
        """Return the next `k` indices; a batch may cross into the next epoch."""
        batch: list[int] = []
        while len(batch) < k:
            epoch, offset = divmod(self._position, self._n)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, shuffled_order(self._n, self._seed, epoch)
            part = self._order[offset : offset + k - len(batch)].tolist()
            batch += part
            self._position += len(part)
        return batch
