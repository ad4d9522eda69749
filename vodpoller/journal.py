"""The journal: what sinks accepted (the ledger), what waits for another attempt, what waits for a person.

One SQLite file in WAL mode. Rows that stand in for an event at VOD are on disk before the caller goes on; ledger rows
may lag, since losing one costs a duplicate at most.
"""

import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Final

from vodpoller.delivery import Delivery, Portion, Position
from vodpoller.durable import Folders
from vodpoller.errors import JournalError, StorageError
from vodpoller.events import Event, restore_event
from vodpoller.logs import Logger, Repeats

SCHEMA_VERSION: Final = 1
CONFIRMED_KEPT_SECS: Final = 600.0
DUE_HORIZON_SECS: Final = 900.0
ROW_OVERHEAD_BYTES: Final = 512
QUICK_CHECK_BYTES: Final = 64 * 1024 * 1024  # about a tenth of a second
SLICES: Final = 256
DEFERRED_MAX: Final = 1000
LOCK_WAIT_SECS: Final = 0.1  # `vodpoller status` asks for the lock, and has it for an instant
_KEYS_A_QUERY: Final = 500
_ROWS_A_STATEMENT: Final = 16
_INODES: Final = 2**64

_SCHEMA: Final = f"""
CREATE TABLE ledger (
    key BLOB NOT NULL, sink TEXT NOT NULL, accepted_at REAL NOT NULL, confirmed_at REAL, PRIMARY KEY (key, sink)
) WITHOUT ROWID;
CREATE TABLE letters (
    id INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB NOT NULL, sink TEXT NOT NULL, state TEXT NOT NULL,
    reason TEXT NOT NULL, error TEXT NOT NULL, attempts INTEGER NOT NULL, stored_at REAL NOT NULL, due_at REAL NOT NULL,
    confirmed INTEGER NOT NULL DEFAULT 0, run TEXT NOT NULL, source TEXT NOT NULL, sub_app_id INTEGER,
    event_type TEXT NOT NULL, body BLOB NOT NULL, UNIQUE (key, sink)
);
CREATE INDEX letters_due ON letters (state, sink, due_at);
CREATE TABLE totals (letters_bytes INTEGER NOT NULL);
INSERT INTO totals VALUES (0);
CREATE TRIGGER letters_in AFTER INSERT ON letters BEGIN
    UPDATE totals SET letters_bytes = letters_bytes + length(NEW.body) + {ROW_OVERHEAD_BYTES};
END;
CREATE TRIGGER letters_out AFTER DELETE ON letters BEGIN
    UPDATE totals SET letters_bytes = letters_bytes - length(OLD.body) - {ROW_OVERHEAD_BYTES};
END;
CREATE TABLE positions (sink TEXT PRIMARY KEY, inode INTEGER NOT NULL, offset_bytes INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE marks (name TEXT PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID;
PRAGMA user_version = {SCHEMA_VERSION};
"""  # noqa: S608 - the numbers are ours


_Work = Callable[[sqlite3.Connection], object]


class Known(Enum):
    """What the journal knows of an event at a sink."""

    ACCEPTED = auto()
    PENDING = auto()
    DEAD = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """A row to be stored: an event that a sink has not got.

    Args:
        event: The event.
        sink: The sink that lacks it; empty where no route names one.
        dead: It waits for a person, not for another attempt.
        reason: One word for filters: "errored", "unsettled", "rejected", "malformed", "unrouted", "gave_up".
        error: What the last attempt said.
        attempts: How many there were.
        due_in_secs: When a pending one is tried again.
    """

    event: Event
    sink: str
    dead: bool
    reason: str
    error: str = ""
    attempts: int = 0
    due_in_secs: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """A stored event that is due at a sink."""

    row: int
    event: Event
    sink: str
    attempts: int
    stored_at: float


class _Write:
    """Work for the next transaction."""

    __slots__ = ("deferred", "done", "durable", "error", "work")

    def __init__(self, work: _Work, *, durable: bool, deferred: bool = False) -> None:
        self.work = work
        self.durable = durable
        self.deferred = deferred
        self.done = False
        self.error: Exception | None = None


