"""The command's entrance. Its name is nobody else's, and it puts ours first.

Talipot's folders have common names (``common``, ``actors``, ...). A user's module of such a name,
on PYTHONPATH or in the working folder, comes before ours on Python's path; a finder for exactly
these names comes before the path. Everything else, reward functions too, is found as without it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

OURS = ("actors", "common", "deploy", "learner", "reward_service")
ROOT = str(Path(__file__).resolve().parent)


class OursFirst:
    """A finder of our five folders, which lie beside this file."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find one of ours; None for every other name."""
        return PathFinder.find_spec(name, [ROOT]) if name in OURS else None


def ours_first() -> None:
    """Put ours before everybody else's, in this process; Ray's workers call it at their start."""
    if OursFirst not in sys.meta_path:
        sys.meta_path.insert(0, OursFirst)


def strangers() -> list[str]:
    """List files and folders of others that workers would find instead of ours."""
    path = [str(Path.cwd()), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    others = []
    for name in OURS:
        spec = PathFinder.find_spec(name, path)
        places = (
            [] if spec is None else [spec.origin or "", *(spec.submodule_search_locations or [])]
        )
        others += [p for p in places if p and not str(Path(p).resolve()).startswith(ROOT + os.sep)]
    return others


def main() -> None:
    """Run the command."""
    ours_first()
    sys.path.append(str(Path.cwd()))  # a judge may lie in the working folder, as for workers
    from deploy.cli.main import main as command

    command()
