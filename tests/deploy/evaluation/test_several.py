"""`talipot compare`: sorted, readable at 80 columns, with what differs; and its page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from common.config.recipe import save_config
from common.config.run import RunConfig
from common.errors import ConfigError, DataError
from deploy.evaluation.several import compare_runs, write_comparison
from tests.deploy.commands import Run

GRPO: dict[str, Any] = {
    "train": {"algorithm": "grpo", "ppg": None, "samples_per_prompt": 4, "lr": 1e-4}
}


def prompts(fingerprint: str) -> str:
    file = {"path": "p.jsonl", "bytes": 9, "lines": 12, "xxh3_128": fingerprint}
    train = {"began": "", "settings": {}, "reads": {"data.prompts": [file]}, "writes": {}}
    return json.dumps({"format": 1, "stages": {"train": train}})


def trained(root: Path, name: str, score: float, read: str = "aa", **sections: Any) -> RunConfig:
    """A run of 20 iterations whose score rises to this."""
    config = RunConfig.model_validate({"output": str(root), "name": name, **sections})
    folder = config.folder
    folder.path.mkdir(parents=True)
    save_config(config, folder.config)
    lines = [
        {
            "stage": "train",
            "step": step,
            "time": 1.8e9 + step,
            "metrics": {"score": score * step / 20, "kl": step / 10, "seconds": 2.0},
        }
        for step in range(1, 21)
    ]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder.inputs.write_text(prompts(read))
    return config


def evaluated(config: RunConfig, score: float, low: float, high: float) -> None:
    figures = {
        "judge_score_policy": score,
        "win_rate": (low + high) / 2,
        "win_rate_low": low,
        "win_rate_high": high,
    }
    config.folder.evaluation.write_text(json.dumps(figures))


def test_the_best_comes_first_and_what_differs_is_named(tmp_path: Path, run: Run) -> None:
    configs = [
        trained(tmp_path, "ppo", 0.5),
        trained(tmp_path, "grpo", 0.8, "bb", **GRPO),
    ]
    folders = [str(config.run_dir) for config in configs]
    done = run("compare", *folders)
    assert done.code == 0, done.error
    lines = done.out.splitlines()
    assert all(len(line) <= 80 for line in lines if str(tmp_path) not in line), done.out
    assert [line.split()[:2] for line in lines[1:3]] == [["grpo", "GRPO"], ["ppo", "PPO"]]
    assert re.search(r"grpo +GRPO +0\.780 +- +- +2\.00 +40 +20/20", lines[1])
    assert " train.algorithm  grpo · ppo" in lines
    assert " train.lr  0.0001 · 0.0003" in lines
    assert " data.prompts  12 lines, bb · 12 lines, aa" in lines
    assert not any(word in done.out for word in ("output ", " name ", "checkpoint_every"))
    page = (tmp_path / "compare.html").read_text(encoding="utf8")
    assert page.count("<svg") == 2  # seconds do not differ
    assert page.index("GRPO, 4 responses") < page.index("PPO with PPG")
    assert not re.search(r"<(?:script|link|img|iframe)\b|@import|url\((?!#)|\ssrc=", page)


def test_held_out_scores_decide_where_every_run_has_one(tmp_path: Path) -> None:
    first, second = trained(tmp_path, "a", 0.9), trained(tmp_path, "b", 0.5)
    evaluated(first, 0.1, 0.4, 0.6)
    assert compare_runs([first, second]).names == ["a", "b"]
    evaluated(second, 0.2, 0.7, 0.8)
    comparison = compare_runs([first, second])
    assert (comparison.names, comparison.by) == (["b", "a"], "held-out")
    assert [run.win_tone for run in comparison.runs] == ["good", ""]
    write_comparison(comparison, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf8")
    assert "70.0% to 80.0%" in page
    assert page.count('<b class="good">') == 1


def test_weights_of_another_run_are_the_same_as_ones_own(tmp_path: Path) -> None:
    """What `--from` takes by reference does not differ from what the other run made itself."""
    first, second = trained(tmp_path, "a", 0.5), trained(tmp_path, "b", 0.4)
    names = {"sft/policy.safetensors": "reuse.sft", "tokenizer.json": "reuse.tokenizer"}
    manifest = json.loads(first.folder.inputs.read_text())
    reads = manifest["stages"]["train"]["reads"]
    for config, called in ((first, list(names)), (second, list(names.values()))):
        for number, name in enumerate(called):
            file = {"path": name, "bytes": 9, "lines": None, "xxh3_128": f"{number}f"}
            reads[name] = [file]
        config.folder.inputs.write_text(json.dumps(manifest))
        for name in called:
            del reads[name]
    assert compare_runs([first, second]).differences == []


def test_scores_of_different_judges_decide_nothing(tmp_path: Path) -> None:
    first = trained(tmp_path, "a", 0.9)
    second = trained(tmp_path, "b", 0.5, evaluate={"judge": "judges:strict"})
    for config, score in ((first, 0.1), (second, 0.2)):
        evaluated(config, score, 0.4, 0.6)
    comparison = compare_runs([first, second])
    assert (comparison.names, comparison.by) == (["a", "b"], "score")
    assert comparison.differences == [("evaluate.judge", ['""', "judges:strict"])]


def test_runs_of_one_name_are_called_by_their_folders(tmp_path: Path) -> None:
    configs = [trained(tmp_path / place, "run", 0.5) for place in ("one", "two")]
    assert compare_runs(configs).names == [str(config.run_dir) for config in configs]
    assert compare_runs(configs).differences == []


def test_what_cannot_be_compared_is_one_line(tmp_path: Path) -> None:
    config = trained(tmp_path, "a", 0.5)
    with pytest.raises(ConfigError, match="takes 2 to 6 runs, and 1 are given"):
        compare_runs([config])
    with pytest.raises(ConfigError, match="a run is given twice"):
        compare_runs([config, config])
    other = trained(tmp_path, "b", 0.5)
    other.folder.metrics.write_text('{"stage": "sft", "step": 1, "metrics": {"loss": 1.0}}\n')
    with pytest.raises(DataError, match="has not trained a policy yet"):
        compare_runs([config, other])
