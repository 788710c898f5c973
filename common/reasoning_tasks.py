"""Tasks of the library `reasoning-gym` as if they were files: made when they are read, by seed.

    reasoning_gym:chain_sum?size=2000&seed=1&max_terms=3
                  family    ours: size, seed, chat, system; the others are the library's own

Its generators make questions of which a program knows whether an answer is right. A name as above
stands wherever a recipe names a file; its lines are prompts, demonstrations (`response`) and what a
scorer needs (`source`, `task`, `index`, `answer`). The package is an extra: ``talipot[reasoning]``.

The library takes the seed of task number i to be ``seed + i``, so data of neighbouring seeds is
nearly the same data. Ours are drawn apart: two seeds share a question by chance only.

Who verifies makes the task again from its name and number, wherever it runs, and compares its
question with the prompt's (`question`, a digest): another version of the library may make others.
"""

from __future__ import annotations

import difflib
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, fields
from enum import Enum
from functools import lru_cache
from hashlib import blake2b
from typing import Any, ClassVar, Final
from urllib.parse import parse_qsl, quote, urlencode

from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import fs

from common.errors import DataError
from common.randomness import derive_seed

SCHEME: Final = "reasoning_gym:"
SYSTEM: Final = "Answer between <answer> and </answer>."
"""What a system message asks for: the form that the library's `extract_answer` reads."""
SIZE: Final = 1000
COLUMNS: Final = ("task", "index", "question")
"""What a scorer needs of a line to verify an answer."""
_MOST: Final = 10_000_000
_UNSTEADY: Final = frozenset(
    {
        *("isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note"),
        "word_ladder",
    }
)
"""Families whose questions follow Python's hash seed, so each process makes others (0.1.25)."""
_OURS: Final = ("size", "seed", "chat", "system")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Name:
    """A name, taken apart."""

    family: str
    size: int
    seed: int
    chat: bool
    system: str
    options: tuple[tuple[str, Any], ...]
    """Of the library's own configuration of the family, which are not its defaults."""


def is_task(path: str) -> bool:
    """Whether a path is the name of tasks, and no file's."""
    return path.startswith(SCHEME)


def family_of(path: str) -> str:
    """Return the family that a name is of: ``chain_sum``."""
    return path.removeprefix(SCHEME).partition("?")[0]


def name_of(family: str, options: Mapping[str, Any]) -> str:
    """Write a name. Values are written as JSON, texts as they are."""
    values = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in options.items()
        if value is not None
    }
    return f"{SCHEME}{family}" + (f"?{urlencode(values, quote_via=quote)}" if values else "")


def file_of(path: str) -> tuple[fs.FileSystem, str]:
    """Return a name's tasks as a file of JSON lines in memory, with the file system that it is in.

    Raises:
        DataError: as `require`; the library cannot make its tasks.
    """
    memory = _Tasks()
    inner = f"/{quote(path, safe='')}.jsonl"
    if not memory.exists(inner):
        memory.pipe_file(inner, b"".join(_lines(path)))
    return fs.PyFileSystem(fs.FSSpecHandler(memory)), inner


class _Tasks(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Files of tasks; each reader has a position of its own, which a `MemoryFileSystem` shares."""

    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode != "rb":
            return super()._open(path, mode, **options)
        return io.BytesIO(self.store[self._strip_protocol(path)].getvalue())


def require(path: str) -> None:
    """Check a name, without making a task.

    Raises:
        DataError: the package is not installed, there is no such family or option, a value of one
            is none that the family takes, or its questions differ from process to process.
    """
    _dataset(path)


def verified(path: str, index: int, question: str, response: str) -> tuple[bool, float]:
    """Ask the library about a response to one task.

    What some families do with an answer has no bounds, `eval` among it (``string_insertion``), so
    what a policy wrote is verified in processes of its own (``isolation: process``).

    Args:
        path: the name that the task is of.
        index: its number there, from 0.
        question: the digest that its line has under this name.
        response: all that was said.

    Returns:
        Whether there is an answer in the expected form, and the library's score of it, from 0 to 1:
        1 is right, and what some families give to an answer that is near lies between. Without an
        answer it is 0, and likewise where an answer makes the library's own code fail.

    Raises:
        DataError: as `file_of`; there is no task of this number, or it asks something else.
    """
    from reasoning_gym.utils import extract_answer

    dataset = _dataset(path)
    if not 0 <= index < len(dataset):
        raise DataError(f"{path}: has no task {index}; it has {len(dataset)}")
    entry = _entry(path, index)
    if _digest(entry) != question:
        raise DataError(
            f"{path}: task {index} asks something else here than where its prompt was made; "
            "install the same version of reasoning-gym everywhere"
        )
    answer = extract_answer(response)
    if answer is None:
        return False, 0.0
    try:
        return True, float(dataset.score_answer(answer, entry=entry))
    except Exception:  # of 106 families some fail on what is no answer: "abc" for prime factors
        return True, 0.0


def _lines(path: str) -> Iterator[bytes]:
    name, dataset = _parsed(path), _dataset(path)
    for index in range(len(dataset)):
        entry = _entry(path, index)
        system = [{"role": "system", "content": name.system}] if name.system else []
        asked: dict[str, Any] = (
            {"messages": [*system, {"role": "user", "content": entry["question"]}]}
            if name.chat
            else {"prompt": f"{entry['question']}\n"}
        )
        # Some families can tell whether an answer is right, and give none of their own.
        answer = None if entry["answer"] is None else str(entry["answer"])
        shown = {} if answer is None else {"response": f"<answer>{answer}</answer>"}
        facts = {
            "source": name.family,
            "task": path,
            "index": index,
            "question": _digest(entry),
            "answer": answer,
        }
        row = asked | shown | facts
        yield json.dumps(row, ensure_ascii=False).encode() + b"\n"


@lru_cache(maxsize=65_536)
def _entry(path: str, index: int) -> Any:
    """Make one task; its metadata is what the library asks for to score an answer."""
    with _refusing(path):
        return _dataset(path)[index]


def _digest(entry: Mapping[str, Any]) -> str:
    return blake2b(str(entry["question"]).encode(), digest_size=8).hexdigest()


@contextmanager
def _refusing(path: str) -> Iterator[None]:
    """Raise whatever the library raises of a name's options as a DataError."""
    try:
        yield
    except Exception as error:
        wrong = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path}: the library refuses these options ({wrong}); change them"
        ) from None


