"""Conversations in a stage: what is learnt in a row, what fits, what is held out together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.config.run import RunConfig
from common.data.records import Comparison, Demonstration
from common.data.tokenizer import Tokenizer, load_tokenizer
from common.errors import ConfigError, DataError
from deploy.run_folder.tokenizer import run_tokenizer
from deploy.stages.encoding import encode_comparisons, encode_pairs, hold_out, same_pair
from learner.supervised.packing import packed_batch
from tests.common.data.tokenizers import CHATML, THINKING, byte_level


def config_of(context: int = 400, response: int = 40, **data: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "chat",
            "model": {"context": context},
            "rollout": {"max_response_tokens": response},
            "data": data,
        }
    )


def conversation(*contents: str) -> Demonstration:
    messages = tuple(
        {"role": "assistant" if index % 2 else "user", "content": content}
        for index, content in enumerate(contents)
    )
    return Demonstration(prompt=contents[0], response=contents[-1], messages=messages, place="d:1")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(byte_level(tmp_path_factory.mktemp("t")))


def test_the_targets_are_the_assistants_turns_and_their_ends(tokenizer: Tokenizer) -> None:
    record = conversation("name a ship", "the Argo", "and a river", "the Seine")
    [pair], _ = encode_pairs([record], tokenizer, config_of())
    length = len(pair.prompt) + len(pair.response) + 3
    batch = packed_batch([pair], [[0]], length)
    [tokens], [mask] = batch.tokens_BT.tolist(), batch.target_mask_BT.tolist()
    learnt = [tokens[i + 1] for i in range(length - 1) if mask[i]]
    end = tokenizer.eos_id
    first, second = tokenizer.encode_batch(["the Argo", "the Seine"], follows=True)
    assert learnt == [*first, end, *second, end]
    assert pair.targets == len(learnt) == sum(mask)
    # Wherever a turn is learnt, what stands before it is the prompt that sampling would have.
    assert tokenizer.chat is not None
    asked = tokenizer.chat.prompt(record.messages[:3]).ids
    assert tokens[: len(asked)] == asked and mask[len(asked) - 1] and not mask[len(asked) - 2]


def test_whole_turns_are_kept_as_far_as_they_fit(tokenizer: Tokenizer) -> None:
    record = conversation("name a ship", "the Argo", "and a river", "the Seine")
    [whole], _ = encode_pairs([record], tokenizer, config_of())
    room = len(whole.prompt) + len(whole.response) - 1
    with pytest.raises(DataError, match=r"d:1: field 'messages': .* up to the end of answer 2"):
        encode_pairs([record], tokenizer, config_of(room, 10, too_long="error"))
    pairs, fitting = encode_pairs([record], tokenizer, config_of(room, 10, too_long="skip"))
    assert not pairs and fitting.skipped == 1
    [cut], fitting = encode_pairs([record], tokenizer, config_of(room, 10, too_long="truncate"))
    assert fitting.cut == 1 and cut.between == ()
    assert cut.response == whole.response[: len(cut.response)]
    assert cut.response[-1] == tokenizer.eos_id
    pairs, _ = encode_pairs([record], tokenizer, config_of(400, 2, too_long="truncate"))
    assert not pairs, "an answer is not cut in the middle"


def test_rows_of_one_conversation_are_held_out_together(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path, template=THINKING))
    records = [
        conversation(f"q{i}", "<think>\na\n</think>\n\nb", "d", f"<think>\n{i}\n</think>\n\nf")
        for i in range(6)
    ]
    pairs, _ = encode_pairs(records, tokenizer, config_of())
    assert len(pairs) == 12
    train, held_out = hold_out(pairs, 0.5, 0, same_pair)
    assert len(train) == len(held_out) == 6
    assert not {p.conversation for p in train} & {p.conversation for p in held_out}


def test_comparisons_share_the_prompts_ids(tokenizer: Tokenizer) -> None:
    asked = ({"role": "user", "content": "name a ship"},)
    record = Comparison(prompt="name a ship", chosen="the Argo", rejected="no", messages=asked)
    [found], _ = encode_comparisons([record], tokenizer, config_of())
    assert tokenizer.chat is not None
    assert found.prompt == tokenizer.chat.prompt(asked).ids
    assert tokenizer.decode(found.chosen) == "the Argo" and found.chosen[-1] == tokenizer.eos_id
    assert tokenizer.decode(found.rejected) == "no" and found.rejected[-1] == tokenizer.eos_id


def test_a_run_takes_a_checkpoints_tokenizer_with_its_template(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "model", template=CHATML)
    (tmp_path / "mine.jinja").write_text(THINKING)
    run = tmp_path / "run"

    def recipe(**tokenizer: Any) -> RunConfig:
        values = {"name": "run", "output": str(tmp_path), "tokenizer": tokenizer}
        return RunConfig.model_validate(values)

    plain = recipe(path=str(folder))
    made = run_tokenizer(run, plain, lambda: None)
    names = {path.name for path in (run / "tokenizer").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert plain.folder.tokenizer == run / "tokenizer"
    assert run_tokenizer(run, plain, lambda: None).fingerprint() == made.fingerprint()
    other = recipe(path=str(folder), chat_template=str(tmp_path / "mine.jinja"))
    changed = run_tokenizer(run, other, lambda: None)  # nothing depends on the first yet
    assert changed.chat is not None and changed.chat.source == THINKING
    (run / "sft").mkdir()
    (run / "sft" / "policy.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"the recipe asks for another one: tokenizer.path"):
        run_tokenizer(run, plain, lambda: None)
    (run / "tokenizer" / "chat_template.jinja").write_text(CHATML)
    with pytest.raises(DataError, match=r"tokenizer/chat_template.jinja: .* changed"):
        run_tokenizer(run, other, lambda: None)
