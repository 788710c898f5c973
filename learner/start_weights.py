"""The weights that a stage's networks begin with: checked, named, and read by whoever keeps them.

Nothing here has a network whole in memory: what looks at all of a checkpoint looks at one tensor at
a time, on one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Final, TypeVar

import torch

from common.models.adapters import sources_fingerprint
from common.models.decoder import DECODER, Decoder
from common.models.filling import Source
from common.models.networks import DecoderNetwork, PolicyNetwork, ScalarNetwork
from common.models.weight_files import (
    decoder_part,
    decoder_weights,
    prefixed,
    scalar_start,
    weights_of,
)
from learner.batch.pulse import beat
from learner.zero.process_group import all_sum, rank, world_size

Found = TypeVar("Found")
_DIGITS: Final = 32
"""Of a fingerprint."""
_MEET_S: Final = 5.0


def policy_start(network: PolicyNetwork, path: Path) -> dict[str, Source]:
    """Return where a policy's weights are.

    Raises:
        CheckpointError: as `common.models.weight_files.load_weights`; that the library computes
            other logits is found by rank 0.
    """
    return _checked(network, _telling(weights_of(network, path)), path)


def critic_start(network: ScalarNetwork, path: Path) -> dict[str, Source]:
    """Return where the weights of a critic's decoder are; its head is the network's own.

    Raises:
        CheckpointError: as `policy_start`.
    """
    sources = _telling(prefixed(f"{DECODER}.", decoder_weights(network.decoder, path)))
    return _checked(network, sources, path)


def trained_scalar(network: ScalarNetwork, path: Path) -> dict[str, Source]:
    """Return where the weights of a reward model are that was trained as a whole.

    Raises:
        CheckpointError: as `common.models.weight_files.weights_of`.
    """
    return _telling(weights_of(network, path))


def reward_start(network: ScalarNetwork, path: Path, seed: int) -> dict[str, Source]:
    """Return where a reward model's first weights are, and draw its head where it has none.

    Raises:
        CheckpointError: as `policy_start`.
    """
    found = _telling(scalar_start(network, path, seed))
    classifier = any(not name.startswith(f"{DECODER}.") for name in found)
    return found if classifier else _checked(network, found, path)


def fingerprint(decoder: Decoder, sources: Mapping[str, Source]) -> str:
    """Return the `base_fingerprint` of a network's decoder (a collective): rank 0 reads it."""
    found = _by_rank_0(lambda: sources_fingerprint(decoder, decoder_part(sources)))
    digits = torch.zeros(_DIGITS, dtype=torch.int64)
    if found is not None:
        digits = torch.tensor([ord(digit) for digit in found])
    return "".join(chr(digit) for digit in all_sum(digits).tolist())


def _checked(network: DecoderNetwork, sources: dict[str, Source], path: Path) -> dict[str, Source]:
    if path.is_dir():
        _by_rank_0(lambda: network.decoder.check(decoder_part(sources)))
    return sources


def _by_rank_0(work: Callable[[], Found]) -> Found | None:
    """Do what rank 0 does alone (a collective); the others return None, and raise nothing.

    It may take longer than a collective may: they meet again and again until it is done.
    """
    if world_size() == 1:
        return work()
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(work) if rank() == 0 else None
        done = False
        while not done:
            if future is not None:
                wait([future], _MEET_S)
            told = torch.tensor([float(future is not None and future.done())])
            done = bool(all_sum(told))
    return None if future is None else future.result()


def _telling(sources: Mapping[str, Source]) -> dict[str, Source]:
    """Let every read tell that this rank gets on: weights are large, and disks may be slow."""

    def told(source: Source) -> Source:
        def read(begin: int, end: int) -> torch.Tensor:
            beat()
            return source(begin, end)

        return read

    return {name: told(source) for name, source in sources.items()}
