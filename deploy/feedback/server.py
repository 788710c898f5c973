"""The labelling pages' server: where it listens, and what it says of that."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import Final

from aiohttp import web

from deploy.feedback.access import Access
from deploy.feedback.pages import Pages, Round
from deploy.listening import address_of, listen

PORT: Final = 8970


async def serve(
    of: Round,
    host: str,
    port: int | None,
    say: Callable[[str], None],
    complain: Callable[[str], None],
    invite: str = "",
) -> None:
    """Serve a round until it is cancelled.

    Args:
        of: the round.
        host: where to listen.
        port: likewise; None takes the first free one from `PORT` on.
        say: is told the address, or the link of `invite`.
        complain: is told what is wrong with the round's files.
        invite: name of a labeler to invite at once; empty for none.

    Raises:
        ConfigError: it cannot listen there.
        DataError: a file of the round is damaged.
    """
    with listen(host, port, PORT) as listening:
        bound = int(listening.getsockname()[1])
        # A run's labelers stay signed in over restarts at other ports; cookies are of a host.
        of_run = hashlib.sha256(str(of.access.absolute()).encode()).hexdigest()[:12]
        pages = Pages(of, f"talipot_label_{of_run}", complain)
        runner = web.AppRunner(pages.application(), access_log=None)
        await runner.setup()
        try:
            await web.SockSite(runner, listening).start()
            address = address_of(host, bound)
            of.address.write_text(address, encoding="utf8")
            if invite:
                access = Access(of.access)
                say(link_of(address, access.invite(invite)))
                access.close()
            else:
                say(address)
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()
            of.address.unlink(missing_ok=True)


def link_of(address: str, token: str) -> str:
    """Return what a labeler is sent."""
    return f"{address.rstrip('/')}/enter?token={token}"
