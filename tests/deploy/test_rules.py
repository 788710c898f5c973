"""Prometheus rules: each fires on its pattern and is silent beside it; by promtool itself."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.live_metrics import Live
from common.metric_catalogue import Logged

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy" / "monitoring" / "rules.yaml"
RECORDED = Path(__file__).parent / "recorded" / "healthy.json"
PROMTOOL = shutil.which("promtool")
promtool = pytest.mark.skipif(PROMTOOL is None, reason="needs Debian's package prometheus")


def alerts() -> dict[str, Any]:
    (group,) = yaml.safe_load(RULES.read_text(encoding="utf8"))["groups"]
    return {rule["alert"]: rule for rule in group["rules"]}


def run(*arguments: str, cwd: Path = ROOT) -> None:
    assert PROMTOOL is not None
    done = subprocess.run(
        [PROMTOOL, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@promtool
def test_the_rules_are_rules() -> None:
    run("check", "rules", str(RULES))


def test_every_name_is_in_the_catalogue() -> None:
    known = {f"ray_talipot_{metric.facts.series}" for metric in [*Logged, *Live]}
    for alert, rule in alerts().items():
        named = set(re.findall(r"ray_talipot_\w+", rule["expr"]))
        assert named, alert
        assert named <= known, alert
    for rule in alerts().values():
        for anchor in re.findall(r"(docs/[\w.-]+)", rule["annotations"]["description"]):
            assert (ROOT / anchor).exists(), anchor


def series(name: str, values: str, **labels: str) -> dict[str, str]:
    shown = ",".join(f'{key}="{value}"' for key, value in {"run": "r", **labels}.items())
    return {"series": f"ray_talipot_{name}{{{shown}}}", "values": values}


LOST = "workers_lost_by_cause_total"
IDLE = [
    # An iteration a minute, told each 15 s.
    series("iteration_end", " ".join(str(60 * (i // 4)) for i in range(240)), WorkerId="c"),
    series("seconds", "60x240", stage="train", WorkerId="c"),
    series("learner_restarts_total", "0x240", stage="train", WorkerId="c"),
    series(LOST, "0x240", stage="train", pool="rollout", cause="died", WorkerId="c"),
    series("health", "0x240", check="kl", severity="critical", WorkerId="c"),
    series("resident_bytes", "1000000x240", role="rollout", worker="w", NodeAddress="10.0.0.1"),
    {"series": 'ray_node_mem_total{ip="10.0.0.1"}', "values": "1000000000x240"},
]
"""What a run at work tells for an hour, that nothing is wrong with."""


def told(*others: dict[str, str]) -> list[dict[str, str]]:
    """The same with other values of some series."""
    names = {other["series"].partition("{")[0] for other in others}
    return [*(s for s in IDLE if s["series"].partition("{")[0] not in names), *others]


CASES: dict[str, tuple[list[dict[str, str]], str, bool]] = {
    "a healthy run": (told(), "", False),
    "TalipotHealth": (
        told(series("health", "0x40 1x200", check="kl", severity="critical", WorkerId="c")),
        "20m",
        True,
    ),
    "TalipotNoProgress": (
        told(series("iteration_end", "0x8 60x4 120x240", WorkerId="c")),
        "20m",
        True,
    ),
    "TalipotRunGone": (
        told(series("iteration_end", "600x40 stale", WorkerId="c")),
        "13m",
        True,
    ),
    "TalipotWorkerLost": (
        told(series(LOST, "0x40 1x200", stage="train", pool="rollout", cause="died", WorkerId="c")),
        "12m",
        True,
    ),
    "TalipotWorkersLost": (
        told(
            series(
                LOST, "0x40 1x2 3x200", stage="train", pool="rollout", cause="hung", WorkerId="c"
            )
        ),
        "12m",
        True,
    ),
    "TalipotLearnerRestarted": (
        told(series("learner_restarts_total", "0x40 1x200", stage="train", WorkerId="c")),
        "30m",
        True,
    ),
    "TalipotMemoryGrowing": (
        told(
            series(
                "resident_bytes",
                "0+4000000x240",
                role="rollout",
                worker="w",
                NodeAddress="10.0.0.1",
            )
        ),
        "55m",
        True,
    ),
}
SILENT: dict[str, tuple[list[dict[str, str]], str, str]] = {
    "a slow iteration is no standstill": (
        told(
            series(
                "iteration_end", " ".join(str(600 * (i // 40)) for i in range(240)), WorkerId="c"
            ),
            series("seconds", "600x240", stage="train", WorkerId="c"),
        ),
        "TalipotNoProgress",
        "49m",
    ),
    "an evaluation takes longer than iterations": (
        told(
            series(
                "iteration_end", " ".join(str(360 * (i // 24)) for i in range(240)), WorkerId="c"
            ),
            series("evaluate_seconds", "300x240", stage="held_out", WorkerId="c"),
        ),
        "TalipotNoProgress",
        "59m",
    ),
    "weights are loaded": (
        told(
            series(
                "resident_bytes",
                "0+50000000x10 500000000x230",
                role="rollout",
                worker="w",
                NodeAddress="10.0.0.1",
            )
        ),
        "TalipotMemoryGrowing",
        "8m",
    ),
    "a worker whose node was taken away": (
        told(
            series(
                LOST, "0x40 5x200", stage="train", pool="rollout", cause="preempted", WorkerId="c"
            )
        ),
        "TalipotWorkerLost",
        "12m",
    ),
    "a run that is resumed goes on with its counts": (
        told(
            series(LOST, "7x200", stage="train", pool="rollout", cause="died", WorkerId="next"),
            series("learner_restarts_total", "3x200", stage="train", WorkerId="next"),
        ),
        "TalipotWorkerLost",
        "5m",
    ),
    "a warning that has gone": (
        told(series("health", "1x40 0x200", check="kl", severity="warning", WorkerId="c")),
        "TalipotHealth",
        "20m",
    ),
}


def check(folder: Path, given: list[dict[str, str]], at: str, firing: set[str]) -> None:
    """Whether exactly these alerts fire at a moment."""
    found = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": given,
                "promql_expr_test": [
                    {
                        "expr": 'count by (alertname) (ALERTS{alertstate="firing"}) > bool 0',
                        "eval_time": at,
                        "exp_samples": [
                            {"labels": f'{{alertname="{name}"}}', "value": 1}
                            for name in sorted(firing)
                        ],
                    }
                ],
            }
        ],
    }
    path = folder / "case.yaml"
    path.write_text(yaml.safe_dump(found), encoding="utf8")
    run("test", "rules", str(path))


@promtool
@pytest.mark.parametrize("case", CASES)
def test_each_rule_fires_on_its_pattern_alone(tmp_path: Path, case: str) -> None:
    given, at, fires = CASES[case]
    if not fires:
        for minute in ("5m", "30m", "59m"):
            check(tmp_path, given, minute, set())
        return
    # Three workers are some, too.
    also = {"TalipotWorkersLost": {"TalipotWorkerLost"}}.get(case, set())
    check(tmp_path, given, at, {case, *also})


@promtool
@pytest.mark.parametrize("case", SILENT)
def test_each_rule_is_silent_beside_its_pattern(tmp_path: Path, case: str) -> None:
    given, _, at = SILENT[case]
    check(tmp_path, given, at, set())


@promtool
def test_all_are_silent_on_a_healthy_run_as_it_was_recorded(tmp_path: Path) -> None:
    """The series of a quickstart, by `tests.deploy.record`; one that is made ill is seen."""
    recorded = json.loads(RECORDED.read_text(encoding="utf8"))
    given, seconds = recorded["series"], recorded["seconds"]
    assert seconds > 300
    named = {name for rule in alerts().values() for name in re.findall(r"ray_\w+", rule["expr"])}
    assert {one["series"].partition("{")[0] for one in given} >= named - {
        "ray_talipot_evaluate_seconds"  # of evaluations while it trains, which it has not
    }
    for at in range(60, seconds, 60):
        check(tmp_path, given, f"{at}s", set())
    ill = [
        {**one, "values": re.sub(r"x\d+$", "x8 1x100", one["values"])}
        if one["series"].startswith("ray_talipot_learner_restarts_total")
        else one
        for one in given
    ]
    check(tmp_path, ill, f"{seconds - 30}s", {"TalipotLearnerRestarted"})


def test_every_rule_has_its_case() -> None:
    assert {name for name, (_, _, fires) in CASES.items() if fires} == alerts().keys()
