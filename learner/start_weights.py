"""The weights that a stage's networks begin with: checked, named, and read by whoever keeps them.

Nothing here has a network whole in memory: what looks at all of a checkpoint looks at one tensor at
a time, on one rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from common.models.adapters import sources_fingerprint
from common.models.decoder import DECODER, Decoder
from common.models.filling import Source
from common.models.networks import DecoderNetwork, PolicyNetwork, ScalarNetwork
from common.models.weight_files import scalar_start, weights_of
from learner.batch.pulse import beat
from learner.zero.process_group import all_sum, rank

_DIGITS = 32
"""Of a fingerprint."""


def policy_start(network: PolicyNetwork, path: Path) -> dict[str, Source]:
    """Return where a policy's weights are.

    Raises:
        CheckpointError: as `common.models.weight_files.load_weights`; that the library computes
            other logits is found by rank 0.
    """
    return _checked(network, _telling(weights_of(network, path)), path)


def reward_start(network: ScalarNetwork, path: Path, seed: int) -> dict[str, Source]:
    """Return where a reward model's first weights are, and draw its head where it has none.

    Raises:
        CheckpointError: as `policy_start`.
    """
    found = _telling(scalar_start(network, path, seed))
    classifier = any(not name.startswith(f"{DECODER}.") for name in found)
    return found if classifier else _checked(network, found, path)


def decoder_part(sources: Mapping[str, Source]) -> dict[str, Source]:
    """Return a network's decoder's sources, by the names that they have in the network."""
    return {name: source for name, source in sources.items() if name.startswith(f"{DECODER}.")}


def fingerprint(decoder: Decoder, sources: Mapping[str, Source]) -> str:
    """Return the `base_fingerprint` of a network's decoder (a collective): rank 0 reads it."""
    digits = torch.zeros(_DIGITS, dtype=torch.int64)
    if rank() == 0:
        found = sources_fingerprint(decoder, _decoder_names(sources))
        digits = torch.tensor([ord(digit) for digit in found])
    return "".join(chr(digit) for digit in all_sum(digits).tolist())


def _checked(network: DecoderNetwork, sources: dict[str, Source], path: Path) -> dict[str, Source]:
    if path.is_dir() and rank() == 0:
        network.decoder.check(_decoder_names(sources))
    return sources


def _decoder_names(sources: Mapping[str, Source]) -> dict[str, Source]:
    """Return a decoder's sources by its own names."""
    prefix = f"{DECODER}."
    return {name.removeprefix(prefix): source for name, source in decoder_part(sources).items()}


def _telling(sources: Mapping[str, Source]) -> dict[str, Source]:
    """Let every read tell that this rank gets on: weights are large, and disks may be slow."""

    def told(source: Source) -> Source:
        def read(begin: int, end: int) -> torch.Tensor:
            beat()
            return source(begin, end)

        return read

    return {name: told(source) for name, source in sources.items()}
