"""Pairs of responses that people compare, in a round's pairs.parquet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from common.data.chat import Message
from common.data.records import content_uid
from common.errors import DataError
from common.files import one_line, write_atomic
from deploy.feedback.answers import MOST


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One of two responses, and where it comes from; people see the text alone."""

    text: str
    policy: str = ""
    """Which policy sampled it: ``policy``, ``best`` (of several of its responses), ``sft``, or
    ``human``, who wrote it."""
    version: int = -1
    """Its iteration; -1 where it has none."""
    seed: int = 0
    sampling: str = ""
    """How its tokens were drawn: `common.logprobs.Sampling` in JSON; empty where they were not."""
    scores: tuple[float, ...] = ()
    """By the run's reward models, one of each seed where all are kept; empty where it has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two different responses to one prompt."""

    uid: str = ""
    """`content_uid` of prompt and both texts when left blank."""
    prompt: str
    messages: tuple[Message, ...] = field(default=(), hash=False)
    """The conversation that both answer; empty for a plain text."""
    first: Response
    second: Response
    chosen_by: str = "random"
    """How it came to be asked."""
    gold: int | None = None
    """What is known of it, -3 ... 3, above 0 where the first is the better; None of most."""

    @property
    def has_best(self) -> bool:
        """Whether one side was chosen by a reward model, as the best of several."""
        return "best" in (self.first.policy, self.second.policy)

    def __post_init__(self) -> None:
        if self.first.text == self.second.text or not (self.first.text and self.second.text):
            raise ValueError("a pair needs two different responses that say something")
        if self.gold is not None and not -MOST <= self.gold <= MOST:
            raise ValueError(f"gold {self.gold}: should be {-MOST} ... {MOST}")
        if not self.uid:
            contents = [self.prompt, self.first.text, self.second.text]
            if self.messages:
                contents.append(json.dumps(self.messages, sort_keys=True, ensure_ascii=False))
            object.__setattr__(self, "uid", content_uid("pair", *contents))


_RESPONSE: Final = pa.struct(
    [
        ("text", pa.string()),
        ("policy", pa.string()),
        ("version", pa.int64()),
        ("seed", pa.uint64()),
        ("sampling", pa.string()),
        ("scores", pa.list_(pa.float64())),
    ]
)
_SCHEMA: Final = pa.schema(
    [
        ("uid", pa.string()),
        ("prompt", pa.string()),
        ("messages", pa.string()),
        ("first", _RESPONSE),
        ("second", _RESPONSE),
        ("chosen_by", pa.string()),
        ("gold", pa.int8()),
    ]
)


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """Write pairs in their order, whole or not at all. Raises StorageError."""
    rows: list[dict[str, Any]] = []
    for pair in pairs:
        messages = json.dumps(pair.messages, ensure_ascii=False) if pair.messages else None
        rows.append({**asdict(pair), "messages": messages})
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), sink, write_page_checksum=True)
    write_atomic(path, [memoryview(sink.getvalue())])


def read_pairs(path: Path) -> list[Pair]:
    """Read them back.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        return [_pair(row) for row in table.cast(_SCHEMA).to_pylist()]
    except FileNotFoundError:
        raise DataError(f"{path}: no such round; `talipot feedback propose` makes one") from None
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path}: damaged, or no pairs ({one_line(error)})") from None


def _pair(row: dict[str, Any]) -> Pair:
    messages = tuple(json.loads(row["messages"])) if row["messages"] else ()
    sides = {
        side: Response(**{**row[side], "scores": tuple(row[side]["scores"])})
        for side in ("first", "second")
    }
    return Pair(**{**row, "messages": messages, **sides})
