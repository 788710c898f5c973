"""The data that ships with every Python: functions and the first line of their docstrings.

Source files of the standard library and of the installed packages are parsed (`ast`), never
imported. The result depends on the contents of the files alone, not on the order in which a file
system lists them; `fingerprint` tells two environments apart.
"""

from __future__ import annotations

import ast
import multiprocessing
import os
import re
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Final

from common.errors import ConfigError

MAX_FILE_BYTES: Final = 400_000  # beyond it files are generated tables
MAX_SIGNATURE: Final = 100
MAX_DEFAULT: Final = 24  # a longer default value is written "..."
DOCSTRING_LENGTHS: Final = range(8, 121)
FILES_PER_TASK: Final = 32

OWN_PACKAGES: Final = frozenset(
    {"actors", "common", "deploy", "learner", "reward_service", "talipot", "tests"}
)
_SKIPPED_FOLDERS: Final = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "testing"}
)
_RECEIVERS: Final = frozenset({"self", "cls", "mcs", "mcls", "metacls"})
_MARKUP: Final = (">>>", "..", ":", "@", "#", "<", "|", "+-", "- ", "* ", "```", "%", "{", "$")

_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Pair:
    """A function's signature and what a person wrote about it.

    Example: `Pair(name="area", params=("radius",), signature="def area(radius):",
    docstring="Return the area of a circle.")`.
    """

    name: str
    """The function's name, without its class."""
    params: tuple[str, ...]
    """Names of the parameters without `self` and `cls`, without stars."""
    signature: str
    """One line, at most 100 characters, no annotations, ends in a colon."""
    docstring: str
    """First paragraph on one line, 8 ... 120 printable ASCII characters."""


def prompt_text(pair: Pair) -> str:
    """Return the prompt of a pair, which the policy continues with a docstring."""
    return f'{pair.signature}\n    """'


def fingerprint(pairs: Sequence[Pair]) -> str:
    """Return 32 hex digits that depend on the pairs and their order."""
    digest = blake2b(digest_size=16)
    for pair in pairs:
        digest.update(f"{pair.signature}\0{pair.docstring}\0".encode())
    return digest.hexdigest()


def harvest(
    roots: Sequence[Path] | None = None, max_pairs: int | None = None, workers: int = 2
) -> list[Pair]:
    """Collect the pairs under `roots`, sorted; by default all of this Python's packages.

    Files that cannot be read or parsed are passed over: there are a few in every environment and
    none of them is the user's. `max_pairs` keeps the pairs with the smallest hash, a fair sample.
    Where there are many files, `workers` processes are started by "spawn".

    Raises:
        ConfigError: there is no pair at all.
    """
    folders = default_roots() if roots is None else list(roots)
    files = [file for folder in folders for file in _python_files(folder)]
    tasks = [files[i : i + FILES_PER_TASK] for i in range(0, len(files), FILES_PER_TASK)]
    unique: set[Pair] = set()
    if workers > 1 and len(tasks) > 8:
        context = multiprocessing.get_context("spawn")  # fork is unsafe under Ray and torch
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            unique.update(pair for pairs in pool.map(_pairs_of_files, tasks) for pair in pairs)
    else:
        unique.update(pair for task in tasks for pair in _pairs_of_files(task))
    by_signature: dict[str, Pair] = {}
    for pair in sorted(unique):
        by_signature.setdefault(pair.signature, pair)
    pairs = sorted(by_signature.values())
    if not pairs:
        raise ConfigError(
            f"harvest: no documented function under {', '.join(map(str, folders))}; "
            "name folders with Python sources"
        )
    if max_pairs is not None and max_pairs < len(pairs):
        pairs = sorted(sorted(pairs, key=lambda pair: _hash(pair.signature))[:max_pairs])
    return pairs


def default_roots() -> list[Path]:
    """Return the folders of the standard library and of the installed packages."""
    names = ("stdlib", "purelib", "platlib")
    return [Path(path) for path in dict.fromkeys(sysconfig.get_path(name) for name in names)]