class Journal:
    """The open journal. One process at a time: a lock file beside it keeps a second daemon out.

    Args:
        path: The file; its folder is made where it is missing.
        max_bytes: How much the stored events may take; beyond that nothing is stored.
        ledger_days: How long rows of events that never were confirmed are kept.
        log: Where to.
        wall: The clock that stamps rows, in seconds since 1970.

    Raises:
        JournalError: Another process has it, it is corrupt, it is of a later version, or it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int,
        ledger_days: float,
        log: Logger,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._ledger_secs = ledger_days * 86_400
        self._log = log
        self._repeats = Repeats(log)
        self._wall = wall
        self._started_at = wall()
        self._run = f"{os.getpid()}-{self._started_at:.6f}"
        self._queue: list[_Write] = []
        self._queue_lock = threading.Lock()
        self._write_lock = threading.Lock()
        self._read_lock = threading.Lock()
        self._unwritten: dict[tuple[bytes, str], tuple[float, float | None]] = {}
        self._unwritten_positions: dict[str, Position] = {}
        self._failing = False
        self._next_slice = 0
        try:
            Folders(lambda text: log.warning("config.warning", message=f"journal.path: {text}")).make(path.parent)
        except OSError as error:
            raise JournalError(
                f"{path.parent}: the journal's folder cannot be made: {error.strerror}. Create it, or set journal.path"
            ) from error
        self._lock_fd = _lock(path)
        try:
            self._writer = _connect(path)
            self._prepare()
            self._reader = _connect(path)
        except sqlite3.Error as error:
            os.close(self._lock_fd)
            raise JournalError(_cannot_open(path, error)) from error
        except JournalError:
            os.close(self._lock_fd)
            raise
        self._identity = _identity_of(path)
        self._replaced = False

    def _prepare(self) -> None:
        self._writer.execute("PRAGMA journal_mode = WAL")
        (version,) = self._writer.execute("PRAGMA user_version").fetchone()
        if version == 0:
            self._writer.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}COMMIT;")
        elif version != SCHEMA_VERSION:
            raise JournalError(
                f"{self._path}: the journal is of version {version}, this vodpoller writes version {SCHEMA_VERSION}: "
                "install the vodpoller that wrote it"
            )
        if self._path.stat().st_size <= QUICK_CHECK_BYTES:
            ((verdict,), *_) = self._writer.execute("PRAGMA quick_check(1)").fetchall()
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
        for table in ("ledger", "letters", "totals", "positions", "marks"):
            self._writer.execute(f"SELECT * FROM {table} LIMIT 1").fetchall()  # noqa: S608 - the names are ours
        # A write shows now, not at the first event, that the file is read-only or the disk is full.
        self._writer.execute("INSERT OR REPLACE INTO marks VALUES ('started', ?)", (self._wall(),))

    def close(self) -> None:
        """Write what waits, and let the next process have the file."""
        self.flush()
        with self._write_lock, self._read_lock:
            self._writer.close()
            self._reader.close()
        os.close(self._lock_fd)

    # --- group commit: whoever comes first writes for all who wait ---------------------------------------------------

    def _write(self, work: _Work, *, durable: bool) -> None:
        """Have the work done in a transaction, together with that of other threads.

        Raises:
            sqlite3.Error: It was not, and nothing of it is in the file.
        """
        mine = _Write(work, durable=durable)
        with self._queue_lock:
            self._queue.append(mine)
        with self._write_lock:
            if not mine.done:
                self._commit_queue()
        if mine.error is not None:
            raise mine.error

    def _defer(self, work: _Work) -> None:
        """Have the work done with the next transaction that succeeds: for what only saves work later."""
        with self._queue_lock:
            self._queue.append(_Write(work, durable=False, deferred=True))

    def _commit_queue(self) -> None:
        with self._queue_lock:
            batch, self._queue = self._queue, []
        if not self._commit(batch) and len(batch) > 1:
            for write in batch:  # one that cannot be written must not take the others with it
                self._commit([write])
        again = [write for write in batch if write.deferred and isinstance(write.error, sqlite3.OperationalError)]
        if again:
            with self._queue_lock:
                self._queue = [*again[:DEFERRED_MAX], *self._queue]

    def _commit(self, batch: Sequence[_Write]) -> bool:
        """False where one of several may be at fault; a file that is locked by others fails all, once."""
        has_begun = False
        try:
            durable = any(write.durable for write in batch)
            self._writer.execute("PRAGMA synchronous = FULL" if durable else "PRAGMA synchronous = NORMAL")
            self._writer.execute("BEGIN IMMEDIATE")
            has_begun = True
            for write in batch:
                write.work(self._writer)
            self._writer.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - whatever it is, nobody may believe that his row was written
            with suppress(sqlite3.Error):
                self._writer.execute("ROLLBACK")
            for write in batch:
                write.error, write.done = error, True
            return not has_begun
        for write in batch:
            write.error, write.done = None, True
        return True

    # --- the ledger --------------------------------------------------------------------------------------------------

    def known(self, pairs: Iterable[tuple[bytes, str]]) -> dict[tuple[bytes, str], Known]:
        """What is known of (key, sink) pairs. Identical content after a confirm of ten minutes ago is a new event.

        Raises:
            StorageError: The journal cannot be read, so nobody can tell.
        """
        wanted = set(pairs)
        keys = list({key for key, _ in wanted})
        found: dict[tuple[bytes, str], Known] = {}
        # Memory before the file: a pair that leaves memory in between is in the file by then.
        unwritten = [pair for pair in wanted if pair in self._unwritten] if self._unwritten else []
        try:
            for first in range(0, len(keys), _KEYS_A_QUERY):
                found |= self._known(keys[first : first + _KEYS_A_QUERY])
        except sqlite3.Error as error:
            self._failed(error)
            raise StorageError(f"the journal cannot be read: {error}") from error
        return found | dict.fromkeys(unwritten, Known.ACCEPTED)

    def _known(self, keys: Sequence[bytes]) -> dict[tuple[bytes, str], Known]:
        marks = ",".join("?" * len(keys))
        found = {}
        with self._read_lock:
            if _letters_bytes(self._reader):
                letters = self._reader.execute(
                    f"SELECT key, sink, state FROM letters WHERE key IN ({marks})",  # noqa: S608 - question marks
                    keys,
                )
                for key, sink, state in letters:
                    found[key, sink] = Known.PENDING if state == "pending" else Known.DEAD
            accepted = self._reader.execute(
                f"SELECT key, sink FROM ledger WHERE key IN ({marks})"  # noqa: S608 - question marks
                " AND (confirmed_at IS NULL OR confirmed_at >= ?)",
                (*keys, self._wall() - CONFIRMED_KEPT_SECS),
            )
            for key, sink in accepted:
                found[key, sink] = Known.ACCEPTED
        return found

    def accept(self, sink: str, accepted: Sequence[Delivery], position: Position | None) -> None:
        """Remember that a sink has events, and how far its file goes. What cannot be written stays in memory."""
        now = self._wall()
        keys = [delivery.event.key for delivery in accepted]
        # The mark must stay below what is in memory only: it moves when that is written.
        waits = bool(self._unwritten)
        mark = None if waits else position

        def work(db: sqlite3.Connection) -> None:
            # Asked in the transaction: a row that is stored before it is deleted by it, one after it sees the ledger.
            stored = [delivery.event.key for delivery in accepted if delivery.stored]
            _insert_accepted(db, sink, [(key, sink, now) for key in keys], stored, mark)

        try:
            self._write(work, durable=False)
        except Exception as error:  # noqa: BLE001 - the sink has the events, whatever became of the rows
            with self._queue_lock:
                self._unwritten |= dict.fromkeys([(key, sink) for key in keys], (now, None))
                if position is not None:
                    self._unwritten_positions[sink] = position
            self._failed(error)
            return
        if position is not None and (waits or self._unwritten_positions):
            with self._queue_lock:
                if waits:
                    self._unwritten_positions[sink] = position
                else:
                    self._unwritten_positions.pop(sink, None)  # overtaken

    def recover(self, sink: str, portion: Portion) -> None:
        """Enter a part of what a sink's file holds beyond its mark, at start. When this returns, it is on disk.

        Args:
            sink: The sink's name.
            portion: Its keys and, for the mark, where it ends.

        Raises:
            StorageError: The journal cannot be written.
        """
        now = self._wall()

        def work(db: sqlite3.Connection) -> None:
            # One that was confirmed ten minutes ago or more was of an earlier event with the same content.
            db.executemany(
                "INSERT INTO ledger VALUES (?, ?, ?, NULL) ON CONFLICT DO UPDATE"
                " SET accepted_at = excluded.accepted_at, confirmed_at = NULL WHERE confirmed_at < ?",
                [(key, sink, now, now - CONFIRMED_KEPT_SECS) for key in portion.keys],
            )
            if _letters_bytes(db):
                db.executemany("DELETE FROM letters WHERE key = ? AND sink = ?", [(key, sink) for key in portion.keys])
            _set_position(db, sink, portion.position)

        try:
            self._write(work, durable=True)
        except sqlite3.Error as error:
            raise StorageError(f"the journal cannot be written: {error}") from error

    def position(self, sink: str) -> Position | None:
        """The mark of a sink's file: all below it is in the ledger."""
        with self._read_lock:
            row = self._reader.execute("SELECT inode, offset_bytes FROM positions WHERE sink = ?", (sink,)).fetchone()
        return Position(inode=row[0] % _INODES, offset_bytes=row[1]) if row else None

    def confirmed(self, keys: Sequence[bytes]) -> None:
        """VOD answered OK to the confirm of these events: their rows are no longer needed for long."""
        now = self._wall()
        marks = ",".join("?" * len(keys))

        if self._unwritten:
            with self._queue_lock:
                done = set(keys)
                self._unwritten |= {pair: (at, now) for pair, (at, _) in self._unwritten.items() if pair[0] in done}

        def work(db: sqlite3.Connection) -> None:
            db.execute(f"UPDATE ledger SET confirmed_at = ? WHERE key IN ({marks})", (now, *keys))  # noqa: S608
            if _letters_bytes(db):
                db.executemany("UPDATE letters SET confirmed = 1 WHERE key = ?", [(key,) for key in keys])

        self._defer(work)

    # --- pending and dead --------------------------------------------------------------------------------------------

    def store(self, letters: Sequence[Letter]) -> None:
        """Take events over from VOD: when this returns, they are on disk.

        A pair that is stored already stays as it is; one that the ledger turns out to have by now is left out.

        Raises:
            StorageError: They are not; VOD must keep them.
        """
        if not letters:
            return
        self._check_in_place()
        size_bytes = sum(len(letter.event.body) + ROW_OVERHEAD_BYTES for letter in letters)
        self._check_room(self._taken_bytes(), size_bytes)
        now = self._wall()
        rows = [
            (
                letter.event.key,
                letter.sink,
                "dead" if letter.dead else "pending",
                letter.reason,
                _text(letter.error),
                letter.attempts,
                now,
                now + min(letter.due_in_secs, DUE_HORIZON_SECS),
                self._run,
                letter.event.source,
                letter.event.sub_app_id,
                _text(letter.event.type),
                letter.event.body,
                now - CONFIRMED_KEPT_SECS,
            )
            for letter in letters
        ]

        def work(db: sqlite3.Connection) -> None:
            # Once more where no other lane can come in between, else all of them together take many times the room.
            self._check_room(_letters_bytes(db), size_bytes)
            db.executemany(
                "INSERT OR IGNORE INTO letters (key, sink, state, reason, error, attempts, stored_at, due_at,"
                " run, source, sub_app_id, event_type, body)"
                " SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13 WHERE NOT EXISTS (SELECT 1"
                " FROM ledger WHERE key = ?1 AND sink = ?2 AND (confirmed_at IS NULL OR confirmed_at >= ?14))",
                rows,
            )

        try:
            self._write(work, durable=True)
        except StorageError:  # no room: that has been said
            raise
        except Exception as error:
            self._failed(error)
            raise StorageError(f"the journal cannot be written: {error}") from error

    def _check_room(self, taken_bytes: int, size_bytes: int) -> None:
        if taken_bytes + size_bytes > self._max_bytes:
            error = StorageError(
                f"the journal is full: stored events take {taken_bytes} bytes of journal.max_bytes = "
                f"{self._max_bytes}. Bring the sinks back, purge dead letters, or raise journal.max_bytes"
            )
            self._repeats.say("error", "journal.failed", cause="full", **error.fields())
            raise error

    def _taken_bytes(self) -> int:
        try:
            with self._read_lock:
                return _letters_bytes(self._reader)
        except sqlite3.Error as error:
            self._failed(error)
            raise StorageError(f"the journal cannot be read: {error}") from error

    def due(self, sink: str, limit: int) -> list[Pending]:
        """Stored events whose time has come, the oldest due time first.

        A due time beyond any back-off was set by a clock that was wrong: it has come as well.
        """
        now = self._wall()
        with self._read_lock:
            rows = self._reader.execute(
                "SELECT id, key, sink, attempts, stored_at, source, sub_app_id, event_type, body FROM letters"
                " WHERE state = 'pending' AND sink = ?1 AND (due_at <= ?2 OR due_at > ?2 + ?3)"
                " ORDER BY due_at LIMIT ?4",
                (sink, now, DUE_HORIZON_SECS + 60, limit),
            ).fetchall()
        return [
            Pending(
                row=row,
                event=restore_event(body=body, key=key, event_type=event_type, source=source, sub_app_id=sub_app_id),
                sink=to,
                attempts=attempts,
                stored_at=stored_at,
            )
            for row, key, to, attempts, stored_at, source, sub_app_id, event_type, body in rows
        ]

    def forget(self, rows: Sequence[int]) -> None:
        """Delete stored events that their sinks turn out to have."""
        self._defer(lambda db: db.executemany("DELETE FROM letters WHERE id = ?", [(row,) for row in rows]))

    def reschedule(self, row: int, *, attempts: int, due_in_secs: float, error: str | None) -> None:
        """When a stored event is tried again. Where that cannot be written it is sooner.

        Args:
            row: As `due` gave it.
            attempts: How many failed so far.
            due_in_secs: From now, at most a quarter of an hour.
            error: What the last attempt said; None where there was none.
        """
        due_at = self._wall() + min(due_in_secs, DUE_HORIZON_SECS)
        values = (attempts, due_at, None if error is None else _text(error), row)
        self._defer(
            lambda db: db.execute(
                "UPDATE letters SET attempts = ?, due_at = ?, error = coalesce(?, error) WHERE id = ?", values
            )
        )

    def bury(self, row: int, *, attempts: int, reason: str, error: str) -> None:
        """A stored event becomes a dead letter. Where that cannot be written it stays pending."""
        values = (attempts, reason, _text(error), row)
        with suppress(sqlite3.Error):
            self._write(
                lambda db: db.execute(
                    "UPDATE letters SET state = 'dead', attempts = ?, reason = ?, error = ? WHERE id = ?", values
                ),
                durable=True,
            )

    def counts(self) -> dict[tuple[str, str], int]:
        """How many rows there are by (sink, state)."""
        with self._read_lock:
            rows = self._reader.execute("SELECT sink, state, count(*) FROM letters GROUP BY sink, state").fetchall()
        return {(sink, state): number for sink, state, number in rows}

    # --- upkeep ------------------------------------------------------------------------------------------------------

    @property
    def is_writable(self) -> bool:
        """Whether the file is in its place and has every accepted pair: if not, no new pull should start."""
        return not (self._unwritten or self._replaced)

    def _check_in_place(self) -> None:
        """What is written to a file that was deleted or replaced is lost at the next start.

        Raises:
            StorageError: That happened.
        """
        self._replaced = _identity_of(self._path) != self._identity
        if self._replaced:
            error = StorageError(
                f"{self._path}: the journal was deleted or replaced while it was open: put it back if you can, and"
                " restart vodpoller; until then events stay with VOD"
            )
            self._repeats.say("error", "journal.failed", cause="replaced", **error.fields())
            raise error

    @property
    def has_letters(self) -> bool:
        """Whether anything is stored, pending or dead.

        Raises:
            StorageError: The journal cannot be read.
        """
        return self._taken_bytes() > 0

    @property
    def unwritten(self) -> int:
        """How many accepted pairs are in memory only."""
        return len(self._unwritten)

    def mark(self, name: str, at: float) -> None:
        """Remember when something last happened, for `vodpoller status`."""
        self._defer(lambda db: db.execute("INSERT OR REPLACE INTO marks VALUES (?, ?)", (name, at)))

    def flush(self) -> None:
        """Write what waits in memory. Called every second; a failure is said once and tried again."""
        with suppress(StorageError):
            self._check_in_place()
        if not (self._unwritten or self._unwritten_positions or self._queue or self._failing):
            return
        with self._queue_lock:
            rows = [(key, sink, *times) for (key, sink), times in self._unwritten.items()]
            positions = dict(self._unwritten_positions)

        def work(db: sqlite3.Connection) -> None:
            db.executemany("INSERT OR REPLACE INTO ledger VALUES (?, ?, ?, ?)", rows)
            db.executemany("DELETE FROM letters WHERE key = ? AND sink = ?", [row[:2] for row in rows])
            for sink, position in positions.items():
                _set_position(db, sink, position)

        try:
            self._write(work, durable=False)
        except sqlite3.Error as error:
            self._failed(error)
            return
        with self._queue_lock:
            for key, sink, *_ in rows:
                self._unwritten.pop((key, sink), None)
            for sink, position in positions.items():
                if self._unwritten_positions.get(sink) is position:
                    del self._unwritten_positions[sink]
        self._recovered()

    def prune(self, slices: int = SLICES) -> None:
        """Delete ledger rows that have done their duty, in short transactions.

        An index by age would cost more at each event than all else in the ledger. Keys are hashes, so equal ranges of
        them hold equally many rows, and each call looks at the next ones.

        Args:
            slices: How many of the 256 ranges; all of them unless told otherwise.
        """
        now = self._wall()
        with suppress(sqlite3.Error):
            for _ in range(slices):
                first, self._next_slice = self._next_slice, (self._next_slice + 1) % SLICES
                self._write(partial(self._prune_slice, first, now), durable=False)

    def _prune_slice(self, first: int, now: float, db: sqlite3.Connection) -> None:
        last = bytes([first]) + b"\xff" * 32
        deleted = db.execute(
            # Rows from the future are of a clock that was set back.
            "DELETE FROM ledger WHERE key >= ? AND key <= ?"
            " AND (confirmed_at < ? OR confirmed_at > ? OR (confirmed_at IS NULL AND accepted_at < ?))",
            (bytes([first]), last, now - CONFIRMED_KEPT_SECS, now + 60, now - self._ledger_secs),
        ).rowcount
        if deleted:
            self._log.debug("journal.pruned", rows=deleted)

    def shift(self, secs: float) -> None:
        """The clock was set: move what this process stamped along, so that nothing ages or waits by the jump."""
        recent = self._wall() - secs - CONFIRMED_KEPT_SECS

        def work(db: sqlite3.Connection) -> None:
            db.execute(
                "UPDATE letters SET stored_at = stored_at + ?1, due_at = due_at + ?1 WHERE run = ?2", (secs, self._run)
            )
            db.execute(
                "UPDATE ledger SET accepted_at = accepted_at + ?1, confirmed_at = confirmed_at + ?1"
                " WHERE accepted_at >= ?2 AND (confirmed_at IS NULL OR confirmed_at >= ?3)",
                (secs, self._started_at, recent),
            )

        with suppress(sqlite3.Error):
            self._write(work, durable=False)
            self._started_at += secs

    def _failed(self, error: Exception) -> None:
        self._failing = True
        message = str(error)
        self._repeats.say("error", "journal.failed", cause=message, error_message=message, path=str(self._path))

    def _recovered(self) -> None:
        if self._failing:
            self._failing = False
            suppressed = self._repeats.forget("")
            self._log.info("journal.recovered", suppressed_lines=suppressed or 0)


