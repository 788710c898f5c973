"""What a run's reward models say of responses, and how far they disagree on a pair.

Where models that were trained alike, but for the seed, prefer different sides, a label says most
(query by committee, Seung 1992; the variance of an ensemble chose pairs in Christiano 2017, section
2.2.4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, pstdev

from common.config.rewards import ModelComponent
from common.config.run import RunConfig
from common.data.records import Prompt
from deploy.feedback.pairs import Pair, Response
from deploy.run_folder.inputs import RunInputs


def preferences(pair: Pair) -> list[float]:
    """Return the probability that each reward model gives the pair's first response.

    By Bradley and Terry: ``sigmoid(score of the first - score of the second)``.
    """
    return [
        1 / (1 + math.exp(-max(-500.0, min(500.0, first - second))))
        for first, second in zip(pair.first.scores, pair.second.scores, strict=True)
    ]


def disagreement(pair: Pair) -> float:
    """Return the standard deviation of these probabilities; 0 of less than two models."""
    found = preferences(pair)
    return pstdev(found) if len(found) > 1 else 0.0


def preferred(pair: Pair) -> float:
    """Return their mean. Raises ValueError where nobody scored the pair."""
    if not (found := preferences(pair)):
        raise ValueError(f"pair {pair.uid}: has no scores")
    return fmean(found)


def scored(
    config: RunConfig,
    models: Sequence[Path],
    prompts: Mapping[str, Prompt],
    said: Mapping[str, Sequence[Response]],
) -> dict[str, list[Response]]:
    """Return all responses with the score of each reward model.

    Args:
        config: of the run that the models are of.
        models: their weights.
        prompts: by uid.
        said: responses by the prompt's uid.

    Raises:
        DataError: the run's reward models are not what its stage wrote.
    """
    from deploy.scorer import RunScorer  # with torch, which those who only count labels do without

    RunInputs(config.run_dir).require_result("reward")
    alone = {"components": {"model": ModelComponent()}}
    judged = config.model_copy(
        update={"reward_service": config.reward_service.model_copy(update=alone)}
    )
    asked = [prompts[uid] for uid, of in said.items() for _ in of]
    texts = [response.text for of in said.values() for response in of]
    columns = []
    for weights in models:  # one at a time: each is a whole network
        scorer = RunScorer(judged, weights)
        columns.append([score for score, _, _ in scorer.scores(asked, texts)])
    rows = iter(zip(*columns, strict=True))
    return {
        uid: [
            replace(response, scores=tuple(_number(score) for score in next(rows)))
            for response in of
        ]
        for uid, of in said.items()
    }


def _number(score: float | None) -> float:
    """Return a reward model's score, which is never missing."""
    assert score is not None
    return score
