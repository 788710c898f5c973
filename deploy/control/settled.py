"""Which rollouts are settled (trained or dropped), in memory that does not grow with them.

A rollout id is ``{prefix}-{index}``, and the prefix is the iteration's number (or a label of an
evaluation). Settled indices of one prefix are kept as ranges; a prefix that was trained on and
whose every rollout is settled is kept by name alone, and numbers again as ranges. Millions of
trained rollouts are one range ``[0, iterations)``. A prefix of which everything was dropped stays
open: it may have to be issued once more.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from typing import Any


class Ranges:
    """Integers as sorted, disjoint, half-open ranges."""

    def __init__(self, pairs: Iterable[tuple[int, int]] = ()) -> None:
        self._low: list[int] = []
        self._high: list[int] = []
        for low, high in pairs:
            self._low.append(low)
            self._high.append(high)

    def __contains__(self, value: int) -> bool:
        at = bisect_right(self._low, value) - 1
        return at >= 0 and value < self._high[at]

    def __len__(self) -> int:
        """Return the number of ranges: what the memory grows with."""
        return len(self._low)

    def add(self, value: int) -> None:
        """Join a value to the range before it, the one after it, or both."""
        after = bisect_right(self._low, value)
        before = after - 1
        if before >= 0 and value < self._high[before]:
            return
        joins = before >= 0 and self._high[before] == value
        meets = after < len(self._low) and self._low[after] == value + 1
        if joins and meets:
            self._high[before] = self._high[after]
            del self._low[after], self._high[after]
        elif joins:
            self._high[before] += 1
        elif meets:
            self._low[after] = value
        else:
            self._low.insert(after, value)
            self._high.insert(after, value + 1)

    def pairs(self) -> list[tuple[int, int]]:
        """Return all ranges as (first, last + 1)."""
        return list(zip(self._low, self._high, strict=True))


class Settled:
    """A set of rollout ids that compacts as prefixes are completed."""

    def __init__(self) -> None:
        self._open: dict[str, Ranges] = {}
        self._left: Counter[str] = Counter()
        """Rollouts of an open prefix that are still to be settled."""
        self._begun: set[str] = set()
        """Open prefixes of which something was trained."""
        self._numbers = Ranges()
        """Iterations of which everything issued is settled."""
        self._names: set[str] = set()
        """Other prefixes of which everything is."""

    def __contains__(self, rollout_id: str) -> bool:
        prefix, index = _parts(rollout_id)
        if prefix in self._open:
            return index in self._open[prefix]
        return (int(prefix) in self._numbers) if prefix.isdigit() else (prefix in self._names)

    def __len__(self) -> int:
        """Return the number of ranges and names: what the memory grows with."""
        return sum(map(len, self._open.values())) + len(self._numbers) + len(self._names)

    def in_open_prefix(self, rollout_id: str) -> bool:
        """Return whether it is settled while others of its prefix are not."""
        prefix, index = _parts(rollout_id)
        return prefix in self._open and index in self._open[prefix]

    def expect(self, rollout_ids: Iterable[str]) -> None:
        """Note that these are issued, and will be settled one day."""
        for rollout_id in rollout_ids:
            prefix, _ = _parts(rollout_id)
            self._open.setdefault(prefix, Ranges())
            self._left[prefix] += 1

    def reopen(self, prefixes: Iterable[str]) -> bool:
        """Forget what is settled of prefixes of which all was dropped and nothing is expected.

        Returns:
            Whether there were any.
        """
        dropped = [
            p for p in prefixes if p in self._open and p not in self._begun | self._left.keys()
        ]
        for prefix in dropped:
            del self._open[prefix]
        return bool(dropped)

    def add(self, rollout_id: str, *, dropped: bool = False) -> None:
        """Settle a rollout that was expected: it was trained, or dropped."""
        prefix, index = _parts(rollout_id)
        self._open[prefix].add(index)
        if not dropped:
            self._begun.add(prefix)
        self._left[prefix] -= 1
        if self._left[prefix]:
            return
        del self._left[prefix]
        if prefix not in self._begun:
            return
        del self._open[prefix]
        self._begun.remove(prefix)
        if prefix.isdigit():
            self._numbers.add(int(prefix))
        else:
            self._names.add(prefix)

    def state(self) -> dict[str, Any]:
        """Return JSON that `restore` reads; what is expected is not in it, and is issued again."""
        return {
            "open": {p: ranges.pairs() for p, ranges in self._open.items() if len(ranges)},
            "begun": sorted(self._begun),
            "numbers": self._numbers.pairs(),
            "names": sorted(self._names),
        }

    @classmethod
    def restore(cls, state: dict[str, Any]) -> Settled:
        """Return the set as `state` gave it."""
        settled = cls()
        settled._open = {prefix: Ranges(pairs) for prefix, pairs in state["open"].items()}
        settled._begun = set(state.get("begun", ()))  # missing in checkpoints of earlier versions
        settled._numbers = Ranges(state["numbers"])
        settled._names = set(state["names"])
        return settled


def _parts(rollout_id: str) -> tuple[str, int]:
    prefix, _, index = rollout_id.rpartition("-")
    return prefix, int(index)
