"""A remote reward endpoint that may be slow, flaky or down.

``POST {"requests": [{"rollout_id", "prompt", "response", "columns", "source", "messages"}]}``
answers ``{"scores": [{"rollout_id", "score"}]}``; columns, source and messages are there where the
data has them.
Another `Exchange` asks and reads otherwise.
Batches go out side by side up to a cap; a failed batch
is retried with exponential backoff and full jitter; after several failures in a row the circuit
opens and requests wait for a cool-down before one tries again. A batch that stays down is a dead
letter: returned as such, counted, and written to a file when one is named. Nothing is lost.

Requests are made in an event loop of the scorer's own, in which each can be left at its deadline,
whatever the endpoint is at: it may send a byte of a header now and then for ever.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import httpx

from common.metric_catalogue import Logged
from reward_service.http_answers import Failed, Refused, parse_answer
from reward_service.http_settings import (
    HttpScorerSettings,
    certificates,
    prepare_file,
    require_url,
    token_of,
)
from reward_service.proxies import proxy_of
from reward_service.samples import Sample
from reward_service.scorers import ScoreResult

COUNTS: Mapping[str, Logged] = {
    "requests": Logged.HTTP_REQUESTS,
    "retries": Logged.HTTP_RETRIES,
    "failures": Logged.HTTP_FAILURES,
    "dead_letters": Logged.HTTP_DEAD_LETTERS,
    "circuit_opened": Logged.HTTP_CIRCUIT_OPENED,
}
"""What a scorer counts, and the metrics that these are logged as."""


class Exchange(Protocol):
    """What is said in one request."""

    def body(self, requests: Sequence[Sample]) -> Mapping[str, Any]:
        """Return what is sent."""

    def read(self, raw: bytes, requests: Sequence[Sample]) -> list[ScoreResult]:
        """Return what an answer says of each; raises Failed or Refused."""


class Scores:
    """Our own exchange."""

    def body(self, requests: Sequence[Sample]) -> Mapping[str, Any]:
        """Return what is sent."""
        return {"requests": [_asked(sample) for sample in requests]}

    def read(self, raw: bytes, requests: Sequence[Sample]) -> list[ScoreResult]:
        """Return the scores; raises Failed for an answer that is not what was agreed."""
        scores = parse_answer(raw, [request.rollout_id for request in requests])
        return [ScoreResult(rollout_id=r.rollout_id, score=scores[r.rollout_id]) for r in requests]


class HttpScorer:
    """Scores through an HTTP endpoint. Safe to call from one thread at a time."""

    def __init__(
        self, settings: HttpScorerSettings, *, seed: int = 0, exchange: Exchange | None = None
    ) -> None:
        """Prepare to ask an endpoint; nothing is sent yet.

        Args:
            settings: where it is, and how patient we are.
            seed: of the jitter.
            exchange: what is said; None is `Scores`.

        Raises:
            ConfigError: a bad URL, a token that is missing, a file that cannot be written, or a
                proxy or certificates of the environment that cannot be used.
        """
        require_url(settings.url)
        headers = {}
        if settings.token_env is not None:
            headers["Authorization"] = f"Bearer {token_of(settings.token_env)}"
        if settings.dead_letter_path is not None:
            prepare_file(settings.dead_letter_path)
        self.settings = settings
        self._exchange = exchange or Scores()
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=None,  # httpx limits each wait; what is limited here is the whole request
            follow_redirects=False,
            # The environment is read by us: httpx fails on proxies that this endpoint needs not.
            trust_env=False,
            proxy=proxy_of(httpx.URL(settings.url)),
            verify=certificates(settings.url),
            # httpx stops at 100 by itself; a request that waits there would time out unsent.
            limits=httpx.Limits(max_connections=settings.max_concurrency),
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="http", daemon=True)
        self._thread.start()
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._failed_in_a_row = 0
        self._open_until = 0.0

    def score(self, requests: Sequence[Sample]) -> list[ScoreResult]:
        """Score in concurrent batches; results in the requests' order."""
        size = self.settings.batch_size
        batches = [requests[at : at + size] for at in range(0, len(requests), size)]
        with ThreadPoolExecutor(self.settings.max_concurrency) as pool:
            answered = list(pool.map(self._batch, batches))
        return [result for batch in answered for result in batch]

    def stats(self) -> dict[str, int]:
        """Return those of `COUNTS` that are not 0."""
        with self._lock:
            return dict(self._counts)

    def close(self) -> None:
        """Close connections."""
        asyncio.run_coroutine_threadsafe(self._client.aclose(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # ------------------------------------------------------------------ one batch

    def _batch(self, requests: Sequence[Sample]) -> list[ScoreResult]:
        give_up = time.monotonic() + self.settings.give_up_after_s
        reason = "never tried"
        for attempt in range(self.settings.max_retries + 1):
            if not self._await_circuit(give_up):
                reason = f"circuit open; last failure: {reason}"
                break
            try:
                results = self._post(requests)
            except Refused as error:
                reason = str(error)
                self._count("failures")
                break
            except Failed as error:
                reason = str(error)
                self._record_failure()
                if attempt == self.settings.max_retries or time.monotonic() > give_up:
                    break
                self._count("retries")
                time.sleep(self._backoff(attempt, error.wait_s))
                continue
            self._record_success()
            return results
        return self._dead_letter(requests, reason)

    def _post(self, requests: Sequence[Sample]) -> list[ScoreResult]:
        body = self._exchange.body(requests)
        self._count("requests")
        asked = asyncio.run_coroutine_threadsafe(self._answer(body), self._loop)
        return self._exchange.read(asked.result(), requests)

    async def _answer(self, body: Mapping[str, Any]) -> bytes:
        """Return what a request is answered with. Raises Failed, Refused."""
        raw = bytearray()
        try:
            async with (
                asyncio.timeout(self.settings.timeout_s),
                self._client.stream("POST", self.settings.url, json=body) as response,
            ):
                self._require_ok(response)
                async for chunk in response.aiter_bytes():
                    raw += chunk
                    if len(raw) > self.settings.max_response_bytes:
                        raise Refused(f"answer over {self.settings.max_response_bytes} bytes")
        except TimeoutError:
            raise Failed(f"no whole answer within {self.settings.timeout_s} s") from None
        except httpx.RequestError as error:
            raise Failed(f"{type(error).__name__}: {error}") from None
        return bytes(raw)

    def _require_ok(self, response: httpx.Response) -> None:
        status = response.status_code
        if status in (408, 429) or status >= 500:
            raise Failed(f"HTTP {status}", _retry_after(response))
        if status != 200:
            raise Refused(f"HTTP {status}")

    def _backoff(self, attempt: int, wait_s: float | None) -> float:
        """Draw a wait with full jitter, but at least what the server asked for, within bounds."""
        ceiling = min(
            self.settings.max_backoff_s, self.settings.backoff_s * 2.0 ** min(attempt, 64)
        )
        with self._lock:
            jittered = self._random.uniform(0.0, ceiling)
        return min(self.settings.max_backoff_s, max(jittered, wait_s or 0.0))

    # ------------------------------------------------------------------ circuit breaker

    def _await_circuit(self, give_up: float) -> bool:
        """Wait while the circuit is open; False when the batch is too old to wait on."""
        while True:
            with self._lock:
                now = time.monotonic()
                if now >= self._open_until:
                    if self._failed_in_a_row >= self.settings.open_after:
                        # Half open: this one tries, the others wait another cool-down.
                        self._open_until = now + self.settings.cool_down_s
                    return True
                wait = self._open_until - now
            if now + wait > give_up:
                return False
            time.sleep(wait)

    def _record_failure(self) -> None:
        with self._lock:
            self._counts["failures"] += 1
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= self.settings.open_after:
                if self._failed_in_a_row == self.settings.open_after:
                    self._counts["circuit_opened"] += 1
                self._open_until = time.monotonic() + self.settings.cool_down_s

    def _record_success(self) -> None:
        with self._lock:
            self._failed_in_a_row = 0
            self._open_until = 0.0

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    def _dead_letter(self, requests: Sequence[Sample], reason: str) -> list[ScoreResult]:
        with self._lock:
            self._counts["dead_letters"] += len(requests)
            if self.settings.dead_letter_path is not None:
                with self.settings.dead_letter_path.open("a", encoding="utf8") as file:
                    for sample in requests:
                        line = _asked(sample) | {"error": reason}
                        file.write(json.dumps(line) + "\n")
        return [ScoreResult(rollout_id=r.rollout_id, score=None, error=reason) for r in requests]


def _asked(sample: Sample) -> dict[str, Any]:
    """Return what an endpoint is told of a sample."""
    asked: dict[str, Any] = {
        "rollout_id": sample.rollout_id,
        "prompt": sample.prompt,
        "response": sample.response,
    }
    if sample.columns:
        asked["columns"] = sample.columns
    if sample.source:
        asked["source"] = sample.source
    if sample.messages:
        asked["messages"] = sample.messages
    return asked


def _retry_after(response: httpx.Response) -> float | None:
    try:
        return max(0.0, float(response.headers["Retry-After"]))
    except (KeyError, ValueError):
        return None  # Absent, or a date: our own backoff serves.
