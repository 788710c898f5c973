"""Score against KL: what training has paid for its score, beside best-of-N of the first policy.

Stiennon 2020 (figure 5) and Gao 2022 judge a policy by where it lies between the two: best-of-N is
what anybody gets without training, at a KL that is known.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow.parquet as pq

from common.errors import DataError
from common.files import one_line
from common.metric_catalogue import Logged
from common.run_folder import RunFolder
from deploy.evaluation.charts import Point, frontier_chart, running_mean
from deploy.evaluation.curves import Chart, Steps
from deploy.evaluation.intervals import best_of_n_kl

_LEAST = 3
"""Iterations that a line begins with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The best of `n` responses to a prompt."""

    n: int
    kl: float
    """To the policy that they are of, nats, where no two responses have one score."""
    score: float


def frontier(folder: RunFolder, steps: Steps, *, chosen: bool = False) -> Chart | None:
    """Draw mean score against mean KL by iteration; None where a run has too few, or no KL.

    Args:
        folder: the run's, whose first trajectories best-of-N is estimated on.
        steps: metrics of policy training.
        chosen: prompts were chosen by their scores, so that the best of their responses say nothing
            of the policy.
    """
    known = [m for m in steps.values() if Logged.SCORE in m and Logged.KL in m]
    known = [m for m in known if math.isfinite(m[Logged.SCORE]) and math.isfinite(m[Logged.KL])]
    if len(known) < _LEAST:
        return None
    means = [running_mean([m[name] for m in known]) for name in (Logged.KL, Logged.SCORE)]
    path = [Point(kl, score) for kl, score in zip(*means, strict=True)]
    if len(set(path)) < _LEAST:
        return None
    title, best = "Score against KL, nats", []
    if not chosen:
        try:
            best = best_of_first(folder)
        except DataError:  # a picture is no reason to end a run without its report
            title += "; the first trajectories cannot be read"
    if len(best) > 1:
        title += f"; dashed: best of 1 to {best[-1].n} of the first policy"
    marks = [Point(found.kl, found.score) for found in best]
    return Chart(title=title, svg=frontier_chart(title, path, marks if len(best) > 1 else []))


def best_of_first(folder: RunFolder) -> list[Best]:
    """Estimate best-of-N on the first iteration's responses; only N = 1 where each prompt has one.

    Raises:
        DataError: the log of the first trajectories is damaged.
    """
    path = folder.trajectories(0)
    if not path.exists():
        return []
    groups: defaultdict[int, list[float]] = defaultdict(list)
    try:
        table = pq.read_table(path, columns=["group", "score"])
        for group, score in zip(
            *(table[name].to_pylist() for name in table.column_names), strict=True
        ):
            groups[group].append(score)
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: damaged or no trajectory log ({one_line(error)})") from None
    smallest, found, n = min(map(len, groups.values()), default=0), [], 1
    while n <= smallest:
        scores = [mean_of_best(group, n) for group in groups.values()]
        found.append(Best(n=n, kl=best_of_n_kl(n), score=sum(scores) / len(scores)))
        n *= 2
    return found


def mean_of_best(scores: Sequence[float], n: int) -> float:
    """Return the mean of the best score over all choices of `n` of these, without bias.

    The i-th lowest of m is the best of C(i - 1, n - 1) of C(m, n) choices.

    Raises:
        ValueError: there are fewer than `n`.
    """
    if not 1 <= n <= len(scores):
        raise ValueError(f"the best {n} of {len(scores)} scores")
    every = math.comb(len(scores), n)
    ordered = sorted(scores)
    return sum(math.comb(i, n - 1) / every * score for i, score in enumerate(ordered))
