"""Experience, its memory, packing, and how rows are dealt to ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import TrainingError
from common.wire.trajectory import ScoredTrajectory, to_table
from learner.batch.dealing import deal, deal_shared
from learner.batch.experience import Sequences, experience
from learner.batch.memory import AuxiliaryMemory
from learner.supervised.examples import EncodedPair
from learner.supervised.packing import pack, packed_batch

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=40)


def trajectory(index: int, response: list[int]) -> ScoredTrajectory:
    return ScoredTrajectory(
        rollout_id=f"000000-{index:06d}",
        group=index // 2,
        prompt_uid="u",
        prompt_text="",
        prompt_ids=[index + 5, 6],
        seed=index,
        response_ids=response,
        response_text="",
        behavior_logprobs=[-0.5 * index] * len(response),
        finish_reason="eos" if index % 2 else "length",
        policy_version=3,
        weights_fingerprint="",
        actor_id="",
        score=float(index),
        score_components={},
        ref_logprobs=[-1.0] * len(response),
        reward_version=0,
    )


def test_rows_are_in_rollout_order_whoever_came_first() -> None:
    rows = [trajectory(i, [7] * (i + 1)) for i in range(4)]
    late_first = [to_table(rows[2:], ScoredTrajectory), to_table(rows[:2], ScoredTrajectory)]
    batch = experience(late_first)
    assert batch.scores_N.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert batch.ended_N.tolist() == [False, True, False, True]
    assert batch.groups_N.tolist() == [0, 0, 1, 1]
    assert batch.mask_NR.sum(1).tolist() == [1, 2, 3, 4]
    assert batch.behavior_NR[3].tolist() == [-1.5] * 4
    assert batch.sequences.lengths == [3, 4, 5, 6]
    assert batch.versions == (3, 3, 3, 3)


def test_what_other_weights_sampled_is_not_trained_on() -> None:
    table = to_table([trajectory(0, [7])], ScoredTrajectory)
    with pytest.raises(TrainingError, match="000000-000000 was sampled from adapter ''"):
        experience([table], "policy")


@given(LENGTHS, st.integers(1, 4), st.integers(10, 200))
def test_every_row_is_dealt_once_and_ranks_keep_step(
    lengths: list[int], ranks: int, budget: int
) -> None:
    if len(lengths) < ranks:
        return  # refused by the configuration
    dealt = [
        deal(range(len(lengths)), lengths, ranks=ranks, rank=rank, budget=budget)
        for rank in range(ranks)
    ]
    real = sorted(row for shares in dealt for share in shares if share.real for row in share.rows)
    assert real == list(range(len(lengths)))
    assert len({len(shares) for shares in dealt}) == 1
    for share in (share for shares in dealt for share in shares):
        size = len(share.rows) * max(lengths[row] for row in share.rows)
        assert len(share.rows) == 1 or size <= budget


@given(LENGTHS, st.integers(1, 4), st.integers(10, 200))
def test_rows_that_share_prompts_are_dealt_once_and_ranks_keep_step(
    lengths: list[int], ranks: int, budget: int
) -> None:
    rows = range(0, len(lengths), 2)  # a minibatch
    prompts, responses = [[length % 3] for length in lengths], [[1] * n for n in lengths]
    dealt = [
        deal_shared(rows, prompts, responses, ranks=ranks, rank=rank, budget=budget)
        for rank in range(ranks)
    ]
    real = sorted(row for shares in dealt for share in shares if share.real for row in share.rows)
    assert real == list(rows)
    assert len({len(shares) for shares in dealt}) == 1
    for shares in dealt:
        assert [share.last for share in shares] == [False] * (len(shares) - 1) + [True]


def test_the_memory_comes_back_from_its_file(tmp_path: Path) -> None:
    memory = AuxiliaryMemory()
    for start in (0, 10):
        sequences = Sequences(prompts=[[start + 1], [2]], responses=[[3], [4, 5]])
        targets = torch.tensor([[0.5, 0.0], [1.5, 2.5]])
        memory.add(sequences, targets, [start, start], missed=start + 0.1)
    memory.save(tmp_path / "memory.parquet")
    found = AuxiliaryMemory.load(tmp_path / "memory.parquet")
    assert found == memory
    assert found.iterations == 2
    # 0.1 and 10.1 over six tokens are more than the targets' own variance.
    assert found.value_unit == pytest.approx((10.2 / 6) ** 0.5)
    assert found.versions == [0, 0, 10, 10]
    assert found.targets_NR.tolist() == [[0.5, 0.0], [1.5, 2.5]] * 2
    AuxiliaryMemory().save(tmp_path / "empty.parquet")
    assert AuxiliaryMemory.load(tmp_path / "empty.parquet") == AuxiliaryMemory()


@given(st.lists(st.tuples(st.integers(1, 10), st.integers(1, 10)), min_size=1, max_size=60))
def test_packing_keeps_every_document_whole_and_apart(sizes: list[tuple[int, int]]) -> None:
    pairs = [
        EncodedPair(prompt=[100 + i] * p, response=[500 + i] * r) for i, (p, r) in enumerate(sizes)
    ]
    rows = pack(pairs, 20)
    assert sorted(i for row in rows for i in row) == list(range(len(pairs)))
    batch = packed_batch(pairs, rows, 20)
    for row, members in enumerate(rows):
        for segment, index in enumerate(members):
            at = batch.segments_BT[row] == segment
            ids = batch.tokens_BT[row][at].tolist()
            assert ids == [*pairs[index].prompt, *pairs[index].response]
            assert batch.positions_BT[row][at].tolist() == list(range(len(ids)))
            trained = batch.tokens_BT.roll(-1, 1)[row][at & batch.target_mask_BT[row]].tolist()
            assert trained == pairs[index].response
    assert int(batch.target_mask_BT.sum()) == sum(r for _, r in sizes)
    assert not bool(batch.target_mask_BT[:, -1].any())