@lru_cache(maxsize=256)
def _dataset(path: str) -> Any:
    """Return the library's generator."""
    name = _parsed(path)
    generator, config = _families(path)[name.family]
    seed = derive_seed(name.seed, SCHEME, name.family) >> 33  # any generator takes 31 bits
    with _refusing(path):
        made = config(**dict(name.options), seed=seed, size=name.size)
        if hasattr(made, "validate"):  # two families have none
            made.validate()
        return generator(config=made)


@lru_cache(maxsize=256)
def _parsed(path: str) -> _Name:
    family = family_of(path)
    families = _families(path)
    if family not in families:
        near = difflib.get_close_matches(family, families, 1)
        hint = f"did you mean '{near[0]}'?" if near else "its documentation shows all of them"
        raise DataError(f"{path}: reasoning-gym has no family '{family}'; {hint}")
    if family in _UNSTEADY:
        raise DataError(
            f"{path}: the questions of '{family}' differ from process to process, so no answer "
            "could be verified elsewhere; take another family"
        )
    own = {field.name: field for field in fields(families[family][1])}
    given: dict[str, Any] = {}
    for key, text in parse_qsl(path.partition("?")[2], keep_blank_values=True):
        if key not in own and key not in _OURS:
            known = sorted({*own, *_OURS})
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}"
            raise DataError(f"{path}: {family} has no option '{key}'; {hint}")
        if key in given:
            raise DataError(f"{path}: option '{key}' is there twice; keep one of them")
        given[key] = text if key == "system" else _value(text)
    for key, kind in (("size", int), ("seed", int), ("chat", bool)):
        if type(given.get(key, kind())) is not kind:
            raise DataError(
                f"{path}: option '{key}' is '{given[key]}'; write "
                + ("true or false" if kind is bool else "a whole number")
            )
    size, seed = given.pop("size", SIZE), given.pop("seed", 0)
    if not 1 <= size <= _MOST or seed < 0:
        raise DataError(f"{path}: write a size from 1 to {_MOST} and a seed from 0 on")
    return _Name(
        family=family,
        size=size,
        seed=seed,
        chat=given.pop("chat", True),
        system=given.pop("system", SYSTEM),
        options=tuple(
            (key, _as_field(value, _default(own[key]), path, key)) for key, value in given.items()
        ),
    )


def _value(text: str) -> Any:
    """Read a value: JSON, or a text as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _default(field: Field[Any]) -> Any:
    """Return a field's default; None where it has none that tells its kind."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default


def _as_field(value: Any, default: Any, path: str, key: str) -> Any:
    """Require the kind that the family's default has; the library checks no kinds itself."""
    shown = default.value if isinstance(default, Enum) else default
    if isinstance(default, Enum) and value in [member.value for member in type(default)]:
        return type(default)(value)
    if isinstance(value, list) and isinstance(default, tuple):
        return tuple(value)
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if default is None or type(value) is type(default):
        return value
    raise DataError(
        f"{path}: option '{key}' is {json.dumps(value)}; write a value like its default, "
        f"{json.dumps(shown, default=str)}"
    )


@lru_cache(maxsize=1)
def _imported() -> Mapping[str, tuple[Any, Any]]:
    import reasoning_gym  # noqa: F401  (registers its families)
    from reasoning_gym.factory import DATASETS

    families: Mapping[str, tuple[Any, Any]] = DATASETS
    return families


def _families(path: str) -> Mapping[str, tuple[Any, Any]]:
    """Return the library's families, by name: generator and configuration."""
    try:
        return _imported()
    except ModuleNotFoundError as error:
        raise DataError(
            f"{path}: needs the package reasoning-gym ({error.name} is not installed); run "
            "`pip install 'talipot[reasoning]'`"
        ) from None
