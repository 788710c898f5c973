"""Who may label: invitations that are traded for a browser's cookie, and can be taken back.

A link holds a token of 256 bits, of which only a hash is stored. It works once: in the browser in
which its button is pressed first; a second one is refused. The cookie is another secret, likewise
stored as a hash.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from common.errors import ConfigError
from deploy.feedback.sqlite_file import SqliteFile

_SCHEMA: Final = """
CREATE TABLE invitations (
    hash BLOB PRIMARY KEY, name TEXT NOT NULL, made REAL NOT NULL, used REAL, revoked REAL
) STRICT;
CREATE TABLE browsers (
    hash BLOB PRIMARY KEY, name TEXT NOT NULL, since REAL NOT NULL, revoked REAL
) STRICT;
"""
_LONGEST_NAME: Final = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Invited:
    """One who may label, or might."""

    name: str
    browsers: int
    """In which he is signed in."""
    waiting: int
    """Links that nobody has opened yet."""


class Access:
    """The file of who may label a run's pairs; one object for one thread."""

    def __init__(self, path: Path) -> None:
        """Open it, or make it.

        Raises:
            DataError: it is no such file.
            StorageError: it cannot be written.
        """
        self._file = SqliteFile(path, _SCHEMA, version=1)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def invite(self, name: str) -> str:
        """Return a token for a name; it works once.

        Raises:
            ConfigError: it is no name that others could read.
        """
        name = name_of_labeler(name)
        token = secrets.token_urlsafe(32)
        with self._file.writing() as db:
            db.execute(
                "INSERT INTO invitations (hash, name, made) VALUES (?, ?, ?)",
                (_hash(token), name, time.time()),
            )
        return token

    def name_of(self, token: str) -> str | None:
        """Return whom an unused token is for; None where it is none, or used, or taken back."""
        with self._file.writing() as db:
            row = db.execute(
                "SELECT name FROM invitations WHERE hash = ? AND used IS NULL AND revoked IS NULL",
                (_hash(token),),
            ).fetchone()
        return None if row is None else str(row[0])

    def enter(self, token: str) -> tuple[str, str] | None:
        """Trade a token for a browser's secret; return it with the name. None as `name_of`."""
        secret = secrets.token_urlsafe(32)
        with self._file.writing() as db:
            taken = db.execute(
                """
                UPDATE invitations SET used = ? WHERE hash = ? AND used IS NULL AND revoked IS NULL
                RETURNING name
                """,
                (time.time(), _hash(token)),
            ).fetchall()
            if not taken:
                return None
            ((name,),) = taken
            db.execute(
                "INSERT INTO browsers (hash, name, since) VALUES (?, ?, ?)",
                (_hash(secret), name, time.time()),
            )
        return secret, str(name)

    def labeler(self, secret: str) -> str | None:
        """Return who is signed in with this secret; None where nobody is."""
        if not secret:
            return None
        with self._file.writing() as db:
            row = db.execute(
                "SELECT name FROM browsers WHERE hash = ? AND revoked IS NULL", (_hash(secret),)
            ).fetchone()
        return None if row is None else str(row[0])

    def revoke(self, name: str) -> int:
        """Take back all links of one, and sign all browsers out; return how many there were.

        Raises:
            ConfigError: nobody of this name was invited.
        """
        name, now = name_of_labeler(name), time.time()
        with self._file.writing() as db:
            known = db.execute("SELECT 1 FROM invitations WHERE name = ?", (name,)).fetchone()
            if known is None:
                raise ConfigError(f"labeler {name!r}: was never invited")
            links = db.execute(
                "UPDATE invitations SET revoked = ? WHERE name = ? AND used IS NULL "
                "AND revoked IS NULL",
                (now, name),
            )
            browsers = db.execute(
                "UPDATE browsers SET revoked = ? WHERE name = ? AND revoked IS NULL", (now, name)
            )
        return links.rowcount + browsers.rowcount

    def all(self) -> list[Invited]:
        """Return everybody by name."""
        with self._file.writing() as db:
            rows = db.execute(
                """
                SELECT name, sum(signed_in), sum(waiting) FROM (
                    SELECT name, 1 AS signed_in, 0 AS waiting FROM browsers WHERE revoked IS NULL
                    UNION ALL
                    SELECT name, 0, 1 FROM invitations WHERE used IS NULL AND revoked IS NULL
                ) GROUP BY name ORDER BY name
                """
            ).fetchall()
        return [Invited(name=name, browsers=int(b), waiting=int(w)) for name, b, w in rows]


def name_of_labeler(text: str) -> str:
    """Return a name as it is kept, however it was typed.

    Raises:
        ConfigError: it is no name that others could read.
    """
    name = unicodedata.normalize("NFC", text.strip())
    if not name or not name.isprintable() or len(name) > _LONGEST_NAME or "+" in name:
        raise ConfigError(
            f"labeler {text!r}: a name has 1 to {_LONGEST_NAME} characters that can be printed, "
            "and no +"
        )
    return name


def form_token(secret: str) -> str:
    """Return what the forms of a signed-in browser hold: no other page can know it."""
    return hmac.new(secret.encode(), b"form", hashlib.sha256).hexdigest()


def same(one: str, two: str) -> bool:
    """Compare two secrets, in a time that says nothing of them."""
    return hmac.compare_digest(one.encode(), two.encode())


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
