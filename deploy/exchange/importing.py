"""`talipot import`: a checkpoint's folder from a GGUF file, the Hub's cache, or another folder."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from common.errors import CheckpointError, ConfigError
from common.models.pretrained.checkpoint import Checkpoint
from common.models.pretrained.checks import require_usable
from common.models.pretrained.config_files import read_config
from common.models.pretrained.text_part import open_text_part
from common.models.pretrained.writing import (
    DTYPES,
    copy_settings,
    write_json,
    write_weights,
    written_whole,
)
from common.out_of_memory import require_memory
from deploy.run_folder.fingerprints import fingerprint

RECORD = "talipot_import.json"
"""What an imported folder was made from."""
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What is imported."""

    given: str
    """As the user named it."""
    path: Path
    """A folder, or a GGUF file."""

    @property
    def files(self) -> Sequence[Path]:
        """All files that the import depends on."""
        if self.path.is_file():
            return [self.path]
        return [path for path in sorted(self.path.iterdir()) if path.is_file()]


def import_model(source: str, target: Path, precision: str | None) -> dict[str, Any]:
    """Make a checkpoint's folder; returns what it is.

    Args:
        source: a GGUF file, a folder, or a name in this machine's cache of the Hub.
        target: the folder to make; the same import again changes nothing.
        precision: number type of the weights, as `DTYPES`; None: what they are stored in, and fp32
            of a GGUF file, which keeps the dequantized values exactly.

    Raises:
        CheckpointError: the source is none, or is not supported.
        ClusterError: there is not enough memory.
        ConfigError: the target holds something else.
    """
    if precision is not None and precision not in DTYPES:
        raise ConfigError(f"--precision {precision}: should be {', '.join(DTYPES)}")
    target, found = target.expanduser().absolute(), find_source(source)
    record = _record(found, precision)
    if target.exists():
        _require_same(target, record)
    else:
        dtype = DTYPES[precision] if precision else None
        with written_whole(target) as folder:
            if found.path.is_file():
                _from_gguf(found.path, folder, dtype or torch.float32)
            else:
                _from_folder(found.path, folder, dtype)
            require_usable(Checkpoint.open(folder))
            write_json(folder / RECORD, record)
    made = Checkpoint.open(target)
    return {
        "family": made.family,
        "parameters": made.parameters,
        "number type": str(made.dtype).removeprefix("torch."),
        "source": found.path,
    }


def find_source(source: str) -> Source:
    """Find what a user named.

    Raises:
        CheckpointError: nothing of the name is here.
    """
    path = Path(source).expanduser()
    if path.is_dir() or path.suffix == ".gguf":
        if path.exists():
            return Source(given=source, path=path)
        raise CheckpointError(f"{source}: no such file; check the path")
    if path.exists():
        raise CheckpointError(f"{source}: neither a folder nor a GGUF file")
    if _HUB_NAME.fullmatch(source) and not source.startswith("."):
        return Source(given=source, path=_cached(source))
    raise CheckpointError(f"{source}: no such folder or GGUF file; check the path")


def _cached(name: str) -> Path:
    """Return the folder of a name in the cache of the Hub; nothing is fetched."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or no name at all
        raise CheckpointError(
            f"{name}: not in this machine's cache of the Hub, and nothing is fetched; run `hf "
            f"download {name} --local-dir FOLDER` on a machine with a connection and import that "
            "folder"
        ) from None


def _from_gguf(source: Path, folder: Path, dtype: torch.dtype) -> None:
    # The library takes seconds to import, which other imports do without.
    from common.models.pretrained.gguf import convert_gguf

    convert_gguf(source, folder, dtype)


def _from_folder(source: Path, folder: Path, dtype: torch.dtype | None) -> None:
    """Copy a checkpoint; of one that reads images too, the part that reads text."""
    part = open_text_part(source)
    checkpoint = part or _without_code(source)
    require_usable(checkpoint)
    copy_settings(checkpoint, folder, dtype)
    if part is None and dtype is None:
        for file in checkpoint.weight_files:
            shutil.copyfile(file, folder / file.name)
        return
    dtypes = {name: dtype or fact.dtype for name, fact in checkpoint.facts.items()}
    require_memory(
        checkpoint.parameters * checkpoint.dtype.itemsize,
        f"{source}: rewritten",
        "leave out --precision, or use another machine",
    )
    names = {name: name if part else fact.stored for name, fact in checkpoint.facts.items()}
    write_weights(
        {names[name]: tensor for name, tensor in checkpoint.tensors()},
        {names[name]: dtype for name, dtype in dtypes.items()},
        folder,
    )


def _without_code(source: Path) -> Checkpoint:
    """Read a checkpoint as the library's own code does, whatever code it brings."""
    config = read_config(source)
    return Checkpoint.of(source, {k: v for k, v in config.items() if k != "auto_map"})


def _record(source: Source, precision: str | None) -> dict[str, object]:
    """Return what an import depends on."""
    files = [asdict(fingerprint(path, path.name)) for path in source.files]
    return {"source": source.given, "precision": precision, "files": files}


def _require_same(target: Path, record: Mapping[str, object]) -> None:
    """Refuse a target that is not of the same import.

    Raises:
        ConfigError: it holds something else.
    """
    try:
        before = json.loads((target / RECORD).read_text(encoding="utf8"))
        same = all(before[key] == record[key] for key in ("precision", "files"))
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise ConfigError(f"{target}: exists and is not this import; name another folder")