def _insert_accepted(
    db: sqlite3.Connection,
    sink: str,
    rows: Sequence[tuple[bytes, str, float]],
    stored: Sequence[bytes],
    position: Position | None,
) -> None:
    # REPLACE: a row that a confirm of more than ten minutes ago left behind begins anew. One statement for many rows,
    # since SQLite's module lets go of the interpreter's lock for each.
    for first in range(0, len(rows), _ROWS_A_STATEMENT):
        portion = rows[first : first + _ROWS_A_STATEMENT]
        values = ",".join(["(?, ?, ?, NULL)"] * len(portion))
        db.execute(f"INSERT OR REPLACE INTO ledger VALUES {values}", [*chain.from_iterable(portion)])  # noqa: S608
    if stored:
        db.executemany(
            "UPDATE ledger SET confirmed_at = accepted_at WHERE key = ?1 AND sink = ?2"
            " AND EXISTS (SELECT 1 FROM letters WHERE key = ?1 AND sink = ?2 AND confirmed)",
            [(key, sink) for key in stored],
        )
        db.executemany("DELETE FROM letters WHERE key = ? AND sink = ?", [(key, sink) for key in stored])
    _set_position(db, sink, position)


def _letters_bytes(db: sqlite3.Connection) -> int:
    """What all stored events take; kept by triggers, so that it holds whoever writes."""
    (size,) = db.execute("SELECT letters_bytes FROM totals").fetchone()
    return int(size)


