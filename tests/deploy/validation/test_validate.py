"""Everything that would stop a run is found in one call, and nothing else."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.config.recipe import load_config
from common.errors import CheckpointError, ConfigError, DataError
from deploy.validation.validate import require_stage, validate
from tests.deploy.commands import Run

MINE = "tests.deploy.validation.functions_of_mine"
GOOD = """
name: sound
output: {folder}/runs
model: {{dim: 16, layers: 1, heads: 1, head_dim: 16, context: 96}}
tokenizer: {{vocab_size: 300}}
data: {{demonstrations: d.jsonl, comparisons: c.jsonl, prompts: "p*.jsonl", evaluation: e.jsonl}}
train: {{prompts_per_iteration: 8, minibatches: 2}}
rollout: {{lease_size: 4}}
"""
FAULTY = """
name: faulty
output: {folder}/runs
model: {{dim: 16, layers: 1, heads: 1, head_dim: 16, context: 96, vocab_size: 77}}
tokenizer: {{vocab_size: 300, chat_template: template.jinja}}
data:
  demonstrations: [d.jsonl, gone.jsonl]
  comparisons: [c.jsonl, c.csv]
  prompts: "p*.jsonl"
  evaluation: [e.jsonl, "held-out/*.jsonl"]
train:
  learning_rate: 0.1
  lr: fast
  prompts_per_iteration: 8
  minibatches: 3
  critic: {{start: no-critic}}
rollout:
  lease_size: many
  stop: [""]
  stop_ids: [999999]
  temperature: 0
  cpus_per_actor: 1000
learner: {{zero_stage: 7}}
cluster: {{dashboard: perhaps}}
sft: {{optimizer: adafactor, adam_eps: 0.1, start: no-weights.safetensors}}
reward_service:
  components:
    gone: {{kind: function, target: "no_such_module:score"}}
    near: {{kind: function, target: "{mine}:goood"}}
    args: {{kind: function, target: "{mine}:other_arguments"}}
    down: {{kind: http, target: "http://127.0.0.1:{port}/score", token_env: NO_SUCH_TOKEN}}
    odd: {{kind: http, target: "ftp://host/score"}}
