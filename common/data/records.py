"""Readers, validation and order of what users bring: prompts, demonstrations, comparisons.

    file (.jsonl | .json | .parquet, local or URI) -> rows -> `_build` -> record, with its place

A row that is not what it should be is an error of one line: `file:line: field 'x': what; advice`
(`file:row N` for Parquet, `file:element N` for an array). The first is raised together with the
places of those after it. A record keeps its place, so that whatever is said of it later names the
same line.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from hashlib import blake2b
from typing import Any, Final, TypeVar

from common.data.chat import Message
from common.data.column_names import column_fault
from common.data.comparison_columns import OF_ROUNDS, READERS, Split
from common.data.conversations import (
    Messages,
    answer_of,
    answered_of,
    last_user,
    prompt_of,
    text_of,
    tools_of,
)
from common.data.files.rows import Columns, Refused, Row, Source, sources
from common.errors import DataError
from common.files import write_atomic

Tools = tuple[Mapping[str, Any], ...]
MOST_REFUSED: Final = 20
"""Rows that are named before reading stops."""


def content_uid(kind: str, *contents: str) -> str:
    """Return 32 hex digits of blake2b over length-prefixed `contents`; equal on every machine."""
    digest = blake2b(kind.encode(), digest_size=16)
    for text in contents:
        raw = text.encode()
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A text to respond to. Example: `Prompt(prompt="def area(radius):")`."""

    uid: str = ""
    """`content_uid` of the other fields when left blank. Equal contents have equal uids."""
    prompt: str
    """Of a conversation what the user said last."""
    messages: Messages = ()
    """The conversation so far; empty for a plain text."""
    tools: Tools = ()
    """What the assistant may call, as the template takes it."""
    columns: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What else its line holds, for scorers; no part of its name."""
    place: str = field(default="", compare=False)
    """Where it was read, as ``file:line``; no part of the data."""

    def __post_init__(self) -> None:
        if not self.uid:
            object.__setattr__(self, "uid", _uid("prompt", self, self.prompt))


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """A prompt with a response to imitate (supervised fine-tuning)."""

    uid: str = ""
    """`content_uid` of the other fields when left blank."""
    prompt: str
    response: str
    messages: Messages = ()
    """A conversation: one that ends with the assistant, all of whose turns are learnt, or one that
    `response` answers, which alone is learnt. Empty for plain texts."""
    tools: Tools = ()
    """What the assistant may call."""
    columns: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What else its line holds, for scorers; no part of its name."""
    place: str = field(default="", compare=False)
    """Where it was read, as ``file:line``; no part of the data."""

    def __post_init__(self) -> None:
        if not self.uid:
            uid = _uid("demonstration", self, self.prompt, self.response)
            object.__setattr__(self, "uid", uid)

    def asked(self) -> Prompt:
        """Return the prompt that it answers."""
        ends = len(self.messages) - (self.messages[-1:] != () and _speaks(self.messages[-1]))
        return Prompt(
            prompt=self.prompt,
            messages=self.messages[:ends],
            tools=self.tools,
            columns=self.columns,
            place=self.place,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two responses to one prompt, one preferred (reward-model training)."""

    uid: str = ""
    """`content_uid` of texts, labeler and confidence when left blank."""
    prompt: str
    chosen: str
    rejected: str
    messages: Messages = ()
    """The conversation that both answer; empty for plain texts."""
    tools: Tools = ()
    """What the assistant may call."""
    labeler: str = "unknown"
    """Who judged: a person's or a program's name."""
    confidence: float = 1.0
    """Probability, in the labeler's eyes, that `chosen` is the better: 0.5 ... 1."""
    pair_uid: str = ""
    """Which pair of a round of feedback it is of; empty of others."""
    round: int = 0
    """Number of that round; 0 of others."""
    seconds: float = 0.0
    """That the answer took; 0 where nobody counted."""
    split: Split = ""
    """What it is for: to train on, to choose a reward model by (`valid1`), to report (`valid2`), as
    in the files of Stiennon 2020; empty where nothing was said."""
    place: str = field(default="", compare=False)
    """Where it was read, as ``file:line``; no part of the data."""

    def __post_init__(self) -> None:
        if not self.uid:
            contents = (self.prompt, self.chosen, self.rejected, self.labeler)
            uid = _uid("comparison", self, *contents, repr(float(self.confidence)))
            object.__setattr__(self, "uid", uid)


def _uid(kind: str, record: Prompt | Demonstration | Comparison, *contents: str) -> str:
    if record.messages:
        chat = [record.messages, record.tools]
        contents += (json.dumps(chat, sort_keys=True, ensure_ascii=False),)
    return content_uid(kind, *contents)


def _speaks(message: Message) -> bool:
    return bool(message["role"] == "assistant")


Record = TypeVar("Record", Prompt, Demonstration, Comparison)


def told_apart(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Give prompts that are asked more than once uids of their own, from the second time on.

    The uid is what samples derive from, so that each of them is answered anew.
    """
    times: Counter[str] = Counter()
    told = []
    for prompt in prompts:
        again = times[prompt.uid]
        times[prompt.uid] += 1
        told.append(replace(prompt, uid=f"{prompt.uid}-{again}") if again else prompt)
    return told


def read_prompts(
    paths: Sequence[str],
    refused: Refused | None = None,
    columns: tuple[str, ...] | None = (),
) -> Iterator[Prompt]:
    """Stream the prompts of `paths` in order, with these further columns (None: all of them).

    Raises:
        DataError: see `_read`.
    """
    return _read(paths, Prompt, refused, columns)


def read_demonstrations(
    paths: Sequence[str],
    refused: Refused | None = None,
    columns: tuple[str, ...] | None = (),
) -> Iterator[Demonstration]:
    """Stream the demonstrations of `paths` in order, with further columns as `read_prompts`.

    Raises:
        DataError: see `_read`.
    """
    return _read(paths, Demonstration, refused, columns)


def read_comparisons(paths: Sequence[str], refused: Refused | None = None) -> Iterator[Comparison]:
    """Stream the comparisons of `paths` in order. Raises: DataError (see `_read`)."""
    return _read(paths, Comparison, refused)


def write_jsonl(
    path: str | os.PathLike[str], records: Iterable[Prompt | Demonstration | Comparison]
) -> None:
    """Write one JSON object a line, atomically. Raises: StorageError."""

    def line(record: Prompt | Demonstration | Comparison) -> bytes:
        required, optional = _COLUMNS[type(record)]
        chat = [name for name in _CHAT if getattr(record, name)]
        said = [n for n in optional if n not in OF_ROUNDS or getattr(record, n)]
        values = {name: getattr(record, name) for name in ("uid", *required, *said, *chat)}
        return json.dumps(values, ensure_ascii=False).encode() + b"\n"

    write_atomic(path, map(line, records))


def _read(
    paths: Sequence[str],
    kind: type[Record],
    refused: Refused | None = None,
    further: tuple[str, ...] | None = (),
) -> Iterator[Record]:
    """Check at the call that every file is there, then stream records one by one.

    Args:
        paths: files, folders or patterns.
        kind: of the records.
        refused: told of each row that is not a `kind`; without it the first one ends the stream,
            and the rows after it are read for the places of others.
        further: columns that go with a record as they are; None is all.

    Raises:
        DataError: at the call, a missing file or unknown extension; while streaming, rows that
            are not a `kind`, or a file without any.
    """
    checked = sources(paths)
    wanted = (*(name for columns in _COLUMNS[kind] for name in columns), *_CHAT)
    columns = Columns(wanted=wanted, further=further)
    if refused is not None:
        return _records(checked, columns, kind, refused)
    return _strictly(checked, columns, kind)


def _strictly(files: Sequence[Source], columns: Columns, kind: type[Record]) -> Iterator[Record]:
    bad: list[DataError] = []
    for record in _records(files, columns, kind, bad.append):
        if not bad:
            yield record
        if len(bad) > MOST_REFUSED:
            break
    if not bad:
        return
    first, *others = map(str, bad)
    if not others:
        raise bad[0]
    shown = ", ".join(_place_of(text) for text in others[: MOST_REFUSED - 1])
    rest = " and more" if len(others) >= MOST_REFUSED else ""
    raise DataError(f"{first}; also refused: {shown}{rest}")


def _records(
    files: Sequence[Source], columns: Columns, kind: type[Record], refused: Refused
) -> Iterator[Record]:
    for file in files:
        for row in file.rows(columns, refused):
            try:
                record = _build(kind, row)
            except DataError as error:
                refused(error)
                continue
            yield record


def _place_of(message: str) -> str:
    return message.split(": ", 1)[0]


# --- one row ----------------------------------------------------------------------------------


_CHAT: Final = ("messages", "tools")


def _names(kind: type[Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    apart = ("uid", "place", "columns", *_CHAT)
    own = [column for column in fields(kind) if column.name not in apart]
    required = tuple(column.name for column in own if column.default is MISSING)
    return required, tuple(column.name for column in own if column.default is not MISSING)


# the (required, optional) columns of each record
_COLUMNS: Final[dict[type[Any], tuple[tuple[str, ...], tuple[str, ...]]]] = {
    kind: _names(kind) for kind in (Prompt, Demonstration, Comparison)
}


def _build(kind: type[Record], row: Row) -> Record:
    if _is_chat(row):
        return _build_chat(kind, row)
    required: tuple[str, ...] = _COLUMNS[kind][0]
    optional: tuple[str, ...] = _COLUMNS[kind][1]
    meant = tuple(name for name in optional if name not in OF_ROUNDS)
    found = tuple(name for name in row.values if name not in OF_ROUNDS)
    if fault := column_fault(required, meant, found, row.others):
        raise DataError(f"{row.place}: {fault}")
    values: dict[str, Any] = {}
    for name in (*required, *optional):
        value = row.values.get(name)
        if value is None and name in optional:
            continue
        where = f"{row.place}: field {name!r}"
        values[name] = READERS.get(name, text_of)(value, where)
    if kind is Comparison:
        _require_different(values["chosen"], values["rejected"], row.place)
    # A uid in the file is not taken over: an edited line would keep the old one's name.
    return kind(**values, **_further(row), place=row.place)


def _further(row: Row) -> dict[str, Any]:
    return {"columns": row.further} if row.further else {}


def _is_chat(row: Row) -> bool:
    """Whether a row is a conversation, wherever it has its messages."""
    if row.values.get("messages") is not None:
        return True
    prompt = row.values.get("prompt")
    sides = [row.values.get(name) for name in ("chosen", "rejected")]
    return isinstance(prompt, list) or (prompt is None and any(isinstance(s, list) for s in sides))


def _build_chat(kind: type[Record], row: Row) -> Record:
    """Build a record of a conversation; as other people write it, `prompt` may be messages."""
    tools = tools_of(row.values.get("tools"), f"{row.place}: field 'tools'")
    parts = {Prompt: _asked, Demonstration: _shown, Comparison: _compared}[kind]
    values = parts({k: v for k, v in row.values.items() if v is not None}, row.place)
    prompt = last_user(values["messages"])
    return kind(prompt=prompt, tools=tools, place=row.place, **_further(row), **values)


def _asked(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    field = "messages" if "messages" in row else "prompt"
    return {"messages": prompt_of(row[field], f"{place}: field {field!r}")}


def _shown(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    if "response" in row:
        messages = _asked(row, place)["messages"]
        _, response = answer_of(row["response"], messages, f"{place}: field 'response'")
    elif "messages" in row:
        messages = answered_of(row["messages"], f"{place}: field 'messages'")
        response = messages[-1]["content"]
    else:
        raise DataError(f"{place}: field 'response': missing; add it, or 'messages' with it")
    return {"messages": messages, "response": response}


def _compared(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    prompt = _asked(row, place)["messages"] if row.keys() & {"messages", "prompt"} else None
    values: dict[str, Any] = {}
    for name in ("chosen", "rejected"):
        if name not in row:
            raise DataError(f"{place}: field {name!r}: missing; add it")
        prompt, values[name] = answer_of(row[name], prompt, f"{place}: field {name!r}")
    _require_different(values["chosen"], values["rejected"], place)
    for name in _COLUMNS[Comparison][1]:
        if name in row:
            values[name] = READERS.get(name, text_of)(row[name], f"{place}: field {name!r}")
    return values | {"messages": prompt}


def _require_different(chosen: str, rejected: str, place: str) -> None:
    if chosen == rejected:
        raise DataError(
            f"{place}: field 'rejected': equal to 'chosen'; a comparison needs two different "
            "responses, so take the line out"
        )
