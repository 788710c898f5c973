"""Every error that Talipot raises for a user's mistake or a failed run.

    TalipotError                 1   base class
    ├── ConfigError              2   a recipe or an override that cannot be run
    ├── DataError                3   an input file that cannot be read as what it should be
    ├── CheckpointError          4   a checkpoint that is torn, missing, or of another architecture
    ├── ClusterError             5   no cluster, or not enough resources on it
    │   └── NotMet               5   ranks that cannot reach each other (in zero.process_group)
    ├── TrainingError            6   the optimisation broke (NaN, mismatched weights)
    │   └── CorruptSliceError    6   weights that changed on their way (in wire.weights)
    ├── RewardError              7   a scorer that cannot score
    ├── StorageError             8   a run directory that cannot be written
    ├── WorkerError              9   a worker that failed too often or outran its deadline
    │   └── LearnerLost          9   a learner rank died or outran its deadline (in workers.gang)
    ├── LedgerError              1   a bug of ours in the books of rollouts (in control.ledger)
    └── Interrupted        130, 143  Ctrl-C or SIGTERM: the run stopped with a checkpoint

The number is the process's exit code. The command line prints the message on one line and
nothing else; 1 is reserved for a bug of ours (which shows a traceback).
"""

from __future__ import annotations

import signal


class TalipotError(Exception):
    """A failure with one clear line for the user: what, where (file, line, field), what to do."""

    exit_code: int = 1


class ConfigError(TalipotError):
    """A recipe or an override that cannot be run."""

    exit_code = 2


class DataError(TalipotError):
    """An input file that cannot be read as what it should be."""

    exit_code = 3


class CheckpointError(TalipotError):
    """A checkpoint that is torn, missing, or of another architecture."""

    exit_code = 4


class ClusterError(TalipotError):
    """No cluster, or not enough resources on it."""

    exit_code = 5


class TrainingError(TalipotError):
    """The optimisation broke: a NaN, or weights that are not what they should be."""

    exit_code = 6


class RewardError(TalipotError):
    """A scorer that cannot score."""

    exit_code = 7


class StorageError(TalipotError):
    """A run directory that cannot be written."""

    exit_code = 8


class WorkerError(TalipotError):
    """A worker that failed too often or outran its deadline."""

    exit_code = 9


class Interrupted(TalipotError):
    """A signal stopped the run; the exit code is the shell's for it: 143 for SIGTERM."""

    exit_code = 130

    def __init__(self, sent: signal.Signals, message: str) -> None:
        word = "interrupted" if sent == signal.SIGINT else "terminated"
        super().__init__(f"{word}: {message}")
        self.exit_code = 128 + sent
