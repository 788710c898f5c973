from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from common.config.run import RunConfig
from common.config.workers import RewardServiceConfig
from common.devices import compute_of
from common.errors import RewardError
from common.logprobs import Sampling
from common.models.build import build_scalar
from common.models.weight_files import save_weights
from common.wire.trajectory import SCHEMAS, Rollout, ScoredTrajectory, from_table, to_table
from reward_service.models import frozen_pass
from reward_service.service import RewardWorker
from tests.reward_service.endpoint import Endpoint, Reply, Rows, fine, first, scores
from tests.reward_service.samples import rollouts

FUNCTIONS = "tests.reward_service.functions"
MODEL = {"reward_model": {"kind": "model"}}
SPELLED = {"spelled": {"kind": "function", "target": f"{FUNCTIONS}:spelled"}}


def worker(
    config: RunConfig,
    components: dict[str, dict[str, Any]],
    *,
    merge: bool = True,
    budget: int = 60,
    reward_model: Path | None = None,
) -> RewardWorker:
    settings = RewardServiceConfig.model_validate(
        {"components": components, "micro_batch_tokens": budget}
    )
    trained = reward_model or config.run_dir / "reward_model" / "reward.safetensors"
    return RewardWorker(
        settings,
        config.model,
        str(config.run_dir / "sft" / "policy.safetensors"),
        str(trained) if any(c["kind"] == "model" for c in components.values()) else None,
        Sampling(temperature=0.8),
        compute_of(cpus=1),
        merge=merge,
    )


def table(records: list[Rollout]) -> pa.Table:
    return to_table(records, Rollout)


def http(endpoint: Endpoint, **changes: Any) -> dict[str, Any]:
    return {"kind": "http", "target": endpoint.url, "batch_size": 1, "max_retries": 0, **changes}


def test_the_score_is_the_weighted_sum_of_its_components(workspace: RunConfig) -> None:
    def behave(number: int, rows: Rows) -> Reply:
        return scores([(row["rollout_id"], 10.0 + float(row["response"])) for row in rows])

    records = rollouts(7)
    with Endpoint(behave) as endpoint:
        made = worker(
            workspace,
            {
                "reward_model": {"kind": "model", "weight": 0.5},
                "spelled": {**SPELLED["spelled"], "weight": -2.0},
                "remote": http(endpoint, weight=3.0),
            },
        )
        facts, out = made.score(table(records))
    expected, _ = frozen_pass(records, 60, made.reward_model, made.reference)
    assert len(set(expected)) == 7
    scored = from_table(out, ScoredTrajectory)
    for index, trajectory in enumerate(scored):
        assert trajectory.score_components == pytest.approx(
            {"reward_model": expected[index], "spelled": index, "remote": 10 + index}
        )
        assert trajectory.score == pytest.approx(
            0.5 * expected[index] - 2.0 * index + 3.0 * (10 + index), rel=1e-5
        )
        assert trajectory.reward_version == 0
    assert facts.dead_letters == {}
    assert facts.seconds > 0


def test_a_trajectory_is_its_rollout_and_more(workspace: RunConfig) -> None:
    records = rollouts(5)
    made = worker(workspace, MODEL)
    facts, out = made.score(table(records))
    _, logprobs = frozen_pass(records, 60, None, made.reference)
    scored = from_table(out, ScoredTrajectory)
    assert out.select(SCHEMAS[Rollout].names).equals(table(records)), "nothing of it changed"
    assert facts.rollout_ids == tuple(r.rollout_id for r in records)
    for trajectory, found in zip(scored, logprobs, strict=True):
        assert len(trajectory.ref_logprobs) == len(trajectory.response_ids)
        assert all(value < 0 for value in trajectory.ref_logprobs)
        assert trajectory.ref_logprobs == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize("merge", [True, False])
def test_several_tables_become_one_in_their_order(workspace: RunConfig, merge: bool) -> None:
    tables = [
        rollouts(3, seed=1, prefix="9"),
        rollouts(4, seed=2, prefix="2"),
        rollouts(1, seed=3, prefix="5"),
    ]
    made = worker(workspace, {**MODEL, **SPELLED}, merge=merge)
    facts, out = made.score(*map(table, tables))
    alone = [t for part in tables for t in from_table(made.score(table(part))[1], ScoredTrajectory)]
    scored = from_table(out, ScoredTrajectory)
    ids = [r.rollout_id for part in tables for r in part]
    assert list(facts.rollout_ids) == [t.rollout_id for t in scored] == ids
    for together, single in zip(scored, alone, strict=True):
        assert together.score == pytest.approx(single.score, rel=1e-4, abs=1e-5)
        assert together.score_components["spelled"] == float(together.response_text)
        assert together.ref_logprobs == pytest.approx(single.ref_logprobs, rel=1e-4, abs=1e-5)
    if not merge:
        assert scored == alone, "to the last bit, whatever arrived together"


