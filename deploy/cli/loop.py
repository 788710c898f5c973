"""`talipot loop`: ask, train the reward model on all that was said, train the policy, ask again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.config.run import RunConfig
from deploy.cli.rounds import (
    ActiveOption,
    BestOption,
    GoldOption,
    GuidelinesOption,
    HostOption,
    HumanOption,
    MarkdownOption,
    MeanOption,
    NameOption,
    OverlapOption,
    OverlapShareOption,
    PairsOption,
    PortOption,
    PracticeOption,
    RepeatShareOption,
    SeedOption,
    ServedAt,
    SupervisedOption,
    WithoutOption,
    propose_round,
    serve_round,
    settings_of,
)
from deploy.cli.shared import (
    AddressOption,
    Overrides,
    RunArgument,
    app,
    console,
    note,
    of_run,
    run_stage,
)
from deploy.screen import say

if TYPE_CHECKING:
    from deploy.feedback.export import How
    from deploy.stages.session import Session


@app.command()
def loop(
    run: RunArgument,
    overrides: Overrides = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="Rounds to do in all, with those that are done.")
    ] = 1,
    pairs: PairsOption = 200,
    supervised: SupervisedOption = 0.5,
    best: BestOption = 0.0,
    human: HumanOption = 0.0,
    active: ActiveOption = 0.0,
    overlap: OverlapOption = 2,
    overlap_share: OverlapShareOption = 0.2,
    repeat_share: RepeatShareOption = 0.05,
    gold: GoldOption = None,
    practice: PracticeOption = None,
    guidelines: GuidelinesOption = None,
    markdown: MarkdownOption = False,
    seed: SeedOption = 0,
    without: WithoutOption = None,
    mean: MeanOption = False,
    name: NameOption = None,
    host: HostOption = "127.0.0.1",
    port: PortOption = None,
    address: AddressOption = None,
) -> None:
    """Ask people about a run's policy, train on all that they said, and ask about the new one.

    Given again it continues where it was interrupted.
    """
    from deploy.feedback.loop import base_of, require_runnable
    from deploy.stages.supervised import run_reward

    base = base_of(of_run(run, overrides, address))
    require_runnable(base.config)  # not when people have answered already
    for number in range(1, rounds + 1):
        asked, trained = base.run_of(number - 1), base.run_of(number)
        while (step := base.next_step(number)) is not None:
            say(console, (f"round {number}", "italic"), f" · {_DOING[step]}")
            if step == "propose":
                settings = settings_of(
                    asked,
                    number,
                    guidelines,
                    supervised_share=supervised,
                    best_share=best,
                    human_share=human,
                    active_share=_active(asked, active),
                    pairs=pairs,
                    overlap=overlap,
                    overlap_share=overlap_share,
                    repeat_share=repeat_share,
                    markdown=markdown,
                    seed=seed,
                )
                propose_round(base.config, asked, settings, gold, practice)
            elif step == "ask":
                at = ServedAt(name=name, host=host, port=port)
                _ask(base.config, number, at, without or (), "mean" if mean else "rows")
            elif step == "reward":
                run_stage("reward", run_reward, trained, writer="reward")
            else:
                run_stage("train", _train, trained, attach=True, address=address)
    say(console, f"{rounds} rounds are done: ", (str(base.run_of(rounds).run_dir), "bold"))


def _ask(base: RunConfig, number: int, at: ServedAt, without: Sequence[str], how: How) -> None:
    """Serve a round until it is answered or closed, and write its comparisons.

    Raises:
        KeyboardInterrupt: Ctrl-C ended it; the round stays open.
    """
    from deploy.feedback.loop import until_answered
    from deploy.feedback.rounds import end_round, is_closed, round_of

    made, settings = round_of(base.folder, number)
    if not is_closed(made) and not serve_round(base, made, settings, at, until_answered):
        say(console, "the round stays open; the same command goes on with it")
        raise KeyboardInterrupt
    count = end_round(made, settings, without, how)
    say(console, f"{made.comparisons}: {count} comparisons")


def _active(asked: RunConfig, share: float) -> float:
    """Return the share of pairs that are chosen by disagreement; none where no models disagree."""
    from deploy.run_folder.weights import reward_models

    if share and len(reward_models(asked)) < 2:
        note(
            f"{asked.run_dir} has no reward models of several seeds: all pairs of this round are "
            "random (--active); reward_model.seeds=3 reward_model.keep_seeds=true keep some for "
            "the next"
        )
        return 0.0
    return share


def _train(session: Session, config: RunConfig) -> Mapping[str, Any]:
    """Train the policy, or go on with that."""
    from deploy.stages.policy import outcome_of, resumption_of, run_train

    facts = run_train(session, config, resumption=resumption_of(config))
    return outcome_of(session.config, facts)


_DOING = {
    "propose": "choosing pairs",
    "ask": "asking people",
    "reward": "training the reward model on all that was said",
    "train": "training the policy",
}
"""Steps in words."""
