"""What people are asked and what they said, in one SQLite file of a round.

::

    serve --next_task--> a lease: this pair, to this labeler, until then
          --submit-----> an answer (appended, under the key of its lease)
          --undo-------> a row that says so (appended); the pair goes back to its labeler

Who is asked what is `deploy.feedback.asking`. Everything that must hold at once is one transaction
that takes the writers' lock first (`BEGIN IMMEDIATE`): no pair goes to more people than wanted,
none twice to one, and what was acknowledged is on the disk (`synchronous = FULL`). Answers are
never changed: an undo is a row, and the standing answer of a labeler on a pair is the last one that
no row undoes.
"""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from common.errors import DataError
from deploy.feedback.answers import MOST, REASONS, STEPS, Answer, preference_of
from deploy.feedback.asking import Asking, Refused, Task
from deploy.feedback.schema import SCHEMA, VERSION
from deploy.feedback.sqlite_file import SqliteFile

_PACE_OF: Final = 20
"""Answers that a labeler's pace is the median of."""
_EVERYBODY: Final = 1_000_000
"""Answers that are missing of a pair that everybody is asked."""
_AGAIN_AFTER: Final = 8
"""Answers from the first to the second showing of a pair to one labeler, at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A pair of a round: how many people it is to be answered by, and how often by one."""

    uid: str
    wanted: int | None = 1
    """None: everybody is asked, as of pairs of which the better response is known."""
    again: bool = False
    """It is shown once more, sides swapped, to one who has answered it."""


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
        if not make and not path.is_file():
            raise DataError(f"{path}: is not there; what people said in this round is lost with it")
        self._clock = clock
        self._file = SqliteFile(path, SCHEMA, VERSION)
        self._asking = Asking(self._file, lease_s)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    # ------------------------------------------------------------------ what is asked

    def ask(self, pairs: Iterable[Asked]) -> None:
        """Add pairs, in the order in which they are asked; what is there stays as it is."""
        with self._file.writing() as db:
            (last,) = db.execute("SELECT coalesce(max(place), 0) FROM pairs").fetchone()
            db.executemany(
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
        with self._file.writing():
            self._file.do(
                "INSERT OR IGNORE INTO labelers (name, since) VALUES (?, ?)",
                labeler,
                self._clock(),
            )

    def has_read(self, labeler: str) -> bool:
        """Whether a labeler has read the guidelines."""
        row = self._file.row("SELECT read_guidelines FROM labelers WHERE name = ?", labeler)
        return row is not None and row["read_guidelines"] is not None

    def note_read(self, labeler: str) -> None:
        """Note that a labeler has read the guidelines."""
        with self._file.writing():
            self._file.do(
                "UPDATE labelers SET read_guidelines = ? WHERE name = ?", self._clock(), labeler
            )

    def practised(self, labeler: str) -> int:
        """Return how many of the pairs to practise with a labeler has answered."""
        row = self._file.row("SELECT practised FROM labelers WHERE name = ?", labeler)
        return 0 if row is None else int(row["practised"])

    def note_practised(self, labeler: str, number: int) -> None:
        """Note that a labeler has answered the pair of this number, where it was the next one."""
        with self._file.writing():
            self._file.do(
                "UPDATE labelers SET practised = ?2 + 1 WHERE name = ?1 AND practised = ?2",
                labeler,
                number,
            )

    # ------------------------------------------------------------------ its end

    def close_round(self) -> None:
        """Ask nothing more, and take no answer; again changes nothing."""
        with self._file.writing():
            self._file.do(
                "INSERT INTO closed SELECT ? WHERE NOT EXISTS (SELECT 1 FROM closed)",
                self._clock(),
            )

    def reopen_round(self) -> None:
        """Go on asking."""
        with self._file.writing():
            self._file.do("DELETE FROM closed")

    def is_closed(self) -> bool:
        """Whether nothing is asked any more."""
        return self._file.row("SELECT 1 FROM closed") is not None

    # ------------------------------------------------------------------ one task at a time

    def next_task(self, labeler: str) -> Task | None:
        """Return what a labeler is to answer: what is leased to him, or something new.

        None where nothing is left for him. A lease is prolonged each time it is asked for.
        """
        with self._file.writing():
            return None if self.is_closed() else self._asking.next_task(labeler, self._clock())

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
        with self._file.writing():
            known = self._file.row("SELECT labeler, step FROM answers WHERE key = ?", key)
            if known is not None:
                if known["labeler"] != labeler:
                    raise Refused("this was asked of somebody else")
                if known["step"] != step:
                    raise Refused("you have answered this already: undo that answer to change it")
                return
            if self.is_closed():
                raise Refused("this round is closed: nothing more is taken")
            lease = self._asking.answered(labeler, key)
            if lease is None:
                raise Refused("others have answered this pair meanwhile; here is the next one")
            passed = self._clock() - lease["given"]
            took = 0.0 if math.isnan(seconds) else max(0.0, min(seconds, passed))
            self._append(lease, "answer" if step is not None else "skip", step, why, flagged, took)
            self._count(labeler, lease, by=1, answered=step is not None)
            if step is None and lease["occasion"] == 0:
                self._asking.reopen(lease["pair"])

    def _count(self, labeler: str, said: sqlite3.Row, *, by: int, answered: bool) -> None:
        """Keep a labeler's counts, and what he is to be shown again."""
        if answered:
            self._file.do(
                "UPDATE labelers SET standing = standing + ?, ever = ever + ? WHERE name = ?",
                *(by, max(by, 0), labeler),
            )
        pair, first = said["pair"], said["occasion"] == 0
        if first == (by > 0) and (answered or not first):
            # It is answered for the first time, or its second answer is taken back.
            self._file.do(
                """
                INSERT OR REPLACE INTO due SELECT l.name, p.uid, l.ever + ? FROM labelers l, pairs p
                WHERE l.name = ? AND p.uid = ? AND p.again = 1
                """,
                *(_AGAIN_AFTER if first else 0, labeler, pair),
            )
        else:
            self._file.do("DELETE FROM due WHERE labeler = ? AND pair = ?", labeler, pair)

    def _append(
        self,
        lease: sqlite3.Row,
        kind: str,
        step: int | None,
        why: str,
        flagged: bool,
        seconds: float,
    ) -> None:
        self._file.do(
            """
            INSERT INTO answers
              (key, labeler, pair, occasion, kind, step, first_is_left, why, flagged, seconds, at)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
            """,
            *(lease[name] for name in ("key", "labeler", "pair", "occasion")),
            *(kind, step, lease["first_is_left"], why, int(flagged), seconds, self._clock()),
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
        with self._file.writing():
            now = self._clock()
            last = self._last(labeler)
            if last is None or number not in (None, last["id"]) or self.is_closed():
                return None
            lease = self._asking.lease_of(labeler)
            if lease is not None:
                self._asking.drop(lease)
            self._file.do(
                """
                INSERT INTO answers (
                  key, labeler, pair, occasion, first_is_left, kind, why, flagged, seconds, at,
                  undoes
                ) VALUES (?, ?, ?, ?, ?, 'undo', '', 0, 0, ?, ?)
                """,
                f"undo-{last['id']}",
                *(last[name] for name in ("labeler", "pair", "occasion", "first_is_left")),
                now,
                last["id"],
            )
            self._count(labeler, last, by=-1, answered=last["kind"] == "answer")
            if last["kind"] == "answer" and last["occasion"] == 0:
                self._asking.reopen(last["pair"])
            return self._asking.give(labeler, last["pair"], last["occasion"], now)

    def _last(self, labeler: str) -> sqlite3.Row | None:
        """Return a labeler's last answer that can be undone."""
        return self._file.row(
            """
            SELECT s.* FROM standing s JOIN pairs p ON p.uid = s.pair
            WHERE s.labeler = ? AND (s.kind = 'answer' OR s.occasion = 1 OR p.missing > 0)
            ORDER BY s.id DESC LIMIT 1
            """,
            labeler,
        )

    # ------------------------------------------------------------------ looking at it

    def standing(self) -> list[Answer]:
        """Return every labeler's last word on each pair, in the order in which they were said."""
        return [_answer(row) for row in self._file.rows("SELECT * FROM standing ORDER BY id")]

    def history(self) -> list[dict[str, Any]]:
        """Return all rows of answers, undone ones and undos too, as they were written."""
        return [dict(row) for row in self._file.rows("SELECT * FROM answers ORDER BY id")]

    def last_of(self, labeler: str, number: int) -> list[Answer]:
        """Return a labeler's last standing answers, newest first."""
        chosen = "SELECT * FROM standing WHERE labeler = ? ORDER BY id DESC LIMIT ?"
        return [_answer(row) for row in self._file.rows(chosen, labeler, number)]

    def answered(self, labeler: str) -> int:
        """Return how many answers of a labeler stand, skips left out."""
        rows = self._file.rows("SELECT standing FROM labelers WHERE name = ?", labeler)
        return int(rows[0]["standing"]) if rows else 0

    def pace(self, labeler: str) -> float | None:
        """Return the median seconds of a labeler's last answers; None before the first."""
        last = self.last_of(labeler, _PACE_OF)
        seconds = [answer.seconds for answer in last if answer.kind == "answer"]
        return median(seconds) if seconds else None

    def last_number(self, labeler: str) -> int:
        """Return the number of the answer that an undo takes back; 0 where there is none."""
        last = self._last(labeler)
        return 0 if last is None else int(last["id"])

    def last_said(self, labeler: str) -> str:
        """Return what that answer said, in the words of its button; empty where there is none."""
        last = self._last(labeler)
        if last is None:
            return ""
        return "skipped" if last["step"] is None else STEPS[last["step"]]

    def asked(self) -> set[str]:
        """Return the uids of all pairs."""
        return {row["uid"] for row in self._file.rows("SELECT uid FROM pairs")}

    def left(self) -> int:
        """Return how many answers are wanted yet, leased ones included.

        Pairs that everybody is asked do not count.
        """
        (row,) = self._file.rows(
            "SELECT coalesce(sum(missing), 0) AS n FROM pairs WHERE wanted > 0"
        )
        (leased,) = self._file.rows(
            "SELECT count(*) AS n FROM leases l JOIN pairs p ON p.uid = l.pair "
            "WHERE l.occasion = 0 AND p.wanted > 0"
        )
        return int(row["n"]) + int(leased["n"])

    def wanted(self) -> int:
        """Return how many answers are wanted in all, as `left` counts them."""
        row = self._file.row("SELECT coalesce(sum(wanted), 0) AS n FROM pairs")
        return 0 if row is None else int(row["n"])

    def is_read(self) -> bool:
        """Whether somebody has a pair before them now, known ones left out."""
        row = self._file.row(
            "SELECT 1 FROM leases l JOIN pairs p ON p.uid = l.pair "
            "WHERE l.until > ? AND p.wanted > 0 LIMIT 1",
            self._clock(),
        )
        return row is not None

    def can_go_on(self) -> bool:
        """Whether somebody who labels could answer a pair that is open, or nobody has come yet."""
        row = self._file.row(
            """
            SELECT 1 FROM pairs p LEFT JOIN labelers l
            WHERE p.missing > 0 AND p.wanted > 0 AND (l.name IS NULL OR NOT EXISTS (
                SELECT 1 FROM standing a
                WHERE a.labeler = l.name AND a.pair = p.uid AND a.occasion = 0
            )) LIMIT 1
            """
        )
        return row is not None


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