def test_what_functions_say_of_tokens_and_parts_is_weighted_and_logged(
    workspace: RunConfig,
) -> None:
    target = "tests.reward_service.functions"
    made = worker(
        workspace,
        {
            "steps": {"kind": "function", "target": f"{target}:by_token", "weight": 0.5},
            "said": {"kind": "function", "target": f"{target}:awaited"},
        },
    )
    records = [replace(r, columns=json.dumps({"answer": i})) for i, r in enumerate(rollouts(3))]
    _, out = made.score(table(records))
    scored = from_table(out, ScoredTrajectory)
    for trajectory, record in zip(scored, records, strict=True):
        ended = 2.0 * (record.finish_reason != "length")
        length = len(record.response_text)
        assert trajectory.columns == record.columns
        assert trajectory.token_scores == [0.5] + [0.0] * (len(record.response_ids) - 1)
        assert trajectory.score == pytest.approx(0.5 * (1.0 + ended) + length)
        assert trajectory.score_components == {
            "steps": 1.0 + ended,
            "said": length,
            "said/group": record.group,
        }
        assert trajectory.score_reason == "said: its length"


def test_no_table_gives_an_empty_one(workspace: RunConfig) -> None:
    facts, out = worker(workspace, {**MODEL, **SPELLED}).score()
    assert (facts.rollout_ids, facts.dead_letters) == ((), {})
    assert out.num_rows == 0 and out.schema.equals(SCHEMAS[ScoredTrajectory])


def test_without_a_model_component_no_reward_model_is_needed(workspace: RunConfig) -> None:
    made = worker(workspace, SPELLED)
    _, out = made.score(table(rollouts(3)))
    assert made.reward_model is None
    assert out["score"].to_pylist() == [0.0, 1.0, 2.0]
    assert all(values for values in out["ref_logprobs"].to_pylist())


def test_each_call_says_what_its_remote_components_counted_in_it(workspace: RunConfig) -> None:
    with Endpoint(first(Reply(status=500))) as endpoint:
        remote = http(endpoint, max_retries=1, max_concurrency=1)
        made = worker(workspace, {**SPELLED, "remote": remote})
        facts = [made.score(table(rollouts(3)))[0].http for _ in range(2)]
    counted = ("requests", "retries", "failures", "dead_letters", "circuit_opened")
    names = [f"http/remote/{count}" for count in counted]
    assert facts[0] == dict(zip(names, (4, 1, 1, 0, 0), strict=True))
    assert facts[1] == dict(zip(names, (3, 0, 0, 0, 0), strict=True))


def test_a_dead_letter_is_dropped_named_and_costs_no_other(
    workspace: RunConfig, tmp_path: Path
) -> None:
    def behave(number: int, rows: Rows) -> Reply:
        return Reply(status=400) if rows[0]["response"] in "14" else fine(number, rows)

    file = tmp_path / "dead.jsonl"
    with Endpoint(behave) as endpoint:
        remote = http(endpoint, dead_letters=str(file))
        made = worker(workspace, {**SPELLED, **MODEL, "remote": remote})
        facts, out = made.score(table(rollouts(6)))
    lost = ["0-000001", "0-000004"]
    assert facts.dead_letters == dict.fromkeys(lost, "remote: HTTP 400")
    kept = [f"0-{i:06d}" for i in (0, 2, 3, 5)]
    assert list(facts.rollout_ids) == out["rollout_id"].to_pylist() == kept
    for trajectory in from_table(out, ScoredTrajectory):
        number = float(trajectory.response_text)
        components = trajectory.score_components
        assert components["spelled"] == components["remote"] == number
        assert trajectory.score == pytest.approx(2 * number + components["reward_model"], rel=1e-5)
    lines = [json.loads(line) for line in file.read_text(encoding="utf8").splitlines()]
    assert sorted(line["rollout_id"] for line in lines) == lost


