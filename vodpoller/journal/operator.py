"""The operator's access to the journal: list stored events, replay them, move them to another sink, purge them.

All of it works while a daemon runs. Reads are done in portions; between two of them no lock and no old view of the file
is held. Writes are many short transactions. The daemon refers to a row that it is delivering by its number and by
(key, sink), and numbers are never used twice. So the result of a delivery does not change a row that was purged or
moved meanwhile; and a row that was only made due again is deleted as usual when its delivery succeeds.
"""

import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Self

from vodpoller.durable import is_locked
from vodpoller.errors import JournalError, UnusableJournalError
from vodpoller.events.event import Event, restore_event
from vodpoller.events.snapshots import event_fields
from vodpoller.journal.place import corruption_message, is_corrupt, problem_of_place
from vodpoller.journal.schema import OLDEST_READABLE, refuse_later_version, version_of
from vodpoller.journal.wal import limit_wal
from vodpoller.router import Router
from vodpoller.settlement import Reason

CHUNK_ROWS: Final = 200
CHUNK_BYTES: Final = 8 * 1024 * 1024
BUSY_SECS: Final = 10.0

_OF_DEAD: Final = (Reason.REJECTED, Reason.GAVE_UP, Reason.MALFORMED, Reason.NO_ROUTE)
_OF_PENDING: Final = (
    Reason.SINK_FAILED,
    Reason.SINK_DOWN,
    Reason.SINK_PAUSED,
    Reason.QUEUE_FULL,
    Reason.OUT_OF_TIME,
    Reason.STOPPING,
    Reason.JOURNAL_FAILED,
    Reason.SINK_REMOVED,
    *(Reason.REJECTED, Reason.GAVE_UP, Reason.NO_ROUTE),  # replayed dead letters keep these reasons
)
REASONS: Final[Mapping[str, Sequence[str]]] = {
    "dead": tuple(reason.value for reason in _OF_DEAD),
    "pending": tuple(reason.value for reason in _OF_PENDING),
}

_COLUMNS: Final = (
    "id, key, sink, state, reason, error, attempts, stored_at, due_at, source, sub_app_id, event_type, confirmed, body"
)


