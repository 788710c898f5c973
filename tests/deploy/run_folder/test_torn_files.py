"""Files of a run that were torn: they are named, or what is left of them is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.config.run import RunConfig
from deploy.cli.main import main
from deploy.evaluation.report import write_report
from deploy.run_folder.log_lines import read_metrics
from deploy.run_folder.metrics_log import RunLog
from deploy.standing import standing_of


@pytest.mark.parametrize("kept", [0, 1, 40, 400, -1, "cluster"])
@pytest.mark.parametrize("arguments", [["status"], ["sample", "-p", "x"], ["train", "--resume"]])
def test_a_recipe_of_a_run_that_is_torn_is_named(
    folder: Path, kept: int | str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "config.yaml"
    raw = path.read_bytes()
    path.write_bytes(raw[: raw.index(b"cluster:") if isinstance(kept, str) else kept])
    with pytest.raises(SystemExit) as ended:
        main([*arguments, str(folder)])
    assert ended.value.code in (2, 3)
    error = capsys.readouterr().err
    assert error.startswith(f"error {path}")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("name", ["summary.json", "evaluation.json", "result.json"])
def test_a_file_of_a_run_that_is_torn_is_named(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / name).write_text('{"win_rate": 0.', encoding="utf8")
    with pytest.raises(SystemExit) as ended:
        main(["replay" if name == "result.json" else "report", str(folder)])
    assert ended.value.code == 3
    assert capsys.readouterr().err.startswith(f"error {folder / name}: damaged")


def test_samples_without_their_end_and_a_log_goes_on_after_a_torn_line(folder: Path) -> None:
    row = {"prompt": "p", "human": "h", "before": "b", "after": "a"}
    scores = {"score_before": 1.0, "score_after": 2.0}
    judged = {"conforms_before": True, "conforms_after": True}
    text = json.dumps(row | scores | judged)
    (folder / "samples.jsonl").write_text(f'{text}\n{{"prom', encoding="utf8")
    with (folder / "metrics.jsonl").open("a", encoding="utf8") as file:
        file.write('{"stage": "sft", "st')
    log = RunLog(folder)
    log.write("sft", 8, {"loss": 1.0})
    log.close()
    assert [line.step for line in read_metrics(folder / "metrics.jsonl")] == [7, 8]
    assert "<svg" in write_report(folder).read_text(encoding="utf8")


WHOLE = json.dumps({"stage": "sft", "step": 7, "time": 0.0, "metrics": {"loss": 1.5}})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {"notes": "nothing is logged yet"}),
        ('{"stage": "sft", "st', {"notes": "nothing is logged yet', 'the log's last line"}),
        (f"{WHOLE}\n", {"step": 7}),
        (f'{WHOLE}\n{{"stage": "s', {"step": 7, "notes": "the log's last line"}),
        (f"{{}}\n{WHOLE}\n", {"step": 7, "notes": ":1: not a line"}),
        ("\0\0\0\0", {"notes": "nothing is logged yet"}),
        ('{"stage": 1, "step": "x", "metrics": []}\n', {"notes": ":1: not a line"}),
        ('{"stage": "a", "step": 1, "metrics": []}\n', {"notes": ":1: not a line"}),
        ("[]\n\n3\n", {"notes": ":3: not a line"}),
    ],
)
def test_status_reads_what_is_left_of_a_log(
    tmp_path: Path, text: str, expected: dict[str, object]
) -> None:
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf8")
    found = standing_of(RunConfig(output=str(tmp_path.parent), name=tmp_path.name))
    for name, value in expected.items():
        held = getattr(found, name)
        assert str(value) in ("', '".join(held) if name == "notes" else str(held))
