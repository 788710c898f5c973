"""`talipot export`: a run's policy, final or from any checkpoint, in the form that is asked for.

One process reads what any number of learner ranks wrote; neither Ray nor DeepSpeed is needed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from common.config.run import RunConfig
from common.errors import CheckpointError, ConfigError, DataError
from common.models.adapter_files import adapter_of, export_merged
from common.models.pretrained.checkpoint import Checkpoint
from common.models.pretrained.writing import (
    CARD,
    DTYPES,
    SCALAR_HEAD,
    VALUE_HEAD,
    copy_any,
    take_tokenizer,
    write_like,
    written_whole,
)
from common.models.weight_files import save_policy
from common.run_folder import PolicyFolder
from deploy.exchange.card import write_card
from deploy.run_folder import checkpoints
from deploy.run_folder.weights import policy_start
from learner.zero.masters import masters

FORMS = ("folder", "merged", "adapter")
FINAL, LATEST = "final", "latest"


def export_run(
    config: RunConfig, target: Path, checkpoint: str, form: str, precision: str | None
) -> dict[str, Any]:
    """Write a policy of a run; returns what was written.

    Args:
        config: the run's.
        target: the folder to make.
        checkpoint: an iteration, `LATEST` or `FINAL`.
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
        whole.mkdir()
        iteration = _write(config, checkpoint, whole)
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
        write_card(folder / CARD, config, "train", iteration)
    return {"iteration": iteration, "form": form, "files": len(list(target.iterdir()))}


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


def _write(config: RunConfig, checkpoint: str, folder: Path) -> int:
    """Write all of a policy; returns the iterations that it was trained for."""
    if checkpoint == FINAL:
        source = config.folder.policy.path
        if not source.exists():
            raise DataError(
                f"{config.run_dir}: not finished, so there is no final policy; --checkpoint latest "
                "takes that of its newest checkpoint"
            )
        for path in source.iterdir():
            copy_any(path, folder / path.name)
        return config.train.iterations
    found, state = _find(config, checkpoint)
    weights = dict(masters(found / "policy"))
    weights.setdefault("value.offset", torch.zeros(1))
    base, model, lora = policy_start(config), config.model, config.train.lora
    if lora is None:
        save_policy(weights, folder, model, base)
    else:
        adapter = adapter_of(weights, config.train.adapter, lora, state["learner"]["base"])
        export_merged(adapter, weights, base, folder, model)
    if base.is_dir():
        take_tokenizer(config.folder.tokenizer, folder)
    else:
        text = json.dumps(model.model_dump(), indent=1)
        PolicyFolder(folder).shape.write_text(text, encoding="utf8")
    iteration: int = state["iteration"]
    return iteration


def _find(config: RunConfig, checkpoint: str) -> tuple[Path, dict[str, Any]]:
    """Return a checkpoint's folder and state.

    Raises:
        ConfigError: neither a number nor a word for one.
        CheckpointError: there is none, or it is damaged.
    """
    if checkpoint == LATEST:
        newest = checkpoints.newest(config.run_dir)
        if newest is None:
            raise CheckpointError(f"{config.run_dir}: no checkpoint yet")
        return newest
    if not checkpoint.isdecimal():
        raise ConfigError(f"--checkpoint {checkpoint}: should be a number, {LATEST} or {FINAL}")
    folder = config.folder.checkpoint(int(checkpoint))
    if not folder.exists():
        there = sorted(p.name for p in config.folder.checkpoints.glob("step-*") if not p.suffix)
        raise CheckpointError(f"{folder}: no such checkpoint; there are {', '.join(there) or '-'}")
    if not checkpoints.is_whole(folder):
        raise CheckpointError(f"{folder}: damaged; take another")
    return folder, json.loads((folder / "state.json").read_text(encoding="utf8"))


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
