"""Simulated people: they label through the page, as a browser would, by a rule of theirs."""

from __future__ import annotations

import hashlib
import html
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from common.run_folder import RunFolder
from deploy.feedback.access import Access
from deploy.feedback.server import link_of

Quality = Callable[[str, str], float]
"""How good a response to a prompt is, in their eyes."""


@dataclass(slots=True, kw_only=True)
class Simulated:
    """One labeler: prefers the better response, and is wrong with a probability.

    What is answered depends on the pair and the name alone, so it is the same whatever fails
    meanwhile.
    """

    run: Path
    """Whose rounds are labelled."""
    name: str
    quality: Quality
    noise: float = 0.0
    margin: float = 0.0
    """Responses that are nearer to each other are tied."""
    twice: float = 0.0
    """Share of answers that are sent a second time, as by a double click."""
    acknowledged: list[str] = field(default_factory=list)
    """Keys of the answers that the server said it had stored."""
    seconds: list[float] = field(default_factory=list)
    """Of each request: a page, and an answer until its next page is asked for."""
    _client: httpx.Client | None = field(default=None)
    _address: str = ""

    def answer(self) -> bool:
        """Answer one pair, where there is one; False: there is none, or nobody serves.

        Raises:
            httpx.HTTPError: the server is gone.
        """
        client = self._signed_in()
        if client is None:
            return False
        begin = time.perf_counter()
        page = client.get("/").text
        self.seconds.append(time.perf_counter() - begin)
        found = re.search(r'name="key" value="([^"]*)"', page)
        if found is None:
            return False
        form = re.search(r'name="form" value="([^"]*)"', page)
        assert form is not None
        data = {"form": form[1], "key": found[1], "step": str(self._step(page))}
        begin = time.perf_counter()
        said = client.post("/answer", data=data)
        self.seconds.append(time.perf_counter() - begin)
        if said.status_code == 303:
            self.acknowledged.append(found[1])
        if _drawn(self.name, found[1]) < self.twice:
            client.post("/answer", data=data)
        return True

    def _signed_in(self) -> httpx.Client | None:
        """Sign in where the round is served now; the cookie stays over the server's restarts."""
        folder = RunFolder(self.run)
        address = ""
        with suppress(OSError):
            address = folder.labelling_address.read_text(encoding="utf8")
        if not address:
            return None
        if self._client is None or address != self._address:
            cookies = None if self._client is None else self._client.cookies
            self._client = httpx.Client(base_url=address, timeout=10.0, cookies=cookies)
            self._address = address
        if self._client.get("/").status_code == 403:
            access = Access(folder.labelers)
            link = link_of(address, access.invite(self.name))
            access.close()
            self._client.post("/enter", data={"token": link.partition("token=")[2]})
        return self._client

    def _step(self, page: str) -> int:
        """Return what is pressed: better, slightly better or a tie, by how far they differ."""
        prompt, left, right = texts_of(page)
        differ = self.quality(prompt, left) - self.quality(prompt, right)
        sides = "\0".join(sorted((left, right)))
        if _drawn(self.name, prompt, sides) < self.noise:
            differ = -differ
        return 3 if abs(differ) <= self.margin else 1 if differ > 0 else 5


def _drawn(*of: str) -> float:
    """A number from 0 to 1 that follows from texts."""
    digest = hashlib.blake2b("\0".join(of).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def texts_of(page: str) -> tuple[str, str, str]:
    """Prompt, left and right response of a page, as they are read."""
    cards = re.findall(r'<div class="text card"[^>]*>(.*?)</div>', page, re.DOTALL)
    prompt, left, right = (html.unescape(re.sub(r"</?mark>", "", card)) for card in cards)
    return prompt, left, right


@contextmanager
def at_work(people: Sequence[Simulated], *, together: bool = False) -> Iterator[None]:
    """Have people label in the background, whenever a round of their run is served.

    Args:
        people: by turns, so that who is asked what is the same each time;
        together: each by themselves instead.
    """
    ended = threading.Event()

    def work(some: Sequence[Simulated]) -> None:
        while not ended.is_set():
            busy = False
            for who in some:
                with suppress(httpx.HTTPError):
                    busy |= who.answer()
            if not busy:
                time.sleep(0.1)

    groups = [[who] for who in people] if together else [people]
    threads = [threading.Thread(target=work, args=(group,)) for group in groups]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()