def time_since(text: str, now: float) -> float:
    """Convert a time that a person wrote to seconds since 1970.

    Args:
        text: A time (2026-11-23, 2026-11-23T08:00) or an age (90m, 12h, 3d).
        now: In seconds since 1970.

    Raises:
        ValueError: It is neither; the message says so.
    """
    units = {"m": 60, "h": 3600, "d": 86_400}
    try:
        if text[:-1].isdecimal() and text[-1] in units:
            return now - int(text[:-1]) * units[text[-1]]
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{text!r} is neither a time (2026-11-23T08:00) nor an age (90m, 12h, 3d)") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Selects stored events; an argument that is None does not restrict the selection.

    Args:
        state: "dead" or "pending".
        ids: Row numbers; empty for all.
        sink: The sink's name; empty for events for which no route named a sink.
        event_type: A glob.
        reason: Why it is stored: one of `REASONS`.
        since: Stored at or after this time, in seconds since 1970.
        last_id: The last row number; later rows are excluded.
        file_id: Tencent's id of the video, as in the log line of the event; empty for events without such an id.
        task_id: Tencent's id of the task, as in the log line of the event; empty for events without such an id.
    """

    state: str = "dead"
    ids: Sequence[int] = ()
    sink: str | None = None
    event_type: str | None = None
    reason: str | None = None
    since: float | None = None
    last_id: int | None = None
    file_id: str | None = None
    task_id: str | None = None

    def where(self) -> tuple[str, list[Any]]:
        """The SQL condition and its parameters: the whole filter except the ids, which are only in the body.

        The `+` keeps SQLite from using the index of due rows: with it, SQLite would sort all rows for each portion.
        """
        conditions, values = ["state = ?"], [self.state, *self.ids]
        if self.ids:
            conditions.append(f"id IN ({','.join('?' * len(self.ids))})")
        for value, condition in (
            (self.sink, "+sink = ?"),
            (self.event_type, "event_type GLOB ?"),
            (self.reason, "reason = ?"),
            (self.since, "stored_at >= ?"),
            (self.last_id, "id <= ?"),
        ):
            if value is not None:
                conditions.append(condition)
                values.append(value)
        return " AND ".join(conditions), values

    @property
    def reads_bodies(self) -> bool:
        """Whether the bodies of rows must be read to know which are selected."""
        return self.file_id is not None or self.task_id is not None

    def takes(self, file_id: str, task_id: str) -> bool:
        """Whether the filter selects a row with these ids in its body."""
        return self.file_id in (None, file_id) and self.task_id in (None, task_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEvent:
    """One stored (event, sink).

    Args:
        id: The row's number, which commands take.
        state: "dead" or "pending".
        key: The event's key, as in the log.
        sink: The sink that lacks it; empty if no route named one.
        reason: Why it is stored.
        error: The error of the last attempt.
        attempts: Number of attempts that failed.
        stored_at: When it was stored, in seconds since 1970.
        due_at: When a pending one is tried next, in seconds since 1970; None for a dead letter.
        source: The name of the source that it came from.
        event_type: Tencent's event type.
        file_id: Tencent's id of the video, empty if the event has none.
        task_id: Tencent's id of the task, empty if the event has none.
        size_bytes: Size of its body.
    """

    id: int
    state: str
    key: str
    sink: str
    reason: str
    error: str
    attempts: int
    stored_at: float
    due_at: float | None
    source: str
    event_type: str
    file_id: str
    task_id: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of the table."""

    id: int
    key: bytes
    sink: str
    state: str
    reason: str
    error: str
    attempts: int
    stored_at: float
    due_at: float
    source: str
    sub_app_id: int | None
    event_type: str
    confirmed: int
    body: bytes

    def event(self) -> Event:
        return restore_event(
            body=self.body,
            key=self.key,
            event_type=self.event_type,
            source=self.source,
            sub_app_id=self.sub_app_id,
        )

    def stored_event(self) -> StoredEvent:
        fields = event_fields(self.event())
        return StoredEvent(
            id=self.id,
            state=self.state,
            key=self.key.hex(),
            sink=self.sink,
            reason=self.reason,
            error=self.error,
            attempts=self.attempts,
            stored_at=self.stored_at,
            due_at=self.due_at if self.state == "pending" else None,
            source=self.source,
            event_type=self.event_type,
            file_id=fields["file_id"],
            task_id=fields["task_id"],
            size_bytes=len(self.body),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """The number of stored events of one sink in one state, and when the oldest was stored, in seconds since 1970."""

    sink: str
    state: str
    events: int
    oldest_at: float


class Letters:
    """The stored events of a journal, for the operator. A context manager.

    Args:
        path: The journal.
        writable: Whether `replay` and `purge` are needed.
        makes_files: Whether SQLite may make its `-wal` and `-shm` beside a journal that no process has open. Without
            these files, reading can fail if a daemon starts meanwhile: for short reads only.
        wall: The clock for the times of rows, in seconds since 1970.

    Raises:
        UnusableJournalError: It is corrupt, of a later version, or not a journal.
        JournalError: The journal is missing, or cannot be read now.
    """

    def __init__(
        self,
        path: Path,
        *,
        writable: bool = False,
        makes_files: bool = True,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._wall = wall
        rights = "commands need the rights of the user that runs vodpoller, or root's"
        try:
            is_there = path.is_file()
        except OSError as error:
            raise JournalError(f"{path}: the journal cannot be read: {error.strerror} ({rights})") from error
        if problem := problem_of_place(path):
            raise UnusableJournalError(problem)
        if not is_there:
            raise JournalError(
                f"{path}: the journal does not exist yet: vodpoller makes it when it first runs"
                " (or journal.path is another)"
            )
        options = "mode=rw" if writable else "mode=ro"
        try:
            if not makes_files and not path.with_name(f"{path.name}-wal").exists():
                options += "&immutable=1"
            self._db = sqlite3.connect(f"{path.resolve().as_uri()}?{options}", uri=True, timeout=BUSY_SECS)
        except sqlite3.Error as error:
            raise JournalError(f"{path}: the journal cannot be read: {error} ({rights})") from error
        try:
            self._db.isolation_level = None
            limit_wal(self._db)
            version = version_of(self._db, path)
            refuse_later_version(path, version)
        except sqlite3.Error as error:
            self.close()
            if is_corrupt(error):
                raise UnusableJournalError(corruption_message(path, error)) from error
            raise JournalError(f"{path}: the journal cannot be read: {error} ({rights})") from error
        except JournalError:
            self.close()
            raise
        if version < OLDEST_READABLE:
            self.close()
            raise JournalError(f"{path}: the journal is empty: vodpoller makes its tables when it first runs")

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
            return is_locked(Path(f"{self._path}.lock"))
        return False

    def count(self, wanted: Filter) -> int:
        """The number of rows that a filter selects."""
        if wanted.reads_bodies:
            return sum(1 for _ in self.stored(wanted))
        where, values = wanted.where()
        (number,) = self._read(f"SELECT count(*) FROM letters WHERE {where}", values)[0]
        return int(number)

    def stored(self, wanted: Filter, *, limit: int | None = None) -> Iterator[StoredEvent]:
        """The rows that a filter selects, oldest first, read in portions.

        Args:
            wanted: The filter.
            limit: Maximum number of rows.
        """
        for event, _ in self.with_bodies(wanted, limit=limit):
            yield event

    def with_bodies(self, wanted: Filter, *, limit: int | None = None) -> Iterator[tuple[StoredEvent, bytes]]:
        """The same rows as `stored`, with their bodies."""
        left = limit
        for rows in self._portions(wanted, limit):
            for row in rows:
                event = row.stored_event()
                if not wanted.takes(event.file_id, event.task_id):
                    continue
                yield event, row.body
                left = None if left is None else left - 1
                if left == 0:
                    return

    def _portions(self, wanted: Filter, limit: int | None = None) -> Iterator[list[_Row]]:
        """Rows that the filter may select, in portions: between two of them no lock is held that blocks the daemon."""
        where, values = wanted.where()
        portion_rows = CHUNK_ROWS if limit is None or wanted.reads_bodies else min(limit, CHUNK_ROWS)
        after = 0
        while rows := self._read(
            f"SELECT {_COLUMNS} FROM letters WHERE {where} AND id > ? ORDER BY id LIMIT ?",
            [*values, after, portion_rows],
        ):
            after = rows[-1][0]
            yield [_Row(*row) for row in rows]

    def last_id(self) -> int:
        """The number of the newest row, 0 if there is none."""
        (number,) = self._read("SELECT coalesce(max(id), 0) FROM letters", [])[0]
        return int(number)

    def body(self, row: int) -> bytes | None:
        """The body of one stored event; None if the row does not exist."""
        rows = self._read("SELECT body FROM letters WHERE id = ?", [row])
        return bytes(rows[0][0]) if rows else None

    def backlogs(self) -> list[Backlog]:
        """The numbers of stored events, by sink and state."""
        rows = self._read(
            "SELECT sink, state, count(*), min(stored_at) FROM letters GROUP BY state, sink ORDER BY state DESC, sink",
            [],
        )
        return [Backlog(sink=sink, state=state, events=number, oldest_at=at) for sink, state, number, at in rows]

    def noted_times(self) -> dict[str, float]:
        """When something last happened, in seconds since 1970: "started", "written", "pull", "confirm"."""
        return dict(self._read("SELECT name, at FROM marks", []))

    # --- writing ------------------------------------------------------------------------------------------------------

    def replay(
        self, wanted: Filter, *, router: Router, sinks: Sequence[str], to: str | None = None
    ) -> Iterator[tuple[int, int]]:
        """Make stored events pending and due now: the daemon delivers them. If it is interrupted, it can be repeated.

        Events that no route took are routed again, by the present routes.

        Args:
            wanted: The filter.
            router: The router of the present configuration.
            sinks: The names of the sinks in the present configuration.
            to: The sink that is to get them instead of their own; one of `sinks`.

        Yields:
            For each portion, the number of events that are due now and the number that cannot be: malformed ones, and
            without `to` those that still no route takes and those of removed sinks.
        """
        for rows in self._portions(replace(wanted, last_id=self.last_id())):
            selected = [row for row in rows if not wanted.reads_bodies or _is_selected(row, wanted)]
            if not selected:
                continue
            with self._transaction():
                done = [self._replay_row(row, self._targets(row, router, sinks, to)) for row in selected]
            yield done.count(True), done.count(False)

    def _targets(self, row: _Row, router: Router, sinks: Sequence[str], to: str | None) -> Sequence[str]:
        if row.reason == "malformed":
            return ()
        if to is not None:
            return (to,)
        if row.sink in sinks:
            return (row.sink,)
        return () if row.sink else router.route(row.event()).sinks

    def _replay_row(self, row: _Row, targets: Sequence[str]) -> bool | None:
        """Replay one row. Returns whether that is possible; None if the row has changed since it was read."""
        if not targets:
            return False
        now = self._wall()
        if row.sink in targets:
            changed = self._db.execute(
                "UPDATE letters SET state = 'pending', attempts = 0, stored_at = ?, due_at = ?, run = ''"
                " WHERE id = ? AND state = ?",
                (now, now, row.id, row.state),
            ).rowcount
            return True if changed else None
        # A new row with a new number for each target: the daemon may be delivering the old one, and will then write to
        # that number or (key, sink), which must not be the new row's. If it has finished, no row is left to move.
        if not self._db.execute("DELETE FROM letters WHERE id = ? AND state = ?", (row.id, row.state)).rowcount:
            return None
        self._db.executemany(
            "INSERT INTO letters (key, sink, state, reason, error, attempts, stored_at, due_at, confirmed, run, source,"
            " sub_app_id, event_type, body) VALUES (?, ?, 'pending', ?, ?, 0, ?, ?, ?, '', ?, ?, ?, ?)"
            " ON CONFLICT (key, sink) DO UPDATE SET state = 'pending', attempts = 0, stored_at = excluded.stored_at,"
            " due_at = excluded.due_at, run = ''",
            [
                (
                    row.key,
                    target,
                    row.reason,
                    row.error,
                    now,
                    now,
                    row.confirmed if row.sink else 1,
                    row.source,
                    row.sub_app_id,
                    row.event_type,
                    row.body,
                )
                for target in targets
            ],
        )
        return True

    def purge(self, wanted: Filter) -> Iterator[int]:
        """Delete stored events; they cannot be restored.

        Yields:
            For each portion, the number of deleted events.
        """
        bounded = wanted if wanted.last_id is not None else replace(wanted, last_id=self.last_id())
        for ids in self._ids(bounded):
            where, values = replace(wanted, ids=ids).where()  # the whole filter again: rows may have changed meanwhile
            with self._transaction():
                deleted = self._db.execute(f"DELETE FROM letters WHERE {where}", values).rowcount
            if deleted:
                yield deleted

    def _ids(self, wanted: Filter) -> Iterator[list[int]]:
        """The numbers of the rows that a filter selects, in portions."""
        if wanted.reads_bodies:
            for rows in self._portions(wanted):
                if ids := [row.id for row in rows if _is_selected(row, wanted)]:
                    yield ids
            return
        where, values = wanted.where()
        after = 0
        while found := self._read(
            f"SELECT id FROM letters WHERE {where} AND id > ? ORDER BY id LIMIT ?",
            [*values, after, CHUNK_ROWS],
        ):
            after = found[-1][0]
            yield [number for (number,) in found]

    def _transaction(self) -> "_Transaction":
        return _Transaction(self._db, self._path)

    def _read(self, query: str, values: Sequence[Any]) -> list[Any]:
        """All rows, or only the first ones up to `CHUNK_BYTES` of bodies, since each body may have megabytes."""
        rows: list[Any] = []
        size_bytes = 0
        try:
            with closing(self._db.execute(query, values)) as cursor:
                for row in cursor:
                    rows.append(row)
                    size_bytes += len(row[-1]) if isinstance(row[-1], bytes) else 0
                    if size_bytes >= CHUNK_BYTES:
                        break
        except sqlite3.Error as error:
            raise _failure(self._path, "read", error) from error
        return rows


def _is_selected(row: _Row, wanted: Filter) -> bool:
    fields = event_fields(row.event())
    return wanted.takes(fields["file_id"], fields["task_id"])


def as_json_value(body: bytes) -> str | None:
    """A body in a form that can be a value in a line of JSON, with all digits and in its order.

    Args:
        body: The body as it was stored.

    Returns:
        The text, with line ends between its tokens replaced by blanks, and characters beyond ASCII by JSON's escapes;
        None if the body is not JSON that every parser accepts.
    """
    try:
        text = body.decode()
        json.loads(text, parse_constant=_not_json)
    except (ValueError, RecursionError):  # also for deep nesting, and for an integer of thousands of digits
        return None
    text = text.translate({10: " ", 13: " ", 127: r"\u007f"})
    return text if text.isascii() else "".join(c if c.isascii() else json.dumps(c)[1:-1] for c in text)


def _not_json(literal: str) -> Any:
    raise ValueError(literal)


def _failure(path: Path, what: str, error: sqlite3.Error) -> JournalError:
    if is_corrupt(error):
        return UnusableJournalError(corruption_message(path, error))
    return JournalError(f"{path}: the journal cannot be {what}: {error}")


class _Transaction:
    """A transaction that writes; it must be short, since the daemon waits for it."""

    def __init__(self, db: sqlite3.Connection, path: Path) -> None:
        self._db = db
        self._path = path

    def __enter__(self) -> None:
        try:
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            raise _failure(self._path, "written", error) from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        try:
            self._db.execute("COMMIT" if kind is None else "ROLLBACK")
        except sqlite3.Error as failure:
            with suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise _failure(self._path, "written", failure) from failure
        if isinstance(error, sqlite3.Error):
            raise _failure(self._path, "written", error) from error
