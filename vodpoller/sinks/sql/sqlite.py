"""The sink `sqlite`: events as rows of a table in a SQLite file."""

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal
from urllib.parse import quote

from pydantic import Field

from vodpoller.sinks.sql import verdicts
from vodpoller.sinks.sql.config import SqlConfig
from vodpoller.sinks.sql.dialect import PRUNE_MAX_ROWS, Dialect
from vodpoller.sinks.sql.sessions import Session, Values
from vodpoller.sinks.sql.sink import SqlSink
from vodpoller.sinks.sql.verdicts import DatabaseError

_SYNCHRONOUS_FULL: Final = 2

# Prefixes of the names in "Result and Error Codes", the longest first. Other errors do not concern the event.
_STATES: Final = {
    "SQLITE_CONSTRAINT_FOREIGNKEY": verdicts.FOREIGN_KEY,
    "SQLITE_CONSTRAINT_PRIMARYKEY": verdicts.UNIQUE,
    "SQLITE_CONSTRAINT_UNIQUE": verdicts.UNIQUE,
    "SQLITE_CONSTRAINT_NOTNULL": verdicts.NULL,
    "SQLITE_CONSTRAINT": verdicts.CHECK,
    "SQLITE_MISMATCH": "22018",
    "SQLITE_TOOBIG": verdicts.TOO_LONG,
    "SQLITE_BUSY": verdicts.LOCKED,
    "SQLITE_LOCKED": verdicts.LOCKED,
    "SQLITE_INTERRUPT": verdicts.CANCELED,
    "SQLITE_READONLY": verdicts.READ_ONLY,
    "SQLITE_CANTOPEN": verdicts.NO_ANSWER,
    "SQLITE_ERROR": verdicts.GENERAL,  # also errors of functions and casts about a value
}
_SYSTEM_ERROR: Final = "58030"


def placeholder(name: str) -> str:
    """The placeholder for a value."""
    return f":{name}"


def iso(time: datetime) -> str:
    """The time as ISO 8601 text."""
    return time.isoformat(timespec="microseconds")


DIALECT: Final = Dialect(
    name="sqlite",
    quote='"',
    placeholder=placeholder,
    time_value=iso,
    prune="DELETE FROM vodpoller_inbox WHERE rowid IN (SELECT rowid FROM vodpoller_inbox WHERE sink = :sink AND"
    f" accepted_at < strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '-' || :days || ' days') LIMIT {PRUNE_MAX_ROWS})",
)


class SqliteConfig(SqlConfig):
    """The settings of a SQLite file."""

    uses_colons: ClassVar[bool] = True

    type: Literal["sqlite"] = Field(description="Each event is a row of a table in a SQLite file.")
    path: Annotated[str, Field(min_length=1, max_length=4096)] = Field(
        description="The file. It must exist, unless `create_table` is true; then only its folder must exist.",
        examples=["/srv/app/events.db"],
    )

    def shares(self) -> frozenset[str]:
        """The file, by its real path: other sinks may have their own tables in it."""
        return frozenset({"file:" + os.path.realpath(self.path)})


class SqliteSink(SqlSink[SqliteConfig]):
    """Writes rows into a SQLite file; each commit is synced."""

    Config = SqliteConfig
    dialect = DIALECT

    def connect(self, secs: float) -> Session:
        """Open the file."""
        return _SqliteSession(self.config.path, creates_file=self.config.create_table, secs=secs)

    @classmethod
    def probe(cls, name: str, config: SqliteConfig, context: Any) -> str:
        """As for every database, but a file that does not exist yet is not created."""
        path = Path(config.path).absolute()
        if config.create_table and not path.exists() and path.parent.is_dir():
            return f"{path} will be created"
        return super().probe(name, config.model_copy(update={"path": str(path)}), context)

    def nondurable_settings(self, session: Session) -> list[str]:
        """Always empty: each connection has `synchronous = FULL`."""
        return []


class _SqliteSession:
    """A connection to a file.

    Args:
        path: The file.
        creates_file: Whether the file is created if it does not exist.
        secs: Time limit for the connection, in seconds.
    """

    def __init__(self, path: str, *, creates_file: bool, secs: float) -> None:
        mode = "rwc" if creates_file else "rw"
        with _translated():
            self._db = sqlite3.connect(
                f"file:{quote(str(Path(path).absolute()))}?mode={mode}",
                uri=True,
                timeout=secs,
                isolation_level=None,
                check_same_thread=False,
            )
            self._db.execute(f"PRAGMA synchronous = {_SYNCHRONOUS_FULL}")
            self._db.execute("PRAGMA foreign_keys = ON")
        self._path = path
        self._identity = _identity_of(path)

    def begin(self, secs: float) -> None:
        # With a WAL, SQLite does not notice this, and continues to write to the deleted file.
        if self._identity is None or _identity_of(self._path) != self._identity:
            raise DatabaseError("the file was removed or replaced while it was open", verdicts.NO_ANSWER)
        with _translated():
            self._db.execute(f"PRAGMA busy_timeout = {int(secs * 1000)}")
            self._db.execute("BEGIN IMMEDIATE")

    def query(self, sql: str, values: Values) -> list[tuple[Any, ...]]:
        with _translated():
            return self._db.execute(sql, values).fetchall()

    def run(self, sql: str, values: Values) -> int:
        with _translated():
            cursor = self._db.execute(sql, values)
            cursor.fetchall()
            return cursor.rowcount

    def run_many(self, sql: str, rows: Sequence[Values]) -> None:
        with _translated():
            self._db.executemany(sql, rows)

    def check(self, sql: str) -> None:
        with _translated():
            self._db.execute(f"EXPLAIN {sql}", _NoValues()).fetchall()

    def commit(self) -> None:
        with _translated():
            self._db.execute("COMMIT")

    def rollback(self) -> None:
        with _translated():
            if self._db.in_transaction:  # some errors end the transaction
                self._db.execute("ROLLBACK")

    def abort(self) -> None:
        with suppress(sqlite3.Error):
            self._db.interrupt()

    def close(self) -> None:
        with suppress(sqlite3.Error):
            self._db.close()


def _identity_of(path: str) -> tuple[int, int] | None:
    with suppress(OSError):
        status = Path(path).stat()
        return status.st_dev, status.st_ino
    return None


class _NoValues(dict[str, object]):
    """Values that are all NULL."""

    def __missing__(self, name: str) -> None:
        return None


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except sqlite3.ProgrammingError as error:  # of the module `sqlite3` itself: the connection was closed
        raise DatabaseError(str(error), verdicts.NO_ANSWER) from error
    except sqlite3.Error as error:
        raise DatabaseError(str(error), state_of(getattr(error, "sqlite_errorname", ""), str(error))) from error


def state_of(name: str, text: str) -> str:
    """The SQLSTATE that corresponds to an error.

    Args:
        name: Its name, such as "SQLITE_BUSY_SNAPSHOT".
        text: Its text: a missing table has no name of its own.
    """
    if text.startswith("no such table"):
        return verdicts.NO_TABLE
    return next((state for beginning, state in _STATES.items() if name.startswith(beginning)), _SYSTEM_ERROR)
