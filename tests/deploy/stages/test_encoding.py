"""Data that does not fit: named by file and line, or counted and said, in every stage."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common.config.run import RunConfig
from common.data.fitting import Fitting
from common.data.prompts import encode_prompts
from common.data.records import Prompt, read_comparisons, read_demonstrations
from common.data.tokenizer import Tokenizer, load_tokenizer
from common.errors import ConfigError, DataError
from deploy.stages import supervised
from deploy.stages.encoding import encode_comparisons, encode_pairs, read_encoded_prompts
from deploy.stages.session import Session
from tests.workspaces import run_copy

# 64 tokens of context, 8 of them for a response: 56 for a prompt. A digit here is a token.
LONG_PROMPT, LONG_RESPONSE = "7" * 57, "7" * 8


@pytest.fixture(scope="module")
def tokenizer(workspace: RunConfig) -> Tokenizer:
    found = load_tokenizer(workspace.run_dir / "tokenizer.json")
    assert len(found.encode(LONG_PROMPT)) == 57
    assert (workspace.max_prompt_tokens, workspace.rollout.max_response_tokens) == (56, 8)
    return found


def lines(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    """A file whose first line is blank: record n stands in line n + 1."""
    path = folder / f"{name}.jsonl"
    path.write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config_of(workspace: RunConfig, folder: Path, **data: Any) -> RunConfig:
    return run_copy(workspace, folder, data=data)


def session_of(config: RunConfig) -> tuple[Session, io.StringIO]:
    said = io.StringIO()
    return Session(config, Console(file=said, width=1000)), said


def pair(prompt: str = "p", response: str = "r") -> dict[str, str]:
    return {"prompt": prompt, "response": response}


def comparison(prompt: str = "p", chosen: str = "a", rejected: str = "b") -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


# ------------------------------------------------------------------ refused: file and line


def test_a_long_demonstration_is_named_by_its_line(
    workspace: RunConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = lines(tmp_path, "d", [*[pair()] * 40, pair(LONG_PROMPT), pair()])
    config = config_of(workspace, tmp_path, too_long="error", demonstrations=[path])
    with pytest.raises(DataError) as caught:
        encode_pairs(read_demonstrations([path]), tokenizer, config)
    assert str(caught.value) == (
        f"{path}:42: field 'prompt': 57 tokens, room for 56; raise model.context or set "
        "data.too_long to skip or truncate"
    )
    path = lines(tmp_path, "e", [pair(), pair(response=LONG_RESPONSE)])
    with pytest.raises(DataError) as caught:
        encode_pairs(read_demonstrations([path]), tokenizer, config)
    assert str(caught.value).startswith(
        f"{path}:3: field 'response': 9 tokens, EOS included, room for 8; raise "
        "rollout.max_response_tokens or "
    )


@pytest.mark.parametrize(
    ("row", "side"),
    [
        (comparison(LONG_PROMPT), "prompt"),
        (comparison(chosen=LONG_RESPONSE), "chosen"),
        (comparison(rejected=LONG_RESPONSE), "rejected"),
    ],
)
def test_a_long_side_of_a_comparison_is_named_by_its_line(
    workspace: RunConfig, tokenizer: Tokenizer, tmp_path: Path, row: dict[str, str], side: str
) -> None:
    path = lines(tmp_path, "c", [*[comparison()] * 40, row])
    config = config_of(workspace, tmp_path, too_long="error")
    with pytest.raises(DataError) as caught:
        encode_comparisons(read_comparisons([path]), tokenizer, config)
    assert str(caught.value).startswith(f"{path}:42: field '{side}': ")


def test_a_long_prompt_is_named_by_its_line_or_number(
    workspace: RunConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = lines(tmp_path, "p", [{"prompt": "p"}, {"prompt": LONG_PROMPT}])
    config = config_of(workspace, tmp_path, too_long="error")
    with pytest.raises(DataError) as caught:
        read_encoded_prompts([path], tokenizer, config)
    assert str(caught.value).startswith(f"{path}:3: field 'prompt': 57 tokens, room for 56; ")
    some = [Prompt(prompt="p"), Prompt(prompt=LONG_PROMPT)]
    with pytest.raises(DataError, match=r"^prompt 2: field 'prompt': 57 tokens"):
        encode_prompts(some, tokenizer, max_tokens=56, too_long="error")


# ------------------------------------------------------------------ skipped: counted and said


def test_each_stage_says_how_many_it_skipped(
    workspace: RunConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = [pair(LONG_PROMPT)] * 95 + [pair(f"p{i}") for i in range(5)]
    path = lines(tmp_path, "d", rows)
    sides = [comparison(f"p{i}", LONG_RESPONSE if i < 95 else "a") for i in range(100)]
    compared = lines(tmp_path, "c", sides)
    config = config_of(
        workspace, tmp_path, too_long="skip", demonstrations=[path], comparisons=[compared]
    )
    pairs, fitting = encode_pairs(read_demonstrations([path]), tokenizer, config)
    assert len(pairs) == 5
    room = "longer than 56 prompt or 8 response tokens (data.too_long)"
    assert fitting.said() == [f"95 of 100 demonstrations skipped: {room}"]
    session, said = session_of(config)
    found = supervised.encoded_comparisons(session, config)
    train, held_out = found.train, found.held_out
    assert len(train) + len(held_out) == 5
    assert said.getvalue() == f"95 of 100 comparisons skipped: {room}\n"
    _, prompts = read_encoded_prompts([path], tokenizer, config)
    assert prompts.said() == [
        "95 of 100 prompts skipped: longer than 56 prompt tokens (data.too_long)"
    ]


def test_too_few_left_is_one_line_with_the_limits(workspace: RunConfig, tmp_path: Path) -> None:
    path = lines(tmp_path, "d", [pair(LONG_PROMPT)] * 99 + [pair()])
    compared = lines(tmp_path, "c", [comparison(LONG_PROMPT)] * 9)
    config = config_of(
        workspace, tmp_path, too_long="skip", demonstrations=[path], comparisons=[compared],
        prompts=[lines(tmp_path, "p", [pair(LONG_PROMPT)] * 3)],
    )  # fmt: skip
    session, _ = session_of(config)
    for stage, left in (
        (lambda: supervised.run_sft(session, config), "1 demonstrations left, and sft"),
        (lambda: supervised.encoded_comparisons(session, config), "0 comparisons left, and reward"),
        (
            lambda: read_encoded_prompts(config.data.prompts, session.tokenizer(), config),
            "0 prompts left, and sampling",
        ),
    ):
        with pytest.raises(DataError) as caught:
            stage()
        message = str(caught.value)
        assert message.startswith(left) and "\n" not in message
        assert "longer than 56 prompt" in message and "model.context" in message


# ------------------------------------------------------------------ truncated


def test_truncation_keeps_what_stands_next_to_the_response_and_its_beginning(
    workspace: RunConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = lines(tmp_path, "d", [pair("1" + "7" * 56, "7" * 8), pair()])
    config = config_of(workspace, tmp_path, too_long="truncate")
    (first, second), fitting = encode_pairs(read_demonstrations([path]), tokenizer, config)
    assert tokenizer.decode(first.prompt) == "7" * 56
    assert tokenizer.decode(first.response) == "7" * 8 and tokenizer.eos_id not in first.response
    assert second.response[-1] == tokenizer.eos_id
    assert fitting.said() == [
        "1 of 2 demonstrations cut: longer than 56 prompt or 8 response tokens (data.too_long)"
    ]


def test_sides_that_are_equal_after_the_cut_are_left_out_and_counted(
    workspace: RunConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    same = comparison("p", "7" * 8 + "yes", "7" * 8 + "no")
    differ = comparison("q", "7" * 7 + "1" + "7", "7" * 9)
    path = lines(tmp_path, "c", [same, differ, comparison("r")])
    config = config_of(workspace, tmp_path, too_long="truncate")
    found, fitting = encode_comparisons(read_comparisons([path]), tokenizer, config)
    assert [tokenizer.decode(c.prompt) for c in found] == ["q", "r"]
    assert all(c.chosen != c.rejected for c in found)
    assert (fitting.read, fitting.cut, fitting.equal, fitting.skipped) == (3, 1, 1, 0)
    assert "1 of 3 comparisons left out: equal sides after the cut to 8 tokens" in fitting.said()


# ------------------------------------------------------------------ the head of a file


def test_the_reward_model_is_centred_on_the_first_that_fit(
    workspace: RunConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = [pair(LONG_PROMPT)] * 600 + [pair(f"p{i}") for i in range(600)]
    path = lines(tmp_path, "d", rows)
    config = config_of(workspace, tmp_path, too_long="skip", demonstrations=[path])
    found = supervised.reference_pairs(config, tokenizer)
    assert [tokenizer.decode(p.prompt) for p in found] == [f"p{i}" for i in range(512)]
    path = lines(tmp_path, "e", rows[:600])
    config = RunConfig.model_validate(
        config.model_dump(mode="json") | {"data": {"demonstrations": [path], "too_long": "skip"}}
    )
    with pytest.raises(DataError, match=r"^0 demonstrations left, and centring the reward model"):
        supervised.reference_pairs(config, tokenizer)
    with pytest.raises(ConfigError, match=r"data\.demonstrations is empty; centring"):
        supervised.reference_pairs(
            config.model_copy(update={"data": type(config.data)()}), tokenizer
        )


def test_evaluation_takes_the_first_prompts_that_fit(tokenizer: Tokenizer) -> None:
    some = [*[Prompt(prompt=LONG_PROMPT)] * 5, *(Prompt(prompt=f"p{i}") for i in range(5))]
    found, fitting = encode_prompts(some, tokenizer, max_tokens=56, too_long="skip", limit=2)
    assert [p.text for p in found] == ["p0", "p1"]
    assert fitting.said()[0].startswith("5 of 7 prompts skipped")


def test_a_part_without_tokens_is_named() -> None:
    fitting = Fitting(what="comparisons", prompt=4, response=4, too_long="truncate")
    with pytest.raises(DataError, match=r"^f:7: field 'chosen': has no tokens"):
        fitting.fit("f:7", {"prompt": [1], "chosen": [], "rejected": [1]})


# ------------------------------------------------------------------ what comparisons are for


def test_comparisons_are_for_what_they_say(
    workspace: RunConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    splits = ["train"] * 6 + ["valid1"] * 2 + ["valid2"] * 3
    rows = [{**comparison(f"p{i}"), "split": split} for i, split in enumerate(splits)]
    rows += [comparison(f"other {i}") for i in range(4)]
    rows += [comparison("p6", "c", "d"), comparison("p9", "c", "d")]  # prompts that are held out
    rows += [{**comparison("p9", "e", "f"), "split": "valid1"}]  # reported is reported
    path = lines(tmp_path, "c", rows)
    config = config_of(workspace, tmp_path, comparisons=[path])
    session, said = session_of(config)
    found = supervised.encoded_comparisons(session, config)
    prompts = {
        name: [tokenizer.decode(c.prompt) for c in part]
        for name, part in (
            *(("train", found.train), ("held out", found.held_out)),
            ("reported", found.reported),
        )
    }
    others = {f"other {i}" for i in range(4)}
    assert prompts["train"][:6] == [f"p{i}" for i in range(6)]
    assert prompts["held out"][:2] == ["p6", "p7"] and prompts["reported"] == ["p8", "p9", "p10"]
    # Of what says nothing a share is held out, as without splits.
    assert len(prompts["train"][6:]) == 3 and len(prompts["held out"][2:]) == 1
    assert {*prompts["train"][6:], *prompts["held out"][2:]} == others
    assert said.getvalue() == "  2 comparisons are left out: their prompts are held out\n"


def test_without_a_choice_of_theirs_a_share_is_held_out(
    workspace: RunConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = [comparison(f"p{i}") for i in range(20)]
    rows += [{**comparison("shown"), "split": "valid2"}]
    config = config_of(workspace, tmp_path, comparisons=[lines(tmp_path, "c", rows)])
    session, said = session_of(config)
    found = supervised.encoded_comparisons(session, config)
    assert (len(found.train), len(found.held_out), len(found.reported)) == (18, 2, 1)
    assert said.getvalue() == ""
    only = [{**comparison(f"p{i}"), "split": "valid1"} for i in range(3)]
    (tmp_path / "other").mkdir()
    config = config_of(workspace, tmp_path / "other", comparisons=[lines(tmp_path, "v", only)])
    session, _ = session_of(config)
    with pytest.raises(DataError, match="every usable comparison is held out"):
        supervised.encoded_comparisons(session, config)
