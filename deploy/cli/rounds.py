"""What the commands about rounds of feedback share: their options, and what they do."""

from __future__ import annotations

import asyncio
import getpass
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from common.config.feedback import RoundConfig
from common.config.run import RunConfig
from common.errors import ConfigError
from common.run_folder import RoundFolder
from deploy.cli.shared import console, note
from deploy.screen import say

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

PairsOption = Annotated[int, typer.Option(min=1, help="Pairs of a round.")]
SupervisedOption = Annotated[
    float,
    typer.Option(min=0, max=1, help="Share that compares the policy with what it began as."),
]
BestOption = Annotated[
    float, typer.Option(min=0, max=1, help="Share that compares it with its best of 8.")
]
HumanOption = Annotated[
    float, typer.Option(min=0, max=1, help="Share that compares it with a demonstration.")
]
ActiveOption = Annotated[
    float,
    typer.Option(min=0, max=0.7, help="Share chosen where reward models of seeds disagree."),
]
OverlapOption = Annotated[
    int, typer.Option(min=1, help="How many people the pairs of --overlap-share are given to.")
]
OverlapShareOption = Annotated[
    float, typer.Option(min=0, max=1, help="Share of pairs that several people are given.")
]
RepeatShareOption = Annotated[
    float, typer.Option(min=0, max=1, help="Share that is shown again to the same person.")
]
GoldOption = Annotated[
    list[str] | None,
    typer.Option(help="A file of comparisons whose better response is known; repeatable."),
]
PracticeOption = Annotated[
    list[str] | None,
    typer.Option(help="A file of such comparisons to practise with first; answers are told."),
]
GuidelinesOption = Annotated[
    Path | None, typer.Option(help="A text that everybody reads before the first pair.")
]
MarkdownOption = Annotated[
    bool, typer.Option("--markdown", help="Show texts as the Markdown that they are.")
]
SeedOption = Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")]
WithoutOption = Annotated[
    list[str] | None, typer.Option(help="A labeler whose answers are left out; repeatable.")
]
MeanOption = Annotated[
    bool, typer.Option("--mean", help="One row a pair, of the mean of its answers.")
]
NameOption = Annotated[
    str | None, typer.Option("--as", help="Print a link for this labeler; left out, for you.")
]
HostOption = Annotated[str, typer.Option(help="Where to listen.")]
PortOption = Annotated[
    int | None, typer.Option(min=0, max=65535, help="Left out, the first free one from 8970.")
]


def settings_of(
    config: RunConfig, number: int, guidelines: Path | None, **chosen: Any
) -> RoundConfig:
    """Return a round's settings, as its options say.

    Args:
        config: of the run whose policies are sampled.
        number: of the round.
        guidelines: a file.
        chosen: other fields of `RoundConfig`.

    Raises:
        ConfigError: the shares are more than all pairs, or the guidelines are no text.
    """
    from deploy.feedback.rounds import read_guidelines

    text = read_guidelines(guidelines) if guidelines else ""
    try:
        return RoundConfig(number=number, run=config.name, guidelines=text, **chosen)
    except ValidationError as error:
        raise ConfigError(f"a round cannot be so: {error.errors()[0]['msg']}") from None


def propose_round(
    base: RunConfig,
    asked: RunConfig,
    settings: RoundConfig,
    gold: Sequence[str] | None,
    practice: Sequence[str] | None,
) -> None:
    """Make a round in one run's folder, of another's (or the same one's) policies."""
    from common.data.records import read_comparisons
    from deploy.feedback.propose import known_pairs, proposed
    from deploy.feedback.rounds import make_round

    known = known_pairs(read_comparisons(gold), settings.seed, "gold") if gold else []
    begin = known_pairs(read_comparisons(practice), settings.seed, "practice") if practice else []
    sampled, which = proposed(asked, settings, base.folder)
    note(which)
    settings = settings.model_copy(update={"policy": which})
    made = make_round(base.folder, settings, sampled, known, begin)
    also = f" and {len(known)} that are known" if known else ""
    say(console, f"round {settings.number}: {settings.pairs} pairs{also}")
    say(console, (str(made.path), "bold"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedAt:
    """Where people are asked."""

    name: str | None = None
    """Who is sent a link at once; None: who gave the command."""
    host: str = "127.0.0.1"
    port: int | None = None


def serve_round(
    base: RunConfig,
    folder: RoundFolder,
    settings: RoundConfig,
    at: ServedAt,
    until: Callable[[RoundFolder, Callable[[str], None]], Coroutine[Any, Any, None]] | None = None,
) -> bool:
    """Show a round's pairs to who was invited.

    Args:
        base: the run that the round is of.
        folder: the round's.
        settings: of the round.
        at: where.
        until: ends it when it returns; None: Ctrl-C alone does.

    Returns:
        Whether `until` has ended it.
    """
    from deploy.feedback.pages import Round
    from deploy.feedback.server import serve
    from deploy.listening import is_local

    served = Round(
        name=f"{base.name}, round {settings.number}",
        folder=folder,
        settings=settings,
        access=base.folder.labelers,
        address=base.folder.labelling_address,
    )
    if not is_local(at.host):
        note("others on the network can read what is sent: put TLS before it, or use ssh -L")
    ends = "Ctrl-C ends it"
    if until is not None:
        several = settings.overlap > 1 and settings.overlap_share > 0
        people = f" (some pairs by {settings.overlap} people)" if several else ""
        ends = f"it ends when all is answered{people}, by `talipot feedback close`, or Ctrl-C"
    say(console, f"{served.name}; {ends}")

    async def work() -> bool:
        name = at.name or _own_name()
        tell = _say_address
        serving = asyncio.create_task(serve(served, at.host, at.port, tell, note, name))
        waiting = (
            {serving} if until is None else {serving, asyncio.create_task(until(folder, note))}
        )
        done, left = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        for task in done:
            task.result()
        return True

    with suppress(KeyboardInterrupt):  # the way to leave it
        return asyncio.run(work())
    return False


def _say_address(url: str) -> None:
    say(console, (url, "bold"))


def _own_name() -> str:
    with suppress(OSError, KeyError):
        return getpass.getuser()
    return "you"
