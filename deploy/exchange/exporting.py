"""`talipot export`: a run's policy, final or from any checkpoint, in the form that is asked for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from common.config.run import RunConfig
from common.errors import ConfigError
from common.models.pretrained.checkpoint import Checkpoint
from common.models.pretrained.writing import (
    CARD,
    DTYPES,
    SCALAR_HEAD,
    VALUE_HEAD,
    write_like,
    written_whole,
)
from common.run_folder import PolicyFolder
from deploy.exchange.card import write_card
from deploy.exchange.policies import write_policy
from deploy.run_folder.weights import policy_start

FORMS = ("folder", "merged", "adapter")


def export_run(
    config: RunConfig, target: Path, checkpoint: str | None, form: str, precision: str | None
) -> dict[str, Any]:
    """Write a policy of a run; returns what was written.

    Args:
        config: the run's.
        target: the folder to make.
        checkpoint: its word (`deploy.exchange.policies`).
        form: folder, as the run's own ``policy/``: all weights, and of adapters the adapter beside;
            merged, all weights alone; adapter, the adapter alone.
        precision: number type of the weights; None: the checkpoint's own.

    Raises:
        ConfigError: the target exists, or the run cannot give that form.
        CheckpointError: no such checkpoint, or a damaged one.
        DataError: the run has not finished.
    """
    target = target.expanduser().absolute()
    _require_possible(config, target, form, precision)
    with written_whole(target) as folder:
        whole = folder / ".whole"
        chosen = write_policy(config, checkpoint, whole)
        if precision is not None:
            _convert(whole, DTYPES[precision])
        adapter = PolicyFolder(whole).adapter
        if form == "adapter":
            whole = adapter
        elif form == "merged" and adapter.exists():
            shutil.rmtree(adapter)
        for path in whole.iterdir():
            path.rename(folder / path.name)
        shutil.rmtree(folder / ".whole")
        write_card(folder / CARD, config, "train", chosen.iteration)
    facts = {"iteration": chosen.iteration, "form": form, "files": len(list(target.iterdir()))}
    return facts | ({"note": chosen.note} if chosen.note else {})


def _require_possible(config: RunConfig, target: Path, form: str, precision: str | None) -> None:
    if form not in FORMS:
        raise ConfigError(f"--to {form}: should be {', '.join(FORMS)}")
    if target.exists():
        raise ConfigError(f"{target}: exists already; name another folder")
    if form == "adapter" and config.train.lora is None:
        raise ConfigError(
            f"{config.run_dir}: trained without adapters (train.lora), so there is none to export; "
            "--to merged gives its weights"
        )
    if precision is None:
        return
    if precision not in DTYPES:
        raise ConfigError(f"--precision {precision}: should be {', '.join(DTYPES)}")
    if not policy_start(config).is_dir():
        raise ConfigError("--precision: weights of a PaLM are exported in fp32 alone")


def _convert(folder: Path, dtype: torch.dtype) -> None:
    """Write a checkpoint's weights again in another number type, in place."""
    checkpoint = Checkpoint.open(folder)
    heads = {name for name in (VALUE_HEAD, SCALAR_HEAD) if (folder / name).exists()}
    again = folder / ".again"
    again.mkdir()
    write_like(checkpoint, dict(checkpoint.tensors()), again, dtype=dtype, index=bool(heads))
    for file in checkpoint.weight_files:
        file.unlink()
    for path in again.iterdir():
        path.replace(folder / path.name)
    again.rmdir()
