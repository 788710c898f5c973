"""One word for a policy, the same in every command: final, latest, best, a checkpoint's number."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import talipot
from common.config.recipe import save_config
from common.config.run import RunConfig
from common.errors import CheckpointError, ConfigError, DataError
from common.models.build import build_policy
from common.models.weight_files import save_policy
from deploy.exchange.policies import choose, policy_of, write_policy
from deploy.run_folder import checkpoints
from deploy.run_folder.inputs import RunInputs
from deploy.sampler import Sampler
from tests.deploy.commands import Run, refused
from tests.workspaces import run_copy

SCORES = {1: 0.2, 2: 0.9, 3: 0.4}


def weights(config: RunConfig, seed: int) -> dict[str, torch.Tensor]:
    network = build_policy(config.model)
    network.initialise(seed)
    return dict(network.state_dict())


def add_checkpoint(config: RunConfig, iteration: int) -> None:
    """What a learner of one rank leaves: all fp32 weights, seeded by the iteration."""

    def fill(folder: Path) -> dict[str, Any]:
        (folder / "policy").mkdir()
        masters = {f"{k}|master": v.float() for k, v in weights(config, iteration).items()}
        save_file(masters, folder / "policy" / "rank-00000.safetensors")
        return {"iteration": iteration, "learner": {}}

    checkpoints.write(config.run_dir, iteration, fill, keep=9)


def finish(config: RunConfig, iterations: int, seed: int) -> None:
    folder = config.folder.policy.path
    folder.mkdir()
    save_policy(weights(config, seed), folder, config.model)
    config.folder.result.write_text(json.dumps({"iterations": iterations}))


@pytest.fixture
def stopped(workspace: RunConfig, tmp_path: Path) -> RunConfig:
    """A run that was stopped after three of its four iterations, with a checkpoint of each."""
    config = run_copy(workspace, tmp_path)
    save_config(config, config.folder.config)
    lines = [
        {"stage": "train", "step": step, "metrics": {"score": score}}
        for step, score in SCORES.items()
    ]
    config.folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for iteration in SCORES:
        add_checkpoint(config, iteration)
    return config


def loaded(config: RunConfig, word: str | None) -> dict[str, torch.Tensor]:
    with policy_of(config, word) as (_, path):
        return load_file(path)


def test_every_word_gives_the_weights_of_its_policy(stopped: RunConfig) -> None:
    for word, iteration in (("1", 1), ("best", 2), ("latest", 3), (None, 3)):
        expected, found = weights(stopped, iteration), loaded(stopped, word)
        assert choose(stopped, word).iteration == iteration
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), word
    assert "checkpoint 3 of 4 iterations" in choose(stopped, None).note
    finish(stopped, 4, seed=9)
    assert choose(stopped, None).note == ""
    assert torch.equal(loaded(stopped, None)["value.weight"], weights(stopped, 9)["value.weight"])


def test_a_run_that_goes_on_after_its_end_has_a_newer_policy(stopped: RunConfig) -> None:
    finish(stopped, 2, seed=9)
    assert choose(stopped, None).iteration == 3
    assert choose(stopped, "final").iteration == 2


def test_best_is_by_held_out_score_where_every_checkpoint_has_one(stopped: RunConfig) -> None:
    for iteration, score in ((1, 0.7), (2, 0.1)):
        path = stopped.folder.evaluation_of(iteration)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"judge_score_policy": score}))
    assert "mean score of its iteration 0.9" in choose(stopped, "best").note
    stopped.folder.evaluation_of(3).write_text(json.dumps({"judge_score_policy": 0.2}))
    assert choose(stopped, "best").iteration == 1
    (stopped.folder.checkpoint(1) / "state.json").write_text("torn")
    assert choose(stopped, "best").iteration == 3


@pytest.mark.parametrize(
    ("word", "error", "words"),
    [
        ("first", ConfigError, "should be a number, latest, best or final"),
        ("7", CheckpointError, "no such checkpoint; there are 1, 2, 3"),
        ("final", DataError, "not finished.*--checkpoint latest"),
    ],
)
def test_what_is_not_there_is_one_line(
    stopped: RunConfig, word: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        choose(stopped, word)


def test_a_run_without_any_policy_says_so(workspace: RunConfig, tmp_path: Path) -> None:
    config = run_copy(workspace, tmp_path)
    for word, error, words in (
        (None, DataError, "not finished, and no checkpoint is there yet"),
        ("latest", CheckpointError, "no checkpoint yet"),
        ("best", CheckpointError, "no checkpoint yet"),
    ):
        with pytest.raises(error, match=words):
            choose(config, word)


def test_a_checkpoint_that_the_run_removes_meanwhile(
    stopped: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on while it is read: the newest one is gone, and a newer one is there."""
    reads = []

    def racing(folder: Path) -> Any:
        reads.append(folder.parent.name)
        if len(reads) == 1:
            add_checkpoint(stopped, 4)
            shutil.rmtree(folder.parent)
            raise CheckpointError("no weights of training in it")
        return ((name, tensor) for name, tensor in weights(stopped, 4).items())

    monkeypatch.setattr("deploy.exchange.policies.masters", racing)
    assert write_policy(stopped, "latest", tmp_path / "out").iteration == 4
    assert reads == ["step-000003", "step-000004"]


