"""`talipot feedback ...`: people compare responses, and a reward model is trained on what they say.

Heavy imports stand inside the commands, so that `talipot --help` is quick.
"""

from __future__ import annotations

import getpass
import json
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from common.errors import ConfigError
from deploy.cli.shared import CheckpointOption, RunArgument, app, console, note, of_run
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
    pairs: Annotated[int, typer.Option(min=1, help="How many.")] = 200,
    supervised: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share that compares the policy with what it began as."),
    ] = 0.5,
    best: Annotated[
        float, typer.Option(min=0, max=1, help="Share that compares it with its best of 8.")
    ] = 0.0,
    human: Annotated[
        float, typer.Option(min=0, max=1, help="Share that compares it with a demonstration.")
    ] = 0.0,
    active: Annotated[
        float,
        typer.Option(min=0, max=0.7, help="Share chosen where reward models of seeds disagree."),
    ] = 0.0,
    checkpoint: CheckpointOption = None,
    overlap: Annotated[int, typer.Option(min=1, help="People that some pairs are given to.")] = 2,
    overlap_share: Annotated[float, typer.Option(min=0, max=1, help="Share of these.")] = 0.2,
    repeat_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share that is shown again to the same person.")
    ] = 0.05,
    gold: Annotated[
        list[str] | None,
        typer.Option(help="A file of comparisons of which the better one is known; repeatable."),
    ] = None,
    practice: Annotated[
        list[str] | None,
        typer.Option(help="Likewise; everybody begins with these and is told the answer."),
    ] = None,
    guidelines: Annotated[
        Path | None, typer.Option(help="A text that everybody reads before the first pair.")
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Show texts as the Markdown that they are.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
) -> None:
    """Make a new round: sample responses of a run's policies, and pair them. Needs no cluster."""
    from common.config.feedback import RoundConfig
    from common.data.records import read_comparisons
    from deploy.feedback.propose import known_pairs, proposed
    from deploy.feedback.rounds import make_round, read_guidelines, rounds_of

    config = of_run(run, None, None)
    if supervised + best + human > 1:
        raise ConfigError("--supervised, --best and --human are more than all pairs together")
    settings = RoundConfig(
        number=max(rounds_of(config.folder), default=0) + 1,
        run=config.name,
        seed=seed,
        pairs=pairs,
        supervised_share=supervised,
        best_share=best,
        human_share=human,
        active_share=active,
        checkpoint=checkpoint or "",
        overlap=overlap,
        overlap_share=overlap_share,
        repeat_share=repeat_share,
        guidelines=read_guidelines(guidelines) if guidelines else "",
        markdown=markdown,
    )
    known = known_pairs(read_comparisons(gold), seed, "gold") if gold else []
    begin = known_pairs(read_comparisons(practice), seed, "practice") if practice else []
    sampled, which = proposed(config, settings)
    note(which)
    settings = settings.model_copy(update={"policy": which})
    made = make_round(config.folder, settings, sampled, known, begin)
    also = f" and {len(known)} that are known" if known else ""
    say(console, f"round {settings.number}: {pairs} pairs{also}")
    say(console, (str(made.path), "bold"))


@feedback.command()
def serve(
    run: RunArgument,
    number: RoundOption = None,
    name: Annotated[
        str | None, typer.Option("--as", help="Print a link for this labeler; left out, for you.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Left out, the first free one from 8970.")
    ] = None,
) -> None:
    """Show a round's pairs to who was invited; Ctrl-C ends it, and loses nothing."""
    import asyncio

    from deploy.feedback.pages import Round
    from deploy.feedback.rounds import round_of
    from deploy.feedback.server import serve
    from deploy.listening import is_local

    config = of_run(run, None, None)
    folder, settings = round_of(config.folder, number)
    served = Round(
        name=f"{config.name}, round {settings.number}",
        folder=folder,
        settings=settings,
        access=config.folder.labelers,
        address=config.folder.labelling_address,
    )
    if not is_local(host):
        note("others on the network can read what is sent: put TLS before it, or use ssh -L")
    say(console, f"{served.name}; Ctrl-C ends it")
    with suppress(KeyboardInterrupt):  # the way to leave it
        asyncio.run(
            serve(
                served,
                host,
                port,
                lambda url: say(console, (url, "bold")),
                note,
                name or _own_name(),
            )
        )


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
    without: Annotated[
        list[str] | None, typer.Option(help="A labeler whose answers are left out; repeatable.")
    ] = None,
    mean: Annotated[
        bool, typer.Option("--mean", help="One row a pair, of the mean of its answers.")
    ] = False,
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
    reopen: Annotated[bool, typer.Option("--reopen", help="Go on asking instead.")] = False,
) -> None:
    """End a round: nothing more is asked, and no answer is taken. Exports it, too."""
    from deploy.feedback.rounds import close_round, export_round, round_of

    config = of_run(run, None, None)
    folder, settings = round_of(config.folder, number)
    close_round(folder, reopen=reopen)
    if reopen:
        say(console, f"round {settings.number} is open again")
        return
    say(console, f"round {settings.number} is closed; `--reopen` opens it again")
    say(console, f"{folder.comparisons}: {export_round(folder, settings)} comparisons")


def _own_name() -> str:
    with suppress(OSError, KeyError):
        return getpass.getuser()
    return "you"
