"""`talipot import` and `talipot export` as typed: one line for what is wrong, and an exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config.recipe import save_config
from common.config.run import RunConfig
from common.models.pretrained.checkpoint import INDEX, Checkpoint
from common.models.pretrained.writing import VALUE_HEAD, write_like, written_whole
from tests.common.models.pretrained.checkpoints import random_checkpoint
from tests.deploy.commands import Outcome, Run


def refused(outcome: Outcome, code: int, *says: str) -> None:
    assert outcome.code == code, outcome
    assert len(outcome.error.splitlines()) == 1, outcome.error
    assert outcome.error.startswith("error ")
    for text in says:
        assert text in outcome.error, outcome.error


def test_what_was_imported_is_said(run: Run, tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source")
    done = run("import", str(source), str(tmp_path / "target"))
    assert done.code == 0, done
    for said in ("family", "llama", "parameters", "float32"):
        assert said in done.out


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        ("owner/nowhere", 4, "hf download owner/nowhere"),
        ("missing.gguf", 4, "no such file"),
        ("broken.gguf", 4, "torn or not GGUF"),
        ("note.txt", 4, "neither a folder nor a GGUF file"),
        ("empty", 4, "no config.json"),
    ],
)
def test_what_cannot_be_imported_is_one_line(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03\x00")
    (tmp_path / "note.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    refused(run("import", source, "target"), code, words)
    assert not (tmp_path / "target").exists()


def test_a_number_type_that_is_none(run: Run, tmp_path: Path) -> None:
    source = str(random_checkpoint(tmp_path / "source"))
    refused(run("import", source, "target", "--precision", "int4"), 2, "fp32, bf16, fp16")


def test_a_finished_pretrained_run_is_exported(run: Run, tmp_path: Path) -> None:
    start = random_checkpoint(tmp_path / "model")
    config = RunConfig.model_validate(
        {
            "name": "run",
            "output": str(tmp_path),
            "model": {"start": str(start), "context": 64},
        }
    )
    save_config(config, config.folder.config)
    target = tmp_path / "out"
    refused(run("export", str(config.run_dir), str(target)), 3, "not finished")
    base = Checkpoint.open(start)
    with written_whole(config.folder.policy.path) as folder:
        write_like(base, dict(base.tensors()), folder, beside={VALUE_HEAD: {}})
    done = run("export", str(config.run_dir), str(target), "--precision", "bf16")
    assert done.code == 0, done
    assert (target / INDEX).exists()
    assert (target / "README.md").exists()
    assert str(Checkpoint.open(target).dtype) == "torch.bfloat16"
    refused(run("export", str(config.run_dir), str(target)), 2, "exists already")
    refused(run("export", str(config.run_dir), "x", "--to", "adapter"), 2, "without adapters")
