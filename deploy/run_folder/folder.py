"""The folder of an existing run, and the recipe in it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from common.config.recipe import load_config
from common.config.run import RunConfig
from common.errors import DataError
from common.files import is_utf8
from common.run_folder import RunFolder
from deploy.run_folder.paths import rebased


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


def config_of(
    run: str | Path,
    overrides: Sequence[str] = (),
    given: Mapping[str, str] = MappingProxyType({}),
) -> RunConfig:
    """Load a run's own recipe, wherever its folder is now and whatever that is called.

    `overrides` and `given` are those of `load_config`.

    Raises:
        DataError: there is no run, or its recipe is cut off.
        ConfigError: an override that cannot be applied.
    """
    folder = folder_of(run)
    path = _whole_recipe(folder)
    recorded = load_config(path, saved=True)
    was = {"output": recorded.output, "name": recorded.name}
    return rebased(load_config(path, overrides, {**given, **was}, saved=True), folder)


def _whole_recipe(folder: Path) -> Path:
    """Return the path of a run's recipe; raise DataError where a section is missing.

    A saved recipe has every section; one without was cut off by a kill or a full disk.
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
