"""The data of a stage in tokens: fitted into the model's context, counted, and split."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TypeVar

import numpy as np

from common.config.run import RunConfig
from common.data.chat import Turn
from common.data.encoding import comparisons_in_ids, rows_in_ids
from common.data.fitting import Fitting
from common.data.mixture import prompt_columns, source_of
from common.data.prompts import EncodedPrompt, encode_prompts
from common.data.records import (
    Comparison,
    Demonstration,
    read_demonstrations,
    read_prompts,
)
from common.data.tokenizer import Tokenizer
from common.errors import DataError
from common.randomness import derive_seed
from learner.supervised.examples import EncodedComparison, EncodedPair

_BATCH = 1024
"""Records that are tokenised at once."""

Item = TypeVar("Item")


def read_encoded_prompts(
    paths: Sequence[str], tokenizer: Tokenizer, config: RunConfig
) -> tuple[list[EncodedPrompt], Fitting]:
    """Read prompts in tokens, and how many of them fitted."""
    data = config.data
    return encode_prompts(
        list(read_prompts(paths, columns=prompt_columns(data))),
        tokenizer,
        max_tokens=config.max_prompt_tokens,
        too_long=data.too_long,
        source=None if data.mixture is None else partial(source_of, column=data.source_column),
    )


def read_held_out(tokenizer: Tokenizer, config: RunConfig) -> tuple[list[EncodedPrompt], Fitting]:
    """Read the first `evaluate.prompts` held-out prompts in tokens, and how many of them fitted."""
    data = config.data
    records = read_demonstrations(data.evaluation, columns=prompt_columns(data))
    return encode_prompts(
        [record.asked() for record in records],
        tokenizer,
        max_tokens=config.max_prompt_tokens,
        too_long=data.too_long,
        limit=config.evaluate.prompts,
        source=None if data.mixture is None else partial(source_of, column=data.source_column),
    )


def encode_pairs(
    demonstrations: Iterable[Demonstration],
    tokenizer: Tokenizer,
    config: RunConfig,
    limit: int | None = None,
) -> tuple[list[EncodedPair], Fitting]:
    """Encode the first `limit` (prompt, response) that fit, with EOS, and count those that did not.

    Raises:
        DataError: one is too long and `data.too_long` is "error"; names its place.
    """
    fitting, out = _fitting("demonstrations", config, tokenizer), list[EncodedPair]()
    for batch in _batches(demonstrations):
        for record, rows in zip(batch, rows_in_ids(batch, tokenizer), strict=True):
            for row in rows:
                if len(out) == limit:
                    return out, fitting
                if (pair := _pair(record, row, fitting)) is not None:
                    out.append(pair)
    return out, fitting


def _pair(record: Demonstration, row: Sequence[Turn], fitting: Fitting) -> EncodedPair | None:
    """Fit a row; of a conversation all turns of the assistant are learnt."""
    if not record.messages:
        [turn] = row
        parts = {"prompt": turn.before, "response": turn.learnt}
        kept = fitting.fit(record.place, parts)
        return None if kept is None else EncodedPair(prompt=kept[0], response=kept[1])
    turns = fitting.fit_turns(record.place, row)
    if not turns:
        return None
    response: list[int] = []
    between: list[tuple[int, int]] = []
    for turn in turns:
        if response:
            between.append((len(response), len(response) + len(turn.before)))
            response += turn.before
        response += turn.learnt
    return EncodedPair(
        prompt=turns[0].before,
        response=response,
        between=tuple(between),
        conversation=record.uid,
    )


def encode_comparisons(
    comparisons: Iterable[Comparison], tokenizer: Tokenizer, config: RunConfig
) -> tuple[list[EncodedComparison], Fitting]:
    """Encode both sides, with EOS, and count what did not fit; raises as `encode_pairs`."""
    fitting, out = _fitting("comparisons", config, tokenizer), list[EncodedComparison]()
    for batch in _batches(comparisons):
        encoded = comparisons_in_ids(batch, tokenizer)
        for record, (prompt, chosen, rejected) in zip(batch, encoded, strict=True):
            parts = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            kept = fitting.fit(record.place, parts, chat=bool(record.messages))
            if kept is not None:
                out.append(
                    EncodedComparison(
                        prompt=kept[0],
                        chosen=kept[1],
                        rejected=kept[2],
                        confidence=record.confidence,
                        split=record.split,
                    )
                )
    return out, fitting


def same_pair(pair: EncodedPair) -> Hashable:
    """Return a key that is equal for demonstrations that are the same, or of one conversation."""
    return pair.conversation or (tuple(pair.prompt), tuple(pair.response))


def same_comparison(comparison: EncodedComparison) -> Hashable:
    """Return a key that is equal for comparisons of the same two responses, either preferred."""
    sides = frozenset((tuple(comparison.chosen), tuple(comparison.rejected)))
    return tuple(comparison.prompt), sides


@dataclass(frozen=True, slots=True, kw_only=True)
class Divided:
    """Comparisons, by what they are for."""

    train: list[EncodedComparison]
    held_out: list[EncodedComparison]
    """To choose a reward model by."""
    reported: list[EncodedComparison]
    """To say how good the chosen one is; empty where no comparison is for that."""
    left_out: int
    """Comparisons that were to be trained on, with the prompt of one that is held out."""


def divided(data: Sequence[EncodedComparison], share: float, seed: int) -> Divided:
    """Divide comparisons as they say themselves; of those that say nothing a share is held out.

    No prompt is on two sides: what is reported is nowhere else, what is held out not trained on.

    Raises:
        DataError: as `hold_out`; or nothing is left to train on.
    """
    of: dict[str, list[EncodedComparison]] = {"": [], "train": [], "valid1": [], "valid2": []}
    for comparison in data:
        of[comparison.split].append(comparison)
    reported = {tuple(c.prompt) for c in of["valid2"]}
    chosen_by = [c for c in of["valid1"] if tuple(c.prompt) not in reported]
    apart = reported | {tuple(c.prompt) for c in chosen_by}
    said = [c for c in of["train"] if tuple(c.prompt) not in apart]
    unsaid = [c for c in of[""] if tuple(c.prompt) not in apart]
    left_out = len(of["train"]) + len(of[""]) - len(said) - len(unsaid)
    if not chosen_by:
        train, held_out = hold_out(said + unsaid, share, seed, same_comparison)
    elif len({same_comparison(c) for c in unsaid}) > 1:
        rest, held_out = hold_out(unsaid, share, seed, same_comparison)
        train, held_out = said + rest, chosen_by + held_out
    else:
        train, held_out = said + unsaid, chosen_by
    if not train:
        raise DataError("every usable comparison is held out (split valid1 or valid2); add others")
    return Divided(train=train, held_out=held_out, reported=of["valid2"], left_out=left_out)


def hold_out(
    data: Sequence[Item], share: float, seed: int, same: Callable[[Item], Hashable]
) -> tuple[list[Item], list[Item]]:
    """Hold some out, drawn by seed: at least one is left on either side, equals stay together.

    Raises:
        DataError: all of them are equal, or there are fewer than two.
    """
    alike: dict[Hashable, list[Item]] = {}
    for item in data:
        alike.setdefault(same(item), []).append(item)
    groups = list(alike.values())
    if len(groups) < 2:
        raise DataError(
            f"{len(groups)} usable records that differ; at least 2 are needed, 1 to hold out"
        )
    order = np.random.default_rng(derive_seed(seed, "hold out")).permutation(len(groups))
    count = min(len(groups) - 1, max(1, round(share * len(groups))))
    split = order[count:], order[:count]
    train, held_out = ([item for index in part for item in groups[index]] for part in split)
    return train, held_out


def _fitting(what: str, config: RunConfig, tokenizer: Tokenizer) -> Fitting:
    return Fitting(
        what=what,
        prompt=config.max_prompt_tokens,
        response=config.rollout.max_response_tokens,
        too_long=config.data.too_long,
        prefix=len(tokenizer.prefix_ids),
    )


def _batches(records: Iterable[Item]) -> Iterator[list[Item]]:
    source = iter(records)
    while batch := list(islice(source, _BATCH)):
        yield batch
