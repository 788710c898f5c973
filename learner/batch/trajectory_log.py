"""The trajectory log: what each iteration was trained on, enough to train it again.

``trajectories/iteration-000003.parquet`` holds an iteration's scored trajectories in rollout_id
order, which is the order they are trained in, and beside each what the learner made of its tokens.
Its metadata says which iteration it is and under which settings that change results it was trained
(a resumed run may have changed some). A file is closed atomically, before the first optimizer step;
an iteration that is trained again after a failure writes its file again, so the files are always
those of the surviving history.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from common.config.earlier import saved_config
from common.config.run import RunConfig
from common.errors import DataError
from common.files import one_line, write_atomic
from common.run_folder import RunFolder
from common.wire.trajectory import (
    LEARNT,
    LOGGED_ITERATION,
    SCHEMAS,
    ScoredTrajectory,
    completed,
)

if TYPE_CHECKING:
    from torch import Tensor

_KEY = b"talipot"


@dataclass(frozen=True, slots=True, kw_only=True)
class Learnt:
    """What the learner made of a batch before its first step, ``[N, R]`` in rollout_id order.

    Shape suffixes: N rows of the whole batch, R response positions.
    """

    learner_logprobs_NR: Tensor
    """float32, of the distribution that was sampled from: to compare with `behavior_logprobs`."""
    rewards_NR: Tensor
    """float64, the score (after what its end and length cost) and the KL penalty of each token."""
    kl_penalties_NR: Tensor
    """float64, the penalties among these; the rest are scores."""
    values_NR: Tensor | None
    """float32, of the value function; None of an algorithm that has none."""
    advantages_NR: Tensor
    """float32, as the policy's objective takes them."""
    mask_NR: Tensor
    """bool response_mask."""

    def columns(self) -> list[pa.Array]:
        """Return `common.wire.trajectory.LEARNT`, a list for each row."""
        ends = self.mask_NR.sum(dim=1).cumsum(dim=0).tolist()
        offsets = pa.array([0, *ends], pa.int32())
        return [
            pa.nulls(len(ends), field.type)
            if (tensor := getattr(self, f"{field.name}_NR")) is None
            else pa.ListArray.from_arrays(offsets, pa.array(tensor[self.mask_NR].numpy()))
            for field in LEARNT
        ]


def write_log(
    path: Path, table: pa.Table, learnt: Learnt, iteration: int, config: RunConfig
) -> None:
    """Write an iteration's trajectories, so that a reader sees all of them or no file.

    Raises:
        StorageError: the disk is full or not writable.
    """
    note = {"iteration": iteration, "config": config.model_dump(mode="json")}
    table = _numbered(table.sort_by("rollout_id"), iteration)
    for field, values in zip(LEARNT, learnt.columns(), strict=True):
        table = table.append_column(field, values)
    table = table.replace_schema_metadata({_KEY: json.dumps(note)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, write_page_checksum=True)
    write_atomic(path, [memoryview(sink.getvalue())])


def logged_iterations(run_dir: Path) -> list[int]:
    """Return the iterations of which there is a log, in their order."""
    logs = RunFolder(run_dir).trajectories(0).parent.glob("iteration-*.parquet")
    return sorted(int(log.stem.partition("-")[2]) for log in logs)


def read_log(run_dir: Path, iteration: int) -> tuple[pa.Table, RunConfig]:
    """Read an iteration's trajectories and the settings they were trained under.

    Raises:
        DataError: the file is missing, damaged or no trajectory log.
    """
    table, config = read_learnt(run_dir, iteration)
    return completed(table, ScoredTrajectory), config


def read_learnt(run_dir: Path, iteration: int) -> tuple[pa.Table, RunConfig]:
    """Read the same with the columns that only a log has: `iteration` and `LEARNT`.

    What earlier versions did not log is null.

    Raises:
        DataError: the file is missing, damaged or no trajectory log.
    """
    path = RunFolder(run_dir).trajectories(iteration)
    try:
        whole = pq.read_table(path, page_checksum_verification=True)
        note: dict[str, Any] = json.loads((whole.schema.metadata or {})[_KEY])
        config = saved_config(note["config"])
        if note["iteration"] != iteration:
            raise DataError(f"{path}: is the log of iteration {note['iteration']}")
        table = completed(whole.replace_schema_metadata(None), ScoredTrajectory)
        table = _numbered(table.cast(SCHEMAS[ScoredTrajectory]), iteration)
        for field in LEARNT:
            there = field.name in whole.column_names
            column = whole[field.name] if there else pa.nulls(len(whole), field.type)
            table = table.append_column(field.with_nullable(True), column)
        return table, config
    except FileNotFoundError:
        raise DataError(f"{path}: no such trajectory log; the run cannot be replayed") from None
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"{path}: damaged or no trajectory log ({one_line(error)})") from None


def _numbered(table: pa.Table, iteration: int) -> pa.Table:
    column = pa.array([iteration] * len(table), LOGGED_ITERATION.type)
    return table.add_column(0, LOGGED_ITERATION, column)
