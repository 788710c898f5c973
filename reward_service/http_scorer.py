"""A remote reward endpoint that may be slow, flaky or down.

``POST {"requests": [{"rollout_id", "prompt", "response"}]}`` answers
``{"scores": [{"rollout_id", "score"}]}``. Batches go out side by side up to a cap; a failed batch
is retried with exponential backoff and full jitter; after several failures in a row the circuit
opens and requests wait for a cool-down before one tries again. A batch that stays down is a dead
letter: returned as such, counted, and written to a file when one is named. Nothing is lost.
"""

from __future__ import annotations

import json
import os
import random
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from common.errors import ConfigError
from common.files import one_line
from reward_service.proxies import proxy_of
from reward_service.scorers import ScoreRequest, ScoreResult


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpScorerSettings:
    """How to talk to the endpoint."""

    url: str
    batch_size: int = 32
    """Responses in one request."""
    max_concurrency: int = 8
    """Requests under way at once."""
    timeout_s: float = 10.0
    """Longest wait for one whole request."""
    max_retries: int = 5
    """Tries after the first before a batch is a dead letter."""
    backoff_s: float = 0.2
    """First backoff; doubles, with full jitter."""
    max_backoff_s: float = 10.0
    """Longest backoff; also bounds what Retry-After may ask for."""
    open_after: int = 5
    """Failures in a row that open the circuit."""
    cool_down_s: float = 5.0
    """How long the circuit stays open before one request tries again."""
    give_up_after_s: float = 120.0
    """A batch older than this is a dead letter."""
    max_response_bytes: int = 16 * 2**20
    """Longest answer that is read."""
    token_env: str | None = None
    """Environment variable that holds the bearer token; the token itself is never stored."""
    dead_letter_path: Path | None = None
    """JSON lines of responses given up."""


COUNTS = ("requests", "retries", "failures", "dead_letters", "circuit_opened")
"""What a scorer counts: tries sent, tries after the first, tries that failed, responses given up,
times that the circuit opened."""


class _Refused(Exception):
    """An answer that no retry can mend."""


