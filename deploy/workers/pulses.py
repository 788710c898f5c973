"""What ranks tell of their progress while a call lasts, through the cluster's own key-value store.

A rank computes in its only thread, so it cannot be asked; a thread beside that one writes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_exists,
    _internal_kv_get,
    _internal_kv_put,
)

_SPACE = "talipot"


def begin(keys: Sequence[str]) -> None:
    """Make a place for each rank of a gang that starts."""
    for key in keys:
        _internal_kv_put(key, "0", overwrite=True, namespace=_SPACE)


def tell(key: str, count: int) -> None:
    """Write how far a rank is; nothing where its gang was stopped meanwhile."""
    if _internal_kv_exists(key, namespace=_SPACE):
        _internal_kv_put(key, str(count), overwrite=True, namespace=_SPACE)


def heard(keys: Sequence[str]) -> tuple[bytes | None, ...]:
    """Return what ranks have told last; None of one that has told nothing, or cannot be heard."""
    try:
        return tuple(_internal_kv_get(key, namespace=_SPACE) for key in keys)
    except Exception:  # of the cluster, whichever it raises; who waits for an answer hears of it
        return (None,) * len(keys)


class Listening:
    """Looks now and then whether ranks get on."""

    def __init__(self, keys: Sequence[str], deadline_s: float) -> None:
        """Begin to listen.

        Args:
            keys: where each rank tells how far it is.
            deadline_s: within which a rank has to tell more; it is looked 8 times in that.
        """
        self._keys, self._every_s = keys, deadline_s / 8
        self._looked = time.monotonic()
        self._told: tuple[bytes | None, ...] | None = None

    def moved(self) -> bool:
        """Whether a rank has told more than when this looked before; at first only looks."""
        if time.monotonic() - self._looked < self._every_s:
            return False
        before, self._told = self._told, heard(self._keys)
        self._looked = time.monotonic()
        return before is not None and self._told != before


def forget(keys: Sequence[str]) -> None:
    """Remove what was told: these ranks have ended, and the cluster may have before them."""
    with suppress(Exception):
        for key in keys:
            _internal_kv_del(key, namespace=_SPACE)
