"""Score against KL, and best-of-N of the first policy."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError
from common.run_folder import RunFolder
from deploy.evaluation.frontier import best_of_first, frontier, mean_of_best
from deploy.evaluation.report import write_report


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6), st.data())
def test_the_best_of_n_is_the_mean_over_all_choices(
    scores: list[float], data: st.DataObject
) -> None:
    n = data.draw(st.integers(1, len(scores)))
    choices = list(itertools.combinations(scores, n))
    expected = sum(max(choice) for choice in choices) / len(choices)
    assert mean_of_best(scores, n) == pytest.approx(expected, abs=1e-9)


def write_first(folder: RunFolder, groups: list[list[float]]) -> None:
    path = folder.trajectories(0)
    path.parent.mkdir(parents=True)
    rows = [(group, score) for group, scores in enumerate(groups) for score in scores]
    table = pa.table({"group": [g for g, _ in rows], "score": [s for _, s in rows]})
    pq.write_table(table, path)


def test_best_of_the_first_iteration(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert best_of_first(folder) == []
    write_first(folder, [[0.0, 1.0, 2.0, 3.0, 9.0], [1.0, 1.0, 1.0, 5.0]])
    found = best_of_first(folder)
    assert [best.n for best in found] == [1, 2, 4], "as many as the smallest group has"
    assert found[0].score == pytest.approx((3.0 + 2.0) / 2)
    assert found[0].kl == 0.0
    assert found[2].score == pytest.approx(((4 * 9.0 + 3.0) / 5 + 5.0) / 2)
    assert found[2].kl == pytest.approx(math.log(4) - 0.75)
    folder.trajectories(0).write_bytes(b"PAR1")
    with pytest.raises(DataError, match="damaged"):
        best_of_first(folder)


def test_the_report_draws_it(tmp_path: Path) -> None:
    lines = [
        {"stage": "train", "step": i, "time": 1.0 * i, "metrics": {"score": i / 7, "kl": i / 3}}
        for i in range(1, 9)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf8")
    page = write_report(tmp_path).read_text(encoding="utf8")
    assert "<figcaption>Score against KL, nats</figcaption>" in page
    steps = {line["step"]: line["metrics"] for line in lines}
    write_first(RunFolder(tmp_path), [[0.0, 1.0], [1.0, 2.0]])
    page = write_report(tmp_path).read_text(encoding="utf8")
    assert "best of 1 to 2 of the first policy" in page
    assert frontier(RunFolder(tmp_path), {1: {"score": 1.0, "kl": 0.1}}) is None
    assert "best of" not in frontier(RunFolder(tmp_path), steps, chosen=True).title
    RunFolder(tmp_path).trajectories(0).write_bytes(b"PAR1")
    page = write_report(tmp_path).read_text(encoding="utf8")
    assert "the first trajectories cannot be read" in page
    still = {i: {"score": 1.0, "kl": 0.0} for i in range(9)}
    assert frontier(RunFolder(tmp_path), still) is None, "nothing has moved"
