"""What a rollout actor needs of a generation engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from common.wire.trajectory import FinishReason, RolloutRequest
from common.wire.weights import Manifest, Payload


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """The response to one request."""

    rollout_id: str
    response_ids: list[int]
    """The token that ended it included."""
    logprobs: list[float]
    """float32 log-probability of each token when it was drawn."""
    unfiltered: list[float] | None
    """Likewise of the whole distribution (`Sampling.unfiltered`); None where nothing filters."""
    finish_reason: FinishReason
    """``eos``, ``stop`` (a stop token or string) or ``length``."""


class Generator(Protocol):
    """Samples responses from weights that it is given, version after version."""

    @property
    def exact(self) -> bool:
        """Whether log-probabilities are those of the network in fp32, within rounding (I1)."""

    @property
    def deterministic(self) -> bool:
        """Whether responses are a function of requests and weights alone (I5)."""

    def memory(self) -> dict[str, int]:
        """Return bytes: "weights", and "cache", what keys and values took at most."""

    def hold(self, manifest: Manifest, payloads: Sequence[Payload]) -> str:
        """Take over the weights that a manifest describes, and return their fingerprint.

        Raises:
            CorruptSliceError: a slice is not what its hash says; they can be read again.
            TrainingError: a slice is missing or of another layout.
        """

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Generated]:
        """Sample one response per request; results in the requests' order."""

    def text(self, generated: Generated) -> str:
        """Return the response as text, without the stop string that ended it."""
