"""The data contracts between workers. Arrow is the only wire and disk format.

    RolloutRequest      controller     -> rollout actor
    Rollout             rollout actor  -> reward service
    ScoredTrajectory    reward service -> learner, Parquet log

Records travel as tables (`to_table`, `from_table`), never pickled. Token lists are response
coordinates: entry t belongs to the t-th response token.

Worked example (one scored trajectory)::

    rollout_id          "7-000012"        prompt 12 of iteration 7
    prompt_ids          [512, 17, 301]    "def close(self):"
    response_ids        [88, 1022, 13, 1] "Close the file." and EOS
    behavior_logprobs   [-1.2, -0.4, -0.1, -0.02]
    ref_logprobs        [-1.3, -0.4, -0.2, -0.02]
    score               0.83              finish_reason "eos"
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest:
    """One response to be sampled. Made by the controller, consumed by a rollout actor."""

    rollout_id: str
    """Unique in the run and sortable: ``{iteration}-{index}``; the ledger's key."""
    group: int
    """Index of the prompt within its iteration; samples of one prompt share it."""
    prompt_uid: str
    """The data's own name for the prompt."""
    prompt_text: str
    """The prompt as the user wrote it."""
    prompt_ids: list[int]
    """The prompt's tokens, int32, at least one."""
    seed: int
    """uint64 derived from (run seed, rollout_id)."""
    conversation: str | None = None
    """JSON of a conversation's ``messages`` and ``tools``, for models that have a template of their
    own; None for a plain text."""
    columns: str | None = None
    """JSON of what else stood in the prompt's line of the data, for scorers; None for nothing."""
    source: str | None = None
    """Name of the source in the recipe's mixture that the prompt is of; None without a mixture."""
    adapter: str = ""
    """What to sample from: this adapter of those that the worker holds, or its weights without any
    (a policy of whole weights, or the base of adapters)."""
    greedy: bool | None = None
    """Take the most probable token each time; None samples as the recipe says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout(RolloutRequest):
    """A sampled response. Made by a rollout actor, consumed by the reward service."""

    response_ids: list[int]
    """int32, EOS included when it was sampled; never empty."""
    response_text: str
    """The response decoded, without EOS."""
    behavior_logprobs: list[float]
    """float32, of the distribution really sampled from (`common.logprobs`)."""
    unfiltered_logprobs: list[float] | None = None
    """float32, of the whole distribution before top-p, top-k and min-p (`Sampling.unfiltered`).
    None where nothing filters: `behavior_logprobs` are those."""
    finish_reason: FinishReason
    """Why it ended: EOS, a stop token or text, or the longest length."""
    policy_version: int
    """The version that sampled every token; stamped by the engine."""
    weights_fingerprint: str
    """Content hash of the weights that sampled, of an adapter and its base together; verified by
    the controller."""
    actor_id: str
    """Who sampled."""

    @property
    def policy_logprobs(self) -> list[float]:
        """What to compare with `ScoredTrajectory.ref_logprobs`: of the policy, without a filter."""
        whole = self.unfiltered_logprobs
        return self.behavior_logprobs if whole is None else whole


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredTrajectory(Rollout):
    """A rollout with its score. Made by the reward service, consumed by the learner and the log."""

    score: float
    """float32, one number for the response: the weighted sum of the components."""
    score_components: dict[str, float]
    """Each component's own value, unweighted."""
    token_scores: list[float] | None = None
    """float32 rewards on single tokens, weighted, a part of `score`; what is left of that is on the
    last token. None where no component gives any."""
    score_reason: str | None = None
    """Why, in the components' own words."""
    ref_logprobs: list[float]
    """float32, of the response tokens under the reference (SFT) policy, without a filter."""
    reward_version: int
    """Which reward model scored."""


