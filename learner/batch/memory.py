"""The auxiliary memory of a phase (Cobbe 2020, algorithm 1: buffer B): states and value targets.

Holds token ids and frozen targets, never logits: pi_old is recomputed (a 50k vocabulary would
need tens of gigabytes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from common.batching import pad_rows
from learner.algorithms.ppo import unit_of
from learner.batch.experience import Sequences

_SCHEMA = pa.schema(
    [
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("response_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("value_targets", pa.list_(pa.float32()), nullable=False),
        pa.field("policy_version", pa.int64(), nullable=False),
    ]
)


@dataclass(slots=True)
class AuxiliaryMemory:
    """Rows of the current phase, oldest first."""

    sequences: Sequences = field(default_factory=lambda: Sequences(prompts=[], responses=[]))
    value_targets: list[list[float]] = field(default_factory=list)
    """V_targ of the policy phase per response token; frozen."""
    versions: list[int] = field(default_factory=list)
    iterations: int = 0
    """Policy phases since the memory was emptied."""
    missed: float = 0.0
    """Sum of the squares by which the auxiliary head missed the targets when they were set; 0
    where it was not measured."""

    def __len__(self) -> int:
        return len(self.sequences)

    def add(
        self,
        sequences: Sequences,
        returns_NR: Tensor,
        versions: Sequence[int],
        *,
        missed: float = 0.0,
    ) -> None:
        """Append one iteration.

        Args:
            sequences: its prompts and responses.
            returns_NR: V_targ of each response token.
            versions: policy_version of each row.
            missed: sum of the squares by which the auxiliary head misses these targets.
        """
        self.sequences.prompts.extend(sequences.prompts)
        self.sequences.responses.extend(sequences.responses)
        self.value_targets += [
            returns_NR[row, : len(response)].tolist()
            for row, response in enumerate(sequences.responses)
        ]
        self.versions += versions
        self.iterations += 1
        self.missed += missed

    @property
    def value_unit(self) -> float:
        """What the auxiliary head's values are measured in (`ppo.value_unit`)."""
        return unit_of(self.missed, self.targets_NR, self.sequences.mask_NR)

    @property
    def targets_NR(self) -> Tensor:
        """V_targ of all rows, float32 ``[N, R]``, zeros on the right."""
        return pad_rows(self.value_targets, max(len(row) for row in self.value_targets))

    def save(self, path: Path) -> None:
        """Write Parquet."""
        table = pa.table(
            [
                self.sequences.prompts,
                self.sequences.responses,
                self.value_targets,
                self.versions,
            ],
            schema=_SCHEMA,
        )
        numbers = {"iterations": str(self.iterations), "missed": repr(self.missed)}
        table = table.replace_schema_metadata(numbers)
        pq.write_table(table, path)

    @classmethod
    def load(cls, path: Path) -> AuxiliaryMemory:
        """Read what `save` wrote."""
        table = pq.read_table(path)
        columns, numbers = table.to_pydict(), table.schema.metadata or {}
        return cls(
            sequences=Sequences(prompts=columns["prompt_ids"], responses=columns["response_ids"]),
            value_targets=columns["value_targets"],
            versions=columns["policy_version"],
            iterations=int(numbers[b"iterations"]),
            missed=float(numbers.get(b"missed", 0.0)),  # earlier versions did not measure it
        )
