"""Each health check fires on its pattern, and is silent beside it."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from common.config.recipe import save_config
from common.config.run import RunConfig
from deploy.evaluation.report import write_report
from deploy.health.checks import CHECKS, verdicts, what_checks_read
from deploy.health.history import History, Verdict
from deploy.health.watch import Watch
from deploy.run_folder.log_lines import HELD_OUT, Line
from deploy.standing import lines_of, standing_of
from deploy.watch.runs import WatchedRun

PAGE = Path(__file__).resolve().parents[2] / "docs" / "diagnosis.md"
WELL = {
    "score": 0.5,
    "score_deviation": 0.3,
    "equal_groups": 0.2,
    "kl": 2.0,
    "entropy": 1.0,
    "response_length": 20.0,
    "eos_share": 0.95,
    "mismatch_kl": 1e-5,
    "clip_fraction": 0.1,
    "update_kl": 0.005,
    "gradient_norm": 0.8,
    "explained_variance": 0.4,
    "seconds": 30.0,
    "collect_seconds": 10.0,
    "learner_restarts": 0.0,
    "workers_lost/rollout": 0.0,
    "workers_lost/reward": 0.0,
}
COUNT = 30
GROUPS = {"algorithm": "grpo", "ppg": None, "samples_per_prompt": 4}


def history(
    changes: dict[str, Sequence[float] | float],
    *,
    count: int = COUNT,
    held_out: Sequence[tuple[int, float]] = (),
    error: float | None = 0.01,
    evaluation: float = 5.0,
    now: float | None = None,
    **settings: Any,
) -> History:
    """A healthy run but for some metrics: all their values, or the last ones of many."""
    lines = []
    for at in range(count):
        metrics = dict(WELL)
        for name, values in changes.items():
            known = [values] * count if isinstance(values, float) else list(values)
            behind = count - len(known)
            if at >= behind:
                metrics[name] = known[at - behind]
        lines.append(Line(stage="train", step=at + 1, metrics=metrics, time=1000.0 + 30.0 * at))
    for version, score in held_out:
        told = {"score": score, "responses": 64.0, "evaluate_seconds": evaluation}
        if error is not None:
            told["metric_error"] = error
        lines.append(Line(stage=HELD_OUT, step=version, metrics=told, time=1000.0))
    return History.of(RunConfig.model_validate(settings), lines, now)


def of(check: str, looked_at: History) -> Verdict | None:
    return next((v for v in verdicts(looked_at) if v.check == check), None)


def rising(begin: float, end: float) -> list[float]:
    return [begin + (end - begin) * at / (COUNT - 1) for at in range(COUNT)]


FIRES: dict[str, list[tuple[History, str]]] = {
    "kl": [
        (history({"kl": [11.0] * 5}), r"11\.0 nats per response, over 10 \(there is no train\.kl"),
        (history({"kl": [13.0] * 5}, train={"kl_target": 6}), r"over 12 \(twice train\.kl_targ"),
        (history({"kl": [-0.1, -0.2] * 10}), r"-0\.15 nats per response, the mean of 20 iter"),
    ],
    "over-optimisation": [
        (
            history(
                {"score": rising(0.0, 1.0)},
                held_out=[(0, 0.2), (5, 0.5), (15, 0.4), (20, 0.3)],
                evaluate={"every": 5},
            ),
            r"held-out score fell from 0\.500 \(iteration 5\) to 0\.300",
        ),
        (
            history(  # from the first evaluation on, before training
                {"score": rising(0.0, 1.0)},
                held_out=[(0, 0.9), (10, 0.7), (20, 0.5), (30, 0.3)],
                evaluate={"every": 10},
            ),
            r"held-out score fell from 0\.900 \(iteration 0\) to 0\.300",
        ),
    ],
    "update": [
        (history({"clip_fraction": [0.35] * 3}), r"35% of tokens clipped, over 30%"),
        (history({"clip_fraction": [0.6] * 3}), r"60% of tokens clipped, over 50%"),
        (history({"update_kl": [0.03] * 3}), r"by 0\.030 nats per token"),
    ],
    "mismatch": [(history({"mismatch_kl": [0.005] * 3}), r"differ by 0\.005 nats per token")],
    "entropy": [(history({"entropy": [0.15] * 5}), r"under 0\.200 .* \(it began with 1\.00\)")],
    "length": [
        (history({"response_length": [31.0] * 5}), r"over 1\.5 times the 20 of the start"),
        (history({"eos_share": [0.7] * 5}), r"30% of responses are cut at .*, over 20%"),
        (history({"eos_share": 0.1}), r"90% of responses are cut at .*, over 50%"),
    ],
    "signal": [
        (
            history({"equal_groups": [0.6] * 5}, train=GROUPS),
            r"60% of prompts have responses of one score",
        ),
        (history({"score_deviation": [0.0] * 5}), r"all responses of an iteration had one score"),
    ],
    "value": [(history({"explained_variance": [-0.1] * 10}), r"explains -0\.10 of the returns'")],
    "gradient": [(history({"gradient_norm": [9.0]}), r"gradient norm 9, over 10 times its median")],
    "workers": [
        (
            history({"learner_restarts": [1.0]}),
            r"restarts of the learner in the last 20 iterations: 1",
        ),
        (
            history({"workers_lost/rollout": [2.0] * 5, "workers_lost/reward": [1.0] * 2}),
            r"3 workers lost within \d+ minutes",
        ),
    ],
    "progress": [
        (history({}, now=1000.0 + 29 * 30 + 200), r"for 200 s, over 150 \(they took 30\)"),
        (
            history({}, held_out=[(30, 0.5)], evaluation=300.0, now=1000.0 + 29 * 30 + 800),
            r"for 800 s, over 750 \(they took 30\)",
        ),
    ],
    "starvation": [
        (
            history({"resampled/stale": rising(0.0, 3000.0)}, train={"max_staleness": 1}),
            r"were too old and dropped or sampled again",
        ),
        (
            history({"collect_seconds": [20.0] * 20}, train={"max_staleness": 1}),
            r"the learner waits for rollouts in 67% of the time",
        ),
    ],
    "dead-letters": [
        (
            history({"dropped/dead letter": [0.0, *rising(0.0, 900.0)]}),
            r"of the rollouts of the last 20 iterations were given up",
        ),
    ],
}
SILENT: dict[str, list[History]] = {
    "kl": [
        history({"kl": [11.0] * 4}),
        history({"kl": [11.0] * 5}, train={"kl_target": 6}),
        history({"kl": [-0.2, 0.15] * 10}),  # noise around 0
        history({"kl": [-1e-6] * 20}),
        history({"kl": 30.0}, train={"kl_coef": 0}),  # nothing holds it there, on purpose
    ],
    "over-optimisation": [
        history(  # both rise
            {"score": rising(0.0, 1.0)},
            held_out=[(0, 0.2), (5, 0.5), (15, 0.6), (20, 0.7)],
            evaluate={"every": 5},
        ),
        history(  # fell once, within its error the other time
            {"score": rising(0.0, 1.0)},
            held_out=[(0, 0.2), (5, 0.5), (15, 0.49), (20, 0.3)],
            evaluate={"every": 5},
        ),
        history(  # nobody knows how exact they are
            {"score": rising(0.0, 1.0)},
            held_out=[(0, 0.2), (5, 0.5), (15, 0.4), (20, 0.3)],
            error=None,
            evaluate={"every": 5},
        ),
        history(  # the score of training falls too: something else is wrong
            {"score": rising(1.0, 0.0)},
            held_out=[(0, 0.2), (5, 0.5), (15, 0.4), (20, 0.3)],
            evaluate={"every": 5},
        ),
    ],
    "update": [
        history({"clip_fraction": [0.6] * 2}),
        history({"clip_fraction": [0.6] * 3}, train={"objective": {"ratio": "sequence"}}),
    ],
    "mismatch": [
        history({"mismatch_kl": [0.005] * 3}, train={"max_staleness": 1}),
        history({"mismatch_kl": 0.002}),
    ],
    "entropy": [history({"entropy": [0.15] * 4}), history({"entropy": 0.08})],
    "length": [history({"response_length": [31.0] * 4}), history({"eos_share": 0.72})],
    "signal": [
        history({"equal_groups": [0.6] * 4}, train=GROUPS),
        history({"score_deviation": [0.0] * 4}),
        history({"equal_groups": 0.6}),  # PPO compares none
    ],
    "value": [history({"explained_variance": -0.1}, count=20)],
    "gradient": [history({"gradient_norm": [7.0]}), history({"gradient_norm": [9.0]}, count=9)],
    "workers": [
        history({"workers_lost/rollout": 5.0}),  # long ago
        history({"workers_lost/rollout": [2.0] * 5}),
        history({"learner_restarts": [1.0] * 25}),  # healed long ago
    ],
    "progress": [
        history({}),
        history({}, now=1000.0 + 29 * 30 + 140),
        history(  # an evaluation may take ten iterations' time
            {}, held_out=[(30, 0.5)], evaluation=300.0, now=1000.0 + 29 * 30 + 700
        ),
        replace(history({}, now=90_000.0), since=89_900.0),  # resumed a day later
    ],
    "starvation": [
        history({"collect_seconds": [29.0] * 20}),
        history({"collect_seconds": [29.0] * 19}, train={"max_staleness": 1}),
        history({"dropped/lone": 3000.0}),
    ],
    "dead-letters": [history({"dropped/dead letter": 20.0}), history({"dropped/lone": 500.0})],
}


def test_every_check_is_in_both_tables_and_has_a_section() -> None:
    assert FIRES.keys() == SILENT.keys() == CHECKS.keys()
    sections = re.findall(r"^## (.+)$", PAGE.read_text(encoding="utf8"), re.MULTILINE)
    assert set(CHECKS) <= {title.lower().replace(" ", "-") for title in sections}


@pytest.mark.parametrize(
    ("check", "looked_at", "evidence"),
    [(check, *case) for check, cases in FIRES.items() for case in cases],
)
def test_it_fires(check: str, looked_at: History, evidence: str) -> None:
    [verdict] = verdicts(looked_at)
    assert verdict.check == check
    assert re.search(evidence, verdict.evidence), verdict.evidence
    assert verdict.iteration == COUNT and verdict.advice
    assert verdict.section == f"docs/diagnosis.md#{check}"


@pytest.mark.parametrize(
    ("check", "looked_at"), [(check, case) for check, cases in SILENT.items() for case in cases]
)
def test_it_is_silent(check: str, looked_at: History) -> None:
    assert of(check, looked_at) is None


@pytest.mark.parametrize("looked_at", [case for cases in FIRES.values() for case, _ in cases])
def test_what_is_kept_of_a_long_run_is_what_checks_read(looked_at: History) -> None:
    config = looked_at.config
    slim = replace(
        looked_at,
        iterations=[
            replace(line, metrics=what_checks_read({**line.metrics, "other": 1.0}, config))
            for line in looked_at.iterations
        ],
        held_out=[
            replace(line, metrics=what_checks_read(line.metrics, config))
            for line in looked_at.held_out
        ],
    )
    assert verdicts(slim) == verdicts(looked_at) != []
    assert not any("other" in line.metrics for line in slim.iterations)


def test_a_healthy_run_and_one_that_has_not_begun() -> None:
    assert verdicts(history({})) == []
    assert verdicts(history({}, count=0)) == []
    assert verdicts(history({}, count=1)) == []


def test_what_was_trained_again_is_not_counted_twice() -> None:
    """A run that went back to iteration 2 and was well from there."""
    lines = [
        Line(stage="train", step=step, metrics={**WELL, "kl": kl})
        for step, kl in [(1, 1.0), *((s, 50.0) for s in range(2, 8)), (2, 1.0), (3, 1.0)]
    ]
    looked_at = History.of(RunConfig(), lines)
    assert [line.step for line in looked_at.iterations] == [1, 2, 3]
    assert verdicts(looked_at) == []


def test_what_is_critical_comes_first() -> None:
    found = verdicts(history({"kl": [11.0] * 5, "learner_restarts": [1.0]}))
    assert [(v.check, v.severity) for v in found] == [("workers", "critical"), ("kl", "warning")]


def test_watch_status_report_and_page_say_the_same(tmp_path: Path) -> None:
    config = RunConfig.model_validate({"output": str(tmp_path), "name": "run"})
    config.run_dir.mkdir()
    lines = history({"kl": [11.0] * 5}).iterations
    begun, rest = lines[:-1], lines[-1]
    config.folder.metrics.write_text(
        "".join(f"{json.dumps(asdict(line))}\n" for line in begun), encoding="utf8"
    )
    watch = Watch(config)
    [first] = watch.look(rest.stage, rest.step, rest.metrics)
    assert first.check == "kl"
    assert watch.look("train", COUNT + 1, {**WELL, "kl": 12.0}) == [], "it is told once"
    assert watch.look("train", COUNT + 2, WELL) == [] and watch.verdicts == ()
    [much] = watch.look("train", COUNT + 3, {**WELL, "learner_restarts": 1.0})
    assert (much.check, much.severity) == ("workers", "critical")
    [again] = watch.look("train", COUNT + 2, {**WELL, "kl": 12.0})
    assert again.check == "kl", "it went back, to a history in which it is wrong"
    with config.folder.metrics.open("a", encoding="utf8") as file:
        file.write(f"{json.dumps(asdict(rest))}\n")
    standing = standing_of(config)
    assert standing.health == (first,)
    shown = "\n".join(
        "".join(p if isinstance(p, str) else p[0] for p in line) for line in lines_of(standing)
    )
    assert first.evidence in shown
    page = write_report(config.run_dir, config=config).read_text(encoding="utf8")
    assert html.escape(first.evidence) in page and html.escape(first.section) in page
    save_config(config, config.folder.config)
    live = WatchedRun(config.run_dir).state()
    assert live["health"] == [{**asdict(first), "section": first.section}]
    config.folder.metrics.write_text(json.dumps(asdict(begun[0])) + "\n", encoding="utf8")
    page = write_report(config.run_dir, config=config).read_text(encoding="utf8")
    assert f"none of {len(CHECKS)} checks found anything wrong" in page
