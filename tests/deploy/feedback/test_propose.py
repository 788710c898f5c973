"""Pairs that are sampled from a run's policies, and the commands over a round."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
from pydantic import ValidationError

from common.config.feedback import RoundConfig
from common.config.recipe import save_config
from common.config.run import RunConfig
from common.data.records import (
    Comparison,
    Prompt,
    read_comparisons,
    read_demonstrations,
    write_jsonl,
)
from common.errors import ConfigError, DataError
from common.models.build import build_policy, build_scalar
from common.models.weight_files import save_weights
from deploy.feedback.disagreement import disagreement, preferences
from deploy.feedback.pairs import Pair, Response, read_pairs
from deploy.feedback.propose import chosen, proposed
from deploy.feedback.rounds import make_round, round_of
from deploy.feedback.store import Store
from tests.deploy.commands import Run, refused
from tests.workspaces import run_copy


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


def with_reward_models(config: RunConfig, seeds: int = 3) -> RunConfig:
    """The run with so many reward models that differ, as `keep_seeds` leaves them."""
    settings = config.reward_model.model_copy(update={"seeds": seeds, "keep_seeds": True})
    for seed in range(seeds):
        network = build_scalar(config.model)
        network.initialise(seed)
        path = config.folder.reward_seed(seed).weights
        path.parent.mkdir(parents=True)
        save_weights(network.state_dict(), path, {"model": config.model.model_dump_json()})
    made = config.model_copy(update={"reward_model": settings})
    save_config(made, made.folder.config)
    return made


def test_pairs_come_from_every_source_and_are_scored(config: RunConfig) -> None:
    config = with_reward_models(config)
    shares = {"supervised_share": 0.25, "best_share": 0.25, "human_share": 0.25, "best_of": 4}
    pairs, _ = proposed(config, settings(**shares))
    kinds = Counter(tuple(sorted((p.first.policy, p.second.policy))) for p in pairs)
    assert kinds == {
        ("policy", "policy"): 3,
        ("policy", "sft"): 3,
        ("best", "policy"): 3,
        ("human", "policy"): 3,
    }
    written = {d.response.strip() for d in read_demonstrations(config.data.demonstrations)}
    for response in (side for pair in pairs for side in (pair.first, pair.second)):
        assert len(response.scores) == 3
        assert (response.policy == "human") <= (response.text in written)
        assert bool(response.sampling) == (response.policy != "human")
    folder = make_round(config.folder, settings(**shares), pairs)
    assert {p.uid: p for p in read_pairs(folder.pairs)} == {p.uid: p for p in pairs}


def test_the_best_of_several_has_the_best_score(config: RunConfig) -> None:
    config = with_reward_models(config, 1)
    few = {"supervised_share": 0.0, "pairs": 6, "best_of": 6}
    pairs, _ = proposed(config, settings(best_share=1.0, **few))
    wins = 0
    for pair in pairs:
        sides = {side.policy: side.scores[0] for side in (pair.first, pair.second)}
        wins += sides["best"] > sides["policy"]
    assert wins >= 4


def test_pairs_on_which_reward_models_disagree_are_chosen(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"it has 1; train several with reward_model\.seeds=3"):
        proposed(config, settings(active_share=0.5))
    config = with_reward_models(config)
    pairs, _ = proposed(config, settings(active_share=0.5))
    assert Counter(pair.chosen_by for pair in pairs) == {"random": 6, "active": 6}
    random = [disagreement(pair) for pair in pairs if pair.chosen_by == "random"]
    active = [disagreement(pair) for pair in pairs if pair.chosen_by == "active"]
    assert fmean(active) > fmean(random)
    with pytest.raises(ValidationError):
        settings(active_share=0.71)  # less than 30 % at random
    with pytest.raises(ValidationError, match="more than all pairs together"):
        settings(human_share=0.6)


def test_disagreement_by_hand() -> None:
    def pair(first: tuple[float, ...], second: tuple[float, ...]) -> Pair:
        one, two = Response(text="a", scores=first), Response(text="b", scores=second)
        return Pair(prompt="p", first=one, second=two)

    assert disagreement(pair((0.0, 0.0), (0.0, 0.0))) == 0.0
    assert preferences(pair((1.0, 0.0), (0.0, 1.0))) == pytest.approx(
        [0.731059, 0.268941], abs=1e-6
    )
    assert disagreement(pair((1.0, 0.0), (0.0, 1.0))) == pytest.approx(0.231059, abs=1e-6)
    assert disagreement(pair((2000.0, 0.0), (0.0, 2000.0))) == pytest.approx(0.5)
    assert disagreement(pair((3.0,), (0.0,))) == 0.0
    candidates = [pair((float(i), 0.0), (0.0, float(i))) for i in range(9)]
    candidates = [replace(each, uid=str(i)) for i, each in enumerate(candidates)]
    found = chosen(candidates, 4, 0.5)
    assert [each.uid for each in found] == ["0", "1", "8", "7"]
    assert [each.chosen_by for each in found] == ["random", "random", "active", "active"]
    every = chosen(candidates, 9, 0.5)
    assert {each.chosen_by for each in every} == {"random"}, "there was nothing to choose from"


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
    folder_of, _ = round_of(config.folder, None)
    assert sum(pair.gold is not None for pair in read_pairs(folder_of.pairs)) == 1
    refused(run("feedback", "invite", folder, "ann"), 2, "is not served")
    link = run("feedback", "invite", folder, "ann", "--address", "http://127.0.0.1:1/").out
    assert "/enter?token=" in link
    refused(run("feedback", "invite", folder, "\n", "--address", "x"), 2, "a name has")
    refused(run("feedback", "revoke", folder, "Ann"), 2, "was never invited")
    assert "ann: 1 links" in run("feedback", "revoke", folder, "ann").out
    store = Store(folder_of.answers)
    store.welcome("ann")
    while (task := store.next_task("ann")) is not None:
        store.submit("ann", task.key, step=2)
    store.close()
    shown = run("feedback", "status", folder).out
    assert "7 of 7 pairs answered" in shown and "ann" in shown
    exported = run("feedback", "export", folder)
    assert "6 comparisons" in exported.out
    assert len(list(read_comparisons([str(folder_of.comparisons)]))) == 6
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
