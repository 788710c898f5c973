"""The data of a stage in tokens: fitted into the model's context, counted, and split."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import numpy as np

from common.config.run import RunConfig
from common.data.fitting import Fitting
from common.data.prompts import EncodedPrompt, encode_prompts
from common.data.records import Comparison, Demonstration, read_prompts
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
    return encode_prompts(
        list(read_prompts(paths)),
        tokenizer,
        max_tokens=config.max_prompt_tokens,
        too_long=config.data.too_long,
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
    fitting, out = _fitting("demonstrations", config), list[EncodedPair]()
    for batch in _batches(demonstrations):
        prompts = tokenizer.encode_batch([d.prompt for d in batch])
        responses = tokenizer.encode_batch([d.response for d in batch])
        for record, prompt, response in zip(batch, prompts, responses, strict=True):
            if len(out) == limit:
                return out, fitting
            parts = {"prompt": prompt, "response": [*response, tokenizer.eos_id]}
            if (kept := fitting.fit(record.place, parts)) is not None:
                out.append(EncodedPair(prompt=kept[0], response=kept[1]))
    return out, fitting


def encode_comparisons(
    comparisons: Iterable[Comparison], tokenizer: Tokenizer, config: RunConfig
) -> tuple[list[EncodedComparison], Fitting]:
    """Encode both sides, with EOS, and count what did not fit; raises as `encode_pairs`."""
    fitting, out = _fitting("comparisons", config), list[EncodedComparison]()
    for batch in _batches(comparisons):
        texts = [text for c in batch for text in (c.prompt, c.chosen, c.rejected)]
        ids = tokenizer.encode_batch(texts)
        for index, record in enumerate(batch):
            prompt, *sides = ids[3 * index : 3 * index + 3]
            chosen, rejected = ([*side, tokenizer.eos_id] for side in sides)
            parts = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            if (kept := fitting.fit(record.place, parts)) is not None:
                out.append(
                    EncodedComparison(
                        prompt=kept[0],
                        chosen=kept[1],
                        rejected=kept[2],
                        confidence=record.confidence,
                    )
                )
    return out, fitting


def same_pair(pair: EncodedPair) -> Hashable:
    """Return a key that is equal for demonstrations that are the same."""
    return tuple(pair.prompt), tuple(pair.response)


def same_comparison(comparison: EncodedComparison) -> Hashable:
    """Return a key that is equal for comparisons of the same two responses, either preferred."""
    sides = frozenset((tuple(comparison.chosen), tuple(comparison.rejected)))
    return tuple(comparison.prompt), sides


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


def _fitting(what: str, config: RunConfig) -> Fitting:
    return Fitting(
        what=what,
        prompt=config.max_prompt_tokens,
        response=config.rollout.max_response_tokens,
        too_long=config.data.too_long,
    )


def _batches(records: Iterable[Item]) -> Iterator[list[Item]]:
    source = iter(records)
    while batch := list(islice(source, _BATCH)):
        yield batch
