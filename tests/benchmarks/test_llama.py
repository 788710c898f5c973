"""The benchmark of generation from Llama's blocks runs, without vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks import llama
from tests.benchmarks.test_pretrained import TINY


def test_it_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(llama, "VLLM", tmp_path / "none")
    found, spent = llama.run(TINY, small=2)
    results = {result.key: result.value for result in found}
    assert results.keys() == {
        "llama_decode_vs_hf",
        "llama_decode_share_of_limit",
        "llama_score_vs_decode",
        "llama_score_vs_torch",
    }
    assert all(value > 0 for value in results.values())
    assert spent["logits"] > 0
