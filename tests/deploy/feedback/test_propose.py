"""Pairs that are sampled from a run's policies, and the commands over a round."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config.feedback import RoundConfig
from common.config.recipe import save_config
from common.config.run import RunConfig
from common.data.records import Comparison, Prompt, read_comparisons, write_jsonl
from common.errors import ConfigError, DataError
from common.models.build import build_policy
from common.models.weight_files import save_weights
from deploy.feedback.pairs import read_pairs
from deploy.feedback.propose import proposed
from deploy.feedback.rounds import make_round, round_of
from deploy.feedback.store import Store
from tests.conftest import run_copy
from tests.deploy.commands import Run, refused


@pytest.fixture
def config(workspace: RunConfig, tmp_path: Path) -> RunConfig:
    """A run with a policy that is another one than it began with; responses end at a letter."""
    ends = {"stop": ["a", "e", "i", "o", "t"], "max_response_tokens": 24}
    made = run_copy(workspace, tmp_path, rollout=ends)
    policy = build_policy(made.model)
    policy.initialise(9)
    made.folder.policy.path.mkdir()
    save_weights(policy.state_dict(), made.folder.policy.weights, {})
    save_config(made, made.folder.config)
    return made


def settings(number: int = 1, **more: object) -> RoundConfig:
    return RoundConfig.model_validate({"number": number, "pairs": 12, **more})


def test_pairs_come_from_both_policies_and_are_the_same_each_time(config: RunConfig) -> None:
    pairs, note = proposed(config, settings())
    assert (pairs, note) == proposed(config, settings())
    assert pairs != proposed(config, settings(seed=1))[0]
    assert len({pair.uid for pair in pairs}) == 12
    kinds = {tuple(sorted((pair.first.policy, pair.second.policy))) for pair in pairs}
    assert kinds == {("policy", "policy"), ("policy", "sft")}
    firsts = [pair.first.policy for pair in pairs if pair.first.policy != pair.second.policy]
    assert set(firsts) == {"policy", "sft"}, "either stands first"
    (only,) = {
        tuple(sorted((p.first.policy, p.second.policy)))
        for p in proposed(config, settings(supervised_share=1.0))[0]
    }
    assert only == ("policy", "sft")


def test_no_prompt_is_asked_in_two_rounds(config: RunConfig) -> None:
    seen: set[str] = set()
    number = 0
    with pytest.raises((ConfigError, DataError), match=r"earlier round|ask for fewer"):
        while True:
            number += 1
            pairs, _ = proposed(config, settings(number))
            prompts = {pair.prompt for pair in pairs}
            assert not prompts & seen
            seen |= prompts
            make_round(config.folder, settings(number), pairs)
    assert number > 1


def test_from_proposal_to_comparisons_by_the_commands(
    run: Run, config: RunConfig, tmp_path: Path
) -> None:
    folder = str(config.run_dir)
    refused(run("feedback", "status", folder), 2, "has no round", "feedback propose")
    refused(run("feedback", "propose", folder, "--guidelines", "none.txt"), 2, "none.txt")
    gold = tmp_path / "gold.jsonl"
    write_jsonl(gold, [Comparison(prompt="q", chosen="good", rejected="bad")])
    made = run("feedback", "propose", folder, "--pairs", "6", "--gold", str(gold))
    assert (made.code, made.error) == (0, ""), made
    assert "round 1: 6 pairs and 1 that are known" in made.out
    chosen, _ = round_of(config.folder, None)
    assert sum(pair.gold is not None for pair in read_pairs(chosen.pairs)) == 1
    refused(run("feedback", "invite", folder, "ann"), 2, "is not served")
    link = run("feedback", "invite", folder, "ann", "--address", "http://127.0.0.1:1/").out
    assert "/enter?token=" in link
    refused(run("feedback", "invite", folder, "\n", "--address", "x"), 2, "a name has")
    refused(run("feedback", "revoke", folder, "Ann"), 2, "was never invited")
    assert "ann: 1 links" in run("feedback", "revoke", folder, "ann").out
    store = Store(chosen.answers)
    store.welcome("ann")
    while (task := store.next_task("ann")) is not None:
        store.submit("ann", task.key, step=2)
    store.close()
    shown = run("feedback", "status", folder).out
    assert "7 of 7 pairs answered" in shown and "ann" in shown
    exported = run("feedback", "export", folder)
    assert "6 comparisons" in exported.out
    assert len(list(read_comparisons([str(chosen.comparisons)]))) == 6
    refused(run("feedback", "export", folder, "--without", "bob"), 2, "--without bob")
    closed = run("feedback", "close", folder)
    assert closed.code == 0 and "round 1 is closed" in closed.out and "6 comparisons" in closed.out
    assert "closed" in run("feedback", "status", folder).out
    assert "open again" in run("feedback", "close", folder, "--reopen").out
    refused(run("feedback", "serve", folder, "--round", "3"), 2, "no round 3; there are 1")


def test_prompts_with_tools_are_not_asked(config: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "tools.jsonl"
    messages = ({"role": "user", "content": "close"},)
    write_jsonl(path, [Prompt(prompt="close", messages=messages, tools=({"type": "function"},))])
    data = config.data.model_copy(update={"prompts": (str(path),)})
    with pytest.raises(ConfigError, match="0 prompts were not asked"):
        proposed(config.model_copy(update={"data": data}), settings())
