"""The tree of exceptions at the head of `common.errors` is whole."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from common import errors

ROOT = Path(__file__).resolve().parents[2]


def test_every_error_of_ours_is_in_the_tree_with_its_exit_code() -> None:
    drawn = dict(re.findall(r"(\w+) +(\d+)", errors.__doc__ or ""))
    found = {"TalipotError": "1"}
    classes = [
        (node.name, ast.unparse(base))
        for package in ("actors", "common", "deploy", "learner", "reward_service")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf8")))
        if isinstance(node, ast.ClassDef)
        for base in node.bases
    ]
    while new := {name: base for name, base in classes if base in found and name not in found}:
        for name, base in new.items():
            own = getattr(errors, name, None)
            found[name] = str(own.exit_code) if own else found[base]
    assert drawn == found
