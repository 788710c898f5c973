"""A run and its inputs are one thing: what changed is refused, what only moved is not."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash
from rich.console import Console

from common.config.recipe import load_config, save_config
from common.config.run import RunConfig
from common.data.own_tokenizer import OwnTokenizer
from common.data.records import read_demonstrations
from common.data.tokenizer import load_tokenizer
from common.errors import ConfigError, DataError
from deploy.run_folder import checkpoints
from deploy.run_folder.folder import config_of
from deploy.run_folder.inputs import RunInputs
from deploy.run_folder.lock import writing
from deploy.run_folder.reads import reads_of
from deploy.stages import policy, preparation
from deploy.stages.session import Session
from tests.deploy.commands import Run, refused
from tests.workspaces import make_workspace


def session_of(config: RunConfig) -> Session:
    return Session(config, Console(file=io.StringIO(), width=500))


def checked(config: RunConfig, stage: str) -> str:
    """Begin a stage as its command does, up to what needs a cluster; returns what is said."""
    session = session_of(config)
    try:
        config = preparation.prepare_tokenizer(session, config)
        preparation.check_inputs(session, config, stage)()
    finally:
        session.close()
    file = session.console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


@pytest.fixture
def begun(tmp_path: Path) -> RunConfig:
    """A run that is through `sft` and `reward` and one iteration into `train`."""
    config = make_workspace(tmp_path)
    for stage in ("sft", "reward", "train"):
        checked(config, stage)
    saved = load_config(config.run_dir / "config.yaml")
    state = {"iteration": 1, "config": saved.model_dump(mode="json")}
    checkpoints.write(config.run_dir, 1, lambda _: state, keep=2)
    return config


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(path.read_bytes().splitlines(keepends=True)[0])


def reverse(path: Path) -> None:
    path.write_bytes(b"".join(reversed(path.read_bytes().splitlines(keepends=True))))


def edit(path: Path) -> None:
    """Another byte, the same size and time."""
    stat, data = path.stat(), path.read_bytes()
    at = data.index(b"read")
    path.write_bytes(data[:at] + b"road" + data[at + 4 :])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    ("stage", "file", "change", "says"),
    [
        ("train", "data/prompts.jsonl", append, "200 lines, .* -> 201 lines, .* `train` read it"),
        ("train", "data/prompts.jsonl", reverse, "200 lines, .* -> 200 lines"),
        ("train", "data/prompts.jsonl", edit, "data.prompts"),
        ("sft", "data/demonstrations.jsonl", append, "`sft` and `reward` read it"),
        ("reward", "data/demonstrations.jsonl", edit, "data.demonstrations"),
        ("reward", "data/comparisons.jsonl", append, "data.comparisons"),
        ("train", "base/sft/policy.safetensors", append, "sft/policy.safetensors"),
        ("train", "base/reward_model/reward.safetensors", append, "reward.safetensors"),
        ("sft", "base/tokenizer.json", append, "tokenizer.json changed .* since it was made"),
    ],
)
def test_what_changed_since_a_stage_read_it_is_refused(
    begun: RunConfig,
    tmp_path: Path,
    stage: str,
    file: str,
    change: Callable[[Path], None],
    says: str,
) -> None:
    before = (tmp_path / file).read_bytes()
    held = {name: (begun.run_dir / name).read_bytes() for name in ("run.json", "config.yaml")}
    if file.endswith(".json"):  # one that still loads
        (tmp_path / file).write_bytes(before + b"\n")
    else:
        change(tmp_path / file)
    with pytest.raises(DataError, match=says) as error:
        checked(begun, stage)
    assert "\n" not in str(error.value)
    assert "put back" in str(error.value)
    assert held == {name: (begun.run_dir / name).read_bytes() for name in held}
    (tmp_path / file).write_bytes(before)
    assert checked(begun, stage) == ""


@pytest.mark.usefixtures("cluster")
def test_the_command_refuses_and_names_old_and_new(
    begun: RunConfig, tmp_path: Path, run: Run
) -> None:
    prompts = tmp_path / "data" / "prompts.jsonl"
    old = xxhash.xxh3_128_hexdigest(prompts.read_bytes())[:12]
    append(prompts)
    new = xxhash.xxh3_128_hexdigest(prompts.read_bytes())[:12]
    outcome = run("train", "--resume", str(begun.run_dir))
    change = f"{prompts} changed (200 lines, {old} -> 201 lines, {new})"
    refused(outcome, 3, "data.prompts", change, "another name")
    prompts.unlink()
    refused(run("train", "--resume", str(begun.run_dir)), 3, str(prompts), "no such file")


@pytest.mark.parametrize("stage", ["sft", "reward", "train"])
@pytest.mark.parametrize("override", ["tokenizer.vocab_size=280", "tokenizer.words=identifiers"])
def test_a_tokenizer_setting_that_would_have_no_effect_is_refused(
    tmp_path: Path, stage: str, override: str
) -> None:
    """Without a checkpoint too: results stand on the tokenizer as soon as there are weights."""
    config = make_workspace(tmp_path)
    (config.run_dir / "tokenizer.json").unlink()
    model = config.model.model_copy(update={"vocab_size": 0})
    config = config.model_copy(update={"model": model})
    checked(config, "sft")
    assert checked(config, stage) == ""
    field, _, value = override.partition("=")
    path = tmp_path / "recipe.yaml"
    save_config(config, path)
    old = {"tokenizer.vocab_size": "2048", "tokenizer.words": "spaced"}[field]
    with pytest.raises(ConfigError, match=f"{field}: {old} -> {value}"):
        checked(load_config(path, [override]), stage)


def test_another_tokenizer_under_the_same_path_is_refused_and_a_moved_one_is_not(
    tmp_path: Path,
) -> None:
    config = make_workspace(tmp_path)
    mine = tmp_path / "mine.json"
    OwnTokenizer.train(iter(["read the file", "read a path"] * 9), 270).save(mine)
    settings = config.tokenizer.model_copy(update={"path": str(mine)})
    model = config.model.model_copy(update={"vocab_size": 0})
    config = config.model_copy(update={"tokenizer": settings, "model": model})
    (config.run_dir / "tokenizer.json").unlink()
    checked(config, "train")
    moved = mine.rename(tmp_path / "moved.json")
    settings = settings.model_copy(update={"path": str(moved)})
    config = config.model_copy(update={"tokenizer": settings})
    assert checked(config, "train") == ""
    before = (config.run_dir / "tokenizer.json").read_bytes()
    OwnTokenizer.train(iter(["close all of it", "close it all"] * 9), 265).save(moved)
    with pytest.raises(ConfigError, match=r"tokenizer\.path .*moved\.json .* tokens, .* -> "):
        checked(config, "train")
    assert (config.run_dir / "tokenizer.json").read_bytes() == before


def test_nothing_stands_on_a_tokenizer_before_the_first_weights(tmp_path: Path) -> None:
    """Demonstrations are mended, and a size chosen, before a stage has come to its end."""
    config = make_workspace(tmp_path)
    for part in ("sft", "reward_model", "tokenizer.json"):
        path = config.run_dir / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    model = config.model.model_copy(update={"vocab_size": 0})
    config = config.model_copy(update={"model": model})
    checked(config, "sft")
    for _ in range(9):
        append(tmp_path / "data" / "demonstrations.jsonl")
    settings = config.tokenizer.model_copy(update={"vocab_size": 275})
    for wanted, size in ((config, 2048), (config.model_copy(update={"tokenizer": settings}), 275)):
        checked(wanted, "sft")
        pairs = list(read_demonstrations(config.data.demonstrations))
        expected = OwnTokenizer.train((p.prompt + p.response for p in pairs), size)
        made = load_tokenizer(config.run_dir / "tokenizer.json")
        assert made.fingerprint() == expected.fingerprint()


def test_the_same_contents_elsewhere_are_no_change(begun: RunConfig, tmp_path: Path) -> None:
    """Files and the run are moved, and the run goes on from there."""
    with (tmp_path / "recipe.yaml").open("wb") as file:
        file.write((begun.run_dir / "config.yaml").read_bytes())
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    (tmp_path / "new").mkdir()
    shutil.move(begun.run_dir, tmp_path / "new" / "moved")
    with pytest.raises(DataError, match=r"prompts\.jsonl: no such file"):
        checked(config_of(tmp_path / "new" / "moved"), "train")
    override = f"data.prompts=[{tmp_path}/elsewhere/prompts.jsonl]"
    config = config_of(tmp_path / "new" / "moved", [override])
    resumption = policy.resumption_of(config)
    assert resumption.facts is None
    assert [change.field for change in resumption.changed] == ["data.prompts"]
    assert checked(config, "train") == ""
    append(tmp_path / "elsewhere" / "prompts.jsonl")
    with pytest.raises(DataError, match=r"elsewhere/prompts\.jsonl changed"):
        checked(config, "train")


def test_what_lies_in_the_runs_folder_moves_along(begun: RunConfig, tmp_path: Path) -> None:
    """As the data of the quickstart does."""
    inside = begun.run_dir / "data"
    shutil.copytree(tmp_path / "data", inside)
    data = begun.data.model_copy(update={"evaluation": (str(inside / "prompts.jsonl"),)})
    save_config(begun.model_copy(update={"data": data}), begun.run_dir / "config.yaml")
    shutil.move(begun.run_dir, tmp_path / "moved")
    config = config_of(tmp_path / "moved")
    assert config.data.evaluation == (str(tmp_path / "moved" / "data" / "prompts.jsonl"),)
    assert config.data.prompts == begun.data.prompts


def test_a_run_of_before_goes_on_and_is_recorded_from_then_on(
    begun: RunConfig, tmp_path: Path
) -> None:
    (begun.run_dir / "run.json").unlink()
    assert checked(begun, "train") == ""
    held = json.loads((begun.run_dir / "run.json").read_text())["stages"]["train"]["reads"]
    prompts = tmp_path / "data" / "prompts.jsonl"
    assert held["data.prompts"] == [
        {
            "path": str(prompts),
            "bytes": prompts.stat().st_size,
            "lines": 200,
            "xxh3_128": xxhash.xxh3_128_hexdigest(prompts.read_bytes()),
        }
    ]
    assert held["sft/policy.safetensors"][0]["path"] == "sft/policy.safetensors"
    append(prompts)
    with pytest.raises(DataError, match=r"prompts\.jsonl changed"):
        checked(begun, "train")


def test_prompts_that_nobody_recorded_cannot_be_exchanged(begun: RunConfig, tmp_path: Path) -> None:
    (begun.run_dir / "run.json").unlink()
    other = shutil.copy(tmp_path / "data" / "prompts.jsonl", tmp_path / "other.jsonl")
    with pytest.raises(ConfigError, match=r"data\.prompts"):
        policy.resumption_of(config_of(begun.run_dir, [f"data.prompts=[{other}]"]))


def test_a_stage_that_training_stands_on_may_only_be_repeated(
    begun: RunConfig, tmp_path: Path
) -> None:
    assert checked(begun, "sft") == ""
    path = tmp_path / "recipe.yaml"
    save_config(begun, path)
    for stage, field in (("sft", "sft.lr"), ("reward", "reward_model.epochs"), ("sft", "seed")):
        with pytest.raises(ConfigError, match=rf"training has begun.*{field}: .* -> 3"):
            checked(load_config(path, [f"{field}=3"]), stage)
    shutil.rmtree(begun.run_dir / "checkpoints")
    assert checked(load_config(path, ["sft.lr=3"]), "sft") == ""


def test_a_reward_model_of_another_supervised_policy_is_refused(
    begun: RunConfig, tmp_path: Path
) -> None:
    """`sft` was done again before training began, `reward` not yet."""
    shutil.rmtree(begun.run_dir / "checkpoints")
    append(begun.run_dir / "sft" / "policy.safetensors")
    with pytest.raises(DataError, match=r"`reward` read it.*remove .*reward_model"):
        checked(begun, "train")
    checked(begun, "reward")
    assert checked(begun, "train") == ""


def test_a_mended_reward_function_is_told_and_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 7 says to mend it and to resume."""
    package = tmp_path / "lib" / "mine"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('nobody imports this here')")
    module = package / "rewards.py"
    module.write_text("def brevity(prompts, responses):\n    return [0.0] * len(prompts)\n")
    monkeypatch.syspath_prepend(tmp_path / "lib")
    config = make_workspace(tmp_path)
    path = tmp_path / "recipe.yaml"
    save_config(config, path)
    component = "reward_service.components={b: {kind: function, target: 'mine.rewards:brevity'}}"
    config = load_config(path, [component])
    checked(config, "train")
    checkpoints.write(config.run_dir, 1, lambda _: {"iteration": 1}, keep=1)
    assert checked(config, "train") == ""
    module.write_text(module.read_text().replace("0.0", "1.0"))
    said = checked(config, "train")
    assert said.count("changed: function mine.rewards:brevity") == 1
    assert checked(config, "train") == ""


