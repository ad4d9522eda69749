"""The journal: what sinks accepted (the ledger), what waits for another attempt, what waits for a person.

One SQLite file in WAL mode. Rows that stand in for an event at VOD are on disk before the caller goes on; ledger rows
may lag, since losing one costs a duplicate at most.
"""

import errno
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Final

from vodpoller.delivery import Portion, Position
from vodpoller.durable import Folders, kind_of_file, may_pass, take_lock
from vodpoller.errors import JournalError, JournalFullError, StorageError, UnusableJournalError
from vodpoller.events import Event, restore_event
from vodpoller.logs import Logger, Repeats
from vodpoller.migrations import ROW_OVERHEAD_BYTES, count_anew, migrate
from vodpoller.settlement import Reason

CONFIRMED_KEPT_SECS: Final = 600.0
DUE_HORIZON_SECS: Final = 900.0
QUICK_CHECK_BYTES: Final = 64 * 1024 * 1024  # about a tenth of a second
SLICES: Final = 256
DEFERRED_MAX: Final = 1000
BUSY_SECS: Final = 2.0  # a command may hold the file for a moment
WAL_KEPT_BYTES: Final = 8 * 1024 * 1024  # SQLite's own checkpoints, at 4 MiB, keep it below while nobody reads
WAL_LARGE_BYTES: Final = 64 * 1024 * 1024
WAL_RETRY_SECS: Final = 5.0
WAL_WAIT_SECS: Final = 0.1  # all who write wait meanwhile
_KEYS_A_QUERY: Final = 500
_ROWS_A_STATEMENT: Final = 16
_INODES: Final = 2**64

# What flock(2) answers on a file system that has no locks.
_NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})
_CORRUPT: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
# SQLITE_ERROR at the start: a table or column is not there.
_UNUSABLE: Final = _CORRUPT | {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_FORMAT}
_FORBIDDEN: Final = frozenset({sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH})

