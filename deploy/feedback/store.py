"""What people are asked and what they said, in one SQLite file of a round.

::

    serve --next_task--> a lease: this pair, to this labeler, until then
          --submit-----> an answer (appended, under the key of its lease)
          --undo-------> a row that says so (appended); the pair goes back to its labeler

Everything that must hold at once is one transaction that takes the writers' lock first (`BEGIN
IMMEDIATE`): no pair goes to more people than wanted, none twice to one, and what was acknowledged
is on the disk (`synchronous = FULL`). Answers are never changed: an undo is a row, and the standing
answer of a labeler on a pair is the last one that no row undoes.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from common.errors import DataError, StorageError
from deploy.feedback.answers import MOST, REASONS, Answer, preference_of

VERSION: Final = 1
_BUSY_S: Final = 10.0
_EVERYBODY: Final = 1_000_000
"""Answers that are missing of a pair that everybody is asked."""
_AGAIN_AFTER: Final = 8
"""Answers from the first to the second showing of a pair to one labeler, at least."""
_KNOWN_EVERY: Final = 6
"""Answers from one known pair to the next."""
_UNSAID: Final = """NOT EXISTS (
    SELECT 1 FROM standing a WHERE a.labeler = ?1 AND a.pair = p.uid AND a.occasion = 0
)"""
_SCHEMA: Final = """
CREATE TABLE pairs (
    uid TEXT PRIMARY KEY,
    place INTEGER NOT NULL UNIQUE,
    wanted INTEGER NOT NULL,
    missing INTEGER NOT NULL,
    again INTEGER NOT NULL
) STRICT;
CREATE INDEX open_pairs ON pairs (place) WHERE missing > 0;
CREATE TABLE labelers (
    name TEXT PRIMARY KEY,
    since REAL NOT NULL,
    read_guidelines REAL,
    cursor INTEGER NOT NULL DEFAULT 0,
    standing INTEGER NOT NULL DEFAULT 0,
    ever INTEGER NOT NULL DEFAULT 0,
    known_at INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE due (
    labeler TEXT NOT NULL,
    pair TEXT NOT NULL,
    after INTEGER NOT NULL,
    PRIMARY KEY (labeler, pair)
) STRICT;
CREATE TABLE answers (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL UNIQUE,
    labeler TEXT NOT NULL,
    pair TEXT NOT NULL,
    occasion INTEGER NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('answer', 'skip', 'undo')),
    step INTEGER,
    first_is_left INTEGER NOT NULL,
    why TEXT NOT NULL,
    flagged INTEGER NOT NULL,
    seconds REAL NOT NULL,
    at REAL NOT NULL,
    undoes INTEGER REFERENCES answers (id)
) STRICT;
CREATE INDEX answers_of ON answers (labeler, pair);
CREATE INDEX last_answers ON answers (labeler);
CREATE UNIQUE INDEX undone_once ON answers (undoes) WHERE undoes IS NOT NULL;
CREATE VIEW standing AS
    SELECT * FROM answers a WHERE a.kind != 'undo'
    AND NOT EXISTS (SELECT 1 FROM answers u WHERE u.undoes = a.id);