LOGGED_ITERATION = pa.field("iteration", pa.int64(), nullable=False)
"""First column of a trajectory log: the iteration that a row was trained in, which nothing on the
wire knows yet. Logs of earlier versions lack it."""
LEARNT: tuple[pa.Field, ...] = (
    pa.field("learner_logprobs", pa.list_(pa.float32()), nullable=False),
    pa.field("rewards", pa.list_(pa.float64()), nullable=False),
    pa.field("kl_penalties", pa.list_(pa.float64()), nullable=False),
    pa.field("values", pa.list_(pa.float32())),
    pa.field("advantages", pa.list_(pa.float32()), nullable=False),
)
"""Last columns of a trajectory log: what the learner made of each response token before its first
step (`learner.batch.trajectory_log.Learnt`). Logs of earlier versions lack them."""
_CONVERSATION = pa.field("conversation", pa.string())
_COLUMNS = pa.field("columns", pa.string())
_SOURCE = pa.field("source", pa.string())
_GREEDY = pa.field("greedy", pa.bool_())
_TOKEN_SCORES = pa.field("token_scores", pa.list_(pa.float32()))
_REASON = pa.field("score_reason", pa.string())
_REQUEST: list[pa.Field] = [
    pa.field("rollout_id", pa.string(), nullable=False),
    pa.field("group", pa.int32(), nullable=False),
    pa.field("prompt_uid", pa.string(), nullable=False),
    pa.field("prompt_text", pa.string(), nullable=False),
    pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
    pa.field("seed", pa.uint64(), nullable=False),
    _CONVERSATION,
    _COLUMNS,
    _SOURCE,
    pa.field("adapter", pa.string(), nullable=False),
    _GREEDY,
]
_ROLLOUT: list[pa.Field] = [
    *_REQUEST,
    pa.field("response_ids", pa.list_(pa.int32()), nullable=False),
    pa.field("response_text", pa.string(), nullable=False),
    pa.field("behavior_logprobs", pa.list_(pa.float32()), nullable=False),
    pa.field("unfiltered_logprobs", pa.list_(pa.float32())),
    pa.field("finish_reason", pa.string(), nullable=False),
    pa.field("policy_version", pa.int64(), nullable=False),
    pa.field("weights_fingerprint", pa.string(), nullable=False),
    pa.field("actor_id", pa.string(), nullable=False),
]
_SCORED: list[pa.Field] = [
    *_ROLLOUT,
    pa.field("score", pa.float32(), nullable=False),
    pa.field("score_components", pa.map_(pa.string(), pa.float32()), nullable=False),
    _TOKEN_SCORES,
    _REASON,
    pa.field("ref_logprobs", pa.list_(pa.float32()), nullable=False),
    pa.field("reward_version", pa.int64(), nullable=False),
]
SCHEMAS: dict[type[RolloutRequest], pa.Schema] = {
    RolloutRequest: pa.schema(_REQUEST),
    Rollout: pa.schema(_ROLLOUT),
    ScoredTrajectory: pa.schema(_SCORED),
}
_BEFORE: dict[str, str | None] = {
    "conversation": None,
    "columns": None,
    "source": None,
    "adapter": "",
    "greedy": None,
    "unfiltered_logprobs": None,
    "token_scores": None,
    "score_reason": None,
}
"""Columns that tables of earlier versions lack, and what they stood for there: whole weights, a KL
from `behavior_logprobs`, nothing."""
_NAMES = {kind: tuple(schema.names) for kind, schema in SCHEMAS.items()}

Record = TypeVar("Record", bound=RolloutRequest)


def to_table(records: Sequence[RolloutRequest], kind: type[RolloutRequest]) -> pa.Table:
    """Lay records of one kind out as an Arrow table.

    Raises ValueError when the lists of one record disagree in length.
    """
    for record in records:
        _check(record)
    columns: dict[str, list[Any]] = {
        name: [getattr(record, name) for record in records] for name in SCHEMAS[kind].names
    }
    if "score_components" in columns:
        columns["score_components"] = [list(c.items()) for c in columns["score_components"]]
    return pa.table(columns, schema=SCHEMAS[kind])


def from_table(table: pa.Table, kind: type[Record]) -> list[Record]:
    """Read records back, of a log too. Raises ValueError when the table is not of this kind."""
    schema, table = SCHEMAS[kind], completed(table, kind)
    if not table.schema.equals(schema):
        raise ValueError(f"not a table of {kind.__name__}: {table.schema.names}")
    rows = table.to_pylist()
    if "score_components" in table.schema.names:
        for row in rows:
            row["score_components"] = dict(row["score_components"])
    return [kind(**row) for row in rows]


def completed(table: pa.Table, kind: type[RolloutRequest]) -> pa.Table:
    """Return a table, of a log too, with the columns that earlier versions did not write."""
    schema, table = SCHEMAS[kind], without_logged(table)
    for place, field in enumerate(schema):
        if field.name in _BEFORE and field.name not in table.column_names:
            column = pa.array([_BEFORE[field.name]] * len(table), field.type)
            table = table.add_column(min(place, table.num_columns), field, column)
    return table


def without_logged(table: pa.Table) -> pa.Table:
    """Return a log's table without the columns that it has beside its records."""
    logged = {field.name for field in (LOGGED_ITERATION, *LEARNT)}
    return table.drop_columns([name for name in table.column_names if name in logged])


def rows_without(table: pa.Table, rollout_ids: Collection[str]) -> pa.Table:
    """Return a table's rows that are not of these rollouts."""
    unwanted = pa.array(sorted(rollout_ids), pa.string())
    return table.filter(pc.invert(pc.is_in(table["rollout_id"], value_set=unwanted)))


def extend(record: RolloutRequest, kind: type[Record], **more: Any) -> Record:
    """Return a later-stage record with all fields of an earlier one; lists are not copied."""
    shared = min(_NAMES[type(record)], _NAMES[kind], key=len)  # a later stage only adds
    return kind(**{name: getattr(record, name) for name in shared}, **more)


def _check(record: RolloutRequest) -> None:
    if not record.prompt_ids:
        raise ValueError(f"rollout {record.rollout_id}: empty prompt")
    if isinstance(record, Rollout):
        length = len(record.response_ids)
        if not length:
            raise ValueError(f"rollout {record.rollout_id}: empty response")
        if len(record.behavior_logprobs) != length:
            raise ValueError(f"rollout {record.rollout_id}: behavior_logprobs differ in length")
        if len(record.policy_logprobs) != length:
            raise ValueError(f"rollout {record.rollout_id}: unfiltered_logprobs differ in length")
        if isinstance(record, ScoredTrajectory):
            if len(record.ref_logprobs) != length:
                raise ValueError(f"rollout {record.rollout_id}: ref_logprobs differ in length")
            if record.token_scores is not None and len(record.token_scores) != length:
                raise ValueError(f"rollout {record.rollout_id}: token_scores differ in length")
