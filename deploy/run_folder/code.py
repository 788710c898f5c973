"""The user's reward functions as a run used them, copied into its folder for whoever gets it."""

from __future__ import annotations

import shutil
from pathlib import Path

from common.run_folder import RunFolder
from deploy.run_folder.reads import FUNCTION, Reads
from talipot_first import OURS


def keep_functions(folder: RunFolder, reads: Reads) -> None:
    """Copy the source of each reward function that a stage reads into ``code/``.

    A module ``a.b`` lies in ``a/b.py``, so the folder can be put on Python's path as it is. The
    copy is for people: a run imports what is on the path, and its fingerprint is in ``run.json``.

    Raises:
        OSError: nothing can be written there.
    """
    for name, paths in reads.items():
        module = name.removeprefix(FUNCTION).partition(":")[0].split(".")
        if not name.startswith(FUNCTION) or module[0] in OURS:
            continue
        for source in map(Path, paths):
            package = [source.stem] if source.stem == "__init__" else []
            target = folder.code.joinpath(*module, *package).with_suffix(".py")
            if target.exists() and target.samefile(source):
                continue  # the run goes on by its own copy
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
