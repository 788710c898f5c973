"""The live page's server: what it answers, to whom, and that it only reads."""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path

import httpx
import pytest

from common.config.run import RunConfig
from common.errors import ConfigError, DataError
from deploy.feedback.store import Store
from deploy.run_folder.log_lines import Follower, read_lines
from deploy.watch.runs import WatchedRun
from deploy.watch.server import runs_in
from tests.deploy.commands import Run, refused
from tests.deploy.feedback.rounds import plain, round_in
from tests.deploy.watch.served import event, log, log_samples, metrics_of, run_folder, served

HOSTILE = "<script>alert(1)</script> \x1b[31mred \u202egnp"


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_it_tells_what_the_folder_says_and_leaves_it_as_it_was(
    workspace: RunConfig, tmp_path: Path
) -> None:
    config = run_folder(workspace, tmp_path)
    log_samples(config, 5, ["file", HOSTILE])
    before = tree(config.run_dir)
    with served([config.run_dir]) as url, httpx.Client(base_url=url) as client:
        assert client.get("api/runs").json() == [config.name]
        state = client.get("api/runs/0/state").json()
        assert state["standing"]["step"] == 6
        assert {t["metric"]: t["value"] for t in state["tiles"]}["score"] == metrics_of(6)["score"]
        panels = client.get("api/runs/0/panels/outcome").json()["panels"]
        kl = next(panel for panel in panels if panel["title"] == "KL to the reference")
        assert kl["curves"][0]["values"] == [metrics_of(i)["kl"] for i in range(1, 7)]

        found = client.get("api/runs/0/samples?order=best").json()
        assert found["iteration"] == 5
        assert [s["rollout_id"] for s in found["samples"]] == ["000005-000001", "000005-000000"]
        shown = found["samples"][0]["response"]
        assert shown == "<script>alert(1)</script> \\x1b[31mred \\u202egnp"
        one = client.get("api/runs/0/samples/000005-000000").json()
        assert [t["advantage"] for t in one["tokens"]] == [-t for t in range(len(one["tokens"]))]
    assert tree(config.run_dir) == before


def test_lanes_tell_each_workers_life(workspace: RunConfig, tmp_path: Path) -> None:
    config = run_folder(workspace, tmp_path)
    event(config, "rollout-0", "draining", "scaled to 1", 140.0)
    event(config, "rollout-0", "left", "", 150.0)
    lanes = {lane["name"]: lane for lane in WatchedRun(config.run_dir).workers()["lanes"]}
    assert [(s["from"], s["to"], s["state"]) for s in lanes["rollout-0"]["spans"]] == [
        (100.0, 140.0, "working"),
        (140.0, 150.0, "draining"),
    ]
    assert lanes["rollout-1"]["spans"] == [
        {"from": 100.1, "to": 130.0, "state": "working", "end": "died: killed by signal 9"}
    ]
    assert lanes["rollout-2"]["spans"][-1]["to"] == 160.0, "the log's last line: nobody works"
    assert {lane["state"] for lane in lanes.values()} == {"gone"}


def test_it_tells_what_workers_are_at(workspace: RunConfig, tmp_path: Path) -> None:
    config = run_folder(workspace, tmp_path)
    with served([config.run_dir]) as url, httpx.Client(base_url=url) as client:
        found = client.get("api/runs/0/workers").json()["timeline"]
    assert (found["begin"], found["end"]) == (130.0, 160.0), "the last three iterations"
    assert found["iterations"] == [130.0, 140.0, 150.0, 160.0]
    lanes = {lane["name"]: lane for lane in found["lanes"]}
    assert list(lanes) == ["learner", "rollout-0", "rollout-1", "rollout-2"]
    assert lanes["learner"]["spans"][:3] == [
        ["idle", 130.0, 136.0],
        ["learning", 136.0, 139.0],
        ["publishing", 139.0, 140.0],
    ]
    assert lanes["rollout-0"]["words"] == "loading 10%, sampling 50%, idle 40%"
    assert lanes["rollout-1"]["spans"] == [["lost", 130.0, 160.0]]
    assert lanes["rollout-2"]["spans"] == [["idle", 134.0, 160.0]]
    config.folder.activity.unlink()
    assert WatchedRun(config.run_dir).workers()["timeline"] is None, "of an earlier version"


