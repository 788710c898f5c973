from __future__ import annotations

import ast
import sys
import sysconfig
from itertools import pairwise
from pathlib import Path

import pytest

from common.errors import ConfigError
from deploy.quickstart.harvest import (
    MAX_FILE_BYTES,
    Pair,
    default_roots,
    fingerprint,
    harvest,
    prompt_text,
    split,
)

SOURCE = '''
import os
raise SystemExit("harvesting must never run this")

def area(radius: float, *, unit: str = "m") -> float:
    """Return the area
    of a circle.
    \t
    More about it.
    """

class Shape:
    """A shape."""
    if os.name == "nt":
        def close(self, *args, **kwargs):
            """Close the shape."""
    else:
        async def open(self, path=os.path.join("a", "b"), modes=[], very="x" * 40):
            """Open the shape."""

    @classmethod
    def of(cls, /, size=-1):
        """Make a shape of a size."""

def silent(): pass
def short(): "Too."
def long(): """%s"""
def markup(): """:param x: nothing"""
def symbols(): """=== *** === ***"""
def foreign(): """Schließt die Datei."""
def doctest(): """>>> doctest()"""
def test_area(): """Check the area of a circle."""
def number(): 3
''' % ("a" * 130)


OTHER = b'''
def area(radius, *, unit="m"):
    """Another text, earlier in order."""
'''


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    files = {
        "pkg/shapes.py": SOURCE.encode(),
        "pkg/copy_of_shapes.py": SOURCE.encode(),
        "pkg/other.py": OTHER,
        "pkg/python2.py": b'def f():\n    """Print a thing."""\n    print "x"\n',
        "pkg/bytes.py": b'"""\xff"""\0',
        "pkg/deep.py": b'x = """"""\ny = ' + b"(" * 5000,
        "pkg/escape.py": b'def g(x):\n    """Escape the x."""\n    return "\\d"\n',
        "pkg/huge.py": b'def h():\n    """Be in a huge file."""\n' + b"#" * MAX_FILE_BYTES,
        "pkg/tests/helper.py": b'def t():\n    """Help the tests run."""\n',
        "pkg/test_it.py": b'def t():\n    """Help the tests run."""\n',
        "pkg/conftest.py": b'def t():\n    """Help the tests run."""\n',
        "site-packages/x.py": b'def s():\n    """Be in another root."""\n',
        "learner/x.py": b'def own():\n    """Be of this project."""\n',
        "pkg/learner/x.py": b'def foreign_learner():\n    """Be of another project."""\n',
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "pkg" / "dangling.py").symlink_to(tmp_path / "absent.py")
    return tmp_path


def test_tree_gives_exactly_the_documented_functions(tree: Path) -> None:
    pairs = {pair.signature: pair for pair in harvest([tree])}
    assert {signature: pair.docstring for signature, pair in pairs.items()} == {
        "def area(radius, *, unit='m'):": "Another text, earlier in order.",
        "def close(self, *args, **kwargs):": "Close the shape.",
        "async def open(self, path=..., modes=[], very=...):": "Open the shape.",
        "def of(cls, /, size=-1):": "Make a shape of a size.",
        "def g(x):": "Escape the x.",
        "def foreign_learner():": "Be of another project.",
    }
    assert pairs["def close(self, *args, **kwargs):"].params == ("args", "kwargs")
    assert pairs["def of(cls, /, size=-1):"].params == ("size",)
    assert pairs["def area(radius, *, unit='m'):"].params == ("radius", "unit")


def test_first_paragraph_is_one_line(tree: Path) -> None:
    (tree / "pkg/other.py").unlink()
    (area,) = (pair for pair in harvest([tree]) if pair.name == "area")
    assert area.docstring == "Return the area of a circle."
    assert prompt_text(area) == 'def area(radius, *, unit=\'m\'):\n    """'


def test_order_of_roots_and_processes_do_not_matter(tree: Path) -> None:
    stdlib = Path(sysconfig.get_path("stdlib"))
    roots = [tree / "pkg", stdlib / "json", stdlib / "email"]
    one = harvest(roots, workers=1)
    assert harvest(roots[::-1], workers=1) == one
    assert len(one) > 100
    assert fingerprint(one) != fingerprint(one[1:])
    for pair in one:
        tree_of_pair = ast.parse(pair.signature + " ...")
        assert isinstance(tree_of_pair.body[0], ast.FunctionDef | ast.AsyncFunctionDef)


def test_worker_processes_find_the_same(tmp_path: Path) -> None:
    for i in range(320):  # enough files for the pool to be used
        text = f'def f{i}(x):\n    """Return the value number {i}."""\n'
        (tmp_path / f"m{i}.py").write_text(text)
    pairs = harvest([tmp_path], workers=2)
    assert len(pairs) == 320
    assert pairs == harvest([tmp_path], workers=1)


def test_harvest_imports_nothing() -> None:
    before = set(sys.modules)
    pairs = harvest([Path(sysconfig.get_path("stdlib")) / "wsgiref"], workers=1)
    assert len(pairs) > 20
    assert not {name for name in set(sys.modules) - before if name.startswith("wsgiref")}


def test_max_pairs_is_a_sample_that_more_pairs_contain(tree: Path) -> None:
    every = harvest([tree])
    samples = [harvest([tree], max_pairs=k) for k in range(1, 7)]
    for small, large in pairwise(samples):
        assert set(small) < set(large)
    assert samples[-1] == every and every == sorted(every)


def test_nothing_found_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no documented function under"):
        harvest([tmp_path])


def test_default_roots_are_this_python() -> None:
    roots = default_roots()
    assert len(roots) == len(set(roots)) >= 2
    assert any((root / "dataclasses.py").is_file() for root in roots)
    assert any((root / "pytest").is_dir() for root in roots)


def _pairs(names: list[str]) -> list[Pair]:
    return [
        Pair(name=name, params=(), signature=f"def {name}(a{i}):", docstring="Do the work.")
        for i, name in enumerate(names)
    ]


def test_split_keeps_names_apart_and_is_exact() -> None:
    pairs = _pairs([f"f{i // 3}" for i in range(300)] + ["__init__"] * 50 + ["g", "h"])
    train, held_out = split(pairs, 31, seed=0)
    assert len(held_out) == 31
    assert not {p.name for p in train} & {p.name for p in held_out}
    assert sorted([*train, *held_out]) == sorted(pairs)
    assert split(pairs[::-1], 31, seed=0)[1] == held_out[::-1]
    assert split(pairs, 31, seed=1)[1] != held_out
    assert split(pairs, 0, seed=0) == (pairs, [])


def test_split_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(ConfigError, match="held_out: 3 of 3 pairs"):
        split(_pairs(["a", "b", "c"]), 3, seed=0)
    with pytest.raises(ConfigError, match="held_out: 1 cannot be filled"):
        split(_pairs(["a", "a", "b", "b"]), 1, seed=0)
