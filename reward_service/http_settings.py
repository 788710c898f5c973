"""How to talk to a remote reward endpoint, checked before the first request."""

from __future__ import annotations

import os
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

import httpx

from common.errors import ConfigError


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


def require_url(text: str) -> None:
    """Raise ConfigError for what is no URL of http or https."""
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in ("http", "https") or not url.host:
        shown = " ".join(text.split())
        raise ConfigError(f"reward endpoint '{shown}': write it as http(s)://host/path")


def certificates(url: str) -> ssl.SSLContext | bool:
    """Load the certificates of SSL_CERT_FILE or SSL_CERT_DIR in the environment, else certifi's."""
    if not url.lower().startswith("https:"):
        return True
    try:
        return httpx.create_ssl_context(trust_env=True)
    except OSError as error:
        named = " or ".join(n for n in ("SSL_CERT_FILE", "SSL_CERT_DIR") if n in os.environ)
        raise ConfigError(
            f"reward endpoint: certificates of {named or 'certifi'} cannot be read: {error}"
        ) from None


def token_of(variable: str) -> str:
    """Return the token, without the line break that files of secrets end in.

    What no header can carry is refused here: httpx would quote it in its own error.
    """
    token = os.environ.get(variable, "").strip()
    if not token:
        raise ConfigError(
            f"reward endpoint: environment variable {variable} is not set on host "
            f"{socket.gethostname()}; workers have the environment that Ray was started in there"
        )
    if not (token.isascii() and token.isprintable()):
        raise ConfigError(
            f"reward endpoint: environment variable {variable} holds characters that no HTTP "
            "header can carry; a token is one line of printable ASCII"
        )
    return token


def prepare_file(path: Path) -> None:
    """Check now that dead letters can be written, and not when the first one is lost."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a", encoding="utf8").close()
    except OSError as error:
        raise ConfigError(
            f"reward endpoint: dead letters cannot be written to {path}: {error.strerror}"
        ) from None
