"""Prompts of several sources in given shares: which prompt each draw is, from one integer alone.

Draws go round the sources by smooth weighted round robin: each source earns its share of every
draw, the one that has earned most is drawn and pays for it. So the shares hold in every stretch of
draws, not on average only, and any prefix can be counted again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from common.config.run import DataConfig, SourceConfig
from common.data.records import Prompt
from common.errors import DataError
from common.randomness import ShuffledIndex, derive_seed
from common.reasoning_tasks import family_of, is_task


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What is drawn of one source."""

    name: str
    weight: float
    rows: tuple[int, ...]
    """Places of its prompts."""
    epochs: int | None
    """Times that each may be drawn; None is without end."""

    @property
    def draws(self) -> float:
        """How often it can be drawn."""
        return math.inf if self.epochs is None else len(self.rows) * self.epochs


def parts_of(sources: Sequence[str], mixture: Mapping[str, SourceConfig], draws: int) -> list[Part]:
    """Part prompts by their sources, in the mixture's order.

    Args:
        sources: of each prompt.
        mixture: what is wanted of each source.
        draws: that the run will make.

    Raises:
        DataError: a prompt is of a source that the mixture does not name, a source has no prompt,
            or all of them together are used up before the run ends.
    """
    rows: dict[str, list[int]] = {name: [] for name in mixture}
    for place, source in enumerate(sources):
        if source not in rows:
            raise DataError(
                f"data.mixture does not name the source '{source}', of which there are "
                f"{sources.count(source)} prompts; name it beside {', '.join(mixture)}, or leave "
                "its prompts out of data.prompts"
            )
        rows[source].append(place)
    parts = []
    for name, wanted in mixture.items():
        if not rows[name]:
            there = sorted({*sources})
            raise DataError(
                f"data.mixture.{name}: no prompt is of this source; there are {', '.join(there)}"
            )
        chosen = tuple(rows[name][: wanted.limit])
        parts.append(Part(name=name, weight=wanted.weight, rows=chosen, epochs=wanted.epochs))
    most = sum(part.draws for part in parts)
    if most < draws:
        raise DataError(
            f"data.mixture: its sources give {most:.0f} prompts in all their epochs, and the run "
            f"takes {draws} (train.iterations x train.prompts_per_iteration); raise epochs, leave "
            "them out, or lower train.iterations"
        )
    return parts


def prompt_columns(data: DataConfig) -> tuple[str, ...] | None:
    """Return the further columns of prompts to read, scorers' and the source's; None is all."""
    if data.columns is None or data.source_column is None or data.source_column in data.columns:
        return data.columns
    return (*data.columns, data.source_column)


def source_of(prompt: Prompt, column: str | None) -> str:
    """Return the name of the source that a prompt is of.

    Args:
        prompt: as it was read.
        column: that names the source; None is the file's name without its ending, or the family
            of `reasoning_gym` tasks.

    Raises:
        DataError: the prompt has no text in this column.
    """
    if column is None:
        file = prompt.place.rpartition(":")[0]
        if is_task(file):
            return family_of(file)
        return PurePath(file.removesuffix(".gz").removesuffix(".zst")).stem
    name = prompt.columns.get(column)
    if not isinstance(name, str) or not name:
        raise DataError(
            f"{prompt.place}: column '{column}': should name the prompt's source "
            "(data.source_column); add it, or leave data.source_column out"
        )
    return name


class MixedIndex:
    """A stream of places in the given shares, each source in seeded order; one integer resumes it.

    A source that is used up is left out from then on, and the others share its draws.
    """

    def __init__(
        self, parts: Sequence[Part], seed: int, position: int = 0, label: str = "prompts"
    ) -> None:
        """Go on from `position`, in O(position); streams of other labels have other orders."""
        self._parts, self._position = parts, position
        self._earned = [0.0] * len(parts)
        self._drawn = [0] * len(parts)
        for _ in range(position):
            self._next_part()
        self._orders = [
            ShuffledIndex(len(part.rows), derive_seed(seed, label, part.name) >> 1, drawn)
            for part, drawn in zip(parts, self._drawn, strict=True)
        ]

    @property
    def position(self) -> int:
        """Places handed out so far."""
        return self._position

    def next_batch(self, k: int) -> list[int]:
        """Return the next `k` places. Raises IndexError when every source is used up."""
        batch = []
        for _ in range(k):
            at = self._next_part()
            self._position += 1
            batch.append(self._parts[at].rows[self._orders[at].next_batch(1)[0]])
        return batch

    def _next_part(self) -> int:
        """Choose the part of the next draw, and count it."""
        there = [at for at, part in enumerate(self._parts) if self._drawn[at] < part.draws]
        if not there:
            raise IndexError(f"every source is used up after {self._position} prompts")
        whole = sum(self._parts[at].weight for at in there)
        for at in there:
            self._earned[at] += self._parts[at].weight / whole
        chosen = max(there, key=lambda at: (self._earned[at], -at))
        self._earned[chosen] -= 1.0
        self._drawn[chosen] += 1
        return chosen