def test_replay_refuses_what_it_would_begin_with(begun: RunConfig) -> None:
    inputs = RunInputs(begun.run_dir)
    inputs.check("replay", reads_of("replay", begun))
    append(begun.run_dir / "sft" / "policy.safetensors")
    with pytest.raises(DataError, match=r"sft/policy\.safetensors changed"):
        inputs.check("replay", reads_of("replay", begun))


@pytest.mark.parametrize("text", ["", "[]", '{"stages": {"sft": {}}}'])
def test_a_damaged_manifest_is_named(begun: RunConfig, text: str) -> None:
    (begun.run_dir / "run.json").write_text(text)
    with pytest.raises(DataError, match=r"run\.json: damaged"):
        checked(begun, "train")


# ------------------------------------------------------------------ one writer


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("command", ["reward", "train"])
def test_a_second_writer_is_refused(
    begun: RunConfig, tmp_path: Path, run: Run, command: str
) -> None:
    recipe = str(tmp_path / "recipe.yaml")
    save_config(load_config(begun.run_dir / "config.yaml"), Path(recipe))
    who = f"`talipot train` on host {socket.gethostname()}, process {os.getpid()}"
    with writing(begun.run_dir, "train"):
        held = (begun.run_dir / "run.json").read_bytes()
        refused(run(command, "--config", recipe), 8, str(begun.run_dir), who, "UTC")
        assert (begun.run_dir / "run.json").read_bytes() == held
        assert run("status", str(begun.run_dir)).code == 0, "reading is nobody's harm"


