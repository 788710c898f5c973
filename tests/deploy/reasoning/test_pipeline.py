"""The whole recipe on a tiny random chat model, on a real cluster: every file that it promises."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common.config.recipe import load_config
from common.errors import ConfigError
from deploy.cli.main import main
from deploy.reasoning import pipeline
from deploy.reasoning.outcome import show_outcome
from deploy.reasoning.pipeline import run_reasoning
from deploy.stages.session import Session
from deploy.tasks import task_of
from tests.deploy.instruct.test_pipeline import chat_model

FAMILIES = ("chain_sum", "word_sequence_reversal")
SIZES = "prompts: 40, held_out_prompts: 8"
EASY = (
    "{chain_sum: {max_terms: 2, chat: false}, word_sequence_reversal: {max_words: 4, chat: false}}"
)
"""Short enough for a tokenizer of single letters."""


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("taught", [True, False])
def test_the_recipe_leaves_what_it_promises(tmp_path: Path, taught: bool) -> None:
    config = load_config(
        Path("deploy/recipes/reasoning.yaml"),
        [
            f"output={tmp_path}",
            "name=tiny",
            f"model.start={chat_model(tmp_path / 'model')}",
            "model.context=420",
            "rollout={lease_size: 8, max_response_tokens: 60, precision: fp32}",
            "learner.precision=fp32",
            "train={iterations: 2, prompts_per_iteration: 4, samples_per_prompt: 4}",
            f"quickstart={{{SIZES}, demonstrations: {20 * taught}, families: {EASY}}}",
        ],
    )
    console = Console(file=io.StringIO(), width=160)
    task_of(config).prepare(config, console)
    config.run_dir.mkdir()
    session = Session(config, console)
    outcome = run_reasoning(session)
    show_outcome(console, outcome)
    session.close()
    written: dict[str, Any] = json.loads((config.run_dir / "summary.json").read_text("utf8"))
    assert written == outcome.figures()
    for side in ("before", "after", *(["came"] if taught else [])):
        accuracy = written[f"judge_accuracy_{side}"]
        assert tuple(accuracy) == FAMILIES
        low, high = written[f"judge_accuracy_low_{side}"], written[f"judge_accuracy_high_{side}"]
        for family in FAMILIES:  # Wilson's ends are rounded
            assert 0 <= low[family] <= accuracy[family] + 1e-9
            assert accuracy[family] <= high[family] + 1e-9 <= 1 + 1e-9
        assert accuracy == {f: written[f"right_{f}_{side}"] for f in FAMILIES}
    assert written["rollouts_trained"] == written["rollouts_issued"] == 32
    assert written["rollouts_dropped"] == 0
    lines = (config.run_dir / "samples.jsonl").read_text("utf8").splitlines()
    assert len(lines) == sum(written["questions"].values())
    row = json.loads(lines[0])
    assert row["conforms_after"] == (row["score_after"] == 1.0)
    page = (config.run_dir / "report.html").read_text(encoding="utf8")
    assert "word sequence reversal: right" in page
    with pytest.raises(SystemExit) as ended:
        main(["report", str(config.run_dir)])
    assert ended.value.code == 0
    assert (config.run_dir / "report.html").read_text(encoding="utf8") == page
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "chain_sum: +0.0 points" in said
    assert (config.run_dir / "sft").exists() == taught


def test_without_the_library_a_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(Path("deploy/recipes/reasoning.yaml"), [])
    monkeypatch.setattr(pipeline, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package reasoning-gym; run `pip install 't"):
        task_of(config).prepare(config, Console(file=io.StringIO()))
