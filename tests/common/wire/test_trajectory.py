"""Small records and layouts: trajectories, batches, metrics."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.batching import micro_batches, pad_rows, sequence_batch, shared_micro_batches
from common.errors import TrainingError
from common.metrics import Metric, mean, merge, read, require_finite
from common.wire.trajectory import (
    Rollout,
    RolloutRequest,
    ScoredTrajectory,
    extend,
    from_table,
    to_table,
)

IDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6)
FLOATS = st.floats(-100, 100, width=32)


@st.composite
def trajectories(draw: st.DrawFn) -> ScoredTrajectory:
    response = draw(IDS)
    numbers = st.lists(FLOATS, min_size=len(response), max_size=len(response))
    return ScoredTrajectory(
        rollout_id=draw(st.text(min_size=1, max_size=5)),
        group=draw(st.integers(0, 99)),
        prompt_uid=draw(st.text(max_size=5)),
        prompt_text=draw(st.text(max_size=5)),
        prompt_ids=draw(IDS),
        seed=draw(st.integers(0, 2**64 - 1)),
        columns=draw(st.none() | st.just('{"answer": 42}')),
        adapter=draw(st.sampled_from(["", "policy"])),
        response_ids=response,
        response_text=draw(st.text(max_size=5)),
        behavior_logprobs=draw(numbers),
        unfiltered_logprobs=draw(st.none() | numbers),
        finish_reason=draw(st.sampled_from(["eos", "length"])),
        policy_version=draw(st.integers(0, 2**40)),
        weights_fingerprint="f",
        actor_id="a",
        score=draw(FLOATS),
        score_components=draw(st.dictionaries(st.text(max_size=3), FLOATS, max_size=2)),
        token_scores=draw(st.none() | numbers),
        score_reason=draw(st.none() | st.text(max_size=5)),
        ref_logprobs=draw(numbers),
        reward_version=0,
    )


@given(st.lists(trajectories(), min_size=1, max_size=3))
def test_trajectories_come_back_from_arrow(rows: list[ScoredTrajectory]) -> None:
    assert from_table(to_table(rows, ScoredTrajectory), ScoredTrajectory) == rows


@given(trajectories())
def test_lists_that_disagree_are_refused(row: ScoredTrajectory) -> None:
    for name in ("behavior_logprobs", "unfiltered_logprobs", "ref_logprobs", "token_scores"):
        bad = dataclasses.replace(row, **{name: [*(getattr(row, name) or row.response_ids), 0.0]})
        with pytest.raises(ValueError, match=name):
            to_table([bad], ScoredTrajectory)
    for name in ("prompt_ids", "response_ids"):
        with pytest.raises(ValueError, match="empty"):
            to_table([dataclasses.replace(row, **{name: []})], ScoredTrajectory)


@given(trajectories())
def test_where_nothing_filters_the_policys_logprobs_are_the_behaviours(
    row: ScoredTrajectory,
) -> None:
    whole = row.unfiltered_logprobs
    assert row.policy_logprobs == (row.behavior_logprobs if whole is None else whole)


def test_a_table_of_another_kind_is_refused() -> None:
    request = RolloutRequest(
        rollout_id="a",
        group=0,
        prompt_uid="u",
        prompt_text="t",
        prompt_ids=[1],
        seed=1,
        adapter="x",
    )
    assert from_table(to_table([request], RolloutRequest), RolloutRequest) == [request]
    with pytest.raises(ValueError, match="not a table of Rollout"):
        from_table(to_table([request], RolloutRequest), Rollout)
    made = extend(
        request,
        Rollout,
        response_ids=[1],
        response_text="x",
        behavior_logprobs=[0.0],
        finish_reason="eos",
        policy_version=0,
        weights_fingerprint="",
        actor_id="",
    )
    assert (made.prompt_ids, made.adapter) == (request.prompt_ids, "x")


@given(trajectories())
def test_a_later_record_shares_the_lists_of_the_earlier_one(row: ScoredTrajectory) -> None:
    # A copy of every token list was most of the time that a reward worker spent on a rollout.
    request = extend(row, RolloutRequest)
    assert dataclasses.asdict(request) == {
        field.name: getattr(row, field.name) for field in dataclasses.fields(RolloutRequest)
    }
    later = {
        field.name: getattr(row, field.name)
        for field in dataclasses.fields(ScoredTrajectory)
        if field.name not in {known.name for known in dataclasses.fields(RolloutRequest)}
    }
    made = extend(request, ScoredTrajectory, **later)
    assert made == row
    for name in ("prompt_ids", "response_ids", "behavior_logprobs", "ref_logprobs"):
        assert getattr(made, name) is getattr(row, name), name


@given(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=5))
def test_a_batch_reads_each_response_token_from_the_position_before_it(
    rows: list[tuple[list[int], list[int]]],
) -> None:
    batch = sequence_batch([p for p, _ in rows], [r for _, r in rows])
    for row, (prompt, response) in enumerate(rows):
        assert batch.tokens_BT[row, : len(prompt) + len(response)].tolist() == prompt + response
        assert batch.response_mask_BR[row].sum() == len(response)
        for t, token in enumerate(response):
            assert batch.response_BR[row, t] == token
            assert batch.tokens_BT[row, batch.predict_BR[row, t] + 1] == token
        assert batch.tokens_BT[row, batch.last_B[row]] == response[-1]


def test_empty_sequences_are_refused() -> None:
    for prompts, responses in (([[]], [[1]]), ([[1]], [[]])):
        with pytest.raises(ValueError, match="at least one"):
            sequence_batch(prompts, responses)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 200))
def test_micro_batches_hold_every_row_once_within_the_budget(
    lengths: list[int], budget: int
) -> None:
    groups = micro_batches(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[i] for i in group)
        assert len(group) == 1 or len(group) * longest <= budget


@given(st.lists(st.integers(1, 900), min_size=1, max_size=7), st.integers(1, 2000))
def test_micro_batches_are_the_cheapest_grouping(lengths: list[int], budget: int) -> None:
    """Against every way to cut the sorted lengths; a pass costs 256 padded tokens."""

    def cost(groups: list[list[int]]) -> int:
        return sum(256 + len(group) * max(lengths[i] for i in group) for group in groups)

    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    ways = []
    for cuts in itertools.product([False, True], repeat=len(order) - 1):
        groups = [[order[0]]]
        for index, cut in zip(order[1:], cuts, strict=True):
            groups.append([index]) if cut else groups[-1].append(index)
        if all(len(g) == 1 or len(g) * lengths[g[0]] <= budget for g in groups):
            ways.append(cost(groups))
    assert cost(micro_batches(lengths, budget)) == min(ways)


@given(
    st.lists(st.tuples(st.sampled_from([(1,), (2, 3), (4,) * 9]), st.integers(1, 20)), min_size=1),
    st.integers(1, 60),
    st.integers(1, 3),
)
def test_rows_of_one_prompt_stay_together(
    rows: list[tuple[tuple[int, ...], int]], budget: int, ranks: int
) -> None:
    prompts, responses = [p for p, _ in rows], [[0] * n for _, n in rows]
    by_rank = shared_micro_batches(prompts, responses, budget, ranks)
    groups = [group for own in by_rank for group in own]
    assert len(by_rank) == ranks
    assert sorted(row for group in groups for row in group) == list(range(len(rows)))

    def size(group: list[int]) -> int:
        return sum(map(len, {prompts[i] for i in group})) + sum(len(responses[i]) for i in group)

    assert all(len(group) == 1 or size(group) <= budget for group in groups)
    if ranks == 1:
        for prompt in set(prompts):
            whole = [i for i, other in enumerate(prompts) if other == prompt]
            if size(whole) <= min(budget, size(list(range(len(rows))))):
                assert any(set(whole) <= set(group) for group in groups)
        # No two groups would fit in one.
        ordered = sorted(map(size, groups))
        assert len(ordered) < 2 or ordered[0] + ordered[1] > budget


def test_a_prompt_of_all_rows_is_split_over_ranks() -> None:
    by_rank = shared_micro_batches([[1, 2]] * 8, [[3] * 4] * 8, 1000, ranks=2)
    assert [[len(group) for group in own] for own in by_rank] == [[4], [4]]


def test_padding_of_uniform_lengths_is_under_a_tenth() -> None:
    lengths = np.random.default_rng(0).integers(8, 129, 512).tolist()
    padded = sum(len(g) * max(lengths[i] for i in g) for g in micro_batches(lengths, 8192))
    assert 1 - sum(lengths) / padded < 0.1


def test_rows_are_padded_on_the_right() -> None:
    assert pad_rows([[1.0], [2.0, 3.0]], 3).tolist() == [[1, 0, 0], [2, 3, 0]]
    assert pad_rows([[1.0]], 1).dtype == torch.float32


def test_means_merge_by_their_counts() -> None:
    merged = merge([{"loss": mean(2.0, 1), "n": Metric(1.0, how="sum")}, {"loss": mean(1.0, 3)}])
    assert read(merged) == {"loss": 0.75, "n": 1.0}
    assert Metric(3.0, how="max").merge(Metric(2.0, how="max")).read() == 3.0
    assert Metric(3.0, how="sum").merge(Metric(2.0, how="sum")).read() == 5.0
    assert math.isnan(mean(0.0, 0).read())
    with pytest.raises(ValueError, match="cannot merge"):
        Metric(1.0, how="max").merge(Metric(1.0))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stops_the_run_and_says_where(value: float) -> None:
    assert require_finite("loss", 1.5, "step 3") == 1.5
    with pytest.raises(TrainingError, match=r"loss became .* at step 3"):
        require_finite("loss", value, "step 3")