_LETTERS_BYTES: Final = "SELECT letters_bytes FROM totals"
_ACCEPTED: Final = (
    "SELECT 1 FROM ledger WHERE key = :key AND sink = :sink AND (confirmed_at IS NULL OR confirmed_at >= :known_since)"
)
_INSERT_LETTER: Final = (
    "INSERT OR IGNORE INTO letters (key, sink, state, reason, error, attempts, stored_at, due_at, run, source,"
    " sub_app_id, event_type, body) SELECT :key, :sink, :state, :reason, :error, :attempts, :now, :due_at, :run,"
    f" :source, :sub_app_id, :event_type, :body WHERE NOT EXISTS ({_ACCEPTED})"
)
_IS_HELD: Final = f"SELECT EXISTS ({_ACCEPTED}) OR EXISTS (SELECT 1 FROM letters WHERE key = :key AND sink = :sink)"  # noqa: S608 - as above

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
        reason: Why, a value of `Reason`.
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
        monotonic: The clock of what is tried again, in seconds.

    Raises:
        UnusableJournalError: It is corrupt, of a later version, or in a place where no journal can be.
        JournalError: Another process has it, or it cannot be opened or written now.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int,
        ledger_days: float,
        log: Logger,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._ledger_secs = ledger_days * 86_400
        self._log = log
        self._repeats = Repeats(log)
        self._wall = wall
        self._monotonic = monotonic
        self._next_wal_try = 0.0
        self._started_at = wall()
        self._run = f"{os.getpid()}-{self._started_at:.6f}"
        self._queue: list[_Write] = []
        self._queue_lock = threading.Lock()
        self._write_lock = threading.Lock()
        self._read_lock = threading.Lock()
        self._unwritten: dict[tuple[bytes, str], tuple[float, float | None]] = {}
        self._unwritten_positions: dict[str, Position] = {}
        self._failing = False
        self._corrupt: str | None = None  # once found it is so until the next start
        self._next_slice = 0
        with ExitStack() as opening:
            _check_place(path)
            _make_folder(path.parent, log)
            self._lock_fd = _lock(path)
            opening.callback(os.close, self._lock_fd)
            _make_private(path)
            try:
                self._writer = _connect(path)
                opening.callback(self._writer.close)
                copy = migrate(self._writer, path)
                self._prepare()
                self._reader = _connect(path)
                opening.callback(self._reader.close)
            except sqlite3.Error as error:
                raise _cannot_open(path, error) from error
            except OSError as error:
                raise _cannot_make(path, error, "cannot be copied before it is brought to this version") from error
            opening.pop_all()
        if copy is not None:
            log.info("journal.migrated", path=str(path), copy=str(copy))
        self._identity = _identity_of(path)
        self._replaced = False

    def _prepare(self) -> None:
        self._writer.execute("PRAGMA journal_mode = WAL")
        self._writer.execute(f"PRAGMA journal_size_limit = {WAL_KEPT_BYTES}")
        if self._path.stat().st_size <= QUICK_CHECK_BYTES:
            ((verdict,), *_) = self._writer.execute("PRAGMA quick_check(1)").fetchall()
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
            count_anew(self._writer)
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
            if is_corrupt(error):  # said here, since for some writes it does not matter whether they are done
                self._failed(error)
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

    def accept(self, sink: str, keys: Sequence[bytes], position: Position | None) -> None:
        """Remember that a sink has events, and how far its file goes. What cannot be written stays in memory.

        A stored row of a pair is deleted: one that is stored before this transaction is found here, and one that would
        be stored after it finds the ledger's.
        """
        now = self._wall()
        # The mark must stay below what is in memory only: it moves when that is written.
        waits = bool(self._unwritten)
        mark = None if waits else position

        def work(db: sqlite3.Connection) -> None:
            _insert_accepted(db, sink, [(key, sink, now) for key in keys], keys if _letters_bytes(db) else (), mark)

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
        """The mark of a sink's file: all below it is in the ledger.

        Raises:
            StorageError: The journal cannot be read.
        """
        rows = self._read("SELECT inode, offset_bytes FROM positions WHERE sink = ?", (sink,))
        row = rows[0] if rows else None
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

        A pair that is stored already stays as it is; one that the ledger turns out to have by now is left out. Dead
        letters never take the room of pending events: at most half of it is theirs.

        Raises:
            JournalFullError: There was no room for some, which VOD must keep: `refused` has their events' keys. All
                others are on disk.
            StorageError: None is stored; VOD must keep them all.
        """
        if not letters:
            return
        self._check_in_place()
        now = self._wall()
        wanted = [(letter, self._row(letter, now)) for letter in letters]
        refused: list[Letter] = []

        def work(db: sqlite3.Connection) -> None:
            refused[:] = self._insert_letters(db, wanted)

        try:
            self._write(work, durable=True)
        except Exception as error:
            self._failed(error)
            raise StorageError(f"the journal cannot be written: {error}") from error
        if refused:
            raise self._full(refused)

    def _row(self, letter: Letter, now: float) -> dict[str, Any]:
        return {
            "key": letter.event.key,
            "sink": letter.sink,
            "state": "dead" if letter.dead else "pending",
            "reason": letter.reason,
            "error": _text(letter.error),
            "attempts": letter.attempts,
            "now": now,
            "due_at": now + min(letter.due_in_secs, DUE_HORIZON_SECS),
            "run": self._run,
            "source": letter.event.source,
            "sub_app_id": letter.event.sub_app_id,
            "event_type": _text(letter.event.type),
            "body": letter.event.body,
            "known_since": now - CONFIRMED_KEPT_SECS,
        }

    def _insert_letters(
        self, db: sqlite3.Connection, wanted: Sequence[tuple[Letter, Mapping[str, Any]]]
    ) -> list[Letter]:
        """Insert what there is room for, in a transaction, where no other thread can take the same room.

        Returns:
            What there is no room for, and is not held by the journal already.
        """
        room = self._max_bytes - _letters_bytes(db)
        dead_room = self._max_bytes // 2 - _dead_bytes(db)
        if sum(_size(letter) for letter, _ in wanted) <= room and (
            sum(_size(letter) for letter, _ in wanted if letter.dead) <= dead_room
        ):
            db.executemany(_INSERT_LETTER, [row for _, row in wanted])
            return []
        refused = []
        for letter, row in sorted(wanted, key=lambda pair: pair[0].dead):  # pending ones get the room there is
            size = _size(letter)
            if size > room or (letter.dead and size > dead_room):
                if not db.execute(_IS_HELD, row).fetchone()[0]:
                    refused.append(letter)
            elif db.execute(_INSERT_LETTER, row).rowcount:
                room -= size
                dead_room -= size if letter.dead else 0
        return refused

    def _full(self, refused: Sequence[Letter]) -> JournalFullError:
        keys = {letter.event.key for letter in refused}
        if all(letter.dead for letter in refused):
            message = (
                f"dead letters may take half of journal.max_bytes = {self._max_bytes}, and that is full: the events"
                " that would be the next ones stay with VOD, all other events are stored as ever. Look at them"
                " (`vodpoller deadletters list`), replay or purge them, or raise journal.max_bytes"
            )
        else:
            message = (
                f"the journal is full: stored events take all of journal.max_bytes = {self._max_bytes}. Bring the sinks"
                " back, purge dead letters (`vodpoller deadletters purge`), or raise journal.max_bytes"
            )
        error = JournalFullError(message, refused=keys)
        self._repeats.say("error", "journal.failed", cause=message, path=str(self._path), **error.fields())
        return error

    def _taken_bytes(self) -> int:
        if self._corrupt is not None:  # what would be delivered now could not be remembered
            raise StorageError(self._corrupt)
        return int(self._read(_LETTERS_BYTES)[0][0])

    def due(self, sink: str, limit: int) -> list[Pending]:
        """Stored events whose time has come, the oldest due time first.

        A due time beyond any back-off was set by a clock that was wrong: it has come as well. None is due while the
        journal cannot be read.
        """
        now = self._wall()
        try:
            with self._read_lock:
                rows = self._reader.execute(
                    "SELECT id, key, sink, attempts, stored_at, source, sub_app_id, event_type, body FROM letters"
                    " WHERE state = 'pending' AND sink = ? AND (due_at <= ? OR due_at > ?) ORDER BY due_at LIMIT ?",
                    (sink, now, now + DUE_HORIZON_SECS + 60, limit),
                ).fetchall()
        except sqlite3.Error as error:
            self._failed(error)
            return []
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

    def bury(self, row: int, *, attempts: int, reason: str, error: str) -> bool:
        """A stored event becomes a dead letter.

        Returns:
            Whether it did. If that cannot be written it stays pending.
        """
        values = (attempts, reason, _text(error), row)
        try:
            self._write(
                lambda db: db.execute(
                    "UPDATE letters SET state = 'dead', attempts = ?, reason = ?, error = ? WHERE id = ?", values
                ),
                durable=True,
            )
        except sqlite3.Error as failure:
            self._failed(failure)
            return False
        return True

    def mark_removed(self, sinks: Collection[str]) -> None:
        """Give pending events of sinks that are no more the reason `sink_removed`; they stay pending.

        An event whose sink is back loses the reason.

        Args:
            sinks: The names of the sinks that there are.

        Raises:
            StorageError: The journal cannot be written.
        """
        marks = ",".join("?" * len(sinks))

        def work(db: sqlite3.Connection) -> None:
            if not _letters_bytes(db):
                return
            db.execute(
                f"UPDATE letters SET reason = ? WHERE state = 'pending' AND sink NOT IN ({marks})",  # noqa: S608 - marks
                (Reason.SINK_REMOVED.value, *sinks),
            )
            db.execute(
                f"UPDATE letters SET reason = ? WHERE reason = ? AND sink IN ({marks})",  # noqa: S608 - marks
                (Reason.OUT_OF_TIME.value, Reason.SINK_REMOVED.value, *sinks),
            )

        try:
            self._write(work, durable=False)
        except sqlite3.Error as error:
            self._failed(error)
            raise StorageError(f"the journal cannot be written: {error}") from error

    def counts(self) -> dict[tuple[str, str], int]:
        """How many rows there are by (sink, state).

        Raises:
            StorageError: The journal cannot be read.
        """
        rows = self._read("SELECT sink, state, count(*) FROM letters GROUP BY sink, state")
        return {(sink, state): number for sink, state, number in rows}

    def _read(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        try:
            with self._read_lock:
                return self._reader.execute(query, values).fetchall()
        except sqlite3.Error as error:
            self._failed(error)
            raise StorageError(f"the journal cannot be read: {error}") from error

    # --- upkeep ------------------------------------------------------------------------------------------------------

    @property
    def is_writable(self) -> bool:
        """Whether the file is whole, in its place and has every accepted pair: if not, no new pull should start."""
        return not (self._unwritten or self._replaced or self._corrupt)

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
        self._shrink_wal()
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

    def _shrink_wal(self) -> None:
        """Cut the WAL. SQLite goes on at its end, and cuts nothing, as long as somebody reads at every checkpoint."""
        if self._wal_bytes() > WAL_KEPT_BYTES and self._monotonic() >= self._next_wal_try:
            self._next_wal_try = self._monotonic() + WAL_RETRY_SECS
            with self._write_lock, self._read_lock, suppress(sqlite3.Error):
                try:
                    self._writer.execute(f"PRAGMA busy_timeout = {WAL_WAIT_SECS * 1000:.0f}")
                    self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                finally:
                    self._writer.execute(f"PRAGMA busy_timeout = {BUSY_SECS * 1000:.0f}")
            size_bytes = self._wal_bytes()
            if size_bytes > WAL_LARGE_BYTES:
                self._repeats.say(
                    "warning",
                    "wal.grown",
                    cause="wal",
                    path=f"{self._path}-wal",
                    size_bytes=size_bytes,
                    hint="another process reads the journal without a pause, which keeps it from being cut:"
                    f" `fuser {self._path}` names it",
                )
            else:
                self._repeats.forget("wal")

    def _wal_bytes(self) -> int:
        try:
            return self._path.with_name(f"{self._path.name}-wal").stat().st_size
        except OSError:
            return 0

    def prune(self, slices: int = SLICES) -> None:
        """Delete ledger rows that have done their duty, in short transactions.

        An index by age would cost more at each event than all else in the ledger. Keys are hashes, so equal ranges of
        them hold equally many rows, and each call looks at the next ones.

        Args:
            slices: How many of the 256 ranges; all of them unless told otherwise.
        """
        now = self._wall()
        with suppress(sqlite3.Error):  # it is put off; a file that is corrupt has been said to be by the write
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
                "UPDATE letters SET stored_at = stored_at + ?, due_at = due_at + ? WHERE run = ?",
                (secs, secs, self._run),
            )
            db.execute(
                "UPDATE ledger SET accepted_at = accepted_at + ?, confirmed_at = confirmed_at + ?"
                " WHERE accepted_at >= ? AND (confirmed_at IS NULL OR confirmed_at >= ?)",
                (secs, secs, self._started_at, recent),
            )

        with suppress(sqlite3.Error):
            self._write(work, durable=False)
            self._started_at += secs

    def _failed(self, error: Exception) -> None:
        self._failing = True
        message = str(error)
        if is_corrupt(error):
            message = self._corrupt = way_out(self._path, error)
        self._repeats.say("error", "journal.failed", cause=message, error_message=message, path=str(self._path))

    def _recovered(self) -> None:
        if self._failing and self._corrupt is None:
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
            "UPDATE ledger SET confirmed_at = accepted_at WHERE key = ? AND sink = ? AND EXISTS"
            " (SELECT 1 FROM letters WHERE letters.key = ledger.key AND letters.sink = ledger.sink AND confirmed)",
            [(key, sink) for key in stored],
        )
        db.executemany("DELETE FROM letters WHERE key = ? AND sink = ?", [(key, sink) for key in stored])
    _set_position(db, sink, position)


def _size(letter: Letter) -> int:
    """What it takes of `max_bytes`."""
    return len(letter.event.body) + ROW_OVERHEAD_BYTES


def _letters_bytes(db: sqlite3.Connection) -> int:
    """What all stored events take; kept by triggers, so that it holds whoever writes."""
    (size,) = db.execute(_LETTERS_BYTES).fetchone()
    return int(size)


def _dead_bytes(db: sqlite3.Connection) -> int:
    """What the dead letters among them take."""
    (size,) = db.execute("SELECT dead_bytes FROM totals").fetchone()
    return int(size)


def _set_position(db: sqlite3.Connection, sink: str, position: Position | None) -> None:
    if position is not None:
        # SQLite's integers are signed; inodes of some file systems use all 64 bits.
        inode = position.inode if position.inode < _INODES // 2 else position.inode - _INODES
        db.execute("INSERT OR REPLACE INTO positions VALUES (?, ?, ?)", (sink, inode, position.offset_bytes))


def _check_place(path: Path) -> None:
    if problem := problem_of_place(path):
        raise UnusableJournalError(problem)


def problem_of_place(path: Path) -> str | None:
    """Why no journal can be at this path, None if nothing speaks against it: only a regular file keeps what it holds.

    Args:
        path: Where the journal is, or is to be made.
    """
    try:
        mode = path.stat().st_mode
    except OSError:  # it is not there yet; or opening it says what is wrong
        return None
    if stat.S_ISREG(mode):
        return None
    example = path / "journal.db" if stat.S_ISDIR(mode) else "/var/lib/vodpoller/journal.db"
    kind = kind_of_file(mode)
    return f"{path}: this is {kind}, and a journal is a regular file: set journal.path to one (for example {example})"


def _make_folder(folder: Path, log: Logger) -> None:
    try:
        Folders(lambda text: log.warning("config.warning", message=f"journal.path: {text}")).make(folder)
    except OSError as error:
        raise _cannot_make(folder, error, "the journal's folder cannot be made") from error


def _make_private(path: Path) -> None:
    """See to it that others cannot read what events say: SQLite makes files 0644, and its WAL like the file itself."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640))
    except OSError as error:
        raise _cannot_make(path, error, "the journal cannot be opened for writing") from error
    for file in (path, *(path.with_name(path.name + ending) for ending in ("-wal", "-shm", ".lock"))):
        with suppress(OSError):  # it is not there; or another user owns it, or the file system has no rights to take
            mode = stat.S_IMODE(file.stat().st_mode)
            if mode & 0o007:
                file.chmod(mode & ~0o007)