class _Failed(Exception):
    """A try that may go better next time; `wait_s` is the server's own wish."""

    def __init__(self, message: str, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class HttpScorer:
    """Scores through an HTTP endpoint. Safe to call from one thread at a time."""

    def __init__(self, settings: HttpScorerSettings, *, seed: int = 0) -> None:
        """Raises ConfigError for a bad URL, a token that is missing, an impossible file, and a
        proxy or certificates of the environment's that cannot be used."""
        _require_url(settings.url)
        headers = {}
        if settings.token_env is not None:
            headers["Authorization"] = f"Bearer {_token(settings.token_env)}"
        if settings.dead_letter_path is not None:
            _prepare_file(settings.dead_letter_path)
        self.settings = settings
        self._client = httpx.Client(
            headers=headers,
            timeout=settings.timeout_s,
            follow_redirects=False,
            # The environment is read by us: httpx fails on proxies that this endpoint needs not.
            trust_env=False,
            proxy=proxy_of(httpx.URL(settings.url)),
            verify=_certificates(settings.url),
            # httpx stops at 100 by itself; a request that waits there would time out unsent.
            limits=httpx.Limits(max_connections=settings.max_concurrency),
        )
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._failed_in_a_row = 0
        self._open_until = 0.0

    def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Score in concurrent batches; results in the requests' order."""
        size = self.settings.batch_size
        batches = [requests[at : at + size] for at in range(0, len(requests), size)]
        with ThreadPoolExecutor(self.settings.max_concurrency) as pool:
            answered = list(pool.map(self._batch, batches))
        return [result for batch in answered for result in batch]

    def stats(self) -> dict[str, int]:
        """Those of `COUNTS` that are not 0."""
        with self._lock:
            return dict(self._counts)

    def close(self) -> None:
        """Close connections."""
        self._client.close()

    # ------------------------------------------------------------------ one batch

    def _batch(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        give_up = time.monotonic() + self.settings.give_up_after_s
        reason = "never tried"
        for attempt in range(self.settings.max_retries + 1):
            if not self._await_circuit(give_up):
                reason = f"circuit open; last failure: {reason}"
                break
            try:
                scores = self._post(requests)
            except _Refused as error:
                reason = str(error)
                self._count("failures")
                break
            except _Failed as error:
                reason = str(error)
                self._record_failure()
                if attempt == self.settings.max_retries or time.monotonic() > give_up:
                    break
                self._count("retries")
                time.sleep(self._backoff(attempt, error.wait_s))
                continue
            self._record_success()
            return [
                ScoreResult(rollout_id=r.rollout_id, score=scores[r.rollout_id]) for r in requests
            ]
        return self._dead_letter(requests, reason)

    def _post(self, requests: Sequence[ScoreRequest]) -> dict[str, float]:
        body = {
            "requests": [
                {"rollout_id": r.rollout_id, "prompt": r.prompt_text, "response": r.response_text}
                for r in requests
            ]
        }
        self._count("requests")
        deadline = time.monotonic() + self.settings.timeout_s
        try:
            with self._client.stream("POST", self.settings.url, json=body) as response:
                self._require_ok(response)
                raw = bytearray()
                for chunk in response.iter_bytes():
                    raw += chunk
                    # httpx limits the wait for each piece; a slow drip needs one for the whole.
                    if time.monotonic() > deadline:
                        raise _Failed(f"no whole answer within {self.settings.timeout_s} s")
                    if len(raw) > self.settings.max_response_bytes:
                        raise _Refused(f"answer over {self.settings.max_response_bytes} bytes")
        except httpx.RequestError as error:
            raise _Failed(f"{type(error).__name__}: {error}") from None
        return _parse(bytes(raw), [r.rollout_id for r in requests])

    def _require_ok(self, response: httpx.Response) -> None:
        status = response.status_code
        if status in (408, 429) or status >= 500:
            raise _Failed(f"HTTP {status}", _retry_after(response))
        if status != 200:
            raise _Refused(f"HTTP {status}")

    def _backoff(self, attempt: int, wait_s: float | None) -> float:
        """Full jitter (never a herd), but at least what the server asked for, within bounds."""
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

    def _dead_letter(self, requests: Sequence[ScoreRequest], reason: str) -> list[ScoreResult]:
        with self._lock:
            self._counts["dead_letters"] += len(requests)
            if self.settings.dead_letter_path is not None:
                with self.settings.dead_letter_path.open("a", encoding="utf8") as file:
                    for r in requests:
                        line = {
                            "rollout_id": r.rollout_id,
                            "prompt": r.prompt_text,
                            "response": r.response_text,
                            "error": reason,
                        }
                        file.write(json.dumps(line) + "\n")
        return [ScoreResult(rollout_id=r.rollout_id, score=None, error=reason) for r in requests]


def _require_url(text: str) -> None:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in ("http", "https") or not url.host:
        shown = " ".join(text.split())
        raise ConfigError(f"reward endpoint '{shown}': write it as http(s)://host/path")


def _certificates(url: str) -> ssl.SSLContext | bool:
    """Whom to believe: what the environment's SSL_CERT_FILE or SSL_CERT_DIR say, else certifi."""
    if not url.lower().startswith("https:"):
        return True
    try:
        return httpx.create_ssl_context(trust_env=True)
    except OSError as error:
        named = " or ".join(n for n in ("SSL_CERT_FILE", "SSL_CERT_DIR") if n in os.environ)
        raise ConfigError(
            f"reward endpoint: certificates of {named or 'certifi'} cannot be read: {error}"
        ) from None


def _token(variable: str) -> str:
    """The token, without the line break that files of secrets end in.

    What no header can carry is refused here: httpx would quote it in its own error.
    """
    token = os.environ.get(variable, "").strip()
    if not token:
        raise ConfigError(f"reward endpoint: environment variable {variable} is not set")
    if not (token.isascii() and token.isprintable()):
        raise ConfigError(
            f"reward endpoint: environment variable {variable} holds characters that no HTTP "
            "header can carry; a token is one line of printable ASCII"
        )
    return token


def _prepare_file(path: Path) -> None:
    """Find out now that dead letters cannot be written, not when the first one is lost."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a", encoding="utf8").close()
    except OSError as error:
        raise ConfigError(
            f"reward endpoint: dead letters cannot be written to {path}: {error.strerror}"
        ) from None


_LARGEST = sys.float_info.max
_AGREED = "the answer is not {'scores': [{'rollout_id', 'score'}]}"


def _parse(raw: bytes, expected: Sequence[str]) -> dict[str, float]:
    """Scores by rollout_id; raises _Failed for an answer that is not what was agreed."""
    try:
        answer: Any = json.loads(raw)
    except (ValueError, RecursionError):
        raise _Failed(f"{_AGREED}: no JSON but {one_line(repr(raw[:60]))}") from None
    rows = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(rows, list):
        raise _Failed(f"{_AGREED}: it has no list 'scores'")
    scores: dict[str, float] = {}
    for row in rows:
        rollout_id, score = _scored(row)
        if rollout_id in scores:
            raise _Failed(f"the answer scores a rollout twice: {rollout_id}")
        scores[rollout_id] = score
    if scores.keys() != set(expected):
        missing, added = set(expected) - scores.keys(), scores.keys() - set(expected)
        differs = min(missing or added)
        raise _Failed(f"the answer's rollouts differ from those asked for: {differs}")
    return scores


def _scored(row: Any) -> tuple[str, float]:
    """One entry of an answer."""
    if not isinstance(row, dict) or not {"rollout_id", "score"} <= row.keys():
        raise _Failed(f"{_AGREED}: an entry is {one_line(json.dumps(row))}")
    rollout_id, score = row["rollout_id"], row["score"]
    if not isinstance(rollout_id, str):
        raise _Failed(f"{_AGREED}: asked for: texts as rollout_id, not {json.dumps(rollout_id)}")
    if not isinstance(score, int | float) or not -_LARGEST <= score <= _LARGEST:
        if isinstance(score, float):
            raise _Failed(f"the score of {rollout_id} is {score}")
        raise _Failed(f"{_AGREED}: the score of {rollout_id} is {one_line(json.dumps(score))}")
    return rollout_id, float(score)


def _retry_after(response: httpx.Response) -> float | None:
    try:
        return max(0.0, float(response.headers["Retry-After"]))
    except (KeyError, ValueError):
        return None  # Absent, or a date: our own backoff serves.