evaluate: {{judge: "{mine}:nobody"}}
"""
FAULTS = [
    ("r.yaml:12", "unknown key 'train.learning_rate'; did you mean 'train.lr'?"),
    ("r.yaml:13", "train.lr: should be a number, not 'fast'"),
    ("r.yaml:11", "train: batch of 8 rollouts is not divisible by minibatches=3"),
    ("r.yaml:18", "rollout.lease_size: should be a whole number, not 'many'"),
    ("r.yaml:17", "stop: an empty text would end every response at once"),
    ("r.yaml:23", "learner.zero_stage: should be 0, 1, 2 or 3, not 7"),
    ("r.yaml:24", "cluster.dashboard: should be true or false, not 'perhaps'"),
    ("r.yaml:25", "sft.adam_eps has no effect here"),
    ("reward_service.components.gone", "No module named 'no_such_module'"),
    ("reward_service.components.near", "has no 'goood'; did you mean 'good'?"),
    ("reward_service.components.args", "takes other arguments"),
    ("evaluate.judge", "has no 'nobody'"),
    ("reward_service.components.down", "environment variable NO_SUCH_TOKEN is not set"),
    ("reward_service.components.down", "does not answer (ConnectError"),
    ("reward_service.components.odd", "write it as http(s)://host/path"),
    ("rollout", "rollout.temperature=0 always takes the most probable token"),
    ("sft.start", "no-weights.safetensors: no such weights"),
    ("train.critic.start", "no-critic is no folder"),
    ("data.demonstrations", "gone.jsonl: no such file"),
    ("c.csv", "c.csv: extension '.csv' is unknown"),
    ("data.evaluation", "held-out/*.jsonl: no file fits this pattern"),
    ("d.jsonl:41", "field 'response': "),
    ("d.jsonl:42", " tokens, EOS included, room for 32"),
    ("c.jsonl:41", "field 'rejected': equal to 'chosen'"),
    ("c.jsonl:42", "field 'confidence': is 1.2, outside 0.5 ... 1"),
    ("p1.jsonl:41", "torn JSON"),
    ("p1.jsonl:42", "field 'prompt': missing; rename 'promt' to 'prompt'"),
    ("p1.jsonl:43", " tokens, room for 64"),
    ("p1.jsonl:44", "stands in data.prompts before"),
    ("e.jsonl:1", "this held-out prompt stands in data.demonstrations too, as do 2 of 3"),
    ("e.jsonl:1", "this held-out prompt stands in data.prompts too, as do 2 of 3"),
    ("tokenizer.chat_template", "a tokenizer that is trained here has no control tokens"),
    ("tokenizer", "model.vocab_size=77, but the tokenizer has"),
    ("tokenizer", "rollout.stop_ids: 999999 is no token"),
    ("this machine", "needs 2003 CPU and the cluster has"),
    ("data.comparisons", "no part of the score is a reward model"),
]


def write(name: str, rows: list[Any]) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path(name).write_text("\n".join(lines) + "\n", encoding="utf8")


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of this machine on which nobody listens; it is kept while the test runs."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    pairs = [{"prompt": f"q{n}: ", "response": f"a{n}"} for n in range(40)]
    write("d.jsonl", pairs)
    write(
        "c.jsonl",
        [{"prompt": p["prompt"], "chosen": p["response"], "rejected": "x"} for p in pairs],
    )
    write("p1.jsonl", [{"prompt": p["prompt"]} for p in pairs])
    write("e.jsonl", [{"prompt": f"held out {n}", "response": "a"} for n in range(3)])
    return tmp_path


def plant(faulty: Path) -> None:
    """Put what is wrong behind the forty good rows of each file."""
    long = "".join(chr(33 + n * 7 % 90) for n in range(400))
    for name, rows in (
        ("d.jsonl", [{"prompt": "q", "response": ""}, {"prompt": "q", "response": long}]),
        (
            "c.jsonl",
            [
                {"prompt": "q", "chosen": "a", "rejected": "a"},
                {"prompt": "q", "chosen": "a", "rejected": "b", "confidence": 1.2},
            ],
        ),
        ("p1.jsonl", ['{"prompt": "q', {"promt": "q"}, {"prompt": long}, {"prompt": "q7: "}]),
    ):
        with (faulty / name).open("a", encoding="utf8") as file:
            file.writelines((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)
    write("e.jsonl", [{"prompt": f"q{n}: ", "response": "a"} for n in (1, 2, 99)])
    (faulty / "c.csv").write_text("prompt,chosen,rejected\n", encoding="utf8")


def test_every_planted_fault_is_found_in_one_call(folder: Path, closed_port: int) -> None:
    plant(folder)
    text = FAULTY.format(folder=folder, mine=MINE, port=closed_port)
    Path("r.yaml").write_text(text, encoding="utf8")
    begin = time.perf_counter()
    found = validate(Path("r.yaml")).found
    seconds = time.perf_counter() - begin
    assert len(FAULTS) >= 30
    for where, what in FAULTS:
        hits = [f for f in found if f.where == where and what in str(f)]
        assert len(hits) == 1, (where, what, [str(f) for f in found])
    errors = [f for f in found if f.severity == "error"]
    unplanted = [str(f) for f in errors if not any(w == f.where and t in str(f) for w, t in FAULTS)]
    assert unplanted == []
    assert seconds < 5, seconds
    assert not (folder / "runs").exists()


def test_a_sound_recipe_has_facts_and_no_error(folder: Path, run: Run) -> None:
    Path("r.yaml").write_text(GOOD.format(folder=folder), encoding="utf8")
    findings = validate(Path("r.yaml"))
    assert findings.errors() == []
    assert findings.facts[0].startswith("data.demonstrations: 40 records in 1 file; tokens: ")
    outcome = run("validate", "--config", "r.yaml")
    assert (outcome.code, outcome.error) == (0, "")
    assert outcome.out.endswith("✓ nothing stands in the way\n")
    wrong = run("validate", "--config", "r.yaml", "train.lr=0", "data.prompts=nowhere")
    assert wrong.code == 2
    assert "error override 'train.lr=0': train.lr: should be greater than 0" in wrong.out
    assert "error data.prompts: nowhere: no such file; check the path" in wrong.out
    assert wrong.error == "error 2 things to mend before this can run\n"


def test_twenty_bad_rows_of_a_file_are_named_and_the_rest_counted(folder: Path) -> None:
    write("p1.jsonl", [{"prompt": "good"}, *({"prompt": "x" * (n % 2)} for n in range(50))])
    write("p2.jsonl", [{"prompt": "good"}, {"question": "q"}, {"prompt": "p"}, {"question": "q"}])
    Path("r.yaml").write_text(GOOD.format(folder=folder), encoding="utf8")
    empty, rest, unnamed = validate(Path("r.yaml")).errors()
    lines = ", ".join(str(n) for n in range(4, 42, 2))
    assert (empty.where, str(empty).endswith(f"; so in {lines}")) == ("p1.jsonl:2", True)
    assert str(rest) == "p1.jsonl: 5 more rows are refused; mend these first"
    assert (unnamed.where, str(unnamed).endswith("; so in 4")) == ("p2.jsonl:2", True)


def test_sources_are_compared_with_the_mixture(folder: Path) -> None:
    recipe = GOOD.format(folder=folder)
    Path("r.yaml").write_text(recipe, encoding="utf8")
    write("p2.jsonl", [{"prompt": f"other {n}"} for n in range(3)])
    mixture = "data.mixture={p1: {weight: 3}, p2: {}}"
    facts = validate(Path("r.yaml"), [mixture]).facts
    assert "data.mixture: p1 75% of 40 prompts, p2 25% of 3 prompts" in facts
    for override, says in (
        ("data.mixture={p1: {}}", "does not name the source 'p2', of which there are 3 prompts"),
        ("data.mixture={p1: {epochs: 1}, p2: {epochs: 1}}", "give 43 prompts in all their epochs"),
    ):
        (error,) = validate(Path("r.yaml"), [override]).errors()
        assert says in str(error)
    errors = validate(Path("r.yaml"), [mixture, "data.source_column=of"]).errors()
    assert [e.where for e in errors] == ["p1.jsonl:1", "p2.jsonl:1"]
    assert "column 'of': should name the prompt's source" in str(errors[0])


def test_evaluation_while_training_needs_prompts(folder: Path) -> None:
    Path("r.yaml").write_text(GOOD.format(folder=folder), encoding="utf8")
    assert validate(Path("r.yaml"), ["evaluate.every=2"]).errors() == []
    (error,) = validate(Path("r.yaml"), ["evaluate.every=2", "data.evaluation=[]"]).errors()
    assert str(error) == "data.evaluation is empty; evaluate.every needs at least one file"


def test_a_stage_refuses_what_it_reads_and_nothing_else(folder: Path) -> None:
    Path("r.yaml").write_text(GOOD.format(folder=folder), encoding="utf8")
    write("d.jsonl", [{"prompt": "q"}, {"response": "a"}])
    component = f"{{kind: function, target: '{MINE}:goood'}}"
    config = load_config("r.yaml", [f"reward_service.components={{mine: {component}}}"])
    with pytest.raises(DataError, match=r"d\.jsonl:1: .*; and d\.jsonl:2: "):
        require_stage(config, "sft")
    with pytest.raises(ConfigError, match=r"has no 'goood'.*; and .*run `talipot sft` first"):
        require_stage(config, "train")
    with pytest.raises(
        CheckpointError, match=r"run `talipot sft` first.*run `talipot reward` first"
    ):
        require_stage(load_config("r.yaml"), "train")
    # Modules of another machine are not here to be imported.
    with pytest.raises(CheckpointError, match="run `talipot sft` first"):
        require_stage(load_config("r.yaml", ["cluster.address=auto"]), "train")


def test_the_head_of_a_stage_reads_no_more_than_the_first_rows(folder: Path) -> None:
    write("d.jsonl", [*({"prompt": str(n), "response": "a"} for n in range(1_000)), "{torn"])
    Path("r.yaml").write_text(GOOD.format(folder=folder), encoding="utf8")
    require_stage(load_config("r.yaml"), "sft")


def test_a_file_that_cannot_be_written_is_found_before(folder: Path) -> None:
    Path("r.yaml").write_text(GOOD.format(folder=folder), encoding="utf8")
    Path("taken").write_text("a file", encoding="utf8")
    found = validate(Path("r.yaml"), [f"output={os.getcwd()}/taken/runs"]).errors()
    assert [f.what.split(" ")[-3:] for f in found] == [["cannot", "be", "written"]]