def test_what_only_evaluates_is_asked_of_sampled_held_out_answers_alone(
    workspace: RunConfig,
) -> None:
    """A judge that is too slow for all; what it refuses stays, without a value of its own."""
    records = [replace(record, greedy=i == 3) for i, record in enumerate(rollouts(5))]

    def behave(number: int, rows: Rows) -> Reply:
        if rows[0]["response"] == "1":
            return Reply(status=400)
        return scores([(row["rollout_id"], 1.0) for row in rows])

    with Endpoint(behave) as endpoint:
        judge = http(endpoint, evaluation_only=True, weight=5.0)
        made = worker(workspace, {**SPELLED, "judge": judge})
        facts, trained = made.score(table(records))
        assert len(endpoint.calls) == 0
        held, evaluated = made.score_held_out(table(records))
        assert len(endpoint.calls) == 4
    assert facts.dead_letters == held.dead_letters == {}
    assert held.scores == facts.scores
    of = [row.score_components for row in from_table(evaluated, ScoredTrajectory)]
    assert ["judge" in said for said in of] == [True, False, True, False, True]
    assert not any("judge" in r.score_components for r in from_table(trained, ScoredTrajectory))


def test_when_all_are_given_up_the_table_is_empty(workspace: RunConfig) -> None:
    with Endpoint(lambda number, rows: Reply(status=500)) as endpoint:
        made = worker(workspace, {**MODEL, "remote": http(endpoint, max_concurrency=1)})
        facts, out = made.score(table(rollouts(2)))
    assert facts.dead_letters == dict.fromkeys(["0-000000", "0-000001"], "remote: HTTP 500")
    assert facts.rollout_ids == ()
    assert out.num_rows == 0 and out.schema.equals(SCHEMAS[ScoredTrajectory])


def test_http_settings_reach_the_scorer(
    workspace: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TALIPOT_TEST_TOKEN", "s3cret")
    with Endpoint(fine) as endpoint:
        remote = http(endpoint, batch_size=4, token_env="TALIPOT_TEST_TOKEN", max_concurrency=1)
        worker(workspace, {"remote": remote}).score(table(rollouts(6)))
    assert [len(call.ids) for call in endpoint.calls] == [4, 2]
    assert {call.authorization for call in endpoint.calls} == {"Bearer s3cret"}


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("second_is_nan", rf"{FUNCTIONS}:second_is_nan returned nan for rollout 0-000001"),
        ("beyond_float32", r"component 'extra' scored rollout 0-000000 as 1e\+300"),
        ("raising", rf"{FUNCTIONS}:raising raised KeyError"),
    ],
)
def test_a_broken_function_stops_the_batch_and_is_named(
    workspace: RunConfig, name: str, named: str
) -> None:
    extra = {"extra": {"kind": "function", "target": f"{FUNCTIONS}:{name}"}}
    with pytest.raises(RewardError, match=named):
        worker(workspace, {**MODEL, **extra}).score(table(rollouts(3)))


def test_a_reward_model_that_says_nan_stops_the_batch_and_is_named(
    workspace: RunConfig, tmp_path: Path
) -> None:
    network = build_scalar(workspace.model)
    network.initialise(0)
    with torch.no_grad():
        network.head.bias.fill_(float("nan"))
    weights = tmp_path / "reward.safetensors"
    save_weights(network.state_dict(), weights, {})
    made = worker(workspace, MODEL, reward_model=weights)
    with pytest.raises(
        RewardError, match="component 'reward_model' scored rollout 0-000000 as nan"
    ):
        made.score(table(rollouts(2)))


def test_a_model_component_needs_a_reward_model(workspace: RunConfig) -> None:
    with pytest.raises(ValueError, match="'helpful' needs a trained reward model"):
        RewardWorker(
            RewardServiceConfig.model_validate({"components": {"helpful": {"kind": "model"}}}),
            workspace.model,
            str(workspace.run_dir / "sft" / "policy.safetensors"),
            None,
            Sampling(),
            compute_of(cpus=1),
            merge=True,
        )


def test_a_table_of_another_kind_is_refused(workspace: RunConfig) -> None:
    scored = worker(workspace, SPELLED).score(table(rollouts(1)))[1]
    with pytest.raises(ValueError, match="not a table of Rollout"):
        worker(workspace, SPELLED).score(scored)
