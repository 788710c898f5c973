"""The report: one page that needs nothing else, for every kind of run, safe against its samples."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from common.config.run import RunConfig
from common.errors import DataError
from common.wire.trajectory import ScoredTrajectory, to_table
from deploy.evaluation.charts import running_mean
from deploy.evaluation.report import SAMPLES, read_metrics, write_report
from deploy.quickstart.outcome import IN_REPORT

SIDES = ("sft", "policy")
SUMMARY = {
    "win_rate": 0.8731,
    "win_rate_low": 0.85,
    "win_rate_high": 0.89,
    "ties_share": 0.1,
    "judge_conformance_sft": 0.61,
    "judge_conformance_low_sft": 0.58,
    "judge_conformance_high_sft": 0.64,
    "judge_conformance_policy": 0.957,
    "judge_conformance_human": 0.66,
    "kl": 7.31,
    "rollouts_trained": 6144,
    "rollouts_dropped": 0,
    "seconds_sft": 40.0,
    "seconds_train": 80.0,
}


def metrics(stage: str, steps: int, **values: float) -> str:
    """Lines of a stage whose values rise by a tenth a step."""
    lines = [
        {
            "stage": stage,
            "step": step,
            "time": 1.8e9 + 60 * step,
            "metrics": {name: value + step / 10 for name, value in values.items()},
        }
        for step in range(1, steps + 1)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


def sample(index: int, text: str = "Return it.") -> dict[str, Any]:
    return {
        "prompt": f"def f{index}(x):",
        "human": "People's line.",
        "before": text,
        "after": text,
        "score_before": -0.5,
        "score_after": 1.25,
        "conforms_before": False,
        "conforms_after": True,
    }


def run_folder(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf8")
    return folder


def test_a_finished_quickstart_shows_its_numbers(tmp_path: Path) -> None:
    rows = [json.dumps(sample(i)) for i in range(100)]
    run = run_folder(
        tmp_path / "finished",
        metrics__jsonl=metrics("sft", 3, loss=4.0)
        + metrics("train", 8, score=0.5, kl=2.0, auxiliary_seconds=1.0),
        summary__json=json.dumps(SUMMARY | {"pairs_judged": 998, "pairs_asked": 1000}),
        samples__jsonl="\n".join(rows),
        config__yaml="name: finished",
    )
    page = write_report(run, IN_REPORT).read_text(encoding="utf8")
    for shown in (
        "87.3%",
        "95.7%",
        "58.0% to 64.0%",
        "7.3",
        "6,144",
        "name: finished",
        "66.0%",
        "998 of 1000 prompts judged",
    ):
        assert shown in page, shown
    assert page.count("<svg") == 4, "two curves of policy training, its frontier, one of sft"
    assert "an auxiliary phase ran" in page
    assert len(re.findall(r"def f\d+\(x\):", page)) in range(SAMPLES // 2, SAMPLES + 1)


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    run = run_folder(tmp_path, metrics__jsonl=metrics("train", 3, score=1.0))
    page = write_report(run, IN_REPORT).read_text(encoding="utf8")
    loads = re.findall(r"<(?:script|link|img|iframe)\b|@import|url\((?!#)|\ssrc=", page)
    assert not loads
    assert not re.search(r"href=\"https?:", page)


def test_what_a_policy_wrote_cannot_become_markup(tmp_path: Path) -> None:
    run = run_folder(
        tmp_path,
        metrics__jsonl=metrics("sft", 2, loss=1.0),
        samples__jsonl=json.dumps(sample(0, "<script>alert(1)</script>")),
    )
    page = write_report(run, IN_REPORT).read_text(encoding="utf8")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_an_evaluated_run_without_a_quickstart(tmp_path: Path) -> None:
    run = run_folder(
        tmp_path,
        metrics__jsonl=metrics("train", 2, score=1.0),
        evaluation__json=json.dumps({"score_sft": 0.25, "score_policy": 0.75, "kl": 1.0}),
    )
    page = write_report(run, IN_REPORT).read_text(encoding="utf8")
    assert "0.250" in page
    assert "0.750" in page
    assert "people" not in page


@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
def test_what_says_nothing_is_not_drawn(tmp_path: Path, value: float) -> None:
    """A single value, or none that is finite; the values of another metric are drawn."""
    text = metrics("sft", 1, loss=value) + metrics("train", 9, score=1.0)
    still = [json.dumps({"stage": "reward", "step": s, "metrics": {"loss": 0.5}}) for s in (1, 2)]
    page = write_report(run_folder(tmp_path, metrics__jsonl=text + "\n".join(still) + "\n"))
    shown = page.read_text(encoding="utf8")
    assert shown.count("<svg") == 1
    assert "Not drawn, since constant: loss: 0.5" in shown


def test_labels_of_metrics_have_a_curve_each(tmp_path: Path) -> None:
    text = (
        metrics("sft", 3, loss=2.0, heldout_loss=2.5)
        + metrics("reward", 1, heldout_loss=2.5)
        + metrics("held_out", 3, **{"score": 0.1, "pass@16": 0.5, "pass@2": 0.3, "of old": 1.0})
        + metrics("train", 3, **{"score": 0.1, "score/sums": 0.2, "score/a:b": 0.3})
    )
    page = write_report(run_folder(tmp_path, metrics__jsonl=text)).read_text(encoding="utf8")
    titles = [
        "Loss on held-out data, nats per token",
        "Score of the source a:b",
        "Score of the source sums",
        "Prompts solved, pass@2",
        "Prompts solved, pass@16",
    ]
    for title in titles:
        assert title in page, title
    assert page.index("pass@2<") < page.index("pass@16<")
    assert "held-out comparisons" not in page, "measured once, it is no curve"
    assert "of old" not in page


def shown(tmp_path: Path, run: RunConfig, **files: str) -> str:
    """The page of a run with a recipe, as a text without tags and line breaks."""
    folder = run_folder(run.run_dir, config__yaml="name: run", **files)
    page = write_report(folder, IN_REPORT, run).read_text(encoding="utf8")
    page = re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", page, flags=re.S)
    return html.unescape(" ".join(re.sub(r"<[^>]+>", " ", page).split()))


def own_run(tmp_path: Path, **sections: Any) -> RunConfig:
    return RunConfig.model_validate({"output": str(tmp_path), "name": "own", **sections})


def test_the_head_says_what_the_run_is(tmp_path: Path) -> None:
    run = own_run(
        tmp_path,
        train={"algorithm": "grpo", "samples_per_prompt": 4, "ppg": None},
        reward_service={
            "components": {
                "reward_model": {"kind": "model"},
                "brief": {"kind": "function", "target": "rewards:brief", "weight": 0.2},
            }
        },
    )
    text = shown(
        tmp_path,
        run,
        metrics__jsonl=metrics("train", 20, score=1.0, kl=2.0, component__brief=1.0).replace(
            "component__brief", "component/brief"
        ),
        run__json=json.dumps(
            {
                "stages": {
                    "train": {
                        "began": "",
                        "settings": {},
                        "reads": {
                            "data.prompts": [
                                {"path": "p.jsonl", "bytes": 9, "lines": 1200, "xxh3_128": "0"}
                            ]
                        },
                        "writes": {},
                    }
                }
            }
        ),
    )
    for fact in (
        "GRPO, 4 responses to a prompt",
        "reward model + 0.2 × brief (function rewards:brief)",
        "PaLM, 4 layers of width 192, context 128",
        "1,200 prompts",
        "15 January 2027, 08:01 to 08:20 UTC",
        "20 of 20 iterations",
        "1.15 → 2.95 score per response, first and last 2 iterations",
    ):
        assert fact in text, fact
    assert "Before and after" not in text
    assert "win rate" not in text


@pytest.mark.parametrize(
    ("low", "high", "tone"), [(0.41, 0.58, ""), (0.51, 0.7, "good"), (0.2, 0.4, "bad")]
)
def test_colours_follow_the_outcome(tmp_path: Path, low: float, high: float, tone: str) -> None:
    figures = {
        "win_rate": (low + high) / 2,
        "win_rate_low": low,
        "win_rate_high": high,
        "ties_share": 0.0,
        "judge_conformance_sft": 0.5,
        "judge_conformance_low_sft": 0.45,
        "judge_conformance_high_sft": 0.55,
        "judge_conformance_policy": (low + high) / 2,
        "judge_conformance_low_policy": low,
        "judge_conformance_high_policy": high,
    }
    run = run_folder(
        tmp_path, metrics__jsonl=metrics("train", 2, score=1.0), summary__json=json.dumps(figures)
    )
    page = write_report(run, IN_REPORT).read_text(encoding="utf8")
    assert f'<div class="card tile win {tone}">' in page
    assert ("no difference is shown" in page) == (tone == "")
    clear = tone == "bad"  # two intervals that meet leave a doubt
    assert ('<b class="bad">' in page) == clear
    assert '<b class="good">' not in page


def test_a_judge_is_shown_only_where_there_is_one(tmp_path: Path) -> None:
    sides = {f"{name}_{side}": 0.5 for name in ("score", "judge_score") for side in SIDES}
    rate = {"win_rate": 0.6, "win_rate_low": 0.55, "win_rate_high": 0.65, "ties_share": 0.0}
    figures = sides | rate | {"pairs_judged": 90, "pairs_asked": 100, "iteration": 7}
    files = {"metrics__jsonl": metrics("train", 7, score=1.0)}
    text = shown(tmp_path, own_run(tmp_path), **files, evaluation__json=json.dumps(figures))
    assert "Judge" not in text.replace("judged", "")
    assert "90 of 100 prompts judged, by the run's own reward" in text
    assert "of the checkpoint of iteration 7" in text
    figures["judge_score_policy"] = 0.75
    judged = own_run(tmp_path, evaluate={"judge": "judges:strict"})
    text = shown(tmp_path, judged, **files, evaluation__json=json.dumps(figures))
    assert "judge's score 0.500 0.750" in text
    assert "by judges:strict" in text


def test_a_run_from_a_checkpoint_is_not_compared_with_a_supervised_policy(tmp_path: Path) -> None:
    run = own_run(tmp_path, model={"start": str(tmp_path / "SmallLM"), "context": 256})
    rate = {"win_rate": 0.6, "win_rate_low": 0.55, "win_rate_high": 0.65, "ties_share": 0.0}
    text = shown(
        tmp_path,
        run,
        metrics__jsonl=metrics("train", 7, score=1.0, kl=1.0),
        evaluation__json=json.dumps(rate | {"score_sft": 0.1, "score_policy": 0.2}),
    )
    assert "win rate over the model as it came" in text
    assert "SmallLM, context 256" in text
    assert "supervised" not in text
    assert "KL to the reference policy, nats per response" in text


def trajectory(index: int, iteration: int, uid: str) -> ScoredTrajectory:
    return ScoredTrajectory(
        rollout_id=f"{iteration:06d}-{index:06d}",
        group=index,
        prompt_uid=uid,
        prompt_text=f"question {uid}",
        prompt_ids=[1],
        seed=0,
        response_ids=[2],
        response_text=f"answer <{index}> of {iteration}",
        behavior_logprobs=[0.0],
        finish_reason="eos",
        policy_version=0,
        weights_fingerprint="",
        actor_id="",
        score=index / 10,
        score_components={"brief": 0.25, "reward_model": index / 10},
        ref_logprobs=[0.0],
        reward_version=0,
    )


def test_samples_come_from_the_trajectory_log(tmp_path: Path) -> None:
    run = own_run(tmp_path)
    folder = run_folder(run.run_dir, metrics__jsonl=metrics("train", 9, score=1.0))
    (folder / "trajectories").mkdir()

    def log(iteration: int, uids: Sequence[str]) -> None:
        rows = [trajectory(i, iteration, uid) for i, uid in enumerate(uids)]
        table = to_table(rows, ScoredTrajectory)
        pq.write_table(table, run.folder.trajectories(iteration))

    log(1, [f"a{i}" for i in range(40)])
    assert "Samples" not in shown(tmp_path, run)
    log(9, [f"b{i}" for i in range(40)])
    text = shown(tmp_path, run)
    assert "responses each of iterations 1 and 9, of different prompts" in text
    assert "question a0 answer <0> of 1" in text
    assert "question b39 answer <39> of 9" in text
    assert "brief 0.25, reward_model 3.9" in text
    log(9, [f"a{i}" for i in range(40)])
    text = shown(tmp_path, run)
    assert "12 prompts that iterations 1 and 9 both asked" in text
    assert text.count("iteration 9 ·") == 12
    run.folder.trajectories(9).write_bytes(b"torn")
    with pytest.raises(DataError, match=r"iteration-000009\.parquet: damaged"):
        write_report(folder, IN_REPORT, run)


def test_two_thousand_iterations_are_a_small_page(tmp_path: Path) -> None:
    names = ("score", "kl", "entropy", "response_length", "clip_fraction", "seconds")
    text = metrics("train", 2_000, **dict.fromkeys(names, 1.0), auxiliary_seconds=1.0)
    page = write_report(run_folder(tmp_path, metrics__jsonl=text))
    assert page.stat().st_size < 500_000


def test_a_running_mean_is_of_neighbours_on_either_side() -> None:
    values = [float(v) for v in range(60)]
    assert running_mean(values)[2:-2] == pytest.approx(values[2:-2])
    noisy = [0.0, 3.0] * 45
    means = running_mean(noisy)
    assert all(1.0 < mean < 2.0 for mean in means)


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    whole = metrics("sft", 2, loss=1.0)
    run = run_folder(tmp_path, metrics__jsonl=whole + whole[: len(whole) // 3])
    assert [line.step for line in read_metrics(run / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("text", ["", "{"])
def test_no_metrics_is_one_clear_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl: no metrics yet"):
        write_report(run_folder(tmp_path, metrics__jsonl=text))


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    text = metrics("sft", 1, loss=1.0) + "{}\n" + metrics("sft", 1, loss=1.0)
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        write_report(run_folder(tmp_path, metrics__jsonl=text))


def test_faults_and_where_the_time_goes(tmp_path: Path) -> None:
    text = metrics("train", 3, score=1.0, collect_seconds=2.0, learn_seconds=4.0)
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf8")
    events = [
        {"time": 1.8e9, "worker": "rollout-0", "what": "started", "detail": "after 2 s"},
        {"time": 1.8e9, "worker": "rollout-0", "what": "died", "detail": "<b>by</b> signal 9"},
        {"time": 1.8e9, "worker": "", "what": "learner restarted", "detail": "rank 1 \u202edied"},
    ]
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (tmp_path / "events.jsonl").write_text(lines + '{"time": 1.8', encoding="utf8")
    page = write_report(tmp_path).read_text(encoding="utf8")
    assert "<b>rollout-0 died</b> &lt;b&gt;by&lt;/b&gt; signal 9" in page
    assert "<b>learner restarted</b> rank 1 \\u202edied" in page
    assert "after 2 s" not in page
    assert re.search(r"rollouts</span>\s*<span><i[^>]*></i></span><span>2.20 s", page)
    assert re.search(r"policy phase</span>\s*<span><i[^>]*></i></span><span>4.20 s", page)
    assert "auxiliary phase</span>" not in page