def test_sampling_while_it_trains_and_from_a_file_to_a_file(
    stopped: RunConfig, tmp_path: Path, run: Run
) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out" / "answers.jsonl"
    prompts.write_text('{"prompt": "open the file 7:"}\n{"prompt": "close 3:"}\n')
    folder = str(stopped.run_dir)
    options = ["--number", "2", "--temperature", "0.8", "--checkpoint", "best"]
    done = run("sample", folder, "--prompts", str(prompts), "--output", str(output), *options)
    assert done.code == 0, done.error
    assert "best of 3 checkpoints: iteration 2" in done.error
    assert "4 responses" in done.out
    rows = [json.loads(line) for line in output.read_text(encoding="utf8").splitlines()]
    assert [(r["prompt"], r["sample"]) for r in rows] == [
        ("open the file 7:", 0),
        ("open the file 7:", 1),
        ("close 3:", 0),
        ("close 3:", 1),
    ]
    assert all(row["tokens"] > 0 and row["finish_reason"] in ("eos", "length") for row in rows)
    assert len({row["response"] for row in rows}) > 1
    shown = run("sample", folder, "-p", "close 3:")
    assert "not finished: the policy of checkpoint 3" in shown.error
    assert shown.out.strip().endswith(
        Sampler(stopped, sft=False, checkpoint="3").responses(["close 3:"], 0)[0]
    )


def test_an_exported_policy_answers_as_its_run(
    stopped: RunConfig, tmp_path: Path, run: Run
) -> None:
    target = tmp_path / "handed over"
    assert run("export", str(stopped.run_dir), str(target), "--checkpoint", "3").code == 0
    room = f"rollout.max_response_tokens={stopped.rollout.max_response_tokens}"
    prompts = ["close 3:", "open the file 7:", "close 3:"]
    answers = talipot.load_policy(target, room).sample(prompts, seed=5)
    sampler = Sampler(stopped, sft=False, checkpoint="3")
    assert answers == sampler.responses(prompts, 5)
    assert answers[0] != answers[2], "what is asked twice is answered twice"
    shown = run("sample", str(target), "-p", "close 3:", "--seed", "5")
    assert shown.code == 0, shown.error
    assert shown.out.splitlines()[0] == "close 3:"
    refused = run("sample", str(target), "-p", "close 3:", "--checkpoint", "1")
    assert (refused.code, "one exported policy" in refused.error) == (2, True)
    with pytest.raises(DataError, match="no exported policy"):
        talipot.load_policy(stopped.run_dir)
    (target / "model.json").write_text("{}", encoding="utf8")
    with pytest.raises(DataError, match="does not say the model's shape"):
        talipot.load_policy(target)


def test_a_prompt_is_answered_alike_however_it_is_given(
    stopped: RunConfig, tmp_path: Path, run: Run
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "open 1:"}\n{"prompt": "close 3:"}\n', encoding="utf8")
    folder = str(stopped.run_dir)
    of_file = run("sample", folder, "--prompts", str(prompts), "--seed", "1").out
    alone = run("sample", folder, "-p", "close 3:", "--seed", "1").out
    assert of_file.endswith(alone)
    python = talipot.load_run(stopped.run_dir).policy().sample(["close 3:"], seed=1)
    assert alone.splitlines()[1:] == "\n".join(python).splitlines()


def test_what_cannot_be_sampled_is_one_line(stopped: RunConfig, tmp_path: Path, run: Run) -> None:
    folder, prompts = str(stopped.run_dir), tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": ""}\n')
    for arguments, words in (
        ([], "give --prompt TEXT"),
        (["-p", "a", "--prompts", str(prompts)], "give --prompt TEXT"),
        (["--prompts", str(prompts)], "prompts.jsonl:1"),
        (["--prompts", str(tmp_path / "none.jsonl")], "none.jsonl"),
        (["-p", "a", "--temperature", "-1"], "rollout.temperature"),
        (["-p", "a", "--sft", "--checkpoint", "1"], "leave --checkpoint out"),
    ):
        done = run("sample", folder, *arguments)
        assert done.code in (2, 3), (arguments, done.error)
        assert words in done.error


def test_a_policy_that_was_changed_is_refused_in_every_command(
    stopped: RunConfig, tmp_path: Path, run: Run
) -> None:
    finish(stopped, 4, 40)
    path = stopped.folder.policy.weights
    RunInputs(stopped.run_dir).end("train", [path])
    whole = path.read_bytes()
    loaded(stopped, "final")
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # of a weight: it loads as before
    assert load_file(path).keys() == weights(stopped, 40).keys()
    told = "policy/policy.safetensors"
    folder = str(stopped.run_dir)
    for command in (["sample", folder, "--prompt", "x"], ["export", folder, str(tmp_path / "e")]):
        outcome = run(*command)
        refused(outcome, 3, told, "changed", "since `train` wrote it")
