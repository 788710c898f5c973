"""The files that a recipe names: every bad row, lengths in tokens, what is there twice.

Files are read once and whole, and the first records of each field are tokenised. Of the others only
names are kept, and the place where each prompt first stands: some hundred bytes for a record.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from statistics import median
from typing import Any, Final

from common.config.run import DataConfig, RunConfig
from common.data.encoding import comparisons_in_ids, prompts_in_ids, rows_in_ids
from common.data.files.lists import files_at
from common.data.fitting import Fitting
from common.data.mixture import parts_of, prompt_columns, source_of
from common.data.records import (
    MOST_REFUSED,
    Comparison,
    Demonstration,
    Prompt,
    read_comparisons,
    read_demonstrations,
    read_prompts,
)
from common.data.tokenizer import Tokenizer
from common.errors import DataError
from common.files import resolve
from deploy.validation.findings import Findings

TOKENISED: Final = 20_000
"""Records of a field whose tokens are counted."""
_AT_ONCE: Final = 512
_LARGE_BYTES: Final = 16 * 2**20
_MANY: Final = 0.2
"""Share of the records of a field that are left out or cut without a warning."""

AnyRecord = Prompt | Demonstration | Comparison
READERS: Mapping[str, Callable[..., Iterator[AnyRecord]]] = {
    "demonstrations": read_demonstrations,
    "comparisons": read_comparisons,
    "prompts": read_prompts,
    "evaluation": read_demonstrations,
}
"""How the files of each field of `data` are read."""


@dataclass(slots=True)
class _Refused:
    """Rows of a file that are refused, by what is wrong with them: the first ones, and how many."""

    places: dict[str, list[str]] = field(default_factory=dict)
    """What is wrong -> ``file:line`` of the rows that it is said of."""
    named: int = 0
    count: int = 0

    def __call__(self, error: DataError) -> None:
        self.count += 1
        if self.named < MOST_REFUSED:
            self.named += 1
            place, _, wrong = str(error).partition(": ")
            self.places.setdefault(wrong, []).append(place)

    def lines(self, file: str) -> Iterator[str]:
        """Say each thing that is wrong once, at the first row, with the lines of the others."""
        for wrong, (first, *others) in self.places.items():
            alike = ", ".join(place.rpartition(":")[2] for place in others)
            yield f"{first}: {wrong}" + (f"; so in {alike}" if others else "")
        if rest := self.count - self.named:
            yield f"{file}: {rest} more rows are refused; mend these first"


@dataclass(slots=True)
class FieldFacts:
    """What the files of one field hold."""

    name: str
    files: int = 0
    count: int = 0
    records: list[AnyRecord] = field(default_factory=list)
    """The first ones, as they were read."""
    seen: dict[str, str] = field(default_factory=dict)
    """Prompt -> the place where it first stands."""
    again: list[str] = field(default_factory=list)
    """Places of records that stand in the files before."""
    sources: list[str] = field(default_factory=list)
    """Of each prompt, where the recipe mixes sources."""


def read_field(
    name: str,
    paths: Sequence[str],
    findings: Findings,
    limit: int | None = None,
    mixed: DataConfig | None = None,
) -> FieldFacts:
    """Read all files of a field, and note every bad row up to the twentieth of each file.

    Args:
        name: of the field in `data`.
        paths: that it has.
        findings: to note errors in.
        limit: rows to read of each file; None: all.
        mixed: which source a prompt is of; None where the recipe does not mix sources.
    """
    facts, uids = FieldFacts(name), set[str]()
    read = READERS[name]
    if mixed is not None:
        read = partial(read_prompts, columns=prompt_columns(mixed))
    for file in _files(name, paths, findings):
        facts.files += 1
        if limit is not None and _is_large_array(file):
            continue
        refused = _Refused()
        with findings.attempt():
            for record in islice(read([file], refused=refused), limit):
                _add(facts, record, uids)
                if mixed is not None and isinstance(record, Prompt):
                    facts.sources.append(source_of(record, mixed.source_column))
        for line in refused.lines(file):
            findings.error(line, DataError)
    if facts.again:
        findings.warning(
            f"{facts.again[0]}: stands in data.{name} before, as do {len(facts.again)} of its "
            f"{facts.count} records; leave each in once, unless it shall count more"
        )
    return facts


def _files(name: str, paths: Sequence[str], findings: Findings) -> list[str]:
    """Find the files of each path alone, so that one which is missing hides no other."""
    files: list[str] = []
    for path in paths:
        try:
            files += files_at([path])
        except DataError as error:
            findings.error(f"data.{name}: {error}", DataError)
    if len(set(files)) < len(files):
        with findings.attempt():
            files_at(paths)
    return list(dict.fromkeys(files))


def _is_large_array(file: str) -> bool:
    """Whether the first rows of a file cost the reading of all of it, and that takes a while."""
    filesystem, inner = resolve(file)
    array = os.path.basename(inner).removesuffix(".gz").removesuffix(".zst").endswith(".json")
    return array and (filesystem.get_file_info(inner).size or 0) > _LARGE_BYTES


def _add(facts: FieldFacts, record: AnyRecord, uids: set[str]) -> None:
    facts.count += 1
    if record.uid in uids:
        facts.again.append(record.place)
    uids.add(record.uid)
    if len(facts.records) < TOKENISED:
        facts.records.append(record)
    facts.seen.setdefault(_asked(record).uid, record.place)


def _asked(record: AnyRecord) -> Prompt:
    if isinstance(record, Prompt):
        return record
    if isinstance(record, Demonstration):
        return record.asked()
    return Prompt(prompt=record.prompt, messages=record.messages, tools=record.tools)


def check_overlap(fields: Mapping[str, FieldFacts], findings: Findings) -> None:
    """Warn of held-out prompts that are trained on."""
    held_out = fields.get("evaluation")
    for name, trained in fields.items():
        if held_out is None or trained is held_out:
            continue
        both = [place for uid, place in held_out.seen.items() if uid in trained.seen]
        if both:
            findings.warning(
                f"{both[0]}: this held-out prompt stands in data.{name} too, as do {len(both)} of "
                f"{len(held_out.seen)}; take them out of one of the two, or the evaluation "
                "measures what was learnt by heart"
            )


def check_mixture(config: RunConfig, prompts: FieldFacts, findings: Findings) -> None:
    """Compare the sources that are there with those of the mixture, and say what is taken."""
    mixture, train = config.data.mixture, config.train
    if mixture is None or not prompts.sources:
        return
    with findings.attempt():
        parts = parts_of(prompts.sources, mixture, train.iterations * train.prompts_per_iteration)
        whole = sum(part.weight for part in parts)
        shares = ", ".join(
            f"{part.name} {part.weight / whole:.0%} of {len(part.rows)} prompts" for part in parts
        )
        findings.facts.append(f"data.mixture: {shares}")


def check_lengths(
    facts: FieldFacts, tokenizer: Tokenizer, config: RunConfig, findings: Findings
) -> None:
    """Note records that do not fit into the context, and say how long they are."""
    answers = facts.name in ("demonstrations", "comparisons")
    fitting = Fitting(
        what=facts.name if answers else "prompts",
        prompt=config.max_prompt_tokens,
        response=config.rollout.max_response_tokens if answers else 0,
        too_long=config.data.too_long,
        prefix=len(tokenizer.prefix_ids),
    )
    lengths: list[int] = []
    refused = 0
    for record, parts in _encoded(facts, tokenizer, findings):
        lengths.append(sum(map(len, parts[0].values())) if len(parts) == 1 else 0)
        try:
            for part in parts:
                _fit(fitting, record, part)
        except DataError as error:
            refused += 1
            if refused <= MOST_REFUSED:
                findings.error(str(error), DataError)
    if refused > MOST_REFUSED:
        findings.error(
            f"data.{facts.name}: {refused - MOST_REFUSED} more records are too long; raise "
            "model.context, or set data.too_long to skip or truncate",
            DataError,
        )
    if fitting.read and (fitting.skipped + fitting.cut) / fitting.read > _MANY:
        findings.warning(f"data.{facts.name}: {'; '.join(fitting.said())}")
    _say(facts, lengths, fitting, findings)


def _say(facts: FieldFacts, lengths: Sequence[int], fitting: Fitting, findings: Findings) -> None:
    known = [length for length in lengths if length]
    said = f"data.{facts.name}: {facts.count} records in {facts.files} file"
    said += "s" if facts.files != 1 else ""
    if known:
        first = f" of the first {len(known)}" if facts.count > len(known) else ""
        said += f"; tokens{first}: {median(known):.0f} at the median, {max(known)} at most"
        said += f", room for {fitting.prompt + fitting.response}"
    findings.facts.append(said)


Parts = dict[str, list[int]]


def _encoded(
    facts: FieldFacts, tokenizer: Tokenizer, findings: Findings
) -> Iterator[tuple[AnyRecord, list[Parts]]]:
    """Yield records in tokens; what the template refuses is noted, one record at a time."""
    encode = _ENCODERS[facts.name]
    for at in range(0, len(facts.records), _AT_ONCE):
        batch = facts.records[at : at + _AT_ONCE]
        try:
            yield from zip(batch, encode(batch, tokenizer), strict=True)
        except DataError:
            for record in batch:
                with findings.attempt():
                    yield record, encode([record], tokenizer)[0]


def _fit(fitting: Fitting, record: AnyRecord, part: Any) -> None:
    if isinstance(part, dict):
        fitting.fit(record.place, part, chat=bool(record.messages))
    else:
        fitting.fit_turns(record.place, part)


def _asked_in_ids(records: Sequence[Any], tokenizer: Tokenizer) -> list[list[Any]]:
    encoded = prompts_in_ids([_asked(record) for record in records], tokenizer)
    return [[{"prompt": each.ids}] for each in encoded]


def _shown_in_ids(records: Sequence[Any], tokenizer: Tokenizer) -> list[list[Any]]:
    rows = rows_in_ids(records, tokenizer)
    return [
        list(turns)
        if record.messages
        else [{"prompt": turns[0][0].before, "response": turns[0][0].learnt}]
        for record, turns in zip(records, rows, strict=True)
    ]


def _compared_in_ids(records: Sequence[Any], tokenizer: Tokenizer) -> list[list[Any]]:
    names = ("prompt", "chosen", "rejected")
    return [
        [dict(zip(names, parts, strict=True))] for parts in comparisons_in_ids(records, tokenizer)
    ]


_ENCODERS: Mapping[str, Callable[[Sequence[Any], Tokenizer], list[list[Any]]]] = {
    "demonstrations": _shown_in_ids,
    "comparisons": _compared_in_ids,
    "prompts": _asked_in_ids,
    "evaluation": _asked_in_ids,
}
