"""Books of a session of faults: what became of each kind, as a table and as the last line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(slots=True)
class Count:
    """What became of one kind of fault."""

    injected: int = 0
    seconds: list[float] = field(default_factory=list)
    """From the fault to the end of the next iteration."""
    lost: int = 0
    doubled: int = 0
    unequal: int = 0


class Books:
    """All kinds of a session."""

    def __init__(self, kinds: Iterable[str]) -> None:
        self.counts = {kind: Count() for kind in kinds}
        self.hung = 0
        self.ended: list[str] = []
        """How commands ended that a fault explains."""

    def enter(self, kinds: Iterable[str], *, lost: int, doubled: int, equal: bool) -> None:
        """Note what a run came to, for each kind that struck it."""
        for kind in set(kinds):
            count = self.counts[kind]
            count.lost += lost
            count.doubled += doubled
            count.unequal += not equal

    def tell(self, console: Console) -> None:
        """Print a line for each kind that struck, and how commands ended."""
        shown = Table("fault", "injected", "recovered", "median s", "max s", "lost", "doubled")
        shown.add_column("weights")
        for name, count in self.counts.items():
            if not count.injected:
                continue
            seconds = count.seconds or [float("nan")]
            numbers = f"{median(seconds):.1f}", f"{max(seconds):.1f}"
            equal = "equal" if not count.unequal else f"{count.unequal} UNEQUAL"
            cells = (count.injected, len(count.seconds), *numbers, count.lost, count.doubled, equal)
            shown.add_row(name, *map(str, cells))
        console.print(shown)
        for how in sorted(set(self.ended)):
            console.print(f"commands that ended by {how}: {self.ended.count(how)}", highlight=False)

    def verdict(self) -> dict[str, Any]:
        """The last line; `wrong` says whether it is a good one."""
        counts = self.counts.values()
        seconds = [s for count in counts for s in count.seconds]
        return {
            "faults": sum(count.injected for count in counts),
            "kinds": sum(count.injected > 0 for count in counts),
            "lost": sum(count.lost for count in counts),
            "doubled": sum(count.doubled for count in counts),
            "unequal": sum(count.unequal for count in counts),
            "hung": self.hung,
            "median_recovery_s": round(median(seconds), 2) if seconds else None,
        }

    def medians(self) -> dict[str, float]:
        """Seconds to recover from each kind."""
        return {
            name: round(median(count.seconds), 1)
            for name, count in self.counts.items()
            if count.seconds
        }


def wrong(verdict: dict[str, Any]) -> bool:
    """Whether anything was lost, doubled, unequal or hung."""
    return any(verdict[name] for name in ("lost", "doubled", "unequal", "hung"))
