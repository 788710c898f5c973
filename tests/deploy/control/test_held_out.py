"""Evaluation while training: what it measures, what it keeps, and that training does not notice."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from rich.console import Console

from common.config.run import RunConfig
from common.data.tokenizer import load_tokenizer
from deploy.control.held_out import HeldOut
from deploy.evaluation.answering import answers
from deploy.exchange.policies import choose
from deploy.run_folder import checkpoints
from deploy.run_folder.log_lines import held_out_scores, read_lines
from deploy.run_folder.progress import is_final, recorded_facts
from deploy.run_folder.weights import policy_start
from deploy.stages.policy import _held_out
from deploy.stages.session import Session
from deploy.standing import standing_of
from deploy.workers.gang import LearnerGang, LearnerLost
from tests.deploy.control.runs import Run, finish, held_out_of, kill_worker, prompts_of, when
from tests.workspaces import run_copy

cluster = pytest.mark.usefixtures("cluster")
EVALUATED = {"every": 2, "prompts": 12, "samples": 2, "solved": 0.0, "greedy": True}


# ------------------------------------------------------------------ when, and what is best


def held_out(config: RunConfig, scores: dict[int, float], **settings: Any) -> HeldOut:
    evaluate = config.evaluate.model_copy(update={"every": 3, **settings})
    train = config.train.model_copy(update={"iterations": 10})
    changed = config.model_copy(update={"evaluate": evaluate, "train": train})
    return HeldOut(config=changed, prompts=[], scores=scores)


def test_the_first_each_kth_and_the_last_version_are_due_once(workspace: RunConfig) -> None:
    due = held_out(workspace, {3: 0.0}).due
    assert [v for v in range(11) if due(v)] == [0, 6, 9, 10]
    assert not any(map(held_out(workspace, {}, every=0).due, range(11)))


def test_the_best_is_the_first_of_equals_and_patience_counts_from_it(workspace: RunConfig) -> None:
    scores = {0: 0.1, 3: 0.5, 6: 0.5, 9: 0.4}
    assert held_out(workspace, scores).best == 3
    assert not held_out(workspace, scores).hopeless, "patience is without end"
    assert held_out(workspace, scores, patience=2).hopeless
    assert not held_out(workspace, scores, patience=3).hopeless
    assert not held_out(workspace, {}, patience=1).hopeless
    again = held_out(workspace, scores, patience=2)
    again.rewind(6)
    assert (again.scores, again.hopeless) == ({0: 0.1, 3: 0.5, 6: 0.5}, False)


def test_prompts_that_are_trained_on_too_are_told(workspace: RunConfig) -> None:
    evaluate = workspace.evaluate.model_copy(update={"every": 1, "prompts": 5})
    config = workspace.model_copy(update={"evaluate": evaluate})
    console = Console(file=io.StringIO(), width=200)
    trained = {prompt.uid for prompt in prompts_of(config)[:3]}
    session, tokenizer = Session(config, console), load_tokenizer(config.folder.tokenizer)
    assert len(_held_out(session, config, tokenizer, trained)) == 5
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "3 of 5 held-out prompts (data.evaluation) are trained on too" in shown
    assert _held_out(session, workspace, tokenizer, trained) == []


# ------------------------------------------------------------------ in a run


def evaluations(config: RunConfig) -> list[tuple[int, dict[str, float]]]:
    lines = read_lines(config.folder.metrics).lines
    return [(line.step, dict(line.metrics)) for line in lines if line.stage == "held_out"]


@cluster
def test_training_does_not_notice(
    workspace: RunConfig,
    gang: LearnerGang,
    reference: tuple[RunConfig, dict[str, Any]],
    tmp_path: Path,
) -> None:
    config = run_copy(workspace, tmp_path, evaluate=EVALUATED)
    facts = finish(config, gang)
    assert facts["weights_hash"] == reference[1]["weights_hash"]
    assert facts["rollouts_issued"] == facts["rollouts_trained"] == 64
    found = evaluations(config)
    assert [version for version, _ in found] == [0, 2, 4]
    first, _, last = (metrics for _, metrics in found)
    assert first["kl"] == pytest.approx(0.0, abs=1e-4), "before training it is the reference"
    assert last["kl"] != first["kl"]
    for _, metrics in found:
        assert metrics["unscored"] == 0 and metrics["evaluate_seconds"] > 0
        assert 0 <= metrics["pass@1"] <= metrics["pass@2"] <= 1
        assert 0 <= metrics["greedy_solved"] <= 1
        assert 1 <= metrics["response_length"] <= 8
    status = standing_of(config)
    assert (status.state, status.stage, status.step) == ("finished", "train", 4)


@cluster
def test_greedy_answers_are_the_most_probable_ones_and_say_what_is_best(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    length = {"kind": "function", "target": "tests.rewards:length"}
    config = run_copy(
        workspace,
        tmp_path,
        reward_service={"components": {"length": length}},
        evaluate={"every": 1, "prompts": 6, "greedy": True, "metric": "greedy_score"},
        train={"iterations": 1},
    )
    finish(config, gang)
    prompts = held_out_of(config)
    said = answers(config, policy_start(config), prompts, label="elsewhere", greedy=True)
    first = evaluations(config)[0][1]
    assert first["greedy_score"] == pytest.approx(fmean(map(len, said.texts)))
    assert first["greedy_score"] != pytest.approx(first["score"])
    assert first["responses"] == 6
    assert "greedy_solved" not in first
    path = config.folder.metrics
    found = held_out_scores(path, metric="greedy_score")
    assert found == {v: metrics["greedy_score"] for v, metrics in evaluations(config)}
    assert HeldOut.of(config, prompts).scores == found


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"metric": "scores"}, "metric=scores is none of score, greedy_score, greedy_solved, pass"),
        ({"metric": "greedy_score"}, "metric=greedy_score is measured with greedy alone: set that"),
        ({"metric": "greedy_solved", "greedy": True}, "is measured with solved alone: set that"),
        ({"metric": "pass@1"}, "metric=pass@1 is measured with solved alone: set that too"),
        (
            {"metric": "pass@4", "solved": 1, "samples": 2},
            "metric=pass@4: with samples=2 there are pass@1, pass@2$",
        ),
        ({"metric": "score/"}, "metric=score/ is none of score, "),
        ({"metric": "component/"}, "metric=component/ is none of score, "),
        (
            {"metric": "component/taste"},
            r"metric=component/taste: reward_service\.components has reward_model; name one of",
        ),
        ({"metric": "score/a"}, r"metric=score/a: without data\.mixture nothing has a source"),
    ],
)
def test_metrics_that_are_not_measured_are_refused(settings: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ValidationError) as raised:
        RunConfig.model_validate({"evaluate": settings})
    [error] = raised.value.errors()
    assert re.search(wrong, error["msg"]), error["msg"]


@cluster
def test_what_only_evaluates_is_no_part_of_the_score(
    workspace: RunConfig,
    gang: LearnerGang,
    reference: tuple[RunConfig, dict[str, Any]],
    tmp_path: Path,
) -> None:
    """A judge that is too slow for every response; what it says may say what is best."""
    length = {"kind": "function", "target": "tests.rewards:length", "evaluation_only": True}
    components = {name: c.model_dump() for name, c in workspace.reward_service.components.items()}
    config = run_copy(
        workspace,
        tmp_path,
        reward_service={"components": {**components, "length": length}},
        evaluate={**EVALUATED, "metric": "component/length"},
    )
    assert finish(config, gang)["weights_hash"] == reference[1]["weights_hash"]
    for path in sorted((config.run_dir / "trajectories").glob("*.parquet")):
        for said in pq.read_table(path)["score_components"].to_pylist():
            assert set(dict(said)) == set(components)
    found = evaluations(config)
    assert all(metrics["component/length"] >= 1 for _, metrics in found)
    assert all(metrics["component/length"] != metrics["score"] for _, metrics in found)
    assert all(metrics["unjudged/length"] == 0 for _, metrics in found)
    assert all(metrics["metric_error"] > 0 for _, metrics in found)
    best = {version: metrics["component/length"] for version, metrics in found}
    assert HeldOut.of(config, held_out_of(config)).scores == best
    trained = [line for line in read_lines(config.folder.metrics).lines if line.stage == "train"]
    assert not any("component/length" in line.metrics for line in trained)


def test_what_only_evaluates_needs_evaluations_and_another_that_scores() -> None:
    length = {"kind": "function", "target": "tests.rewards:length", "evaluation_only": True}
    with pytest.raises(ValidationError, match=r"nothing is evaluated; set evaluate\.every, or"):
        RunConfig.model_validate(
            {"reward_service": {"components": {"reward_model": {}, "length": length}}}
        )
    with pytest.raises(ValidationError, match="at least one component is needed that is not"):
        RunConfig.model_validate({"reward_service": {"components": {"length": length}}})


@cluster
def test_a_resumed_run_evaluates_no_version_twice(
    workspace: RunConfig,
    gang: LearnerGang,
    reference: tuple[RunConfig, dict[str, Any]],
    tmp_path: Path,
) -> None:
    config = run_copy(workspace, tmp_path, evaluate=EVALUATED)
    finish(config, gang, stop_after=2)
    facts = finish(config, gang)
    assert facts["weights_hash"] == reference[1]["weights_hash"]
    assert [version for version, _ in evaluations(config)] == [0, 2, 4]


@cluster
@pytest.mark.parametrize("kind", ["rollout", "reward"])
def test_a_worker_that_dies_in_an_evaluation_changes_no_figure(
    workspace: RunConfig,
    gang: LearnerGang,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    plain = run_copy(workspace, tmp_path / "a", evaluate=EVALUATED, train={"iterations": 1})
    finish(plain, gang)
    config = run_copy(workspace, tmp_path / "b", evaluate=EVALUATED, train={"iterations": 1})
    with Run(config, gang) as controller:
        measure = HeldOut.measure

        def killing(*args: Any) -> dict[str, float]:
            kill = when(lambda: True, lambda: kill_worker(controller, kind))
            try:
                return measure(*args)
            finally:
                kill.join()

        monkeypatch.setattr(HeldOut, "measure", killing)
        facts = controller.run()
    assert facts["worker_failures"] >= 1
    assert facts["rollouts_issued"] == facts["rollouts_trained"] == 16
    ours, theirs = (dict(evaluations(c)) for c in (config, plain))
    for version, metrics in theirs.items():
        for name in metrics.keys() - {"evaluate_seconds"}:
            assert ours[version][name] == metrics[name], (version, name)


@cluster
def test_asynchronous_rollouts_go_on_beside_it(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    train = {"max_staleness": 2, "iterations": 4, "ppg": None}
    config = run_copy(workspace, tmp_path, evaluate=EVALUATED, train=train)
    facts = finish(config, gang)
    assert facts["rollouts_trained"] + facts["rollouts_dropped"] == 64
    assert [version for version, _ in evaluations(config)] == [0, 2, 4]


@cluster
def test_training_ends_when_patience_does_and_the_best_stays(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    components = {"one": {"kind": "function", "target": "tests.rewards:one"}}
    config = run_copy(
        workspace,
        tmp_path,
        reward_service={"components": components},
        evaluate={"every": 1, "prompts": 4, "patience": 2},
        train={"keep_checkpoints": 1, "checkpoint_every": 1, "iterations": 9, "ppg": None},
    )
    facts = finish(config, gang)
    assert (facts["iterations"], facts["finished"]) == (2, True)
    assert held_out_scores(config.folder.metrics) == {0: 1.0, 1: 1.0, 2: 1.0}
    assert config.folder.policy.path.exists()
    assert is_final(recorded_facts(config.run_dir), config)
    assert standing_of(config).state == "finished"
    for patience in (None, 3):
        more = config.evaluate.model_copy(update={"patience": patience})
        patient = config.model_copy(update={"evaluate": more})
        assert not is_final(recorded_facts(config.run_dir), patient), patience
    # Gone on since, and stopped: what was recorded is of another time.
    checkpoints.write(config.run_dir, 3, lambda _: {"iteration": 3}, keep=2)
    assert not is_final(recorded_facts(config.run_dir), config)


@cluster
def test_the_best_versions_checkpoint_stays_whatever_is_kept(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = HeldOut.measure

    def peaking(self: HeldOut, version: int, *args: Any) -> dict[str, float]:
        metrics = measure(self, version, *args)
        metrics["score"] = self.scores[version] = {0: 0.1, 1: 0.9}.get(version, 0.5)
        return metrics

    monkeypatch.setattr(HeldOut, "measure", peaking)
    config = run_copy(
        workspace,
        tmp_path,
        evaluate={"every": 1, "prompts": 4},
        train={"keep_checkpoints": 1, "checkpoint_every": 0, "iterations": 4, "ppg": None},
    )
    with Run(config, gang) as controller:
        controller.run()
        assert controller.held_out.best == 1
    names = {p.name for p in config.folder.checkpoints.iterdir()}
    assert names == {config.folder.checkpoint(n).name for n in (1, 4)}
    assert choose(config, "best").iteration == 1


@cluster
def test_a_learner_that_dies_in_an_evaluation_leaves_the_workers_free(
    workspace: RunConfig,
    gang: LearnerGang,
    reference: tuple[RunConfig, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = run_copy(workspace, tmp_path, evaluate=EVALUATED, train={"checkpoint_every": 1})
    with Run(config, gang) as controller:
        go_on, died = controller.position.move_rollouts, []

        def dying() -> None:
            busy = [w for pool in controller.collector.pools for w in pool.workers.values()]
            if not died and controller.iteration == 2 and any(w.busy for w in busy):
                died.append(True)
                raise LearnerLost("a rank is gone")
            go_on()

        monkeypatch.setattr(controller.position, "move_rollouts", dying)
        facts = controller.run()
    assert died and facts["learner_restarts"] == 1
    events = [json.loads(line) for line in config.folder.events.read_text().splitlines()]
    [told] = [event["detail"] for event in events if event["what"] == "learner restarted"]
    assert told == "a rank is gone; 2 more may follow"
    assert facts["weights_hash"] == reference[1]["weights_hash"]
    assert facts["rollouts_issued"] == facts["rollouts_trained"] == 64
    assert {version for version, _ in evaluations(config)} == {0, 2, 4}


@cluster
def test_held_out_prompts_have_a_source_as_the_others(
    workspace: RunConfig, gang: LearnerGang, tmp_path: Path
) -> None:
    for name, words in (("sums", ["open", "read"]), ("held", ["file", "close"])):
        rows = [{"prompt": f"{word}:", "response": "x"} for word in words]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf8")
    config = run_copy(
        workspace,
        tmp_path / "runs",
        data={
            "prompts": [str(tmp_path / "sums.jsonl")],
            "evaluation": [str(tmp_path / "held.jsonl")],
            "mixture": {"sums": {}},
        },
        reward_service={
            "components": {"of": {"kind": "function", "target": "tests.rewards:of_source"}}
        },
        evaluate={"every": 1, "prompts": 2},
        train={"iterations": 1},
    )
    finish(config, gang)
    assert held_out_scores(config.folder.metrics) == {0: 4.0, 1: 4.0}


def test_the_best_checkpoint_is_kept_and_found(workspace: RunConfig, tmp_path: Path) -> None:
    config = run_copy(workspace, tmp_path)
    scores = {0: 0.0, 1: 0.2, 2: 0.9, 3: 0.3, 4: 0.4}
    best = None
    for step in range(1, 5):
        best = max((s for s in scores if s <= step), key=lambda s: scores[s])
        checkpoints.write(
            config.run_dir, step, lambda _, at=step: {"iteration": at}, keep=1, best=best
        )
    # One that was never evaluated is not compared.
    checkpoints.write(config.run_dir, 5, lambda _: {"iteration": 5}, keep=2, best=2)
    folders = sorted(p.name for p in config.folder.checkpoints.iterdir())
    assert folders == [config.folder.checkpoint(n).name for n in (2, 4, 5)]
    with config.folder.metrics.open("w", encoding="utf8") as file:
        for step, score in scores.items():
            for stage, shown in (("train", -score), ("held_out", score)):
                told = {"score": shown, "responses": 8.0}
                line = {"stage": stage, "step": step, "metrics": told}
                file.write(json.dumps(line) + "\n")
    chosen = choose(config, "best")
    assert chosen.iteration == 2
    assert "held-out score while training 0.9" in chosen.note
