"""The labelling page's server: pages that work without a script, and answers that are stored first.

::

    browser --cookie--> guard (who is it?) --> Desk, in a thread of its own --> answers.sqlite

What is sent to a browser is the prompt and two texts: no policy, no score, nobody else's answer.
Texts of models are text. Nothing is asked of any other place.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final, TypeVar

from aiohttp import web
from jinja2 import Environment, PackageLoader, StrictUndefined

from common.errors import TalipotError
from deploy.feedback.access import Access, form_token, same
from deploy.feedback.answers import REASONS, STEPS
from deploy.feedback.asking import Refused
from deploy.feedback.desk import Desk, step_of
from deploy.listening import address_of, listen
from deploy.screen import visible

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Answer = TypeVar("Answer")

PORT: Final = 8970
HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not "no-referrer": a browser would then send forms as those of no page.
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_FILES: Final = {"label.js": "text/javascript", "label.css": "text/css"}
_LONGEST_WHY: Final = 2_000_000
_OWN: Final = (None, "same-origin", "none")
"""Where forms come from, as browsers say it; other programs say nothing."""
_LABELER: Final = web.RequestKey("labeler", str)
_FORM: Final = web.RequestKey("form", str)


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What a server serves."""

    name: str
    pairs: Path
    answers: Path
    access: Path
    address: Path
    """Where it says how it is reached, for `talipot feedback invite`."""
    guidelines: str
    """What everybody reads once."""
    lease_s: float


