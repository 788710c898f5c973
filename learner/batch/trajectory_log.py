"""The trajectory log: what each iteration was trained on, enough to train it again.

``trajectories/iteration-000003.parquet`` holds an iteration's scored trajectories in rollout_id
order, which is the order they are trained in. Its metadata says which iteration it is and under
which settings that change results it was trained (a resumed run may have changed some). A file is
closed atomically, before the first optimizer step; an iteration that is trained again after a
failure writes its file again, so the files are always those of the surviving history.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from common.config.earlier import saved_config
from common.config.run import RunConfig
from common.errors import DataError
from common.files import one_line, write_atomic
from common.run_folder import RunFolder
from common.wire.trajectory import (
    LOGGED_ITERATION,
    SCHEMAS,
    ScoredTrajectory,
    completed,
)

_KEY = b"talipot"


def write_log(path: Path, table: pa.Table, iteration: int, config: RunConfig) -> None:
    """Write an iteration's trajectories, so that a reader sees all of them or no file.

    Raises:
        StorageError: the disk is full or not writable.
    """
    note = {"iteration": iteration, "config": config.model_dump(mode="json")}
    table = table.sort_by("rollout_id")
    column = pa.array([iteration] * len(table), LOGGED_ITERATION.type)
    table = table.add_column(0, LOGGED_ITERATION, column)
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
    path = RunFolder(run_dir).trajectories(iteration)
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        note: dict[str, Any] = json.loads((table.schema.metadata or {})[_KEY])
        config = saved_config(note["config"])
        if note["iteration"] != iteration:
            raise DataError(f"{path}: is the log of iteration {note['iteration']}")
        schema = SCHEMAS[ScoredTrajectory]
        table = completed(table.replace_schema_metadata(None), ScoredTrajectory)
        return table.cast(schema), config
    except FileNotFoundError:
        raise DataError(f"{path}: no such trajectory log; the run cannot be replayed") from None
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"{path}: damaged or no trajectory log ({one_line(error)})") from None