CREATE TABLE leases (
    labeler TEXT PRIMARY KEY,
    pair TEXT NOT NULL,
    occasion INTEGER NOT NULL,
    key TEXT NOT NULL UNIQUE,
    first_is_left INTEGER NOT NULL,
    given REAL NOT NULL,
    until REAL NOT NULL
) STRICT;
CREATE TABLE expired (
    key TEXT PRIMARY KEY,
    labeler TEXT NOT NULL,
    pair TEXT NOT NULL,
    occasion INTEGER NOT NULL,
    first_is_left INTEGER NOT NULL,
    given REAL NOT NULL
) STRICT;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A pair of a round: how many people it is to be answered by, and how often by one."""

    uid: str
    wanted: int | None = 1
    """None: everybody is asked, as of pairs of which the better response is known."""
    again: bool = False
    """It is shown once more, sides swapped, to one who has answered it."""


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


class Store:
    """The file of one round; one object for one thread."""

    def __init__(
        self,
        path: Path,
        *,
        make: bool = False,
        lease_s: float = 900.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open a round's file.

        Args:
            path: the file.
            make: make it, where it is not there.
            lease_s: how long a pair waits for its labeler's answer before others are asked.
            clock: unix seconds.

        Raises:
            DataError: it is no such file, a torn one, or of another version.
            StorageError: it cannot be opened, or another process holds it.
        """
        self._path, self._lease_s, self._clock = path, lease_s, clock
        if not make and not path.is_file():
            raise DataError(f"{path}: is not there; what people said in this round is lost with it")
        try:
            self._db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")
            self._prepare()
        except sqlite3.Error as error:
            raise sqlite_error(path, error) from None

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def _prepare(self) -> None:
        with self._writing():
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if version == 0 and tables == 0:
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {VERSION}")
            elif version != VERSION:
                raise DataError(
                    f"{self._path}: is no file of answers of this version; take another folder, or "
                    "open it with the version of Talipot that made it"
                )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction, with the writers' lock from its beginning.

        Raises:
            DataError: the file is damaged.
            StorageError: the disk is full, or another process holds it for too long.
        """
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                if self._db.in_transaction:  # of some errors SQLite rolls back itself
                    self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            raise sqlite_error(self._path, error) from None

    def _rows(self, statement: str, *values: Any) -> list[sqlite3.Row]:
        try:
            return self._db.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise sqlite_error(self._path, error) from None

    # ------------------------------------------------------------------ what is asked

    def ask(self, pairs: Iterable[Asked]) -> None:
        """Add pairs, in the order in which they are asked; what is there stays as it is."""
        with self._writing():
            (last,) = self._db.execute("SELECT coalesce(max(place), 0) FROM pairs").fetchone()
            self._db.executemany(
                "INSERT OR IGNORE INTO pairs VALUES (?, ?, ?, ?, ?)",
                (
                    (
                        pair.uid,
                        place,
                        pair.wanted or 0,
                        _EVERYBODY if pair.wanted is None else pair.wanted,
                        int(pair.again),
                    )
                    for place, pair in enumerate(pairs, last + 1)
                ),
            )

    def welcome(self, labeler: str) -> None:
        """Note that somebody labels."""
        with self._writing():
            self._db.execute(
                "INSERT OR IGNORE INTO labelers (name, since) VALUES (?, ?)",
                (labeler, self._clock()),
            )

    def has_read(self, labeler: str) -> bool:
        """Whether a labeler has read the guidelines."""
        rows = self._rows("SELECT read_guidelines FROM labelers WHERE name = ?", labeler)
        return bool(rows) and rows[0]["read_guidelines"] is not None

    def note_read(self, labeler: str) -> None:
        """Note that a labeler has read the guidelines."""
        with self._writing():
            self._db.execute(
                "UPDATE labelers SET read_guidelines = ? WHERE name = ?", (self._clock(), labeler)
            )

    # ------------------------------------------------------------------ one task at a time

    def next_task(self, labeler: str) -> Task | None:
        """Return what a labeler is to answer: what is leased to him, or something new.

        None where nothing is left for him. A lease is prolonged each time it is asked for.
        """
        with self._writing():
            now = self._clock()
            held = self._lease_of(labeler)
            if held is not None:  # his own, also where he comes back late
                until = now + self._lease_s
                self._db.execute("UPDATE leases SET until = ? WHERE labeler = ?", (until, labeler))
                return _task(held, until)
            self._drop_expired(now)
            chosen = self._again(labeler) or self._choose(labeler)
            if chosen is None:
                return None
            return self._give(labeler, *chosen, now)

    def _lease_of(self, labeler: str) -> sqlite3.Row | None:
        found: sqlite3.Row | None = self._db.execute(
            "SELECT * FROM leases WHERE labeler = ?", (labeler,)
        ).fetchone()
        return found

    def _give(self, labeler: str, pair: str, occasion: int, now: float) -> Task:
        """Lease a pair to a labeler."""
        left = first_is_left(pair, labeler, occasion)
        key, until = secrets.token_urlsafe(18), now + self._lease_s
        self._db.execute(
            "INSERT INTO leases VALUES (?, ?, ?, ?, ?, ?, ?)",
            (labeler, pair, occasion, key, int(left), now, until),
        )
        if occasion == 0:
            self._db.execute("UPDATE pairs SET missing = missing - 1 WHERE uid = ?", (pair,))
        return Task(pair_uid=pair, occasion=occasion, key=key, first_is_left=left, until=until)

    def _drop_expired(self, now: float) -> None:
        """Take leases back whose labelers have not answered in time."""
        for row in self._db.execute("SELECT * FROM leases WHERE until < ?", (now,)).fetchall():
            self._db.execute(
                """
                INSERT INTO expired SELECT key, labeler, pair, occasion, first_is_left, given
                FROM leases WHERE labeler = ?
                """,
                (row["labeler"],),
            )
            self._drop(row)

    def _drop(self, lease: sqlite3.Row) -> None:
        self._db.execute("DELETE FROM leases WHERE labeler = ?", (lease["labeler"],))
        if lease["occasion"] == 0:
            self._reopen(lease["pair"])

    def _reopen(self, pair: str) -> None:
        """One more person is to answer a pair; whoever has looked further looks there again."""
        self._db.execute("UPDATE pairs SET missing = missing + 1 WHERE uid = ?", (pair,))
        self._db.execute(
            "UPDATE labelers SET cursor = min(cursor, (SELECT place FROM pairs WHERE uid = ?) - 1)",
            (pair,),
        )

    def _again(self, labeler: str) -> tuple[str, int] | None:
        """Choose what a labeler is shown once more, where that is due."""
        row = self._db.execute(
            """
            SELECT d.pair FROM due d JOIN labelers l ON l.name = d.labeler
            WHERE d.labeler = ? AND d.after <= l.ever ORDER BY d.after LIMIT 1
            """,
            (labeler,),
        ).fetchone()
        return None if row is None else (row["pair"], 1)

    def _choose(self, labeler: str) -> tuple[str, int] | None:
        """Choose a pair that a labeler has not said anything of; now and then a known one."""
        row = self._db.execute(
            "SELECT cursor, ever - known_at AS since FROM labelers WHERE name = ?", (labeler,)
        ).fetchone()
        if row is None:
            raise Refused("nobody of this name labels here")
        known = self._known(labeler) if row["since"] >= _KNOWN_EVERY else None
        chosen = known or self._first(labeler, row["cursor"]) or self._known(labeler)
        return None if chosen is None else (chosen, 0)

    def _known(self, labeler: str) -> str | None:
        """Return the next pair of which the better response is known."""
        found = self._db.execute(
            f"SELECT p.uid FROM pairs p WHERE p.wanted = 0 AND {_UNSAID} ORDER BY p.place LIMIT 1",
            (labeler,),
        ).fetchone()
        if found is None:
            return None
        self._db.execute("UPDATE labelers SET known_at = ever WHERE name = ?", (labeler,))
        return str(found["uid"])

    def _first(self, labeler: str, cursor: int) -> str | None:
        """Return the first other pair that is open."""
        found = self._db.execute(
            f"""
            SELECT p.uid, p.place FROM pairs p
            WHERE p.missing > 0 AND p.place > ?2 AND p.wanted > 0 AND {_UNSAID}
            ORDER BY p.place LIMIT 1
            """,
            (labeler, cursor),
        ).fetchone()
        if found is None:
            return None
        # What he has passed over, he has answered.
        self._db.execute(
            "UPDATE labelers SET cursor = ? WHERE name = ?", (found["place"] - 1, labeler)
        )
        return str(found["uid"])

    # ------------------------------------------------------------------ answers

    def submit(
        self,
        labeler: str,
        key: str,
        *,
        step: int | None,
        why: str = "",
        flagged: bool = False,
        seconds: float = 0.0,
    ) -> None:
        """Store an answer; on return it is on the disk. The same key a second time changes nothing.

        Args:
            labeler: who answers.
            key: of the task.
            step: 0 ... 6 as in `deploy.feedback.answers.STEPS`; None skips the pair.
            why: in words; of a skip it begins with one of the reasons.
            flagged: somebody should look at this pair.
            seconds: that it took, without breaks.

        Raises:
            Refused: the step or the reason is none, or the task is not this labeler's any more.
        """
        if step is None and not why.startswith(REASONS):
            raise Refused(f"a skip needs a reason: {', '.join(REASONS)}")
        if step is not None and not 0 <= step <= 2 * MOST:
            raise Refused(f"no such answer: {step}")
        with self._writing():
            known = self._db.execute(
                "SELECT labeler, step FROM answers WHERE key = ?", (key,)
            ).fetchone()
            if known is not None:
                if known["labeler"] != labeler:
                    raise Refused("this was asked of somebody else")
                if known["step"] != step:
                    raise Refused("you have answered this already: undo that answer to change it")
                return
            now = self._clock()
            lease = self._lease_of(labeler)
            if lease is not None and lease["key"] == key:
                self._db.execute("DELETE FROM leases WHERE labeler = ?", (labeler,))
            else:
                lease = self._late(labeler, key)
            if lease is None:
                raise Refused("others have answered this pair meanwhile; here is the next one")
            took = 0.0 if math.isnan(seconds) else max(0.0, min(seconds, now - lease["given"]))
            self._append(lease, "answer" if step is not None else "skip", step, why, flagged, took)
            self._count(labeler, lease, by=1, answered=step is not None)
            if step is None and lease["occasion"] == 0:
                self._reopen(lease["pair"])

    def _late(self, labeler: str, key: str) -> sqlite3.Row | None:
        """Take up an expired lease whose pair still lacks an answer."""
        row: sqlite3.Row | None = self._db.execute(
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
            (key, labeler),
        ).fetchone()
        if row is not None and row["occasion"] == 0:
            self._db.execute("UPDATE pairs SET missing = missing - 1 WHERE uid = ?", (row["pair"],))
        return row

    def _count(self, labeler: str, said: sqlite3.Row, *, by: int, answered: bool) -> None:
        """Keep a labeler's counts, and what he is to be shown again."""
        if answered:
            self._db.execute(
                "UPDATE labelers SET standing = standing + ?, ever = ever + ? WHERE name = ?",
                (by, max(by, 0), labeler),
            )
        pair, first = said["pair"], said["occasion"] == 0
        if first == (by > 0) and (answered or not first):
            # It is answered for the first time, or its second answer is taken back.
            self._db.execute(
                """
                INSERT OR REPLACE INTO due SELECT l.name, p.uid, l.ever + ? FROM labelers l, pairs p
                WHERE l.name = ? AND p.uid = ? AND p.again = 1
                """,
                (_AGAIN_AFTER if first else 0, labeler, pair),
            )
        else:
            self._db.execute("DELETE FROM due WHERE labeler = ? AND pair = ?", (labeler, pair))

    def _append(
        self,
        lease: sqlite3.Row,
        kind: str,
        step: int | None,
        why: str,
        flagged: bool,
        seconds: float,
    ) -> None:
        self._db.execute(
            """
            INSERT INTO answers
              (key, labeler, pair, occasion, kind, step, first_is_left, why, flagged, seconds, at)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
            """,
            (
                lease["key"],
                lease["labeler"],
                lease["pair"],
                lease["occasion"],
                kind,
                step,
                lease["first_is_left"],
                why,
                int(flagged),
                seconds,
                self._clock(),
            ),
        )

    def undo(self, labeler: str, number: int | None = None) -> Task | None:
        """Take a labeler's last standing answer back, and ask it of him again.

        What he has not answered yet goes back to the others. What he has skipped and others have
        taken since is passed over.

        Args:
            labeler: whose.
            number: of the answer (`last_number`), so that what is sent twice undoes one.

        Returns:
            What he is asked; None where there is nothing to undo, or `number` is not the last.
        """
        with self._writing():
            now = self._clock()
            last = self._last(labeler)
            if last is None or number not in (None, last["id"]):
                return None
            lease = self._lease_of(labeler)
            if lease is not None:
                self._drop(lease)
            self._db.execute(
                """
                INSERT INTO answers (
                  key, labeler, pair, occasion, kind, first_is_left, why, flagged, seconds, at,
                  undoes
                ) VALUES (?, ?, ?, ?, 'undo', ?, '', 0, 0, ?, ?)
                """,
                (
                    f"undo-{last['id']}",
                    labeler,
                    last["pair"],
                    last["occasion"],
                    last["first_is_left"],
                    now,
                    last["id"],
                ),
            )
            self._count(labeler, last, by=-1, answered=last["kind"] == "answer")
            if last["kind"] == "answer" and last["occasion"] == 0:
                self._reopen(last["pair"])
            return self._give(labeler, last["pair"], last["occasion"], now)

    def _last(self, labeler: str) -> sqlite3.Row | None:
        """Return a labeler's last answer that can be undone."""
        found: sqlite3.Row | None = self._db.execute(
            """
            SELECT s.* FROM standing s JOIN pairs p ON p.uid = s.pair
            WHERE s.labeler = ? AND (s.kind = 'answer' OR s.occasion = 1 OR p.missing > 0)
            ORDER BY s.id DESC LIMIT 1
            """,
            (labeler,),
        ).fetchone()
        return found

    # ------------------------------------------------------------------ looking at it

    def standing(self) -> list[Answer]:
        """Return every labeler's last word on each pair, in the order in which they were said."""
        return [_answer(row) for row in self._rows("SELECT * FROM standing ORDER BY id")]

    def history(self) -> list[dict[str, Any]]:
        """Return all rows of answers, undone ones and undos too, as they were written."""
        return [dict(row) for row in self._rows("SELECT * FROM answers ORDER BY id")]

    def last_of(self, labeler: str, number: int) -> list[Answer]:
        """Return a labeler's last standing answers, newest first."""
        chosen = "SELECT * FROM standing WHERE labeler = ? ORDER BY id DESC LIMIT ?"
        return [_answer(row) for row in self._rows(chosen, labeler, number)]

    def answered(self, labeler: str) -> int:
        """Return how many answers of a labeler stand, skips left out."""
        rows = self._rows("SELECT standing FROM labelers WHERE name = ?", labeler)
        return int(rows[0]["standing"]) if rows else 0

    def last_number(self, labeler: str) -> int:
        """Return the number of the answer that an undo takes back; 0 where there is none."""
        try:
            last = self._last(labeler)
        except sqlite3.Error as error:
            raise sqlite_error(self._path, error) from None
        return 0 if last is None else int(last["id"])

    def asked(self) -> set[str]:
        """Return the uids of all pairs."""
        return {row["uid"] for row in self._rows("SELECT uid FROM pairs")}

    def left(self) -> int:
        """Return how many answers are wanted yet, leased ones included.

        Pairs that everybody is asked do not count.
        """
        (row,) = self._rows("SELECT coalesce(sum(missing), 0) AS n FROM pairs WHERE wanted > 0")
        (leased,) = self._rows(
            "SELECT count(*) AS n FROM leases l JOIN pairs p ON p.uid = l.pair "
            "WHERE l.occasion = 0 AND p.wanted > 0"
        )
        return int(row["n"]) + int(leased["n"])

    def labelers(self) -> Sequence[str]:
        """Return the names of all who label."""
        return [row["name"] for row in self._rows("SELECT name FROM labelers ORDER BY name")]


def sqlite_error(path: Path, error: sqlite3.Error) -> DataError | StorageError:
    """Return what SQLite complains of as an error of ours, in one line."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StorageError(f"{path}: another process holds it for {_BUSY_S:.0f} s; end that one")
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN) or (
        code == sqlite3.SQLITE_IOERR
    ):
        return StorageError(f"{path}: cannot be written ({error})")
    return DataError(f"{path}: damaged, or not a file of this kind ({error})")


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


def _answer(row: sqlite3.Row) -> Answer:
    left = bool(row["first_is_left"])
    step = row["step"]
    return Answer(
        pair_uid=row["pair"],
        labeler=row["labeler"],
        occasion=row["occasion"],
        kind=row["kind"],
        preference=None if step is None else preference_of(step, first_is_left=left),
        first_is_left=left,
        why=row["why"],
        flagged=bool(row["flagged"]),
        seconds=row["seconds"],
        at=row["at"],
    )