def split(pairs: Sequence[Pair], held_out: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Split into (train, `held_out` pairs); no function name is on both sides.

    Names are held out with all of their pairs, in the order of their hash, as long as they fit: a
    name with too many pairs (`__init__`) is passed over.

    Raises:
        ConfigError: `held_out` pairs cannot be taken, or nothing would be left to train on.
    """
    if not 0 <= held_out < len(pairs):
        raise ConfigError(
            f"held_out: {held_out} of {len(pairs)} pairs leaves nothing to train on; lower it"
        )
    counts: defaultdict[str, int] = defaultdict(int)
    for pair in pairs:
        counts[pair.name] += 1
    taken: set[str] = set()
    room = held_out
    for name in sorted(counts, key=lambda name: _hash(f"{seed}:{name}")):
        if counts[name] <= room:
            taken.add(name)
            room -= counts[name]
        if not room:
            break
    if room:
        raise ConfigError(f"held_out: {held_out} cannot be filled with whole names; lower it")
    train = [pair for pair in pairs if pair.name not in taken]
    return train, [pair for pair in pairs if pair.name in taken]


def _hash(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=8).digest()


def _python_files(root: Path) -> Iterator[str]:
    """List files under `root` that are worth parsing, sorted; unreadable folders are passed."""
    for folder, folders, files in os.walk(root):
        at_top = Path(folder) == root
        folders[:] = sorted(
            name
            for name in folders
            if name not in _SKIPPED_FOLDERS
            and not name.startswith("test_")
            and not (at_top and name in OWN_PACKAGES)
        )
        for name in sorted(files):
            is_test = name.startswith(("test_", "_test")) or name.endswith("_test.py")
            if name.endswith(".py") and not is_test and name != "conftest.py":
                yield os.path.join(folder, name)


def _pairs_of_files(paths: Sequence[str]) -> list[Pair]:
    """Collect the pairs of some files; called in a worker process."""
    return [pair for path in paths for pair in _pairs_of_file(path)]


def _pairs_of_file(path: str) -> Iterator[Pair]:
    try:
        if os.path.getsize(path) > MAX_FILE_BYTES:
            return
        raw = Path(path).read_bytes()
    except OSError:  # a dangling link, no right to read: not the user's file
        return
    if b'"""' not in raw and b"'''" not in raw:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(raw)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # Python 2, torn, too deep
        return
    for function in _functions(tree):
        if pair := _pair(function):
            yield pair


def _functions(node: ast.AST) -> Iterator[_Function]:
    """Functions of a module and methods of its classes, also under if, try and with.

    Goes through statements only: walking every expression would take twice as long.
    """
    for field in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, field, ()):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield child
            elif isinstance(child, ast.ClassDef | ast.If | ast.Try | ast.With | ast.ExceptHandler):
                yield from _functions(child)


def _pair(function: _Function) -> Pair | None:
    # Linters exempt test functions from the mood of the verb: they cannot be judged.
    if function.name.startswith(("test", "runTest")) or not function.name.isascii():
        return None
    docstring = _first_paragraph(function)
    signature = _signature(function)
    if docstring is None or signature is None:
        return None
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, arguments.vararg, *arguments.kwonlyargs]
    names = [argument.arg for argument in (*every, arguments.kwarg) if argument is not None]
    params = tuple(name for i, name in enumerate(names) if i or name not in _RECEIVERS)
    return Pair(name=function.name, params=params, signature=signature, docstring=docstring)


def _signature(function: _Function) -> str | None:
    arguments = function.args
    every = (*arguments.posonlyargs, *arguments.args, arguments.vararg, *arguments.kwonlyargs)
    for argument in (*every, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    arguments.defaults = [_short(value) for value in arguments.defaults]
    arguments.kw_defaults = [value and _short(value) for value in arguments.kw_defaults]
    word = "async def" if isinstance(function, ast.AsyncFunctionDef) else "def"
    text = f"{word} {function.name}({ast.unparse(arguments)}):"
    return text if len(text) <= MAX_SIGNATURE and text.isascii() and text.isprintable() else None


def _short(value: ast.expr) -> ast.expr:
    if isinstance(value, ast.Constant | ast.Name | ast.Attribute | ast.UnaryOp):
        if len(ast.unparse(value)) <= MAX_DEFAULT:
            return value
    elif isinstance(value, ast.List | ast.Tuple | ast.Dict) and len(ast.unparse(value)) <= 2:
        return value
    return ast.Constant(value=...)


def _first_paragraph(function: _Function) -> str | None:
    first = function.body[0]
    if not (isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)):
        return None
    text = first.value.value
    if not isinstance(text, str):
        return None
    line = " ".join(re.split(r"\n\s*\n", text.strip(), maxsplit=1)[0].split())
    if len(line) not in DOCSTRING_LENGTHS or not (line.isascii() and line.isprintable()):
        return None
    letters = sum(c.isalpha() or c == " " for c in line)
    if line.startswith(_MARKUP) or ">>>" in line or letters < 0.6 * len(line):
        return None
    return line
