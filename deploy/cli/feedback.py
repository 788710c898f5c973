"""`talipot feedback ...`: people compare responses, and a reward model is trained on what they say.

Heavy imports stand inside the commands, so that `talipot --help` is quick.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from common.errors import ConfigError
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
from deploy.cli.shared import CheckpointOption, RunArgument, app, console, of_run
from deploy.screen import say, show

feedback = typer.Typer(help="Ask people which of two responses is better.", no_args_is_help=True)
app.add_typer(feedback, name="feedback")

RoundOption = Annotated[
    int | None, typer.Option("--round", min=1, help="Which round; left out, the newest.")
]
NameArgument = Annotated[str, typer.Argument(help="A labeler's name.")]


@feedback.command()
def propose(
    run: RunArgument,
    pairs: PairsOption = 200,
    supervised: SupervisedOption = 0.5,
    best: BestOption = 0.0,
    human: HumanOption = 0.0,
    active: ActiveOption = 0.0,
    checkpoint: CheckpointOption = None,
    overlap: OverlapOption = 2,
    overlap_share: OverlapShareOption = 0.2,
    repeat_share: RepeatShareOption = 0.05,
    gold: GoldOption = None,
    practice: PracticeOption = None,
    guidelines: GuidelinesOption = None,
    markdown: MarkdownOption = False,
    seed: SeedOption = 0,
) -> None:
    """Make a new round: sample responses of a run's policies, and pair them. Needs no cluster."""
    from deploy.feedback.loop import with_own_data
    from deploy.feedback.rounds import rounds_of

    config = with_own_data(of_run(run, None, None))
    settings = settings_of(
        config,
        max(rounds_of(config.folder), default=0) + 1,
        guidelines,
        supervised_share=supervised,
        best_share=best,
        human_share=human,
        active_share=active,
        checkpoint=checkpoint or "",
        pairs=pairs,
        overlap=overlap,
        overlap_share=overlap_share,
        repeat_share=repeat_share,
        markdown=markdown,
        seed=seed,
    )
    propose_round(config, config, settings, gold, practice)


@feedback.command()
def serve(
    run: RunArgument,
    number: RoundOption = None,
    name: NameOption = None,
    host: HostOption = "127.0.0.1",
    port: PortOption = None,
) -> None:
    """Show a round's pairs to who was invited; Ctrl-C ends it, and loses nothing."""
    from deploy.feedback.rounds import round_of

    config = of_run(run, None, None)
    folder, settings = round_of(config.folder, number)
    serve_round(config, folder, settings, ServedAt(name=name, host=host, port=port))


@feedback.command()
def invite(
    run: RunArgument,
    name: NameArgument,
    address: Annotated[
        str | None, typer.Option(help="Where the page is reached; left out, where it is served.")
    ] = None,
) -> None:
    """Print a link for a labeler; it works once, in one browser."""
    from deploy.feedback.access import Access
    from deploy.feedback.server import link_of

    folder = of_run(run, None, None).folder
    if address is None:
        if not folder.labelling_address.exists():
            raise ConfigError(
                f"{folder.path} is not served: start `talipot feedback serve`, or give --address"
            )
        address = folder.labelling_address.read_text(encoding="utf8")
    access = Access(folder.labelers)
    say(console, link_of(address, access.invite(name)))
    access.close()


@feedback.command()
def revoke(run: RunArgument, name: NameArgument) -> None:
    """Take a labeler's links back, and sign all browsers out; answers stay."""
    from deploy.feedback.access import Access

    access = Access(of_run(run, None, None).folder.labelers)
    say(console, f"{name}: {access.revoke(name)} links and browsers closed")
    access.close()


@feedback.command()
def status(
    run: RunArgument,
    number: RoundOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show how far a round is, and how far its labelers agree."""
    from deploy.feedback.rounds import round_of
    from deploy.feedback.standing import COLUMNS, lines_of, standing_of
    from deploy.screen import table

    config = of_run(run, None, None)
    folder, settings = round_of(config.folder, number)
    standing = standing_of(folder, settings)
    if as_json:
        show(console, json.dumps(standing.facts()))
        return
    for line in lines_of(standing):
        say(console, *line)
    table(console, COLUMNS, standing.rows())


@feedback.command()
def export(
    run: RunArgument,
    number: RoundOption = None,
    without: WithoutOption = None,
    mean: MeanOption = False,
) -> None:
    """Write a round's comparisons.jsonl, which `talipot reward` trains on, and all answers."""
    from deploy.feedback.rounds import export_round, round_of

    config = of_run(run, None, None)
    folder, settings = round_of(config.folder, number)
    count = export_round(folder, settings, without or (), how="mean" if mean else "rows")
    say(console, f"{folder.comparisons}: {count} comparisons")


@feedback.command()
def close(
    run: RunArgument,
    number: RoundOption = None,
    without: WithoutOption = None,
    mean: MeanOption = False,
    reopen: Annotated[bool, typer.Option("--reopen", help="Open it again instead.")] = False,
) -> None:
    """End a round: nothing more is asked, no answer is taken. Writes what `export` writes."""
    from deploy.feedback.rounds import close_round, end_round, round_of

    config = of_run(run, None, None)
    folder, settings = round_of(config.folder, number)
    if reopen:
        close_round(folder, reopen=True)
        say(console, f"round {settings.number} is open again")
        return
    count = end_round(folder, settings, without or (), how="mean" if mean else "rows")
    say(console, f"round {settings.number} is closed; `--reopen` opens it again")
    say(console, f"{folder.comparisons}: {count} comparisons")
