"""The folder of an existing run, and the recipe in it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from common.errors import DataError
from common.files import is_utf8
from common.run_folder import RunFolder


def folder_of(run: str | Path) -> Path:
    """Return a run's folder, absolute and by its own name.

    Raises:
        DataError: the path is not UTF-8, or there is no run.
    """
    folder = Path(os.path.expanduser(run))
    if not is_utf8(str(folder)):
        raise DataError(f"{folder}: the path is not UTF-8; rename the folder")
    if not RunFolder(folder).config.exists():
        raise DataError(f"{folder}: not a run (no config.yaml)")
    # Behind a link or `..` is a folder with another name, under which its run is known.
    if folder.is_symlink() or ".." in folder.parts:
        return folder.resolve()
    return folder.absolute()


def recipe_of(folder: Path) -> Path:
    """Return the path of a run's own recipe, which has every section of a recipe.

    Raises:
        DataError: sections are missing, because a writer was killed or the disk was full.
    """
    path = RunFolder(folder).config
    text = path.read_text(encoding="utf8", errors="replace")
    sections = set(re.findall(r"^(\w+):", text, re.MULTILINE))
    if not text.endswith("\n") or not sections >= {"name", "model", "data", "train", "cluster"}:
        raise DataError(
            f"{path}: empty or cut off; put the run's recipe back (a checkpoint's state.json holds "
            "it under 'config')"
        )
    return path
