"""What is handed over is enough: the page's example outside Talipot, and a run without its base."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import talipot
from common.config.recipe import load_config, save_config
from common.data.tokenizer import load_tokenizer
from common.models.pretrained.checkpoint import Checkpoint
from common.models.pretrained.writing import write_like, written_whole
from tests.common.data.tokenizers import byte_level
from tests.common.models.pretrained.tiny import reference
from tests.deploy.commands import Run

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "hand-over.md").read_text(encoding="utf8")
PROMPT = [{"role": "user", "content": "Name a river."}]


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A finished run of a tiny chat model, which lies beside it."""
    base = byte_level(tmp_path / "base")
    tokens = load_tokenizer(base).vocab_size
    reference("qwen3", vocab_size=tokens).save_pretrained(base)
    model = f"model={{start: {base}, context: 90, vocab_size: {tokens}}}"
    rest = [f"output={tmp_path}", "name=run", "rollout.max_response_tokens=9"]
    config = load_config(None, [model, *rest])
    config.run_dir.mkdir()
    load_tokenizer(base).save(config.run_dir / "tokenizer")
    save_config(config, config.folder.config)
    checkpoint = Checkpoint.open(base)
    with written_whole(config.folder.policy.path) as folder:
        write_like(checkpoint, dict(checkpoint.tensors()), folder)
    config.folder.result.write_text(json.dumps({"iterations": 20}), encoding="utf8")
    return config.run_dir


def test_a_colleague_loads_it_without_talipot_and_without_its_base(
    finished: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "colleague"
    shutil.copytree(finished, there / "their-name")
    expected = talipot.load_run(finished).policy().sample([PROMPT], seed=3)
    shutil.rmtree(finished)
    shutil.rmtree(tmp_path / "base")
    monkeypatch.chdir(there)
    copied = talipot.load_run("their-name")
    assert copied.policy().sample([PROMPT], seed=3) == expected
    done = run("export", "their-name", "chat-policy")
    assert done.code == 0, done
    (example,) = re.findall(r"^```python outside\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(example, "docs", "exec"), names)
    assert names["answer"].shape[1] > names["asked"]["input_ids"].shape[1]


def test_an_exported_policy_names_no_path_of_this_machine(
    finished: Path, run: Run, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    assert run("export", str(finished), str(target)).code == 0
    for path in target.rglob("*"):
        assert not path.is_file() or str(tmp_path).encode() not in path.read_bytes(), path
