"""From what people said to what a reward model is trained on."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal

from common.data.chat import Message
from common.data.comparison_columns import Split
from common.data.records import Comparison
from deploy.feedback.answers import CONFIDENCE, Answer, of_kind
from deploy.feedback.pairs import Pair

How = Literal["rows", "mean"]
"""A row for each answer to a pair, or one for the mean of them."""


def comparisons(
    pairs: Sequence[Pair],
    answers: Sequence[Answer],
    *,
    without: Collection[str] = (),
    how: How = "rows",
    number: int = 0,
) -> Iterator[Comparison]:
    """Yield comparisons in the order of the pairs; what was skipped or not answered is none.

    Second showings say how sure a labeler is, and are no further comparisons. Pairs of which the
    better response is known (`Pair.gold`) test people, and are left out.

    Args:
        pairs: of the round.
        answers: standing ones.
        without: labelers whose answers are left out.
        how: a row for each answer, or their mean.
        number: of the round.
    """
    of_pair: defaultdict[str, list[Answer]] = defaultdict(list)
    for answer in of_kind(answers):
        if answer.labeler not in without:
            of_pair[answer.pair_uid].append(answer)
    for pair in pairs:
        said = of_pair.get(pair.uid, [])
        if pair.gold is not None or not said:
            continue
        if how == "rows":
            # Not by time: the same answers make the same file.
            for answer in sorted(said, key=lambda answer: answer.labeler):
                yield _comparison(pair, _sure(answer), answer.labeler, answer.seconds, number)
            continue
        mean = sum(map(_sure, said)) / len(said)
        names = "+".join(sorted(answer.labeler for answer in said))
        yield _comparison(pair, mean, names, sum(a.seconds for a in said), number)


def _sure(answer: Answer) -> float:
    """Return the probability, in the labeler's eyes, that the first response is the better."""
    assert answer.preference is not None
    sure = CONFIDENCE[abs(answer.preference)]
    return sure if answer.preference >= 0 else 1 - sure


def _comparison(pair: Pair, first: float, labeler: str, seconds: float, number: int) -> Comparison:
    sides = (pair.first, pair.second) if first >= 0.5 else (pair.second, pair.first)
    return Comparison(
        prompt=pair.prompt,
        messages=pair.messages,
        chosen=sides[0].text,
        rejected=sides[1].text,
        labeler=labeler,
        confidence=max(first, 1 - first),
        pair_uid=pair.uid,
        round=number,
        seconds=round(seconds, 3),
        split=split_of(pair.prompt, pair.messages),
    )


def split_of(prompt: str, messages: Sequence[Message] = ()) -> Split:
    """Return what the answers to a prompt are for: a tenth chooses, a tenth reports.

    It follows from the prompt alone, so it is the same in every round, and no prompt is on two
    sides.
    """
    asked = json.dumps([prompt, messages], sort_keys=True, ensure_ascii=False)
    digest = hashlib.blake2b(asked.encode(), digest_size=8, person=b"split").digest()
    tenth = int.from_bytes(digest, "big") % 10
    return "valid1" if tenth == 0 else "valid2" if tenth == 1 else "train"


def gold_of(pairs: Sequence[Pair]) -> Mapping[str, int]:
    """Return what is known of pairs, by uid."""
    return {pair.uid: pair.gold for pair in pairs if pair.gold is not None}
