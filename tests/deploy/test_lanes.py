"""Who worked when: lives out of events, and what was done in the last iterations."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import StorageError
from deploy.lanes import (
    ITERATIONS,
    MOST_LANES,
    Life,
    Stretch,
    lives_of,
    timeline_of,
    times_of,
)
from deploy.run_folder.activity import LEARNER, Activity, Span, read_activity
from deploy.run_folder.events import Happened
from deploy.run_folder.log_lines import Line


def span(worker: str, what: str, begin: float, end: float) -> Span:
    return Span(worker=worker, what=what, begin=begin, end=end)


def lines(*times: float) -> list[Line]:
    return [
        Line(stage="train", step=step, metrics={}, time=time) for step, time in enumerate(times, 1)
    ]


def life(name: str, begin: float, end: float | None = None, why: str = "") -> Life:
    return Life(name, None, [Stretch("working", begin, end, why)])


def test_what_was_done_and_the_gaps_between() -> None:
    spans = [
        span("rollout-0", "loading", 101.0, 102.0),
        span("rollout-0", "sampling", 102.0, 106.0),
        span("reward-0", "scoring", 104.0, 105.0),
        span(LEARNER, "learning", 106.0, 109.0),
        span(LEARNER, "publishing", 109.0, 110.0),
    ]
    lives = [life("rollout-0", 90.0), life("reward-0", 103.0)]
    found = timeline_of(spans, lives, lines(110.0), now=111.0)
    assert found is not None
    assert (found.begin, found.end, found.iterations) == (101.0, 111.0, [110.0])
    assert {lane.name: lane.spans for lane in found.lanes} == {
        LEARNER: [
            ("idle", 101.0, 106.0),
            ("learning", 106.0, 109.0),
            ("publishing", 109.0, 110.0),
            ("idle", 110.0, 111.0),
        ],
        "reward-0": [("idle", 103.0, 104.0), ("scoring", 104.0, 105.0), ("idle", 105.0, 111.0)],
        "rollout-0": [
            ("loading", 101.0, 102.0),
            ("sampling", 102.0, 106.0),
            ("idle", 106.0, 111.0),
        ],
    }
    assert found.lanes[0].words == "learning 30%, publishing 10%, idle 60%"
    assert found.roles["rollout"] == "loading 10%, sampling 40%, idle 50%"
    assert found.legend == ["loading", "sampling", "scoring", "learning", "publishing", "idle"]


def test_a_lost_worker_leaves_a_gap_and_one_that_left_does_not() -> None:
    spans = [span(LEARNER, "learning", 100.0, 110.0)]
    lives = [
        life("rollout-0", 100.0, 104.0, "died: killed by signal 9"),
        life("rollout-1", 100.0, 104.0, "left"),
        life("rollout-2", 106.0),
        life("rollout-3", 50.0, 60.0, "died: long ago"),
    ]
    found = timeline_of(spans, lives, lines(), now=110.0)
    assert found is not None
    assert {lane.name: lane.spans for lane in found.lanes[1:]} == {
        "rollout-0": [("idle", 100.0, 104.0), ("lost", 104.0, 110.0)],
        "rollout-1": [("idle", 100.0, 104.0)],
        "rollout-2": [("idle", 106.0, 110.0)],
    }


def test_a_name_that_is_given_again_is_lost_only_until_then() -> None:
    spans = [span(LEARNER, "learning", 100.0, 120.0)]
    again = Life(
        "rollout-0",
        None,
        [Stretch("working", 100.0, 104.0, "died: signal 9"), Stretch("working", 110.0)],
    )
    found = timeline_of(spans, [again], lines(), now=120.0)
    assert found is not None
    assert found.lanes[1].spans == [
        ("idle", 100.0, 104.0),
        ("lost", 104.0, 110.0),
        ("idle", 110.0, 120.0),
    ]
    assert found.lanes[1].words == "idle 70%, lost 30%"


def test_a_night_between_two_sittings_is_left_out() -> None:
    evening = [span(LEARNER, "learning", 10.0 * t, 10.0 * t + 5.0) for t in range(10)]
    morning = [span(LEARNER, "learning", 40_000.0, 40_010.0)]
    events = [
        Happened(time=0.0, worker="rollout-0", what="started", detail=""),
        Happened(time=0.1, worker="rollout-1", what="started", detail=""),
        Happened(time=39_990.0, worker="rollout-0", what="started", detail=""),
        Happened(time=39_991.0, worker="rollout-1", what="started", detail=""),
    ]
    log = lines(*(10.0 * t for t in range(10)), 40_010.0)
    lives = lives_of(events, {}, times_of(log, events))
    assert [life.stretches[0].end for life in lives] == [90.0, 90.0], "the last that was told"
    found = timeline_of([*evening, *morning], lives, log)
    assert found is not None
    assert (found.begin, found.end) == (40_000.0, 40_010.0)


def test_clocks_that_do_not_agree_draw_nothing() -> None:
    spans = [span(LEARNER, "learning", 100.0, 110.0)]
    assert timeline_of(spans, [], lines(), now=50.0) is None


def test_it_begins_some_whole_iterations_ago() -> None:
    spans = [span(LEARNER, "learning", float(t), t + 0.5) for t in range(100)]
    found = timeline_of(spans, [], lines(*(float(t) for t in range(10, 100, 10))), now=95.0)
    assert found is not None
    assert found.begin == 90.0 - 10.0 * ITERATIONS
    ended = timeline_of(spans, [], lines(*(float(t) for t in range(10, 100, 10))))
    assert ended is not None
    assert ended.end == 99.5, "a run that ended has no now"


def test_many_workers_and_calls_are_bounded() -> None:
    spans = [
        span(f"rollout-{i}", "sampling", 10.0 * t, 10.0 * t + 5.0)
        for t in range(20)
        for i in range(1000)
    ]
    found = timeline_of(spans, [life(f"rollout-{i}", 0.0) for i in range(1000)], lines(), now=200.0)
    assert found is not None
    assert len(found.lanes) == MOST_LANES + 1
    assert found.more == 1000 - len(found.lanes)
    assert sum(len(lane.spans) for lane in found.lanes) < 1000
    assert [lane.name for lane in found.lanes[:3]] == ["rollout-0", "rollout-1", "rollout-2"]


@given(
    st.lists(st.tuples(st.floats(0, 100), st.floats(0, 20)), max_size=12),
    st.lists(st.floats(0, 115), min_size=1, max_size=5, unique=True),
    st.booleans(),
)
def test_lanes_have_no_gap_and_no_overlap_while_somebody_lived(
    calls: list[tuple[float, float]], moments: list[float], died: bool
) -> None:
    """Lives one after another under one name: born, gone, born again ..."""
    moments.sort()
    stretches = [
        Stretch("working", begin, end, "died: signal 9" if died else "left")
        for begin, end in zip(moments[::2], [*moments[1::2], None], strict=False)
    ]
    spans = [span("rollout-0", "sampling", begin, begin + took) for begin, took in calls]
    spans.append(span(LEARNER, "learning", 0.0, 120.0))
    found = timeline_of(spans, [Life("rollout-0", None, stretches)], lines(), now=120.0)
    assert found is not None
    (lane,) = (lane for lane in found.lanes if lane.name == "rollout-0")
    alive = sum((s.end or 120.0) - s.begin for s in stretches)
    lived = sum(end - begin for what, begin, end in lane.spans if what != "lost")
    assert lived == pytest.approx(alive)
    for (_, _, end), (_, begin, _) in itertools.pairwise(lane.spans):
        assert begin == end if died else begin >= end


def test_the_file_keeps_its_newest_part(tmp_path: Path) -> None:
    path = tmp_path / "activity.jsonl"
    path.write_text('{"worker": "torn', encoding="utf8")
    activity = Activity(path, most_bytes=1000)
    for number in range(100):
        activity.add(span("rollout-0", "sampling", float(number), number + 0.5))
    activity.close()
    assert sum(part.stat().st_size for part in tmp_path.iterdir()) < 2200
    kept = read_activity(path)
    assert [s.begin for s in kept] == [float(n) for n in range(100 - len(kept), 100)]
    assert len(kept) >= 10
    with path.open("a", encoding="utf8") as file:
        file.write(json.dumps({"worker": "x"}) + '\n{"half')
    assert read_activity(path) == kept, "what is no line is left out"
    path.unlink()
    before = read_activity(path)
    assert before == kept[: len(before)]
    path.write_bytes((tmp_path / "activity.before.jsonl").read_bytes())
    assert read_activity(path) == before, "put aside between two looks"
    assert 0 < len(read_activity(path, most_bytes=300)) < 5, "the newest alone"


def test_what_is_under_way_is_known_until_it_ends(tmp_path: Path) -> None:
    activity = Activity(tmp_path / "activity.jsonl")
    activity.begin("rollout-0", "sampling")
    with activity.doing("learning"):
        now = activity.under_way()
        assert {(s.worker, s.what) for s in now} == {
            ("rollout-0", "sampling"),
            (LEARNER, "learning"),
        }
        assert all(s.end >= s.begin for s in now)
        time.sleep(0.01)
    activity.end("rollout-0", "evaluating")
    assert [s.what for s in activity.under_way()] == ["sampling"], "the evaluation's end is another"
    activity.end("rollout-0", "sampling")
    activity.end("rollout-7", "sampling")
    assert activity.under_way() == []
    with pytest.raises(ValueError), activity.doing("saving"):
        raise ValueError
    assert activity.under_way() == []
    activity.close()
    assert [s.what for s in read_activity(tmp_path / "activity.jsonl")] == ["learning"]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "activity.jsonl"
    path.symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"activity\.jsonl: cannot be written"):
        Activity(path).add(span("rollout-0", "sampling", 1.0, 2.0))