class Clerk:
    """The round's files, all in one thread."""

    def __init__(self, of: Round) -> None:
        self._of = of
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="clerk")
        self.desk: Desk
        self.access: Access

    async def begin(self) -> None:
        """Open the files. Raises DataError."""

        def work() -> None:
            self.access = Access(self._of.access)
            self.desk = Desk(self._of.pairs, self._of.answers, self._of.lease_s)

        await self.do(work)

    async def end(self) -> None:
        """Close the files."""

        def work() -> None:
            self.desk.close()
            self.access.close()

        await self.do(work)
        self._thread.shutdown()

    async def do(self, work: Callable[[], Answer]) -> Answer:
        """Do something with the files."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def application(of: Round, cookie: str, complain: Callable[[str], None]) -> web.Application:
    """Return the application of a round.

    Args:
        of: the round.
        cookie: name of the cookie; cookies are of a host, whatever its port.
        complain: is told what is wrong with the round's files.
    """
    clerk, pages = Clerk(of), _environment()
    files = resources.files("deploy.feedback") / "page"

    def page(template: str, status: int = 200, **values: Any) -> web.Response:
        text = pages.get_template(template).render(round=of.name, steps=STEPS, **values)
        return web.Response(text=text, content_type="text/html", status=status)

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            response = await _let_in(request, handler)
        except web.HTTPException as refusal:
            refusal.headers.update(HEADERS)
            raise
        except (LookupError, UnicodeDecodeError):  # of a form that is no text
            response = page("closed.html.j2", 400, why="this form cannot be read")
        except TalipotError as error:
            complain(str(error))
            why = "your answer was NOT stored: tell who sent you the link, and load this page later"
            response = page("closed.html.j2", 503, why=why)
        for header, value in HEADERS.items():
            response.headers.setdefault(header, value)
        return response

    async def _let_in(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.startswith("/page/"):
            return await handler(request)
        # Not compared with an Origin: where a proxy ends TLS, this server does not know its own.
        if request.method == "POST" and request.headers.get("Sec-Fetch-Site") not in _OWN:
            return page("closed.html.j2", 403, why="this form was sent by another page")
        if request.path == "/enter":  # who has the token is let in; it goes into no Referer
            response = await handler(request)
            response.headers["Referrer-Policy"] = "no-referrer"
            return response
        secret = request.cookies.get(cookie, "")
        name = await clerk.do(lambda: clerk.access.labeler(secret))
        if name is None:
            return page("closed.html.j2", 403, why="open the link that you were sent")
        request[_LABELER], request[_FORM] = name, form_token(secret)
        if request.method == "POST":
            data = await request.post()
            if not same(str(data.get("form", "")), request[_FORM]):
                why = "you have signed in again since: load the page again"
                return page("closed.html.j2", 403, why=why)
        return await handler(request)

    async def invited(request: web.Request) -> web.StreamResponse:
        """Answer the link with a page that has a button: programs look at links, too."""
        token, secret = request.query.get("token", ""), request.cookies.get(cookie, "")
        if await clerk.do(lambda: clerk.access.labeler(secret)) is not None:
            raise web.HTTPFound("/")  # who opens the link once more is signed in already
        name = await clerk.do(lambda: clerk.access.name_of(token))
        if name is None:
            why = "this link was used already, or taken back: ask for another one"
            return page("closed.html.j2", 403, why=why)
        return page("enter.html.j2", name=name, token=token)

    async def enter(request: web.Request) -> web.StreamResponse:
        token = str((await request.post()).get("token", ""))
        entered = await clerk.do(lambda: clerk.access.enter(token))
        if entered is None:
            why = "this link was used already, or taken back: ask for another one"
            return page("closed.html.j2", 403, why=why)
        response = web.HTTPSeeOther("/")
        response.set_cookie(
            cookie,
            entered[0],
            httponly=True,
            samesite="Lax",  # a link to this page in a mail is to work; forms have a token
            path="/",
            max_age=90 * 86_400,
            secure=request.headers.get("X-Forwarded-Proto") == "https",
        )
        raise response

    async def asked(
        request: web.Request, note: str = "", status: int = 200, why: str = ""
    ) -> web.Response:
        name, form = request[_LABELER], request[_FORM]

        def look() -> Any:
            clerk.desk.store.welcome(name)
            if of.guidelines and not clerk.desk.store.has_read(name):
                return "guidelines", None
            return "pair", (clerk.desk.shown(name), clerk.desk.store.last_number(name))

        kind, found = await clerk.do(look)
        if kind == "guidelines":
            return page("guidelines.html.j2", form=form, guidelines=of.guidelines)
        shown, last = found
        return page(
            "pair.html.j2",
            status,
            last=last,
            name=name,
            form=form,
            guidelines=of.guidelines,
            shown=shown,
            reasons=REASONS,
            note=note,
            why=why,
        )

    async def read(request: web.Request) -> web.StreamResponse:
        await clerk.do(lambda: clerk.desk.store.note_read(request[_LABELER]))
        raise web.HTTPSeeOther("/")

    async def answer(request: web.Request) -> web.StreamResponse:
        data = await request.post()
        said = {name: str(data.get(name, "")) for name in ("key", "step", "why", "skip", "seconds")}
        why = said["why"]
        try:
            seconds = float(said["seconds"] or "inf")
        except ValueError:
            seconds = float("inf")

        def store() -> None:
            step = step_of(said["step"])
            skipped = f"{said['skip']}: {why}" if why else said["skip"]
            clerk.desk.store.submit(
                request[_LABELER],
                said["key"],
                step=step,
                why=skipped if step is None else why,
                flagged=bool(data.get("flagged")),
                seconds=seconds,
            )

        try:
            await clerk.do(store)
        except Refused as refusal:
            return await asked(request, note=str(refusal), status=409, why=said["why"])
        raise web.HTTPSeeOther("/")

    async def undo(request: web.Request) -> web.StreamResponse:
        number = str((await request.post()).get("last", ""))
        if number.isdecimal() and len(number) < 18:
            await clerk.do(lambda: clerk.desk.store.undo(request[_LABELER], int(number)))
        raise web.HTTPSeeOther("/")

    async def file(request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in _FILES:
            raise web.HTTPNotFound
        text = (files / name).read_text(encoding="utf8")
        return web.Response(text=text, content_type=_FILES[name], charset="utf-8")

    app = web.Application(middlewares=[guard], client_max_size=_LONGEST_WHY)
    app.add_routes(
        [
            web.get("/", asked),
            web.get("/enter", invited),
            web.post("/enter", enter),
            web.post("/read", read),
            web.post("/answer", answer),
            web.post("/undo", undo),
            web.get("/page/{name}", file),
        ]
    )

    async def opened(_: web.Application) -> None:
        await clerk.begin()

    async def closed(_: web.Application) -> None:
        await clerk.end()

    app.on_startup.append(opened)
    app.on_cleanup.append(closed)
    return app


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
        runner = web.AppRunner(
            application(of, f"talipot_label_{of_run}", complain), access_log=None
        )
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


def _environment() -> Environment:
    """Return the templates; what they are given is text, never markup."""
    return Environment(
        loader=PackageLoader("deploy.feedback", "page"),
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