def _text(text: str) -> str:
    """What a TEXT column takes: no lone surrogates, no novels."""
    return text[:2000].encode(errors="replace").decode()


def _connect(path: Path) -> sqlite3.Connection:
    # The daemon's threads share the connection under a lock of ours. Absolute: some relative names, such as ":memory:",
    # mean something else than a file to SQLite.
    return sqlite3.connect(
        path.absolute(), timeout=BUSY_SECS, isolation_level=None, check_same_thread=False, cached_statements=64
    )


def _lock(path: Path) -> int:
    lock_path = path.with_name(path.name + ".lock")
    try:
        return take_lock(lock_path)
    except BlockingIOError as error:
        raise JournalError(
            f"{path}: another process has this journal open: is vodpoller already running "
            f"(`systemctl status vodpoller`, `fuser {lock_path}`)? Stop it, or set another journal.path"
        ) from error
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise UnusableJournalError(
                f"{lock_path}: cannot be locked: {error.strerror}. Without a lock two daemons could write one journal;"
                " some network file systems have none. Put the journal on a local disk (journal.path)"
            ) from error
        raise _cannot_make(lock_path, error, "cannot be written") from error


def _identity_of(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _cannot_make(path: Path, error: OSError, what: str) -> JournalError:
    if may_pass(error):
        return JournalError(f"{path}: {what}: {error.strerror}. If the disk is full, make room")
    return UnusableJournalError(
        f"{path}: {what}: {error.strerror}. The journal's folder must belong to the user that runs vodpoller; create"
        " it so, or set journal.path to such a place"
    )


def is_corrupt(error: Exception) -> bool:
    """Whether it says that the file is damaged, which waiting does not mend."""
    return _code_of(error) in _CORRUPT


def way_out(path: Path, error: Exception) -> str:
    """What to do about a journal that is corrupt, as one sentence after the other.

    Args:
        path: The journal.
        error: What SQLite said.
    """
    return (
        f"{path}: the journal is corrupt ({error}). Stop vodpoller and keep a copy of {path} and {path}-wal. Then"
        f" rescue what can be read, `sqlite3 {path} .recover | sqlite3 {path}.new`, and put that in its place without"
        f" the old {path.name}-wal and -shm; or move the journal away, and a new one is made: what was stored is in the"
        ' copy only. In both cases some events may be delivered twice. README, "A corrupt journal", has each step'
    )


def _code_of(error: Exception) -> int:
    """SQLite's primary result code, 0 for an error that is not SQLite's."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def _cannot_open(path: Path, error: sqlite3.Error) -> JournalError:
    code = _code_of(error)
    if code in _UNUSABLE or not code:  # without a code it is the verdict of quick_check
        return UnusableJournalError(way_out(path, error))
    if code in _FORBIDDEN:
        return UnusableJournalError(
            f"{path}: the journal cannot be opened: {error}. It and its folder must belong to the user that runs"
            " vodpoller, and be on a file system that can be written; or set journal.path to such a place"
        )
    return JournalError(f"{path}: the journal cannot be opened: {error}. Is the disk full or the folder read-only?")