def test_it_tells_how_a_round_of_feedback_is(workspace: RunConfig, tmp_path: Path) -> None:
    config = run_folder(workspace, tmp_path)
    with served([config.run_dir]) as url:
        state = httpx.get(f"{url}api/runs/0/state").json()
        assert "feedback" not in state["tabs"] and state["feedback"] == []
        assert httpx.get(f"{url}api/runs/0/feedback").status_code == 422
        made = round_in(config.run_dir, plain(30), overlap_share=0.0, repeat_share=0.0)
        state = httpx.get(f"{url}api/runs/0/state").json()
        assert "feedback" in state["tabs"]
        told = httpx.get(f"{url}api/runs/0/feedback").json()
        assert (told["round"], told["pairs"], told["left"], told["rows"]) == (1, 30, 30, [])
        store = Store(made.answers)
        store.welcome("ann")
        for _ in range(20):  # always the left one
            task = store.next_task("ann")
            assert task is not None
            store.submit("ann", task.key, step=0, seconds=1.0)
        store.close()
        later = httpx.get(f"{url}api/runs/0/state").json()
        assert later["feedback"] != state["feedback"], "the page is to ask again"
        told = httpx.get(f"{url}api/runs/0/feedback").json()
        assert told["told"] != later["feedback"], "it is of before, and the page is to see that"
        time.sleep(3.2)
        told = httpx.get(f"{url}api/runs/0/feedback").json()
        assert told["told"][2:] == later["feedback"][2:]
        assert (told["answered"], told["left"], told["rounds"]) == (20, 10, [1])
        assert told["per_hour"] > 20 and told["seconds_left"] < 1800
        assert any("ann prefers the left side in 100% of 20" in text for text in told["concerns"])


def test_what_is_wrong_is_one_line(workspace: RunConfig, tmp_path: Path) -> None:
    config = run_folder(workspace, tmp_path)
    with served([config.run_dir]) as url, httpx.Client(base_url=url) as client:
        for path, says in (
            ("samples", "no trajectory is logged"),
            ("samples?order=bset", "no trajectory is logged"),
            ("samples?iteration=x", "whole numbers"),
            ("samples/best", "ITERATION-NUMBER"),
        ):
            answer = client.get(f"api/runs/0/{path}")
            assert answer.status_code == 422
            assert says in answer.json()["error"]
        for path in (
            "api/runs/1/state",
            "api/runs/0/panels/nothing",
            "page/none.js",
            "page/server.py",
        ):
            assert client.get(path).status_code == 404
        assert client.post("api/runs/0/state").status_code == 405


def test_only_this_machine_by_its_own_name(workspace: RunConfig, tmp_path: Path) -> None:
    config = run_folder(workspace, tmp_path)
    with served([config.run_dir]) as url:
        answer = httpx.get(url)
        assert answer.status_code == 200
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert httpx.get(url, headers={"Host": "localhost:1"}).status_code == 200
        elsewhere = httpx.get(url, headers={"Host": "evil.example"})
        assert elsewhere.status_code == 403
        assert "default-src 'none'" in elsewhere.headers["Content-Security-Policy"]


def test_elsewhere_it_asks_for_its_token(workspace: RunConfig, tmp_path: Path) -> None:
    config = run_folder(workspace, tmp_path)
    with served([config.run_dir], host="0.0.0.0") as url:
        named, _, token = url.partition("?token=")
        assert "0.0.0.0" not in named
        page = re.sub(r"//[^:/]+", "//127.0.0.1", named)
        assert len(token) >= 32
        for path in ("", "api/runs", "page/page.js"):
            assert httpx.get(page + path).status_code == 403
        assert httpx.get(page, params={"token": token[:-1] + "é"}).status_code == 403
        with httpx.Client() as client:
            first = client.get(page, params={"token": token})
            assert (first.status_code, first.headers["Location"]) == (302, "/")
            cookie = first.headers["Set-Cookie"]
            assert "HttpOnly" in cookie and "SameSite=Lax" in cookie
            assert client.get(page + "api/runs").json() == [config.name]
            name = cookie.partition("=")[0]
            assert httpx.get(page, cookies={name: "another"}).status_code == 403


