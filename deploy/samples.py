"""What a run was trained on, response by response and token by token, out of its trajectory log.

Needs the run's folder alone: no cluster, no weights.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from common.config.run import RunConfig
from common.data.tokenizer import Tokenizer
from common.errors import ConfigError, DataError
from common.wire.trajectory import LEARNT
from deploy.screen import Part
from learner.batch.trajectory_log import logged_iterations, read_learnt

_CUT: Final = "\ufffd"
"""What a tokenizer writes in place of a character of which bytes are missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token of a response; None where the log says nothing of it."""

    text: str
    """What it adds to the text; the name of a token that adds nothing, as EOS."""
    behavior_logprob: float
    """By the engine that sampled it."""
    learner_logprob: float | None
    """By the learner, before its first step."""
    ref_logprob: float
    """By the reference policy, without a filter."""
    reward: float | None
    """Score and KL penalty."""
    kl_penalty: float | None
    """The penalty in the reward."""
    value: float | None
    """By the value function, of the state that it was sampled in."""
    advantage: float | None
    """As the policy's objective takes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One response that was trained on."""

    iteration: int
    rollout_id: str
    prompt: str
    response: str
    score: float
    components: Mapping[str, float]
    reason: str
    """Of the score, in the components' own words; often empty."""
    source: str
    kl: float
    """To the reference, in nats."""
    length: int
    """Tokens of the response."""
    finish_reason: str
    policy_version: int
    tokens: tuple[Token, ...]
    """Empty where they were not asked for."""


def _kl(row: Mapping[str, Any]) -> float:
    own = row["unfiltered_logprobs"] or row["behavior_logprobs"]
    return float(sum(own) - sum(row["ref_logprobs"]))


class LoggedIteration:
    """The responses of one iteration."""

    def __init__(self, run_dir: Path, iteration: int, table: pa.Table) -> None:
        self.iteration = iteration
        self._run_dir, self._table = run_dir, table

    @property
    def lengths(self) -> list[int]:
        """Tokens of each response."""
        found: list[int] = pc.list_value_length(self._table["response_ids"]).to_pylist()
        return found

    @property
    def scores(self) -> list[float]:
        """Of each response."""
        found: list[float] = self._table["score"].to_pylist()
        return found

    def samples(
        self,
        *,
        order: str = "random",
        number: int = 4,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
    ) -> list[Sample]:
        """Choose some.

        Args:
            order: which come first, one of `ORDERS`.
            number: how many.
            seed: of the order `random`.
            tokenizer: the run's, to show their tokens too.

        Raises:
            ConfigError: no such order.
        """
        if order not in ORDERS:
            near = get_close_matches(order, ORDERS, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"--order {order}: there are {', '.join(ORDERS)}{meant}")
        places = list(range(len(self._table)))
        if order == "random":
            places = random.Random(seed).sample(places, min(number, len(places)))
        elif by := ORDERS[order]:
            keys = by(self)
            places.sort(key=lambda place: keys[place])
        return self._taken(places[:number], tokenizer)

    def sample(self, rollout_id: str, tokenizer: Tokenizer | None = None) -> Sample:
        """Return one by its name. Raises DataError where there is none of it."""
        place = pc.index(self._table["rollout_id"], rollout_id).as_py()
        if place < 0:
            raise DataError(
                f"{self._run_dir}: iteration {self.iteration} has no rollout '{rollout_id}'"
            )
        return self._taken([place], tokenizer)[0]

    def kl(self) -> list[float]:
        """Return the KL of each response to the reference, in nats."""
        names = ["unfiltered_logprobs", "behavior_logprobs", "ref_logprobs"]
        return [_kl(row) for row in self._table.select(names).to_pylist()]

    def _taken(self, places: Sequence[int], tokenizer: Tokenizer | None) -> list[Sample]:
        rows = self._table.take(pa.array(places, pa.int64())).to_pylist()
        return [_sample(row, tokenizer) for row in rows]


def _falling(values: Sequence[float]) -> list[float]:
    return [-value for value in values]


ORDERS: Final[Mapping[str, Callable[[LoggedIteration], Sequence[float]] | None]] = {
    "best": lambda logged: _falling(logged.scores),
    "worst": lambda logged: logged.scores,
    "kl": lambda logged: _falling(logged.kl()),
    "longest": lambda logged: _falling(logged.lengths),
    "first": None,
    "random": None,
}
"""What comes first: the smallest of what is given for each response."""


