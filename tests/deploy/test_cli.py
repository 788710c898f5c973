"""A user's mistakes: one line that says where and what to do, an exit code, no traceback."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from deploy.exits import _unraised
from deploy.run_folder import checkpoints
from tests.deploy.commands import Run, refused

pytestmark = pytest.mark.usefixtures("cluster")


# ------------------------------------------------------------------ recipe and command line


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.kl_coeff=1", ["unknown key 'train.kl_coeff'", "did you mean 'train.kl_coef'"]),
        ("leaner.ranks=1", ["unknown key 'leaner'", "'learner'"]),
        ("train.iterations=many", ["train.iterations", "whole number", "'many'"]),
        ("learner.zero_stage=4", ["learner.zero_stage", "0, 1, 2 or 3"]),
        ("train.minibatches=7", ["not divisible", "minibatches=7"]),
        ("rollout.max_response_tokens=128", ["leaves no room", "model.context=128"]),
        ("train.algorithm=rloo", ["samples_per_prompt"]),
        ("train.clip_range=nan", ["train.clip_range", "nan"]),
        ("preset=huge", ["preset 'huge'", "palm-8b"]),
        ("train", ["section.field=value"]),
        ("train.lr=[", ["train.lr=["]),
    ],
)
def test_settings(run: Run, override: str, says: list[str]) -> None:
    refused(run("config", override), 2, *says)


def test_recipe_files(run: Run, tmp_path: Path) -> None:
    refused(run("config", "--config", str(tmp_path / "none.yaml")), 2, "none.yaml", "no such")
    broken = tmp_path / "broken.yaml"
    broken.write_text("train:\n  lr: [1, 2\n  x", encoding="utf8")
    refused(run("config", "--config", str(broken)), 2, "broken.yaml:3")
    broken.write_text("- 1\n", encoding="utf8")
    refused(run("config", "--config", str(broken)), 2, "broken.yaml:1", "mapping")
    broken.write_bytes(b"train: \xff\xfe")
    refused(run("config", "--config", str(broken)), 2, "broken.yaml")
    refused(run("config", "--config", str(tmp_path)), 2, str(tmp_path))


def test_the_command_alone_helps_and_says_its_version(run: Run) -> None:
    alone = run()
    assert (alone.code, alone.error) == (0, "")
    assert "Usage" in alone.out and "quickstart" in alone.out
    version = run("--version")
    assert (version.code, version.error) == (0, "")
    assert re.fullmatch(r"talipot \d+\.\d+\.\d+\n", version.out)
    assert "completion" in run("--help").out


def test_unknown_commands_and_options(run: Run) -> None:
    refused(run("trian"), 2, "trian")
    refused(run("train", "--resumee", "x"), 2, "--resumee")
    refused(run("sample", "."), 2, "--prompt")


# ------------------------------------------------------------------ data


def line(**values: Any) -> bytes:
    return json.dumps(values).encode() + b"\n"


GOOD = line(prompt="open the:", response="file")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (GOOD + b'{"prompt": "x"', [":2"]),
        (GOOD + line(prompt="x", answer="y"), [":2", "response"]),
        (GOOD + line(prompt="x", response=""), [":2", "response", "empty"]),
        (GOOD + line(prompt=3, response="y"), [":2", "prompt"]),
        (b'{"prompt": "\xff", "response": "y"}\n', [":1", "UTF-8"]),
        (b"", ["demonstrations"]),
    ],
)
def test_demonstrations(
    run: Run, recipe: Callable[..., str], tmp_path: Path, content: bytes, says: list[str]
) -> None:
    file = tmp_path / "demonstrations.jsonl"
    file.write_bytes(content)
    path = recipe(data={"demonstrations": [str(file)]})
    refused(run("sft", "--config", path), 3, *says)


def test_missing_files_and_sections(run: Run, recipe: Callable[..., str], tmp_path: Path) -> None:
    gone = str(tmp_path / "gone.jsonl")
    path = recipe(data={"demonstrations": [gone], "comparisons": [], "prompts": []})
    refused(run("sft", "--config", path), 3, "gone.jsonl")
    refused(run("reward", "--config", path), 2, "data.comparisons is empty")
    refused(run("train", "--config", path), 2, "data.prompts is empty")


def test_comparisons(run: Run, recipe: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "comparisons.jsonl"
    row = {"prompt": "a:", "chosen": "b", "rejected": "b", "labeler": "me", "confidence": 1.0}
    file.write_bytes(line(**row))
    path = recipe(data={"comparisons": [str(file)]})
    refused(run("reward", "--config", path), 3, "comparisons.jsonl:1", "chosen", "rejected")
    file.write_bytes(line(**{**row, "rejected": "c", "confidence": 1.5}))
    refused(run("reward", "--config", path), 3, "comparisons.jsonl:1", "confidence")


def test_parquet(run: Run, recipe: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"prompt": ["a"] * 100}), file)
    file.write_bytes(file.read_bytes()[:-20])
    path = recipe(data={"prompts": [str(file)]})
    refused(run("train", "--config", path), 3, "prompts.parquet")
    pq.write_table(pa.table({"text": ["a"]}), file)
    refused(run("train", "--config", path), 3, "prompts.parquet", "prompt")


def test_prompts_that_are_too_long(run: Run, recipe: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(line(prompt="read " * 200) + line(prompt="read the file:"))
    path = recipe(data={"prompts": [str(file)], "too_long": "error"})
    refused(run("train", "--config", path), 3, "56", "too_long")


# ------------------------------------------------------------------ weights and runs


def test_weights_of_another_shape(run: Run, recipe: Callable[..., str], tmp_path: Path) -> None:
    path = recipe(model={"dim": 48})
    refused(run("reward", "--config", path), 4, "policy.safetensors", "shape")


def test_torn_weights(run: Run, recipe: Callable[..., str], tmp_path: Path) -> None:
    path = recipe()
    weights = tmp_path / "run" / "sft" / "policy.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(run("reward", "--config", path), 4, "policy.safetensors")
    weights.unlink()
    refused(run("reward", "--config", path), 4, "policy.safetensors")


def test_tokenizer_and_model_that_differ(run: Run, recipe: Callable[..., str]) -> None:
    refused(run("sft", "--config", recipe(model={"vocab_size": 300})), 2, "300", "290")


@pytest.mark.parametrize(
    "command", [["status"], ["report"], ["evaluate"], ["sample", "-p", "x"], ["train", "--resume"]]
)
def test_what_is_no_run(run: Run, tmp_path: Path, command: list[str]) -> None:
    refused(run(*command, str(tmp_path)), 3, str(tmp_path), "not a run")


def test_a_resumed_run_keeps_what_cannot_change(
    run: Run, recipe: Callable[..., str], tmp_path: Path
) -> None:
    path, folder = recipe(), tmp_path / "run"
    kept = Path(path).read_bytes()
    (folder / "config.yaml").write_bytes(kept)
    state = {"iteration": 3, "config": yaml.safe_load(kept)}
    checkpoints.write(folder, 3, lambda _: state, keep=2)
    refused(
        run("train", "--resume", str(folder), "train.lr=1", "seed=5", "rollout.actors=3"),
        2,
        "train.lr: 0.0003 -> 1.0",
        "seed: 0 -> 5",
    )
    refused(run("train", "--config", path, "model.dim=48"), 2, "model.dim: 32 -> 48")
    refused(run("train", "--config", path, "train.iterations=2"), 2, "3 are trained already")
    both = run("train", "--resume", str(folder), "--config", path)
    refused(both, 2, "leave --config and --from out")
    assert (folder / "config.yaml").read_bytes() == kept


def test_greedy_samples_are_refused_before_anything_starts(
    run: Run, recipe: Callable[..., str]
) -> None:
    path = recipe()
    for command in ("train", "preflight", "quickstart"):
        begin = time.monotonic()
        outcome = run(command, "--config", path, "rollout.temperature=0")
        refused(outcome, 2, "rollout.temperature=0", "nothing to learn", "evaluate")
        assert time.monotonic() - begin < 5
    assert run("config", "--config", path, "rollout.temperature=0").code == 0


def test_what_changed_is_told_once(run: Run, recipe: Callable[..., str], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    path, folder = recipe(data={"prompts": [str(prompts)]}), tmp_path / "run"
    (folder / "config.yaml").write_bytes(Path(path).read_bytes())
    state = {"iteration": 3, "config": yaml.safe_load(Path(path).read_bytes())}
    checkpoints.write(folder, 3, lambda _: state, keep=2)
    outcome = run("train", "--resume", str(folder), "rollout.actors=3")
    assert outcome.code in (2, 3)  # prompts.jsonl is missing: it ends after the recipe was taken
    assert outcome.out.count("changed: rollout.actors: 2 -> 3") == 1, outcome.out
    where = f"goes on after iteration 3 of 4, from {folder}/checkpoints/step-000003"
    assert outcome.out.count(where) == 1, outcome.out


def test_overrides_that_an_evaluation_does_not_look_at(
    run: Run, recipe: Callable[..., str], tmp_path: Path
) -> None:
    path = recipe()
    (tmp_path / "run" / "config.yaml").write_bytes(Path(path).read_bytes())
    for override in ("train.lr=1", "evaluate.best_of=4", "data.prompts=[x]", "sft={epochs: 3}"):
        says = ["no effect on an evaluation", override.split("=")[0]]
        refused(run("evaluate", str(tmp_path / "run"), override), 2, *says)


@pytest.mark.parametrize(
    ("component", "says"),
    [
        (
            {"kind": "function", "target": "tests.reward_service.functions:speled"},
            ["did you mean 'spelled'?", "functions.py"],
        ),
        ({"kind": "function", "target": "rewrds:f"}, ["no module named 'rewrds'"]),
        (
            {"kind": "http", "target": "http://127.0.0.1:1/x", "token_env": "NO_SUCH_TOKEN"},
            ["NO_SUCH_TOKEN is not set"],
        ),
        ({"kind": "http", "target": "localhost/x"}, ["http(s)://host/path"]),
    ],
)
def test_a_score_that_cannot_be_is_refused_before_anything_starts(
    run: Run, recipe: Callable[..., str], component: dict[str, str], says: list[str]
) -> None:
    path = recipe(reward_service={"components": {"mine": component}})
    for command in ("train", "preflight"):
        outcome = run(command, "--config", path)
        refused(outcome, 2, "reward_service.components.mine: ", *says)
        assert outcome.out == "", "no cluster, no folder"


def test_a_refused_command_leaves_no_folder(
    run: Run, recipe: Callable[..., str], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(GOOD + b"{")
    path = recipe(data={"demonstrations": [str(bad)]}, model={"vocab_size": 0})
    new = ["--config", path, f"output={tmp_path / 'new' / 'runs'}"]
    refused(run("sft", *new), 3, "bad.jsonl:2")
    assert not (tmp_path / "new").exists()
    # A tokenizer was made before a response was found to be too long.
    long = [f"data.demonstrations=[{good_file(tmp_path)}]", "data.too_long=error"]
    refused(run("sft", *new, *long), 3, "good.jsonl:10", "too_long")
    assert not (tmp_path / "new").exists()
    # The stage before has not been run.
    rows = f"data.demonstrations=[{good_file(tmp_path)}]"
    for stage in ("train", "reward"):
        refused(run(stage, *new, rows), 4, "policy.safetensors", "`talipot sft`")
        assert not (tmp_path / "new").exists()
    # What is there was not made by the command that is refused.
    (tmp_path / "new" / "runs").mkdir(parents=True)
    refused(run("sft", *new), 3, "bad.jsonl:2")
    assert list((tmp_path / "new" / "runs").iterdir()) == []


def good_file(folder: Path) -> Path:
    path = folder / "good.jsonl"
    rows = [line(prompt=f"open {i}:", response="file") for i in range(9)]
    path.write_bytes(b"".join([*rows, line(prompt="open:", response="read the list " * 30)]))
    return path


def test_the_quickstart_makes_its_own_data(run: Run, recipe: Callable[..., str]) -> None:
    refused(run("quickstart", "--config", recipe()), 2, "the quickstart makes its own")


def test_stop_tokens_that_are_none(run: Run, recipe: Callable[..., str]) -> None:
    path = recipe(rollout={"stop_ids": [289, 290]})
    refused(run("sft", "--config", path), 2, "rollout.stop_ids: 290 is no token", "290, from 0")


def test_an_empty_prompt(run: Run, recipe: Callable[..., str], tmp_path: Path) -> None:
    path = recipe()
    (tmp_path / "run" / "config.yaml").write_bytes(Path(path).read_bytes())
    refused(run("sample", str(tmp_path / "run"), "--sft", "-p", ""), 3, "prompt 1 is empty")


def test_a_run_without_a_policy(run: Run, recipe: Callable[..., str], tmp_path: Path) -> None:
    path = recipe()
    (tmp_path / "run" / "config.yaml").write_bytes(Path(path).read_bytes())
    refused(run("sample", str(tmp_path / "run"), "-p", "open:"), 3, "no checkpoint is there yet")


def test_status_before_the_first_step(run: Run, recipe: Callable[..., str], tmp_path: Path) -> None:
    path = recipe()
    (tmp_path / "run" / "config.yaml").write_bytes(Path(path).read_bytes())
    outcome = run("status", str(tmp_path / "run"))
    assert outcome.code == 0
    assert "not running" in outcome.out
    assert "nothing is logged yet" in outcome.out


# ------------------------------------------------------------------ cluster, disk, interruption


def test_a_cluster_that_is_not_there(run: Run, recipe: Callable[..., str]) -> None:
    begin = time.monotonic()
    outcome = run("sft", "--config", recipe(), "--address", "127.0.0.1:1")
    refused(outcome, 5, "127.0.0.1:1", "--address")
    assert time.monotonic() - begin < 30


def test_more_than_the_cluster_has(run: Run, recipe: Callable[..., str]) -> None:
    path = recipe(rollout={"actors": 1000, "cpus_per_actor": 1})
    for command in ("sft", "train", "preflight"):
        refused(run(command, "--config", path), 5, "1000 rollout actors", "the cluster has 32")


def test_preflight_says_what_fits(run: Run, recipe: Callable[..., str]) -> None:
    outcome = run("preflight", "--config", recipe())
    assert outcome.code == 0
    assert "2 learner ranks" in outcome.out
    assert "memory of 2 rollout actors: " in outcome.out


def test_a_folder_that_is_a_file(run: Run, recipe: Callable[..., str], tmp_path: Path) -> None:
    path, blocked = recipe(), tmp_path / "blocked"
    blocked.write_text("", encoding="utf8")
    refused(run("sft", "--config", path, f"output={blocked}"), 8, str(blocked))


def test_a_full_disk(run: Run, recipe: Callable[..., str], tmp_path: Path) -> None:
    path = recipe()
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    refused(run("sft", "--config", path), 8, "No space left")


def test_a_thread_that_hands_its_error_on_prints_no_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """TensorBoard's writer, of a folder that cannot be written; any other thread's is printed."""

    def hook(thread: threading.Thread, error: Exception) -> str:
        _unraised(threading.ExceptHookArgs((type(error), error, None, thread)))
        return capsys.readouterr().err

    board = type("Writer", (threading.Thread,), {"__module__": "tensorboard.summary.writer"})()
    assert hook(board, OSError("read-only")) == ""
    assert "ValueError: ours" in hook(board, ValueError("ours"))
    assert "OSError: other" in hook(threading.Thread(), OSError("other"))
