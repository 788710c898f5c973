"""A round as `talipot feedback propose` would make it, and its page's server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.config.feedback import RoundConfig
from common.run_folder import RoundFolder, RunFolder
from deploy.feedback.access import Access
from deploy.feedback.pages import Round
from deploy.feedback.pairs import Pair, Response
from deploy.feedback.rounds import make_round, read_settings
from deploy.feedback.server import link_of, serve
from tests.deploy.served import in_a_thread


def pairs_of(texts: Sequence[tuple[str, str, str]]) -> list[Pair]:
    """Pairs of prompt, first and second."""
    return [
        Pair(
            prompt=prompt,
            first=Response(text=first, policy="secret-policy", version=7, scores=(0.123456,)),
            second=Response(text=second, policy="secret-sft", scores=(0.654321,)),
        )
        for prompt, first, second in texts
    ]


def plain(number: int) -> list[Pair]:
    """So many pairs."""
    return pairs_of(
        [(f"Name pond {i}.", f"Pond {i} of old.", f"The pond {i}.") for i in range(number)]
    )


def round_in(
    folder: Path,
    pairs: Sequence[Pair],
    gold: Sequence[Pair] = (),
    practice: Sequence[Pair] = (),
    **settings: Any,
) -> RoundFolder:
    """Make the next round of a run's folder."""
    config = RoundConfig(number=1, pairs=max(1, len(pairs)), **settings)
    return make_round(RunFolder(folder), config, pairs, gold, practice)


@contextmanager
def served(
    folder: Path,
    made: RoundFolder,
    complain: Callable[[str], None] = print,
) -> Iterator[str]:
    """The address of the server of a round, in a thread of its own."""
    of = Round(
        name="run, round 1",
        folder=made,
        settings=read_settings(made.settings).model_copy(update={"lease_s": 60.0}),
        access=RunFolder(folder).labelers,
        address=RunFolder(folder).labelling_address,
    )
    with in_a_thread(lambda say: serve(of, "127.0.0.1", 0, say, complain)) as address:
        yield address


def invited(folder: Path, address: str, name: str) -> str:
    """A link for somebody."""
    access = Access(RunFolder(folder).labelers)
    link = link_of(address, access.invite(name))
    access.close()
    return link