def test_the_command_refuses_what_it_cannot_show(
    run: Run, workspace: RunConfig, tmp_path: Path
) -> None:
    config = run_folder(workspace, tmp_path)
    refused(run("watch", str(tmp_path / "none")), 3, "not a run")
    with served([config.run_dir]) as url:
        port = url.rstrip("/").rpartition(":")[2]
        refused(run("watch", str(config.run_dir), "--port", port), 2, f"port {port}", "in use")
    refused(run("watch", str(config.run_dir), "--host", "203.0.113.1"), 2, "cannot listen")


def test_a_folder_of_runs_is_all_of_them(workspace: RunConfig, tmp_path: Path) -> None:
    one = run_folder(workspace, tmp_path / "a")
    two = one.run_dir.rename(one.run_dir.parent / "two")
    run_folder(workspace, tmp_path / "b").run_dir.rename(two.parent / "newest")
    told: list[str] = []
    assert [run.name for run in runs_in([two.parent], told.append)] == ["newest", "two"]
    (two / "config.yaml").write_text("name: cut", encoding="utf8")
    assert [run.name for run in runs_in([two.parent], told.append)] == ["newest"]
    assert len(told) == 1 and "two/config.yaml: empty or cut off" in told[0]
    for paths in ([tmp_path], [two]):
        with pytest.raises(DataError):
            runs_in(paths, told.append)


def test_a_log_is_followed(workspace: RunConfig, tmp_path: Path) -> None:
    config = run_folder(workspace, tmp_path, iterations=2)
    path = config.folder.metrics
    follower = Follower(path)
    assert follower.log() == read_lines(path)
    with path.open("a", encoding="utf8") as file:
        file.write('{"stage": "train", "st')
    assert follower.log() == read_lines(path)
    assert follower.log().torn
    with path.open("a", encoding="utf8") as file:
        file.write('ep": 3, "metrics": {}}\nno line\n')
    assert follower.log() == read_lines(path)
    assert len(follower.log().damaged) == 1
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])  # the end was lost with a power cut
    log(config, "train", 9, {"score": 1.0})
    assert follower.log() == read_lines(path)
    path.write_bytes(b"x" * len(raw) + b"\n" + raw)  # another file, and a longer one
    assert follower.log() == read_lines(path)
    path.unlink()
    assert follower.log() == read_lines(path)
    log(config, "train", 1, {"score": 1.0})
    assert follower.log() == read_lines(path)


def test_following_a_long_log_reads_what_is_new(workspace: RunConfig, tmp_path: Path) -> None:
    config = run_folder(workspace, tmp_path, iterations=0)
    line = json.dumps({"stage": "train", "step": 1, "metrics": metrics_of(1)}) + "\n"
    config.folder.metrics.write_text(line * 20_000, encoding="utf8")
    follower = Follower(config.folder.metrics)

    def seconds() -> float:
        begin = time.perf_counter()
        follower.log()
        return time.perf_counter() - begin

    first = seconds()
    assert seconds() < first / 5


def test_a_resumed_run_shows_its_surviving_history(workspace: RunConfig, tmp_path: Path) -> None:
    config = run_folder(workspace, tmp_path, iterations=6)
    watched = WatchedRun(config.run_dir)
    before = watched.state()["version"]
    log(config, "train", 4, {"kl": 40.0})
    assert watched.state()["version"] != before
    panels = {panel["title"]: panel for panel in watched.panels("outcome")["panels"]}
    assert panels["KL to the reference"]["steps"] == [1, 2, 3, 4]
    assert panels["KL to the reference"]["curves"][0]["last"] == 40.0


def test_no_free_port_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio
    import socket

    from deploy import listening
    from deploy.watch import server

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(server, "PORT", taken.getsockname()[1])
        monkeypatch.setattr(listening, "_TRIED", 1)
        with pytest.raises(ConfigError, match="in use; give another one with --port"):
            asyncio.run(server.serve([], "127.0.0.1", None, print))
