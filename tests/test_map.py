"""The map of the source: a line for every file, and none for a file that is gone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.test_imports import MAY_IMPORT

ROOT = Path(__file__).resolve().parents[1]
MAP = ROOT / "docs" / "map.md"
LINE = re.compile(r"^- \[`([\w/.-]+)`\]\(\.\./([\w/.-]+)\): (.+)$")
QUESTIONS = ("reward", "algorithm", "architecture", "engine", "metric", "command")


def sources() -> set[str]:
    """Files of ours that a reader may look for: all but caches and empty `__init__.py`."""
    files = [path for package in MAY_IMPORT for path in (ROOT / package).rglob("*")]
    named = {
        str(path.relative_to(ROOT))
        for path in files
        if path.is_file() and path.name != "__init__.py" and "__pycache__" not in path.parts
    }
    return named | {"talipot.py", "talipot_first.py"}


def listed(text: str) -> list[tuple[str, str]]:
    """The map's lines: file and what it is for."""
    lines = [LINE.match(line) for line in text.splitlines() if line.startswith("- ")]
    assert all(lines), "a line of the map reads: - [`a/b.py`](../a/b.py): what it is for."
    for line in lines:
        assert line is not None
        assert line[1] == line[2], f"{line[1]} links to {line[2]}"
    return [(line[2], line[3]) for line in lines if line]


def differences(text: str, files: set[str]) -> list[str]:
    """What to do to a map so that it holds these files."""
    names = [name for name, _ in listed(text)]
    missing = [
        f"docs/map.md: add where a prompt comes by: - [`{name}`](../{name}): what it is for."
        for name in sorted(files - set(names))
    ]
    gone = [
        f"docs/map.md: take {name} out: there is no such file"
        for name in sorted(set(names) - files)
    ]
    twice = [
        f"docs/map.md: {name} is there twice"
        for name in sorted(set(names))
        if names.count(name) > 1
    ]
    return missing + gone + twice


def test_every_file_has_one_line() -> None:
    found = differences(MAP.read_text(encoding="utf8"), sources())
    assert not found, "\n" + "\n".join(found)


def test_a_line_says_what_a_file_is_for_in_few_words() -> None:
    for name, purpose in listed(MAP.read_text(encoding="utf8")):
        assert len(purpose.split()) <= 16, f"{name}: {purpose}"


@pytest.mark.parametrize("question", QUESTIONS)
def test_where_to_add_is_one_link(question: str) -> None:
    rows = re.findall(
        rf"^\| an? (?:[\w' ]*\b)?{question}\b[^|]*\| \[[^\]]+\]\(([^)#]+)[^|]*\|",
        MAP.read_text(encoding="utf8"),
        re.MULTILINE,
    )
    assert rows, (
        f"docs/map.md: `Where do I add` has no row for a {question} that begins with a link"
    )
    assert all((MAP.parent / link).exists() for link in rows)


def test_what_is_wrong_is_said() -> None:
    text = "- [`a.py`](../a.py): first.\n- [`b.py`](../b.py): second.\n- [`b.py`](../b.py): again."
    assert differences(text, {"a.py", "c.py"}) == [
        "docs/map.md: add where a prompt comes by: - [`c.py`](../c.py): what it is for.",
        "docs/map.md: take b.py out: there is no such file",
        "docs/map.md: b.py is there twice",
    ]