def test_a_file_that_joins_a_folder_is_noticed(tmp_path: Path) -> None:
    config = make_workspace(tmp_path)
    folder = tmp_path / "prompts"
    folder.mkdir()
    shutil.move(config.data.prompts[0], folder / "a.jsonl")
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"prompts": (str(folder),)})}
    )
    assert reads_of("train", config)["data.prompts"] == [str(folder / "a.jsonl")]
    checked(config, "train")
    checkpoints.write(config.run_dir, 1, lambda _: {"iteration": 1}, keep=2)
    checked(config, "train")
    shutil.copy(folder / "a.jsonl", folder / "b.jsonl")
    with pytest.raises(DataError, match=r"data\.prompts: .*a\.jsonl -> .*a\.jsonl, .*b\.jsonl"):
        checked(config, "train")


def test_what_a_stage_left_is_what_the_next_one_reads(tmp_path: Path) -> None:
    """A bit that turned between two stages is no policy of ours."""
    config = make_workspace(tmp_path)
    checked(config, "sft")
    path = config.folder.sft.weights
    RunInputs(config.run_dir).end("sft", [path])
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for stage in ("reward", "train"):
        with pytest.raises(DataError, match=r"sft/policy\.safetensors: .* since `sft` wrote it"):
            checked(config, stage)
    path.write_bytes(whole)
    checked(config, "train")
