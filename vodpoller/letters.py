"""What an operator does with the journal: look at what is stored, replay dead letters, purge them.

All of it works beside a running daemon: reads take no lock, writes are many short transactions.
"""

import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

from vodpoller.errors import JournalError
from vodpoller.events import restore_event
from vodpoller.migrations import SCHEMA_VERSION
from vodpoller.router import Router

CHUNK_ROWS: Final = 200
BUSY_SECS: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which stored events are meant; what is None does not matter.

    Args:
        state: "dead" or "pending".
        ids: Row numbers.
        sink: The sink's name; empty for what no sink was named for.
        event_type: A glob.
        reason: Why it is there: "rejected", "gave_up", "malformed", "unrouted" for dead ones.
        since: Stored at or after this time, in seconds since 1970.
        last_id: Not what came after this row.
    """

    state: str = "dead"
    ids: Sequence[int] = ()
    sink: str | None = None
    event_type: str | None = None
    reason: str | None = None
    since: float | None = None
    last_id: int | None = None

    def where(self) -> tuple[str, list[Any]]:
        """The SQL condition and its parameters."""
        conditions, values = ["state = ?"], [self.state, *self.ids]
        if self.ids:
            conditions.append(f"id IN ({','.join('?' * len(self.ids))})")
        for value, condition in (
            (self.sink, "sink = ?"),
            (self.event_type, "event_type GLOB ?"),
            (self.reason, "reason = ?"),
            (self.since, "stored_at >= ?"),
            (self.last_id, "id <= ?"),
        ):
            if value is not None:
                conditions.append(condition)
                values.append(value)
        return " AND ".join(conditions), values


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEvent:
    """One stored (event, sink).

    Args:
        id: The row's number, which commands take.
        key: The event's key, as in the log.
        sink: The sink that lacks it; empty where no route named one.
        reason: Why it is stored.
        error: What the last attempt said.
        attempts: How many failed.
        stored_at: In seconds since 1970.
        source: That it was pulled from.
        event_type: Tencent's.
        size_bytes: Of its body.
    """

    id: int
    key: str
    sink: str
    reason: str
    error: str
    attempts: int
    stored_at: float
    source: str
    event_type: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """How much is stored for one sink in one state, and since when (seconds since 1970)."""

    sink: str
    state: str
    events: int
    oldest_at: float


class Letters:
    """A journal as its operator sees it. A context manager.

    Args:
        path: The journal.
        writable: Replay and purge are wanted.
        wall: The clock that stamps rows, in seconds since 1970.

    Raises:
        JournalError: There is none, or it cannot be read.
    """

    def __init__(self, path: Path, *, writable: bool = False, wall: Callable[[], float] = time.time) -> None:
        self._path = path
        self._wall = wall
        rights = "commands need the rights of the user that runs vodpoller, or root's"
        try:
            is_there = path.is_file()
        except OSError as error:
            raise JournalError(f"{path}: the journal cannot be read: {error.strerror} ({rights})") from error
        if not is_there:
            raise JournalError(
                f"{path}: there is no journal yet: vodpoller makes it when it first runs (or journal.path is another)"
            )
        mode = "rw" if writable else "ro"
        try:
            self._db = sqlite3.connect(f"{path.resolve().as_uri()}?mode={mode}", uri=True, timeout=BUSY_SECS)
        except sqlite3.Error as error:
            raise JournalError(f"{path}: the journal cannot be read: {error} ({rights})") from error
        try:
            self._db.isolation_level = None
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
        except sqlite3.Error as error:
            self.close()
            raise JournalError(f"{path}: the journal cannot be read: {error} ({rights})") from error
        if version != SCHEMA_VERSION:
            self.close()
            raise JournalError(
                f"{path}: this is no journal of this version of vodpoller ({version}, not {SCHEMA_VERSION})"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def is_in_use(self) -> bool:
        """Whether a daemon (or another command that delivers) has the journal."""
        with suppress(OSError):
            lock_fd = os.open(f"{self._path}.lock", os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(lock_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            finally:
                os.close(lock_fd)
        return False

    def count(self, wanted: Filter) -> int:
        """How many there are."""
        where, values = wanted.where()
        (number,) = self._read(f"SELECT count(*) FROM letters WHERE {where}", values)[0]  # noqa: S608 - our own text
        return int(number)

    def stored(self, wanted: Filter, *, limit: int | None = None) -> Iterator[StoredEvent]:
        """The rows, oldest first, read in portions.

        Args:
            wanted: Which.
            limit: At most so many.
        """
        where, values = wanted.where()
        after, left = 0, limit
        while left is None or left > 0:
            portion = CHUNK_ROWS if left is None else min(left, CHUNK_ROWS)
            rows = self._read(
                "SELECT id, lower(hex(key)), sink, reason, error, attempts, stored_at, source, event_type,"  # noqa: S608
                f" length(body) FROM letters WHERE {where} AND id > ? ORDER BY id LIMIT ?",
                [*values, after, portion],
            )
            yield from (StoredEvent(**dict(zip(StoredEvent.__slots__, row, strict=True))) for row in rows)
            if len(rows) < portion:
                return
            after = rows[-1][0]
            left = None if left is None else left - len(rows)

    def last_id(self) -> int:
        """The newest row's number, 0 where there is none."""
        (number,) = self._read("SELECT coalesce(max(id), 0) FROM letters", [])[0]
        return int(number)

    def body(self, row: int) -> bytes | None:
        """The body of one stored event, None where there is no such row."""
        rows = self._read("SELECT body FROM letters WHERE id = ?", [row])
        return bytes(rows[0][0]) if rows else None

    def backlogs(self) -> list[Backlog]:
        """What is stored, by sink and state."""
        rows = self._read(
            "SELECT sink, state, count(*), min(stored_at) FROM letters GROUP BY state, sink ORDER BY state DESC, sink",
            [],
        )
        return [Backlog(sink=sink, state=state, events=number, oldest_at=at) for sink, state, number, at in rows]

    def marks(self) -> dict[str, float]:
        """When things last happened, in seconds since 1970: "started", "pull", "confirm"."""
        return dict(self._read("SELECT name, at FROM marks", []))

    # --- writing ------------------------------------------------------------------------------------------------------

    def replay(self, wanted: Filter, *, router: Router, sinks: Sequence[str]) -> Iterator[tuple[int, int]]:
        """Mark dead letters as pending and due now: the daemon delivers them. Resumable: what is marked is marked.

        What no route took is routed anew, by today's routes.

        Args:
            wanted: Which; `state` is "dead".
            router: By today's configuration.
            sinks: That today's configuration has.

        Yields:
            How many of the portion just done were marked, and how many cannot be: malformed ones, those that still no
            route takes, those of sinks that are no more.
        """
        where, values = replace(wanted, last_id=self.last_id()).where()
        after = 0
        while True:
            rows = self._read(
                "SELECT id, key, sink, reason, source, sub_app_id, event_type, body FROM letters"  # noqa: S608
                f" WHERE {where} AND id > ? ORDER BY id LIMIT ?",
                [*values, after, CHUNK_ROWS],
            )
            if not rows:
                return
            after = rows[-1][0]
            with self._transaction():
                marked = sum(self._replay_row(row, router, sinks) for row in rows)
            yield marked, len(rows) - marked

    def _replay_row(self, row: Sequence[Any], router: Router, sinks: Sequence[str]) -> bool:
        number, key, sink, reason, source, sub_app_id, event_type, body = row
        now = self._wall()
        pending = "state = 'pending', attempts = 0, stored_at = ?, due_at = ?, run = ''"
        if sink in sinks:
            self._db.execute(f"UPDATE letters SET {pending} WHERE id = ?", (now, now, number))  # noqa: S608
            return True
        if reason != "unrouted":
            return False
        event = restore_event(body=body, key=key, event_type=event_type, source=source, sub_app_id=sub_app_id)
        targets = router.route(event).sinks
        for target in targets:
            self._db.execute(
                "INSERT OR IGNORE INTO letters (key, sink, state, reason, error, attempts, stored_at, due_at,"
                " confirmed, run, source, sub_app_id, event_type, body)"
                " VALUES (?, ?, 'pending', 'unsettled', '', 0, ?, ?, 1, '', ?, ?, ?, ?)",
                (key, target, now, now, source, sub_app_id, event_type, body),
            )
        if targets:
            self._db.execute("DELETE FROM letters WHERE id = ?", (number,))
        return bool(targets)

    def purge(self, wanted: Filter) -> Iterator[int]:
        """Delete stored events for good.

        Yields:
            How many of the portion just done were deleted.
        """
        where, values = wanted.where()
        while True:
            with self._transaction():
                deleted = self._db.execute(
                    f"DELETE FROM letters WHERE id IN (SELECT id FROM letters WHERE {where} LIMIT ?)",  # noqa: S608
                    [*values, CHUNK_ROWS],
                ).rowcount
            if not deleted:
                return
            yield deleted

    def _transaction(self) -> "_Transaction":
        return _Transaction(self._db, self._path)

    def _read(self, query: str, values: Sequence[Any]) -> list[Any]:
        try:
            with closing(self._db.execute(query, values)) as cursor:
                return cursor.fetchall()
        except sqlite3.Error as error:
            raise JournalError(f"{self._path}: the journal cannot be read: {error}") from error


class _Transaction:
    """A short write: the daemon waits for it, so it must be one."""

    def __init__(self, db: sqlite3.Connection, path: Path) -> None:
        self._db = db
        self._path = path

    def __enter__(self) -> None:
        try:
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            raise JournalError(f"{self._path}: the journal cannot be written: {error}") from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        try:
            self._db.execute("COMMIT" if kind is None else "ROLLBACK")
        except sqlite3.Error as failure:
            with suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise JournalError(f"{self._path}: the journal cannot be written: {failure}") from failure
        if isinstance(error, sqlite3.Error):
            raise JournalError(f"{self._path}: the journal cannot be written: {error}") from error
