"""A SQLite file: one transaction at a time, on the disk when it ends; errors are one line."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from common.errors import DataError, StorageError

_BUSY_S: Final = 10.0
_ELSEWHERE: Final = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_IOERR,
}
"""Errors of the disk or its folder, not of the file's content."""


class SqliteFile:
    """One file; one object for one thread."""

    def __init__(self, path: Path, schema: str, version: int) -> None:
        """Open a file, or make it by its schema.

        Args:
            path: the file.
            schema: statements that make its tables, each with a semicolon.
            version: of the schema.

        Raises:
            DataError: it is no such file, a torn one, or of another version.
            StorageError: it cannot be opened, or another process holds it.
        """
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")
        except OSError as error:
            raise StorageError(f"{path}: cannot be written: {error}") from None
        except sqlite3.Error as error:
            raise self._of_ours(error) from None
        with self.writing():
            (found,) = self._db.execute("PRAGMA user_version").fetchone()
            (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if found == 0 and tables == 0:
                for statement in schema.split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {version}")
            elif found != version:
                raise DataError(
                    f"{path}: is not a file of this version; take another folder, or open it with "
                    "the version of Talipot that made it"
                )

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Give one transaction, with the writers' lock from its beginning.

        Raises:
            DataError: the file is damaged.
            StorageError: the disk is full, or another process holds it for too long.
        """
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                if self._db.in_transaction:  # of some errors SQLite rolls back itself
                    self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._of_ours(error) from None

    def rows(self, statement: str, *values: Any) -> list[sqlite3.Row]:
        """Read something. Raises as `writing`."""
        try:
            return self._db.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise self._of_ours(error) from None

    def row(self, statement: str, *values: Any) -> sqlite3.Row | None:
        """Read the first row; None where there is none. Raises as `writing`."""
        return next(iter(self.rows(statement, *values)), None)

    def do(self, statement: str, *values: Any) -> None:
        """Change something, inside `writing`. Raises as that."""
        self.rows(statement, *values)

    def _of_ours(self, error: sqlite3.Error) -> DataError | StorageError:
        """Return what SQLite complains of as an error of ours, in one line."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            held = f"another process holds it for {_BUSY_S:.0f} s; end that one"
            return StorageError(f"{self.path}: {held}")
        if code in _ELSEWHERE:
            return StorageError(f"{self.path}: cannot be written ({error})")
        return DataError(f"{self.path}: damaged, or not a file of this kind ({error})")
