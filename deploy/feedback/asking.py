"""Who is asked what: leases of pairs to labelers, inside a transaction of the round's file."""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
from dataclasses import dataclass
from typing import Final

from deploy.feedback.sqlite_file import SqliteFile

_KNOWN_EVERY: Final = 6
"""Answers from one known pair to the next."""
_UNSAID: Final = """NOT EXISTS (
    SELECT 1 FROM standing a WHERE a.labeler = ?1 AND a.pair = p.uid AND a.occasion = 0
)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a labeler is asked now."""

    pair_uid: str
    occasion: int
    key: str
    """Names this asking: an answer under it counts once, however often it is sent."""
    first_is_left: bool
    until: float
    """Unix seconds until which nobody else is asked in this labeler's place."""


class Refused(Exception):
    """An answer that cannot be taken, in words for the one who gave it."""


class Asking:
    """Leases of one round; every method is called inside `SqliteFile.writing`."""

    def __init__(self, file: SqliteFile, lease_s: float) -> None:
        self._file, self._lease_s = file, lease_s

    def next_task(self, labeler: str, now: float) -> Task | None:
        """Return what is leased to a labeler, prolonged, or something new; None: nothing is left.

        Raises:
            Refused: nobody of this name labels.
        """
        held = self.lease_of(labeler)
        if held is not None:  # his own, also where he comes back late
            until = now + self._lease_s
            self._file.do("UPDATE leases SET until = ? WHERE labeler = ?", until, labeler)
            return _task(held, until)
        self._drop_expired(now)
        chosen = self._again(labeler) or self._choose(labeler)
        return None if chosen is None else self.give(labeler, *chosen, now)

    def lease_of(self, labeler: str) -> sqlite3.Row | None:
        """Return what is leased to a labeler."""
        return self._file.row("SELECT * FROM leases WHERE labeler = ?", labeler)

    def give(self, labeler: str, pair: str, occasion: int, now: float) -> Task:
        """Lease a pair to a labeler."""
        left = first_is_left(pair, labeler, occasion)
        key, until = secrets.token_urlsafe(18), now + self._lease_s
        self._file.do(
            "INSERT INTO leases VALUES (?, ?, ?, ?, ?, ?, ?)",
            *(labeler, pair, occasion, key, int(left), now, until),
        )
        if occasion == 0:
            self._take(pair)
        return Task(pair_uid=pair, occasion=occasion, key=key, first_is_left=left, until=until)

    def drop(self, lease: sqlite3.Row) -> None:
        """Take a lease back: others may be asked."""
        self._file.do("DELETE FROM leases WHERE labeler = ?", lease["labeler"])
        if lease["occasion"] == 0:
            self.reopen(lease["pair"])

    def answered(self, labeler: str, key: str) -> sqlite3.Row | None:
        """End the lease of this key, which its labeler answers, late or in time.

        None where it is none, or others have answered in the place of one who was late.
        """
        lease = self.lease_of(labeler)
        if lease is not None and lease["key"] == key:
            self._file.do("DELETE FROM leases WHERE labeler = ?", labeler)
            return lease
        late = self._file.row(
            """
            SELECT e.* FROM expired e JOIN pairs p ON p.uid = e.pair
            WHERE e.key = ?1 AND e.labeler = ?2 AND (p.missing > 0 OR e.occasion = 1)
              AND NOT EXISTS (
                SELECT 1 FROM standing a
                WHERE a.labeler = ?2 AND a.pair = e.pair AND a.occasion = e.occasion
              )
              AND NOT EXISTS (
                SELECT 1 FROM leases l
                WHERE l.labeler = ?2 AND l.pair = e.pair AND l.occasion = e.occasion
              )
            """,
            key,
            labeler,
        )
        if late is not None and late["occasion"] == 0:
            self._take(late["pair"])
        return late

    def reopen(self, pair: str) -> None:
        """Let one more person answer a pair; whoever has looked further looks there again."""
        self._file.do("UPDATE pairs SET missing = missing + 1 WHERE uid = ?", pair)
        self._file.do(
            "UPDATE labelers SET cursor = min(cursor, (SELECT place FROM pairs WHERE uid = ?) - 1)",
            pair,
        )

    def _take(self, pair: str) -> None:
        self._file.do("UPDATE pairs SET missing = missing - 1 WHERE uid = ?", pair)

    def _drop_expired(self, now: float) -> None:
        """Take leases back whose labelers have not answered in time."""
        for row in self._file.rows("SELECT * FROM leases WHERE until < ?", now):
            self._file.do(
                """
                INSERT INTO expired SELECT key, labeler, pair, occasion, first_is_left, given
                FROM leases WHERE labeler = ?
                """,
                row["labeler"],
            )
            self.drop(row)

    def _again(self, labeler: str) -> tuple[str, int] | None:
        """Choose what a labeler is shown once more, where that is due."""
        row = self._file.row(
            """
            SELECT d.pair FROM due d JOIN labelers l ON l.name = d.labeler
            WHERE d.labeler = ? AND d.after <= l.ever ORDER BY d.after LIMIT 1
            """,
            labeler,
        )
        return None if row is None else (row["pair"], 1)

    def _choose(self, labeler: str) -> tuple[str, int] | None:
        """Choose a pair that a labeler has not said anything of; now and then a known one."""
        row = self._file.row(
            "SELECT cursor, ever - known_at AS since FROM labelers WHERE name = ?", labeler
        )
        if row is None:
            raise Refused("nobody of this name labels here")
        known = self._known(labeler) if row["since"] >= _KNOWN_EVERY else None
        chosen = known or self._first(labeler, row["cursor"]) or self._known(labeler)
        return None if chosen is None else (chosen, 0)

    def _known(self, labeler: str) -> str | None:
        """Return the next pair of which the better response is known."""
        found = self._file.row(
            f"SELECT p.uid FROM pairs p WHERE p.wanted = 0 AND {_UNSAID} ORDER BY p.place LIMIT 1",
            labeler,
        )
        if found is None:
            return None
        self._file.do("UPDATE labelers SET known_at = ever WHERE name = ?", labeler)
        return str(found["uid"])

    def _first(self, labeler: str, cursor: int) -> str | None:
        """Return the first other pair that is open."""
        found = self._file.row(
            f"""
            SELECT p.uid, p.place FROM pairs p
            WHERE p.missing > 0 AND p.place > ?2 AND p.wanted > 0 AND {_UNSAID}
            ORDER BY p.place LIMIT 1
            """,
            labeler,
            cursor,
        )
        if found is None:
            return None
        # What he has passed over, he has answered.
        self._file.do("UPDATE labelers SET cursor = ? WHERE name = ?", found["place"] - 1, labeler)
        return str(found["uid"])


def first_is_left(pair: str, labeler: str, occasion: int) -> bool:
    """Draw the side of a pair's first response for a labeler; the second time it is the other."""
    digest = hashlib.blake2b(f"{pair}\0{labeler}".encode(), digest_size=8).digest()
    return bool((digest[0] & 1) ^ occasion)


def _task(lease: sqlite3.Row, until: float) -> Task:
    return Task(
        pair_uid=lease["pair"],
        occasion=lease["occasion"],
        key=lease["key"],
        first_is_left=bool(lease["first_is_left"]),
        until=until,
    )
