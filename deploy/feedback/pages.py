"""The labelling pages: who is let in, what is shown, and what comes of a form.

::

    browser --cookie--> guard (who is it?) --> Desk, in a thread of its own --> answers.sqlite

What is sent to a browser is the prompt and two texts: no policy, no score, nobody else's answer.
Texts of models are text. Nothing is asked of any other place.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final, TypeVar

from aiohttp import web
from jinja2 import Environment, PackageLoader, StrictUndefined

from common.config.feedback import RoundConfig
from common.errors import TalipotError
from common.run_folder import RoundFolder
from deploy.feedback.access import Access, form_token, same
from deploy.feedback.answers import REASONS, STEPS
from deploy.feedback.asking import Refused
from deploy.feedback.desk import Desk, step_of
from deploy.screen import visible

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Answer = TypeVar("Answer")

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
_USED: Final = "this link was used already, or taken back: ask for another one"
_LABELER: Final = web.RequestKey("labeler", str)
_FORM: Final = web.RequestKey("form", str)


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What a server serves."""

    name: str
    folder: RoundFolder
    settings: RoundConfig
    access: Path
    address: Path
    """Where it says how it is reached, for `talipot feedback invite`."""


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
            settings = self._of.settings
            self.desk = Desk(self._of.folder, settings.lease_s, markdown=settings.markdown)

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