def _set_position(db: sqlite3.Connection, sink: str, position: Position | None) -> None:
    if position is not None:
        # SQLite's integers are signed; inodes of some file systems use all 64 bits.
        inode = position.inode if position.inode < _INODES // 2 else position.inode - _INODES
        db.execute("INSERT OR REPLACE INTO positions VALUES (?, ?, ?)", (sink, inode, position.offset_bytes))


def _text(text: str) -> str:
    """What a TEXT column takes: no lone surrogates, no novels."""
    return text[:2000].encode(errors="replace").decode()


def _connect(path: Path) -> sqlite3.Connection:
    # The daemon's threads share the connection under a lock of ours. A command may hold the file for a moment.
    return sqlite3.connect(path, timeout=2.0, isolation_level=None, check_same_thread=False, cached_statements=64)


def _lock(path: Path) -> int:
    lock_path = path.with_name(path.name + ".lock")
    try:
        lock_fd = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise JournalError(
            f"{lock_path}: cannot be written: {error.strerror}. The journal's folder must belong to the user that runs "
            "vodpoller; set journal.path to such a place"
        ) from error
    ends_at = time.monotonic() + LOCK_WAIT_SECS
    while True:
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if time.monotonic() < ends_at:
                time.sleep(0.01)
                continue
            os.close(lock_fd)
            raise JournalError(
                f"{path}: another process has this journal open: is vodpoller already running "
                f"(`systemctl status vodpoller`, `fuser {lock_path}`)? Stop it, or set another journal.path"
            ) from error
        return lock_fd


def _identity_of(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _cannot_open(path: Path, error: sqlite3.Error) -> str:
    corrupt = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
    if corrupt:
        return (
            f"{path}: the journal is corrupt ({error}). Keep a copy, try `sqlite3 {path} .recover | sqlite3 new`"
            " and put new in its place; or move it away: then stored events and dead letters are lost to vodpoller, and"
            " some events may be delivered twice"
        )
    return f"{path}: the journal cannot be opened: {error}. Is the disk full or the folder read-only?"
