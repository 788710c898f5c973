"""The JSON files of a checkpoint's folder, and what to do about a folder that is none."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from common.errors import CheckpointError
from common.files import one_line

CONFIG, GENERATION = "config.json", "generation_config.json"


def read_config(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's configuration.

    Raises:
        CheckpointError: there is none, or it is torn; or there is no such folder.
    """
    if not folder.is_dir():
        raise CheckpointError(_no_folder(str(folder)))
    config = read_json(folder / CONFIG)
    if config is None:
        raise CheckpointError(
            f"{folder}: no {CONFIG}; a checkpoint's folder holds {CONFIG}, safetensors and the "
            "tokenizer's files"
        )
    return config


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None where there is no such file."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not JSON ({one_line(error)}); bring it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object; bring it again")
    return value


def _no_folder(path: str) -> str:
    """Say what to do about a path that is no folder."""
    if Path(path).is_file():
        what = "a GGUF file" if path.endswith(".gguf") else "a file"
        return (
            f"{path}: {what}, not a checkpoint's folder; `talipot import {path} FOLDER` makes one "
            "of a GGUF file"
        )
    name = "/".join(Path(path).parts[-2:])  # a recipe's path may have been made absolute
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(path).parent.exists():
        return (
            f"{path}: no such folder; names of the Hub are not fetched: run `hf download {name} "
            "--local-dir FOLDER` on a machine with a connection and name that folder, or `talipot "
            f"import {name} FOLDER` where this machine's cache has it"
        )
    return f"{path}: no such checkpoint folder; check the path"
