"""Scorers that are not models: a Python function of the user's, and what all scorers share."""

from __future__ import annotations

import asyncio
import difflib
import importlib
import inspect
import math
import sysconfig
import traceback
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from common.errors import ConfigError, RewardError
from common.files import one_line
from reward_service.samples import Sample, Score


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreResult:
    """One score, or the reason why there is none."""

    rollout_id: str
    score: float | None
    """None = a dead letter: the scorer gave this response up. With rewards on tokens it is the
    whole response's, theirs included."""
    error: str | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    """As `Score.parts`."""
    tokens: tuple[float, ...] | None = None
    """As `Score.tokens`."""
    reason: str = ""
    """As `Score.reason`."""


class Scorer(Protocol):
    """Scores responses; results in the samples' order, one for each."""

    def score(self, samples: Sequence[Sample]) -> list[ScoreResult]:
        """Score a batch. Raises RewardError when the scorer itself is broken."""
        ...


class FunctionScorer:
    """``package.module:function``: ``f(samples)`` or ``f(prompts, responses)``, one value each.

    A function with one argument is given `Sample`s, one with two the texts alone. It may be async,
    and may return `Score`s in the place of numbers.
    """

    def __init__(
        self, target: str, *, role: str = "reward function", command: bool = False
    ) -> None:
        """Import the function.

        Args:
            target: ``package.module:function``.
            role: what errors call it.
            command: it runs in a command, where KeyboardInterrupt is the user's Ctrl-C and passes;
                in a worker it is an error of the user's code.

        Raises:
            ConfigError: the target cannot be imported.
        """
        self._title = f"{role} {target}"
        self._passes = KeyboardInterrupt if command else _Nothing
        self._function = _resolve(target, role, self._passes)

    def require_callable(self) -> None:
        """Raise RewardError where the function takes other arguments than it will be given."""
        arguments: tuple[list[Any], ...] = ([], [])
        try:
            function = inspect.signature(self._function)
            function.bind(*(arguments[:1] if _takes_samples(self._function) else arguments))
        except ValueError:
            pass  # a function written in C may not tell its arguments
        except TypeError as error:
            raise RewardError(
                f"{self._title} takes other arguments ({one_line(error)}); it is called as "
                "f(samples) or f(prompts, responses)"
            ) from None

    def score(self, samples: Sequence[Sample]) -> list[ScoreResult]:
        """Call the function once for the batch.

        Raises:
            RewardError: the function raised, or returned something else than one finite number or
                `Score` each; says which and where.
        """
        values = self._listed(self._call(samples), len(samples))
        return [self._result(*pair) for pair in zip(values, samples, strict=True)]

    def numbers(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Return one finite number per response, of texts of which no more is known.

        Raises:
            RewardError: as `score`; a response is called by its place.
        """
        texts = zip(prompts, responses, strict=True)
        samples = [Sample(prompt=prompt, response=response) for prompt, response in texts]
        values = self._listed(self._call(samples), len(samples))
        return [
            self._number(value.total if isinstance(value, Score) else value, f"response {index}")
            for index, value in enumerate(values, 1)
        ]

    def _result(self, value: Any, sample: Sample) -> ScoreResult:
        """Check what was returned for one response."""
        name = f"rollout {sample.rollout_id}"
        if not isinstance(value, Score):
            return ScoreResult(rollout_id=sample.rollout_id, score=self._number(value, name))
        tokens = value.tokens
        if tokens is not None:
            tokens = tuple(self._number(reward, f"a token of {name}") for reward in tokens)
            if len(tokens) != len(sample.tokens):
                raise RewardError(
                    f"{self._title} returned {len(tokens)} rewards for the "
                    f"{len(sample.tokens)} tokens of {name}; return one for each of sample.tokens"
                )
        return ScoreResult(
            rollout_id=sample.rollout_id,
            score=self._number(value.value, name) + sum(tokens or ()),
            parts={
                self._part(part, name): self._number(number, f"part '{part}' of {name}")
                for part, number in value.parts.items()
            },
            tokens=tokens,
            reason=value.reason,
        )

    def _call(self, samples: Sequence[Sample]) -> Any:
        """Call the user's code; of an iterator, take as many values as are needed to judge it.

        The user's code may raise anything, and in a worker all of it is an error of that code's:
        Ray would take SystemExit for a worker that ends as it was meant to, and start another one.
        """
        arguments: tuple[list[Any], ...] = (
            [sample.prompt for sample in samples],
            [sample.response for sample in samples],
        )
        if _takes_samples(self._function):
            arguments = (list(samples),)
        self.require_callable()
        try:
            returned = self._function(*arguments)
            if inspect.iscoroutine(returned):
                returned = asyncio.run(returned)
            if isinstance(returned, Iterator):
                return list(islice(returned, len(samples) + 1))
            whole = hasattr(returned, "tolist") and len(getattr(returned, "shape", ())) == 1
            return returned.tolist() if whole else returned
        except self._passes:
            raise
        except BaseException as error:
            raise RewardError(f"{self._title} raised {_raised(error)}") from error

    def _listed(self, returned: Any, count: int) -> list[Any]:
        """Return the values, one for each response."""
        wrong = _instead_of_values(returned)
        if not wrong:
            values = list(returned)
            if len(values) == count:
                return values
            wrong = f"{len(values)} scores"
        responses = "1 response" if count == 1 else f"{count} responses"
        raise RewardError(
            f"{self._title} returned {wrong} for {responses}; return a list of "
            f"{'1 number' if count == 1 else f'{count} numbers'}"
        )

    def _part(self, part: Any, name: str) -> str:
        """Check a part's name: metrics are called by it, and a slash groups metrics."""
        if isinstance(part, str) and part and part.isprintable() and "/" not in part:
            return part
        raise RewardError(
            f"{self._title} returned {one_line(repr(part))} as the name of a part of {name}; "
            "a name is a text of one line without a slash"
        )

    def _number(self, score: Any, name: str) -> float:
        try:
            value = math.nan if isinstance(score, str | bytes) or _shape(score) else float(score)
        except Exception:  # whatever its __float__ raises, it is not a number
            value = math.nan
        if not math.isfinite(value):
            raise RewardError(
                f"{self._title} returned {one_line(repr(score))} for {name}; "
                "a score is a finite number"
            )
        return value


class _Nothing(BaseException):
    """Never raised: no exception passes."""


def _instead_of_values(returned: Any) -> str:
    """Say what was returned, where that holds no number for each response; else empty."""
    kind = type(returned).__name__
    if inspect.isawaitable(returned):
        return f"a {kind} (wait for its result in the function)"
    if isinstance(returned, AsyncIterator):
        return f"an {kind} (take 'async' out of its definition)"
    if returned is None:
        return "None"
    if isinstance(returned, str | bytes | Mapping | Set):
        return f"a {kind}"
    if len(_shape(returned)) > 1:
        return f"a {kind} of shape {list(_shape(returned))}"
    if not isinstance(returned, Iterable) or (hasattr(returned, "shape") and not _shape(returned)):
        return f"one {kind}"
    return ""


def _shape(value: Any) -> tuple[int, ...]:
    """Return the shape of an array or a tensor; () for anything else."""
    shape = getattr(value, "shape", ())
    return tuple(shape) if isinstance(shape, tuple) else ()


def _raised(error: BaseException) -> str:
    """Put an exception of the user's code on one line, with the file and line of that code."""
    name, text = type(error).__name__, one_line(error)
    place = _place(traceback.extract_tb(error.__traceback__)[1:])  # the first frame is ours
    return f"{name}{'' if text == name else f': {text}'}{place}"


def _place(frames: Sequence[traceback.FrameSummary]) -> str:
    """Name the innermost frame of the user's own code, as `` (file:line)``.

    Frames of an installed package count where there are no others, Python's own never.
    """
    paths = sysconfig.get_paths()
    python = ("<frozen", paths["stdlib"], paths["platstdlib"])
    for known in ((*python, paths["purelib"], paths["platlib"]), python):
        if theirs := [frame for frame in frames if not frame.filename.startswith(known)]:
            return f" ({theirs[-1].filename}:{theirs[-1].lineno})"
    return ""


Function = Callable[..., Any]


def _takes_samples(function: Function) -> bool:
    """Whether exactly one argument has to be given."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in parameters if p.kind in positional and p.default is p.empty]
    return len(needed) == 1 and not any(p.kind is p.VAR_POSITIONAL for p in parameters)


def _resolve(target: str, role: str, passes: type[BaseException]) -> Function:
    """Import the function. Raises ConfigError naming the part that is missing."""
    module_name, colon, name = target.partition(":")
    if not colon or not module_name or not name:
        raise ConfigError(f"{role} '{target}': write it as package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{role} '{target}': {one_line(error)}") from None
    except passes:
        raise
    except BaseException as error:
        # The user's module may raise anything while it is imported, SystemExit included.
        raise ConfigError(
            f"{role} '{target}': importing {module_name} raised {_raised(error)}"
        ) from error
    function = getattr(module, name, None)
    if function is None:
        near = difflib.get_close_matches(name, dir(module), 1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ConfigError(f"{role} '{target}': {module_name} has no '{name}'{hint}")
    if not callable(function):
        raise ConfigError(f"{role} '{target}': '{name}' is not a function")
    return function  # type: ignore[no-any-return]
