"""The whole pipeline, tiny, on a real cluster: every file it promises, and the tools upon it."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from common.config.recipe import load_config
from common.config.run import RunConfig
from deploy.cli.main import main
from deploy.quickstart.outcome import show_outcome
from deploy.quickstart.pipeline import run_quickstart
from deploy.stages.session import Session

pytestmark = pytest.mark.usefixtures("cluster")

PROMISED = {
    "seconds_pipeline",
    "judge_conformance_sft",
    "judge_conformance_policy",
    "win_rate",
    "rouge_l_sft",
    "rouge_l_policy",
    "kl",
    "reward_model_accuracy",
    "rollouts_issued",
    "rollouts_trained",
    "rollouts_dropped",
}
SMALL = """
preset: tiny
tokenizer: {vocab_size: 800, words: identifiers}
learner: {ranks: 2, cpus_per_rank: 0.5}
rollout: {actors: 2, cpus_per_actor: 0.5, lease_size: 8, max_response_tokens: 48}
reward_service: {cpus_per_replica: 0.5}
sft: {batch_tokens: 2048, optimizer: adafactor, lr: 0.1, precision: bf16}
reward_model: {batch_size: 16, seeds: 2}
train:
  iterations: 2
  prompts_per_iteration: 16
  ppg: {n_pi: 2, e_aux: 1, minibatches: 1}
evaluate: {prompts: 24, best_of: 2}
quickstart: {demonstrations: 400, held_out: 40, comparisons: 80}
"""


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, cluster: None
) -> tuple[RunConfig, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("quickstart")
    recipe = folder / "small.yaml"
    recipe.write_text(SMALL, encoding="utf8")
    config = load_config(recipe, [f"output={folder}", "name=tiny"])
    config.run_dir.mkdir()
    session = Session(config, Console(file=io.StringIO()))
    outcome = run_quickstart(session)
    session.close()
    show_outcome(session.console, outcome)
    screen = session.console.file.getvalue()  # type: ignore[attr-defined]
    assert f"win rate {outcome.evaluation.comparison.win_rate.mean:.1%} (" in screen
    return config, outcome.figures()


def test_the_summary_holds_what_is_promised(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    config, summary = finished
    written = json.loads((config.run_dir / "summary.json").read_text(encoding="utf8"))
    assert written == summary
    assert set(written) >= PROMISED
    assert written["rollouts_trained"] == written["rollouts_issued"] == 32
    assert written["rollouts_dropped"] == 0


def test_every_file_is_there(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    config, _ = finished
    for name in (
        "config.yaml",
        "tokenizer.json",
        "sft/policy.safetensors",
        "reward_model/reward.safetensors",
        "policy/policy.safetensors",
        "policy/model.json",
        "metrics.jsonl",
        "samples.jsonl",
        "report.html",
        "trajectories/iteration-000001.parquet",
        "checkpoints/step-000002/state.json",
    ):
        assert (config.run_dir / name).is_file(), name
    resolved = load_config(config.run_dir / "config.yaml")
    assert resolved.model.vocab_size == 800
    assert resolved.data.demonstrations


def test_samples_are_of_held_out_signatures(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    config, _ = finished
    rows = samples(config)
    trained = (config.run_dir / "data" / "demonstrations.jsonl").read_text(encoding="utf8")
    assert 0 < len(rows) <= 24
    assert not any(json.dumps(row["prompt"])[1:-1] in trained for row in rows)


@pytest.mark.parametrize("side", [[], ["--sft"]])
def test_a_run_can_be_sampled_without_a_cluster(
    finished: tuple[RunConfig, dict[str, Any]], side: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = finished
    with pytest.raises(SystemExit) as ended:
        main(["sample", str(config.run_dir), "--prompt", "def close(self):", *side])
    assert ended.value.code == 0
    assert "def close(self):" in capsys.readouterr().out


def test_a_finished_run_is_not_trained_again(
    finished: tuple[RunConfig, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = finished
    weights = config.run_dir / "policy" / "policy.safetensors"
    before = weights.stat().st_mtime_ns
    with pytest.raises(SystemExit) as ended:
        main(["train", "--resume", str(config.run_dir)])
    assert ended.value.code == 0
    assert "is finished" in " ".join(capsys.readouterr().out.split())
    assert weights.stat().st_mtime_ns == before


def test_a_run_can_be_evaluated_again(
    finished: tuple[RunConfig, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    config, summary = finished
    judge = "evaluate.judge=tests.rewards:length"
    trained_with = (config.run_dir / "config.yaml").read_bytes()
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(config.run_dir), judge])
    assert ended.value.code == 0
    assert "win_rate" in capsys.readouterr().out
    assert (config.run_dir / "config.yaml").read_bytes() == trained_with
    found = json.loads((config.run_dir / "evaluation.json").read_text(encoding="utf8"))
    assert found["kl"] == pytest.approx(summary["kl"], abs=1e-3)  # the same samples, seeded
    assert found["judge_score_sft"] == pytest.approx(
        sum(len(row["before"]) for row in samples(config)) / len(samples(config)), rel=0.1
    )


def samples(config: RunConfig) -> list[dict[str, Any]]:
    """Rows of samples.jsonl."""
    text = (config.run_dir / "samples.jsonl").read_text(encoding="utf8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_report_can_be_written_again(
    finished: tuple[RunConfig, dict[str, Any]],
) -> None:
    config, summary = finished
    page = (config.run_dir / "report.html").read_text(encoding="utf8")
    assert f"{summary['judge_conformance_policy']:.1%}" in page
    with pytest.raises(SystemExit) as ended:
        main(["report", str(config.run_dir)])
    assert ended.value.code == 0
    assert (config.run_dir / "report.html").read_text(encoding="utf8") == page