def read_iteration(config: RunConfig, iteration: int | None = None) -> LoggedIteration:
    """Read an iteration's responses; None: of the newest that is logged.

    Raises:
        DataError: nothing is logged, not this iteration, or the file is damaged.
    """
    there = logged_iterations(config.run_dir)
    if not there:
        raise DataError(f"{config.run_dir}: no trajectory is logged; `talipot train` writes them")
    if iteration is not None and iteration not in there:
        raise DataError(
            f"{config.run_dir}: iteration {iteration} is not logged; there are {len(there)}, "
            f"from {there[0]} to {there[-1]}"
        )
    number = there[-1] if iteration is None else iteration
    return LoggedIteration(config.run_dir, number, read_learnt(config.run_dir, number)[0])


def iteration_of(rollout_id: str) -> int:
    """Return the iteration that a rollout's name begins with. Raises DataError: it is no name."""
    number = rollout_id.partition("-")[0]
    if not number.isdecimal():
        raise DataError(
            f"'{rollout_id}' names no rollout: a name is ITERATION-NUMBER, such as 000003-000012"
        )
    return int(number)


def _sample(row: Mapping[str, Any], tokenizer: Tokenizer | None) -> Sample:
    return Sample(
        iteration=row["iteration"],
        rollout_id=row["rollout_id"],
        prompt=row["prompt_text"],
        response=row["response_text"],
        score=row["score"],
        components=dict(row["score_components"] or ()),
        reason=row["score_reason"] or "",
        source=row["source"] or "",
        kl=_kl(row),
        length=len(row["response_ids"]),
        finish_reason=row["finish_reason"],
        policy_version=row["policy_version"],
        tokens=() if tokenizer is None else tuple(_tokens(row, tokenizer)),
    )


def _tokens(row: Mapping[str, Any], tokenizer: Tokenizer) -> list[Token]:
    ids = row["response_ids"]
    learnt = {
        field.name: [None] * len(ids) if row[field.name] is None else row[field.name]
        for field in LEARNT
    }
    return [
        Token(
            text=text,
            behavior_logprob=row["behavior_logprobs"][t],
            learner_logprob=learnt["learner_logprobs"][t],
            ref_logprob=row["ref_logprobs"][t],
            reward=learnt["rewards"][t],
            kl_penalty=learnt["kl_penalties"][t],
            value=learnt["values"][t],
            advantage=learnt["advantages"][t],
        )
        for t, text in enumerate(pieces(ids, tokenizer))
    ]


def pieces(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Return what each token adds to the text; together they are the text, and names of controls.

    A character of several tokens is added by its last one. A token that adds nothing, as EOS, is
    called by its name in the tokenizer's file.
    """
    found: list[str] = []
    before, since = 0, 0
    # A token's text may depend on the one before it, and on no earlier one: what is decoded again
    # begins there.
    for t, place in enumerate(ids):
        known, text = tokenizer.decode(ids[before:since]), tokenizer.decode(ids[before : t + 1])
        if text.endswith(_CUT) and t + 1 < len(ids):
            found.append("")
            continue
        found.append(text[len(known) :] or tokenizer.spelling(place))
        before, since = since, t + 1
    return found


# ------------------------------------------------------------------ for people

COLUMNS: Final = ("token", "engine", "learner", "reference", "reward", "value", "advantage")
"""Of the table of a sample's tokens."""


def head_of(sample: Sample) -> list[Part]:
    """Say in a line what a sample is."""
    components = ", ".join(f"{name} {value:.3g}" for name, value in sample.components.items())
    several = f" ({components})" if len(sample.components) > 1 else ""
    facts = [
        f"score {sample.score:.3g}{several}",
        f"KL {sample.kl:.2f}",
        f"{sample.length} tokens",
        f"ended by {sample.finish_reason}",
        *([sample.source] if sample.source else []),
        *([sample.reason] if sample.reason else []),
    ]
    return [(f"{sample.rollout_id}  ", "bold"), " · ".join(facts)]


def rows_of(sample: Sample) -> list[list[str]]:
    """Return a sample's tokens as rows of `COLUMNS`; what is not known stays empty."""
    return [
        [
            repr(token.text),
            *(
                "" if number is None else f"{number:.3f}"
                for number in (
                    token.behavior_logprob,
                    token.learner_logprob,
                    token.ref_logprob,
                    token.reward,
                    token.value,
                    token.advantage,
                )
            ),
        ]
        for token in sample.tokens
    ]