class Pages:
    """The pages of one round."""

    def __init__(self, of: Round, cookie: str, complain: Callable[[str], None]) -> None:
        """Show a round.

        Args:
            of: the round.
            cookie: name of the cookie; cookies are of a host, whatever its port.
            complain: is told what is wrong with the round's files.
        """
        self._of, self._cookie, self._complain = of, cookie, complain
        self._clerk, self._templates = Clerk(of), _environment()

    def application(self) -> web.Application:
        """Return the application, which opens the round's files as it starts."""

        @web.middleware
        async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
            return await self._guard(request, handler)

        async def begin(_: web.Application) -> None:
            await self._clerk.begin()

        async def end(_: web.Application) -> None:
            await self._clerk.end()

        app = web.Application(middlewares=[guard], client_max_size=_LONGEST_WHY)
        app.add_routes(
            [
                web.get("/", self._asked),
                web.get("/enter", self._invited),
                web.post("/enter", self._enter),
                web.post("/read", self._read),
                web.post("/practice", self._practise),
                web.post("/answer", self._answer),
                web.post("/undo", self._undo),
                web.get("/page/{name}", self._file),
            ]
        )
        app.on_startup.append(begin)
        app.on_cleanup.append(end)
        return app

    def _page(self, template: str, status: int = 200, **values: Any) -> web.Response:
        shown = self._templates.get_template(template).render(
            round=self._of.name, steps=STEPS, **values
        )
        return web.Response(text=shown, content_type="text/html", status=status)

    def _closed(self, why: str, status: int = 403) -> web.Response:
        return self._page("closed.html.j2", status, why=why)

    # ------------------------------------------------------------------ who is let in

    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Let in who may come in; whatever comes of it has the headers of ours."""
        try:
            response = await self._let_in(request, handler)
        except web.HTTPException as refusal:
            refusal.headers.update(HEADERS)
            raise
        except (LookupError, UnicodeDecodeError):  # of a form that is no text
            response = self._closed("this form cannot be read", 400)
        except TalipotError as error:
            self._complain(str(error))
            why = "your answer was NOT stored: tell who sent you the link, and load this page later"
            response = self._closed(why, 503)
        for header, value in HEADERS.items():
            response.headers.setdefault(header, value)
        return response

    async def _let_in(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.startswith("/page/"):
            return await handler(request)
        # Not compared with an Origin: where a proxy ends TLS, this server does not know its own.
        if request.method == "POST" and request.headers.get("Sec-Fetch-Site") not in _OWN:
            return self._closed("this form was sent by another page")
        if request.path == "/enter":  # who has the token is let in; it goes into no Referer
            response = await handler(request)
            response.headers["Referrer-Policy"] = "no-referrer"
            return response
        name = await self._labeler(request)
        if name is None:
            return self._closed("open the link that you were sent")
        request[_LABELER] = name
        request[_FORM] = form_token(request.cookies[self._cookie])
        if request.method == "POST":
            data = await request.post()
            if not same(str(data.get("form", "")), request[_FORM]):
                return self._closed("you have signed in again since: load the page again")
        return await handler(request)

    async def _labeler(self, request: web.Request) -> str | None:
        secret = request.cookies.get(self._cookie, "")
        return await self._clerk.do(lambda: self._clerk.access.labeler(secret))

    async def _invited(self, request: web.Request) -> web.StreamResponse:
        """Answer the link with a page that has a button: programs look at links, too."""
        if await self._labeler(request) is not None:
            raise web.HTTPFound("/")  # who opens the link once more is signed in already
        token = request.query.get("token", "")
        name = await self._clerk.do(lambda: self._clerk.access.name_of(token))
        if name is None:
            return self._closed(_USED)
        return self._page("enter.html.j2", name=name, token=token)

    async def _enter(self, request: web.Request) -> web.StreamResponse:
        token = str((await request.post()).get("token", ""))
        entered = await self._clerk.do(lambda: self._clerk.access.enter(token))
        if entered is None:
            return self._closed(_USED)
        response = web.HTTPSeeOther("/")
        response.set_cookie(
            self._cookie,
            entered[0],
            httponly=True,
            samesite="Lax",  # a link to this page in a mail is to work; forms have a token
            path="/",
            max_age=90 * 86_400,
            secure=request.headers.get("X-Forwarded-Proto") == "https",
        )
        raise response

    # ------------------------------------------------------------------ a pair, and its answer

    async def _asked(self, request: web.Request) -> web.Response:
        return await self._pair(request)

    async def _pair(
        self, request: web.Request, note: str = "", status: int = 200, why: str = ""
    ) -> web.Response:
        """Show what a labeler is asked, with what was wrong and what he had written."""
        name, form, desk = request[_LABELER], request[_FORM], self._clerk.desk
        guidelines = self._of.settings.guidelines
        await self._clerk.do(lambda: desk.store.welcome(name))
        closed = await self._clerk.do(lambda: desk.store.is_closed())
        if (
            guidelines
            and not closed
            and not await self._clerk.do(lambda: desk.store.has_read(name))
        ):
            return self._page("guidelines.html.j2", form=form, guidelines=guidelines)
        known = {"name": name, "form": form, "guidelines": guidelines}
        practice = await self._clerk.do(lambda: desk.practice(name))
        if practice is not None and not closed:
            return self._page("practice.html.j2", status, practice=practice, said=None, **known)
        asked, progress = await self._clerk.do(lambda: (desk.asked(name), desk.progress(name)))
        return self._page(
            "pair.html.j2",
            status,
            asked=asked,
            progress=progress,
            closed=closed,
            reasons=REASONS,
            note=note,
            why=why,
            **known,
        )

    async def _practise(self, request: web.Request) -> web.StreamResponse:
        """Tell the answer of a pair to practise with; the next one is asked after it."""
        data = await request.post()
        desk, name = self._clerk.desk, request[_LABELER]
        practice = await self._clerk.do(lambda: desk.practice(name))
        if practice is None or str(data.get("number", "")) != str(practice.number):
            raise web.HTTPSeeOther("/")  # it was sent twice
        try:
            step = step_of(str(data.get("step", "")))
        except Refused:
            step = None
        if step is None:
            raise web.HTTPSeeOther("/")
        await self._clerk.do(lambda: desk.store.note_practised(name, practice.number))
        return self._page(
            "practice.html.j2",
            practice=practice,
            said=step,
            name=name,
            form=request[_FORM],
            guidelines=self._of.settings.guidelines,
        )

    async def _read(self, request: web.Request) -> web.StreamResponse:
        store, name = self._clerk.desk.store, request[_LABELER]
        await self._clerk.do(lambda: store.note_read(name))
        raise web.HTTPSeeOther("/")

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        data = await request.post()
        said = {name: str(data.get(name, "")) for name in ("key", "step", "why", "skip", "seconds")}
        store, name, why = self._clerk.desk.store, request[_LABELER], said["why"]
        try:
            seconds = float(said["seconds"] or "inf")
        except ValueError:
            seconds = float("inf")
        try:
            step = step_of(said["step"])
            if step is None:
                why = f"{said['skip']}: {why}" if why else said["skip"]
            flagged = bool(data.get("flagged"))
            await self._clerk.do(
                lambda: store.submit(
                    name, said["key"], step=step, why=why, flagged=flagged, seconds=seconds
                )
            )
        except Refused as refusal:
            return await self._pair(request, str(refusal), 409, said["why"])
        raise web.HTTPSeeOther("/")

    async def _undo(self, request: web.Request) -> web.StreamResponse:
        store, name = self._clerk.desk.store, request[_LABELER]
        number = str((await request.post()).get("last", ""))
        if number.isdecimal() and len(number) < 18:
            await self._clerk.do(lambda: store.undo(name, int(number)))
        raise web.HTTPSeeOther("/")

    async def _file(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in _FILES:
            raise web.HTTPNotFound
        text = (resources.files("deploy.feedback") / "page" / name).read_text(encoding="utf8")
        return web.Response(text=text, content_type=_FILES[name], charset="utf-8")


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
