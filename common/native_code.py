"""C compiled for this machine's processor, once, and kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common.errors import ClusterError


def shared_library(
    purpose: str, main: Path, flags: Sequence[str], included: Sequence[Path] = ()
) -> Path:
    """Return the shared library of a C file, compiled by gcc (or `CC`) at the first call.

    Args:
        purpose: what errors call it, in the plural.
        main: the C file.
        flags: of the compiler, beside the common ones.
        included: the files that `main` includes; a change in them makes another library.

    Raises:
        ClusterError: there is no C compiler, or it fails, or the folder cannot be written.
    """
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    if compiler is None:
        raise ClusterError(f"{purpose} need a C compiler: install gcc")
    flags = ["-O3", "-march=native", "-shared", "-fPIC", *flags]
    sources = [path.read_text(encoding="utf8") for path in (main, *included)]
    key = hashlib.sha256(
        "\n".join([*sources, _processor(), compiler, *flags]).encode()
    ).hexdigest()[:24]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "talipot"
    target = cache / f"{main.stem}-{key}.so"
    if not target.exists():
        try:
            _compile(purpose, [compiler, *flags, str(main), "-lm"], target)
        except OSError as error:
            raise ClusterError(f"{purpose} cannot be kept in {cache}: {error}") from None
    return target


def _compile(purpose: str, command: Sequence[str], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # Workers start together: each compiles for itself, and the renames are of equal files.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        process = subprocess.run([*command, "-o", str(built)], capture_output=True, text=True)
        if process.returncode:
            reason = "".join(process.stderr.strip().splitlines()[-1:])
            raise ClusterError(f"{command[0]} cannot compile the {purpose}: {reason}")
        built.replace(target)


def _processor() -> str:
    """Describe what -march=native depends on."""
    info = Path("/proc/cpuinfo")
    flags = (
        info.read_text(encoding="utf8").split("flags", 1)[-1].split("\n", 1)[0]
        if info.exists()
        else ""
    )
    return platform.machine() + flags
