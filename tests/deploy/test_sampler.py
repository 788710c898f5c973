"""A conversation with a run's policy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from common.config.recipe import load_config, save_config
from common.config.run import RunConfig
from common.data.tokenizer import load_tokenizer
from common.errors import ConfigError, DataError
from deploy.sampler import Conversation, Sampler
from tests.common.data.tokenizers import byte_level
from tests.common.models.pretrained.tiny import reference


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that has trained nothing yet, of a tiny chat model."""
    root = tmp_path_factory.mktemp("chat")
    folder = byte_level(root / "model")
    tokens = load_tokenizer(folder).vocab_size
    reference("qwen3", vocab_size=tokens).save_pretrained(folder)
    overrides = [f"output={root}", "name=run", "rollout.max_response_tokens=9"]
    model = f"model={{start: {folder}, context: 90, vocab_size: {tokens}}}"
    made = load_config(None, [*overrides, model])
    made.run_dir.mkdir()
    load_tokenizer(folder).save(made.run_dir / "tokenizer")
    save_config(made, made.folder.config)
    return made


def test_every_turn_answers_the_whole_conversation(config: RunConfig) -> None:
    sampler = Sampler(config, sft=True)
    conversation = Conversation(sampler, "Write about ships.", seed=3)
    first = conversation.say("the river")
    second = conversation.say("and the sea")
    asked = [
        {"role": "system", "content": "Write about ships."},
        {"role": "user", "content": "the river"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "and the sea"},
    ]
    assert sampler.reply(asked[:2], 3) == first
    assert sampler.reply(asked, 4) == second
    assert sampler.reply(asked[-1:], 4) != second
    with pytest.raises(DataError, match="your turn is empty"):
        conversation.say("")
    with pytest.raises(DataError, match=r"the conversation has \d+ tokens, and 81 fit"):
        conversation.say("ships and maps " * 30)


@pytest.mark.slow
def test_in_the_terminal(config: RunConfig) -> None:
    talipot = Path(sys.executable).with_name("talipot")
    done = subprocess.run(
        [talipot, "chat", str(config.run_dir), "--sft", "--seed", "3"],
        input="the river\nand the sea\n\nnot asked\n",
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    conversation = Conversation(Sampler(config, sft=True), "", seed=3)
    for turn in ("the river", "and the sea"):
        for line in conversation.say(turn).splitlines():
            assert line.strip() in done.stdout


def test_a_model_without_a_template_does_not_talk(workspace: RunConfig) -> None:
    sampler = Sampler(workspace, sft=True)
    with pytest.raises(ConfigError, match="use `talipot sample`"):
        Conversation(sampler, "", seed=0).say("open")
