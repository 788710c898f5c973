"""The live page's server: answers by runs' folders, and can change nothing.

::

    browser --GET--> allowed (host, token) --> WatchedRun --> the run's folder

It needs no cluster. It listens on this machine alone unless it is told otherwise, and then asks for
a token, which stands in the address that it prints and is traded for a cookie.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Final

from aiohttp import web

from common.errors import DataError, TalipotError
from common.run_folder import RunFolder
from deploy.listening import address_of, is_local, listen
from deploy.run_folder.folder import folder_of
from deploy.screen import visible
from deploy.watch.panels import TABS
from deploy.watch.runs import WatchedRun

PORT: Final = 8990
_ONLY_OURS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_TYPES: Final = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def runs_in(paths: Sequence[Path], note: Callable[[str], None]) -> list[WatchedRun]:
    """Open runs, each named by its folder, or by a folder that they lie in.

    Args:
        paths: the folders.
        note: is told which runs in a folder of several are left out, and why.

    Raises:
        DataError: one that is named is none, or none is left.
    """
    found: list[WatchedRun] = []
    for path in paths:
        folder = Path(os.path.expanduser(path))
        recipes = [RunFolder(inside).config for inside in folder.glob("*/")]
        found_inside = sorted(filter(Path.exists, recipes), key=lambda p: p.stat().st_mtime)
        if RunFolder(folder).config.exists() or not found_inside:
            found.append(WatchedRun(folder_of(folder)))
            continue
        for recipe in reversed(found_inside):  # the newest is shown first
            try:
                found.append(WatchedRun(folder_of(recipe.parent)))
            except TalipotError as error:
                note(f"left out: {error}")
    if not found:
        raise DataError(f"{', '.join(map(str, paths))}: no run that can be read")
    return found


async def serve(
    runs: Sequence[WatchedRun],
    host: str,
    port: int | None,
    say: Callable[[str], None],
) -> None:
    """Serve until it is cancelled.

    Args:
        runs: what to show.
        host: where to listen.
        port: likewise; None takes the first free one from `PORT` on.
        say: is told the address.

    Raises:
        ConfigError: it cannot listen there.
    """
    token = "" if is_local(host) else secrets.token_urlsafe(24)
    with listen(host, port, PORT) as listening:
        bound = int(listening.getsockname()[1])
        # Cookies are of a host, whatever the port: each page has one of its own name.
        guard = _guard(token, cookie=f"talipot_watch_{bound}")
        runner = web.AppRunner(application(runs, guard), access_log=None)
        await runner.setup()
        try:
            await web.SockSite(runner, listening).start()
            say(address_of(host, bound) + (f"?token={token}" if token else ""))
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()


def application(runs: Sequence[WatchedRun], guard: Any) -> web.Application:
    """Return the application; `guard` is the middleware that lets requests in."""
    app = web.Application(middlewares=[guard, _told])
    page = resources.files("deploy.watch") / "page"

    files = {entry.name: entry for entry in page.iterdir()}
    # The report's, and the comparison's.
    files["looks.css"] = resources.files("deploy.evaluation") / "page.css.j2"

    async def file(request: web.Request) -> web.Response:
        name = request.match_info.get("name", "index.html")
        kind = _TYPES.get(Path(name).suffix)
        if name not in files or kind is None:
            raise web.HTTPNotFound
        text = files[name].read_text(encoding="utf8")
        return web.Response(text=text, content_type=kind, charset="utf-8")

    async def listed(_: web.Request) -> web.Response:
        return web.json_response([run.name for run in runs])

    def about(ask: Callable[[WatchedRun, web.Request], dict[str, Any]]) -> Handler:
        async def answer(request: web.Request) -> web.Response:
            number = int(request.match_info["run"])
            if number >= len(runs):
                raise web.HTTPNotFound
            # Reading a folder may take long, on a network's disk for one.
            facts = await asyncio.to_thread(ask, runs[number], request)
            response = web.json_response(_inert(facts))
            response.enable_compression()
            return response

        return answer

    run = r"/api/runs/{run:\d+}"
    app.add_routes(
        [
            web.get("/", file),
            web.get("/page/{name}", file),
            web.get("/api/runs", listed),
            web.get(f"{run}/state", about(lambda run, _: run.state())),
            web.get(f"{run}/panels/{{tab}}", about(_panels)),
            web.get(f"{run}/workers", about(lambda run, _: run.workers())),
            web.get(f"{run}/feedback", about(lambda run, _: run.feedback())),
            web.get(f"{run}/samples", about(_samples)),
            web.get(
                f"{run}/samples/{{rollout}}",
                about(lambda run, request: run.sample(request.match_info["rollout"])),
            ),
        ]
    )
    return app


def _panels(run: WatchedRun, request: web.Request) -> dict[str, Any]:
    tab = request.match_info["tab"]
    if tab not in TABS:
        raise web.HTTPNotFound
    return run.panels(tab)


def _samples(run: WatchedRun, request: web.Request) -> dict[str, Any]:
    query = request.query
    number = query.get("iteration", "")
    if not all(text.isdecimal() for text in (number or "0", query.get("seed", "0"))):
        raise DataError("iteration and seed are whole numbers")
    return run.samples(
        int(number) if number else None, query.get("order", "random"), int(query.get("seed", "0"))
    )


@web.middleware
async def _told(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer with what is wrong in a line, as a command would."""
    try:
        return await handler(request)
    except TalipotError as error:
        return web.json_response(_inert({"error": str(error)}), status=422)


def _inert(value: Any) -> Any:
    """Return the same with texts that turn no line around and steer nothing."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, Mapping):
        return {visible(name): _inert(each) for name, each in value.items()}
    return [_inert(each) for each in value] if isinstance(value, list | tuple) else value


def _guard(token: str, cookie: str) -> Any:
    """Let in who asked for this machine by its own name, or has the token, in the cookie."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            response = await _let_in(request, handler)
        except web.HTTPException as refusal:
            refusal.headers.update(_ONLY_OURS)
            raise
        response.headers.update(_ONLY_OURS)
        return response

    async def _let_in(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not token:
            # A page elsewhere may make a name of its own stand for this machine.
            if not is_local(request.url.host or ""):
                raise web.HTTPForbidden(text="ask for this page by localhost or 127.0.0.1\n")
            return await handler(request)
        if _same(request.query.get("token", ""), token):
            answer = web.HTTPFound("/")
            # Lax: the link may be followed out of another page, a notebook's terminal for one.
            answer.set_cookie(cookie, token, httponly=True, samesite="Lax", path="/")
            raise answer
        if not _same(request.cookies.get(cookie, ""), token):
            raise web.HTTPForbidden(
                text="open the address that `talipot watch` printed: its token is missing here\n"
            )
        return await handler(request)

    return guard


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())
