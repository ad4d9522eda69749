"""The journal in SQLite: what `journal.contract` promises, and how it is kept here.

One file in WAL mode. Rows that stand in for an event at VOD are on disk before the caller goes on; ledger rows
may lag, since losing one costs a duplicate at most.
"""

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

from vodpoller.errors import JournalFullError, StorageError
from vodpoller.events import restore_event
from vodpoller.identity import Occurrence, Occurrences
from vodpoller.journal.contract import (
    CONFIRMED_KEPT_SECS,
    DUE_HORIZON_SECS,
    Journal,
    Known,
    Letter,
    Portion,
    Position,
    Pulled,
    StoredCount,
    StoredEvent,
)
from vodpoller.journal.group_commit import GroupCommit
from vodpoller.journal.place import (
    BUSY_SECS,
    cannot_make,
    cannot_open,
    check_place,
    connect,
    identity_of,
    is_corrupt,
    keep_others_out,
    make_folder,
    make_private,
    way_out,
)
from vodpoller.journal.schema import count_anew, migrate
from vodpoller.journal.statements import (
    INODES,
    LETTERS_BYTES,
    acknowledge,
    delete_slice,
    insert_accepted,
    insert_letters,
    insert_recovered,
    letters_bytes,
    mark_removed,
    occurrence_of_line,
    row_of,
    set_position,
    shift,
    short_text,
    size_of,
)
from vodpoller.journal.unwritten import Unwritten
from vodpoller.status import JournalStatus
from vodpoller.telemetry import Count, Telemetry

QUICK_CHECK_BYTES: Final = 64 * 1024 * 1024  # about a tenth of a second
SLICES: Final = 256
WAL_KEPT_BYTES: Final = 8 * 1024 * 1024  # SQLite's own checkpoints, at 4 MiB, keep it below while nobody reads
WAL_LARGE_BYTES: Final = 64 * 1024 * 1024
WAL_RETRY_SECS: Final = 5.0
WAL_WAIT_SECS: Final = 0.1  # all who write wait meanwhile
_KEYS_A_QUERY: Final = 500


class SqliteJournal(Journal):
    """An open journal in a file. One process at a time: a lock file beside it keeps a second daemon out.

    So claims are a matter of this process: they are in memory.

    Args:
        path: The file; its folder is made where it is missing.
        max_bytes: How much the stored events may take; beyond that nothing is stored.
        ledger_days: How long rows of events that never were confirmed are kept.
        telemetry: Destination of log lines and counts.
        wall: The clock that stamps rows, in seconds since 1970.
        monotonic: The clock of what is tried again, in seconds.
        connect: Opens the file, once to write it and once to read it.

    Attributes:
        commits: All that is written to the file.

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
        telemetry: Telemetry,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        connect: Callable[[Path], sqlite3.Connection] = connect,
    ) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._ledger_secs = ledger_days * 86_400
        self._telemetry = telemetry.scope()
        self._wall = wall
        self._monotonic = monotonic
        self._next_wal_try = 0.0
        self._started_at = wall()
        self._run = f"{os.getpid()}-{self._started_at:.6f}"
        self._claims_lock = threading.Lock()
        self._read_lock = threading.Lock()
        self._claiming = threading.Lock()
        self._unwritten = Unwritten()
        self._claims: dict[tuple[bytes, str], StoredEvent] = {}
        self._occurrences = Occurrences(monotonic())
        self._failing = False
        self._trouble = ""  # what was said last about why it could not be written
        self._lacked_bytes = 0  # what the least of those pending events takes that found no room
        self._corrupt: str | None = None  # once found it is so until the next start
        self._next_slice = 0
        with ExitStack() as opening:
            check_place(path)
            make_folder(path.parent, telemetry.log)
            self._lock_fd = keep_others_out(path)
            opening.callback(os.close, self._lock_fd)
            make_private(path)
            try:
                writer = connect(path)
                opening.callback(writer.close)
                copy = migrate(writer, path)
                self._prepare(writer)
                self._reader = connect(path)
                opening.callback(self._reader.close)
            except sqlite3.Error as error:
                raise cannot_open(path, error) from error
            except OSError as error:
                raise cannot_make(path, error, "cannot be copied before it is brought to this version") from error
            opening.pop_all()
        if copy is not None:
            telemetry.log.info("journal.migrated", path=str(path), copy=str(copy))
        self.commits = GroupCommit(writer, on_failure=self._failed)
        self._identity = identity_of(path)
        self._replaced = False

    def _prepare(self, writer: sqlite3.Connection) -> None:
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute(f"PRAGMA journal_size_limit = {WAL_KEPT_BYTES}")
        if self._path.stat().st_size <= QUICK_CHECK_BYTES:
            ((verdict,), *_) = writer.execute("PRAGMA quick_check(1)").fetchall()
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
            count_anew(writer)
        for table in ("ledger", "letters", "totals", "positions", "marks", "occurrences"):
            writer.execute(f"SELECT * FROM {table} LIMIT 1").fetchall()  # noqa: S608 - the names are ours
        # A write shows now, not at the first event, that the file is read-only or the disk is full.
        writer.execute("INSERT OR REPLACE INTO marks VALUES ('started', ?)", (self._wall(),))
        self._load_occurrences(writer)

    def _load_occurrences(self, writer: sqlite3.Connection) -> None:
        to_monotonic = self._monotonic() - self._wall()
        rows = writer.execute(
            "SELECT key, content_key, source, lease_ends_at FROM occurrences WHERE acknowledged_at IS NULL ORDER BY id"
        )
        for key, content_key, source, lease_ends_at in rows:
            self._occurrences.add(
                Occurrence(
                    key=key,
                    content_key=content_key,
                    source=source,
                    lease_ends_at=lease_ends_at + to_monotonic,
                    leased_until=None,
                )
            )

    def close(self) -> None:
        self.flush()
        with self.commits.lock, self._read_lock:
            self.commits.db.close()
            self._reader.close()
        os.close(self._lock_fd)

    # --- identity ----------------------------------------------------------------------------------------------------

    def identify(self, content_keys: Sequence[bytes], pulled: Pulled) -> list[bytes]:
        now = self._monotonic()
        found, new = self._occurrences.identify(
            content_keys,
            source=pulled.source,
            sent_at=now - pulled.sent_ago_secs,
            answered_at=now - pulled.answered_ago_secs,
            lease_secs=pulled.lease_secs,
        )
        lease_ends_at = self._wall() - pulled.sent_ago_secs + pulled.lease_secs
        again = [(lease_ends_at, occurrence.key) for occurrence in found if occurrence not in new]
        if again:
            self.commits.defer(
                lambda db: db.executemany("UPDATE occurrences SET lease_ends_at = ? WHERE key = ?", again)
            )
        if new:
            rows = [(occurrence.key, occurrence.content_key, pulled.source, lease_ends_at) for occurrence in new]
            try:
                self.commits.write(
                    lambda db: db.executemany(
                        "INSERT INTO occurrences (key, content_key, source, lease_ends_at) VALUES (?, ?, ?, ?)", rows
                    ),
                    durable=True,
                )
            except StorageError:
                self._occurrences.forget([occurrence.key for occurrence in new])
                raise
        return [occurrence.key for occurrence in found]

    def answered_empty(self, pulled: Pulled) -> None:
        now = self._monotonic()
        gone = self._occurrences.answered_empty(
            pulled.source,
            sent_at=now - pulled.sent_ago_secs,
            answered_at=now - pulled.answered_ago_secs,
            lease_secs=pulled.lease_secs,
        )
        if gone:
            self.commits.defer(partial(acknowledge, [(self._wall(), key) for key in gone]))

    def answer_lost(self, source: str, *, sent_ago_secs: float) -> None:
        now = self._monotonic()
        self._occurrences.answer_lost(source, sent_at=now - sent_ago_secs, lost_at=now)

    # --- the ledger --------------------------------------------------------------------------------------------------

    def known(self, pairs: Iterable[tuple[bytes, str]]) -> dict[tuple[bytes, str], Known]:
        wanted = set(pairs)
        keys = list({key for key, _ in wanted})
        found: dict[tuple[bytes, str], Known] = {}
        # Memory before the file: a pair that leaves memory in between is in the file by then.
        unwritten = [pair for pair in wanted if pair in self._unwritten] if self._unwritten else []
        with self._reading():
            for first in range(0, len(keys), _KEYS_A_QUERY):
                found |= self._known(keys[first : first + _KEYS_A_QUERY])
        return found | dict.fromkeys(unwritten, Known.ACCEPTED)

    def _known(self, keys: Sequence[bytes]) -> dict[tuple[bytes, str], Known]:
        marks = ",".join("?" * len(keys))
        found = {}
        with self._read_lock:
            if letters_bytes(self._reader):
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
        # A row that is stored before this transaction is found by it, and `store` finds what this one wrote.
        now = self._wall()
        # The mark must stay below what is in memory only: it moves when that is written.
        waits = bool(self._unwritten)
        mark = None if waits else position

        def work(db: sqlite3.Connection) -> None:
            insert_accepted(db, sink, [(key, sink, now) for key in keys], keys if letters_bytes(db) else (), mark)

        try:
            self.commits.write(work, durable=False)
        except Exception:  # noqa: BLE001 - the sink has the events, whatever became of the rows
            self._unwritten.add(sink, keys, accepted_at=now, position=position)
            self._end_claims((key, sink) for key in keys)
            return
        self._end_claims((key, sink) for key in keys)
        if position is not None:
            self._unwritten.move_position(sink, position, is_written=not waits)

    def recover(self, sink: str, portion: Portion) -> None:
        now = self._wall()

        def work(db: sqlite3.Connection) -> None:
            insert_recovered(db, sink, portion.keys, now)
            for content_keys in portion.content_keys:
                # One at a time: a line of equal content that follows must find that this one has taken its occurrence.
                insert_recovered(db, sink, occurrence_of_line(db, sink, content_keys), now)
            set_position(db, sink, portion.position)

        self.commits.write(work, durable=True)

    def position(self, sink: str) -> Position | None:
        rows = self._read("SELECT inode, offset_bytes FROM positions WHERE sink = ?", (sink,))
        row = rows[0] if rows else None
        return Position(inode=row[0] % INODES, offset_bytes=row[1]) if row else None

    def confirmed(self, keys: Sequence[bytes]) -> None:
        now = self._wall()
        marks = ",".join("?" * len(keys))
        occurrences = [(now, key) for key in self._occurrences.forget(keys)]

        self._unwritten.confirm(keys, now)

        def work(db: sqlite3.Connection) -> None:
            db.execute(
                f"UPDATE ledger SET confirmed_at = ? WHERE key IN ({marks}) AND confirmed_at IS NULL",  # noqa: S608
                (now, *keys),
            )
            if letters_bytes(db):
                db.executemany("UPDATE letters SET confirmed = 1 WHERE key = ?", [(key,) for key in keys])
            acknowledge(occurrences, db)

        self.commits.defer(work)
        if occurrences:  # an equal event that comes after a crash would be taken for one of these
            with suppress(StorageError):
                self.commits.write(lambda _db: None, durable=False)

    # --- pending and dead --------------------------------------------------------------------------------------------

    def store(self, letters: Sequence[Letter]) -> None:
        if not letters:
            return
        self._check_in_place()
        now = self._wall()
        wanted = [(letter, row_of(letter, now=now, run=self._run)) for letter in letters]
        refused: list[Letter] = []

        def work(db: sqlite3.Connection) -> None:
            # The statement asks the ledger; what should be in it and could not be written is in memory.
            lacked = [(letter, row) for letter, row in wanted if (letter.event.key, letter.sink) not in self._unwritten]
            refused[:] = insert_letters(db, lacked, max_bytes=self._max_bytes)

        self.commits.write(work, durable=True)
        if refused:
            raise self._full(refused)

    def _full(self, refused: Sequence[Letter]) -> JournalFullError:
        keys = {letter.event.key for letter in refused}
        self._lacked_bytes = min((size_of(letter) for letter in refused if not letter.dead), default=self._lacked_bytes)
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
        self._telemetry.repeated("error", "journal.failed", cause=message, path=str(self._path), **error.fields())
        return error

    def claim_due(self, sink: str, limit: int) -> list[StoredEvent]:
        if self._corrupt is not None:  # what would be delivered now could not be remembered
            raise StorageError(self._corrupt)
        now = self._wall()
        with self._claiming:
            # Memory before the file: what leaves memory after this was written before, and what is read sees that.
            # Claims before what is unwritten: a pair that is accepted meanwhile is there before its claim ends.
            with self._claims_lock:
                held = {key for key, of in self._claims if of == sink}
            held |= self._unwritten.keys_of(sink)
            free = self._due_rows(sink, now, limit, held)
            found, accepted = self._read_due(sink, now, free)
            with self._claims_lock:
                self._claims |= {(stored.event.key, sink): stored for stored in found}
        if accepted:  # a replay brought them back
            self.commits.defer(lambda db: db.executemany("DELETE FROM letters WHERE id = ?", accepted))
        return found

    def _due_rows(self, sink: str, now: float, limit: int, held: Collection[bytes]) -> list[int]:
        """The numbers of what is due and not held; their bodies are read later, those of what is held never."""
        if limit <= 0 or not self._read(LETTERS_BYTES)[0][0]:
            return []
        due = self._read(
            # A due time beyond any delay was set by a clock that was wrong: it has come as well.
            "SELECT id, key FROM letters WHERE state = 'pending' AND sink = ? AND (due_at <= ? OR due_at > ?)"
            " ORDER BY due_at, id LIMIT ?",
            (sink, now, now + DUE_HORIZON_SECS + 60, limit + len(held)),
        )
        return [row for row, key in due if key not in held][:limit]

    def _read_due(self, sink: str, now: float, rows: Sequence[int]) -> tuple[list[StoredEvent], list[tuple[int]]]:
        """The stored events of these numbers, and the numbers of those that the ledger has."""
        found: list[StoredEvent] = []
        accepted: list[tuple[int]] = []
        for first in range(0, len(rows), _KEYS_A_QUERY):
            portion = rows[first : first + _KEYS_A_QUERY]
            marks = ",".join("?" * len(portion))
            read = self._read(
                "SELECT id, key, attempts, stored_at, source, sub_app_id, event_type, body, EXISTS ("  # noqa: S608
                " SELECT 1 FROM ledger WHERE ledger.key = letters.key AND ledger.sink = letters.sink"
                " AND (confirmed_at IS NULL OR confirmed_at >= ?))"
                f" FROM letters WHERE id IN ({marks}) AND state = 'pending' AND sink = ? ORDER BY due_at, id",
                (now - CONFIRMED_KEPT_SECS, *portion, sink),
            )
            for row, key, attempts, stored_at, source, sub_app_id, event_type, body, is_accepted in read:
                if is_accepted:
                    accepted.append((row,))
                    continue
                event = restore_event(body=body, key=key, event_type=event_type, source=source, sub_app_id=sub_app_id)
                age_secs = max(now - stored_at, 0.0)
                found.append(StoredEvent(row=row, event=event, sink=sink, attempts=attempts, age_secs=age_secs))
        return found, accepted

    def release(self, claimed: Iterable[StoredEvent]) -> None:
        with self._claims_lock:
            for stored in claimed:
                pair = (stored.event.key, stored.sink)
                if self._claims.get(pair) is stored:
                    del self._claims[pair]

    def _end_claims(self, pairs: Iterable[tuple[bytes, str]]) -> None:
        if self._claims:
            with self._claims_lock:
                for pair in pairs:
                    self._claims.pop(pair, None)

    def reschedule(self, claimed: StoredEvent, *, attempts: int, due_in_secs: float, error: str | None) -> None:
        due_at = self._wall() + min(due_in_secs, DUE_HORIZON_SECS)
        values = (attempts, due_at, None if error is None else short_text(error), claimed.row)
        self.commits.defer(
            lambda db: db.execute(
                "UPDATE letters SET attempts = ?, due_at = ?, error = coalesce(?, error) WHERE id = ?", values
            ),
            on_end=lambda: self.release((claimed,)),
        )

    def bury(self, claimed: StoredEvent, *, attempts: int, reason: str, error: str) -> None:
        values = (attempts, reason, short_text(error), claimed.row)
        try:
            self.commits.write(
                lambda db: db.execute(
                    "UPDATE letters SET state = 'dead', attempts = ?, reason = ?, error = ? WHERE id = ?", values
                ),
                durable=True,
            )
        finally:
            self.release((claimed,))

    def mark_removed(self, sinks: Collection[str]) -> None:
        self.commits.write(partial(mark_removed, sinks), durable=False)

    def counts(self) -> dict[tuple[str, str], int]:
        rows = self._read("SELECT sink, state, count(*) FROM letters GROUP BY sink, state")
        return {(sink, state): number for sink, state, number in rows}

    def stored(self) -> list[StoredCount]:
        rows = self._read(
            "SELECT sink, state, count(*), min(stored_at) FROM letters GROUP BY state, sink ORDER BY state DESC, sink"
        )
        now = self._wall()
        return [
            StoredCount(sink=sink, state=state, events=number, oldest_secs=now - at) for sink, state, number, at in rows
        ]

    def _read(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._reading(), self._read_lock:
            return self._reader.execute(query, values).fetchall()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._failed(error)
            raise StorageError(f"the journal cannot be read: {error}") from error

    # --- upkeep ------------------------------------------------------------------------------------------------------

    @property
    def is_writable(self) -> bool:
        return not (self._unwritten or self._replaced or self._corrupt)

    def _check_in_place(self) -> None:
        """What is written to a file that was deleted or replaced is lost at the next start.

        Raises:
            StorageError: That happened.
        """
        self._replaced = identity_of(self._path) != self._identity
        if self._replaced:
            error = StorageError(
                f"{self._path}: the journal was deleted or replaced while it was open: put it back if you can, and"
                " restart vodpoller; until then events stay with VOD"
            )
            self._trouble = str(error)
            self._telemetry.repeated("error", "journal.failed", cause="replaced", **error.fields())
            raise error

    @property
    def unwritten(self) -> int:
        """How many accepted pairs are in memory only."""
        return len(self._unwritten)

    def mark(self, name: str, ago_secs: float = 0.0) -> None:
        at = self._wall() - ago_secs
        self.commits.defer(lambda db: db.execute("INSERT OR REPLACE INTO marks VALUES (?, ?)", (name, at)))

    @property
    def trouble(self) -> str:
        return self._trouble if self._failing or not self.is_writable else ""

    def status(self) -> JournalStatus:
        self.flush(even_if_nothing_waits=True)
        error, remedy, taken_bytes = self.trouble, "", 0
        if self._corrupt is not None:
            remedy = 'Stop vodpoller and keep a copy; README, "A corrupt journal", has each step'
        elif self._replaced:
            remedy = "Put the file back if you can, and restart vodpoller"
        try:
            ((taken_bytes,),) = self._read(LETTERS_BYTES)
        except StorageError as failure:
            error = error or str(failure)
        if not error and self._lacked_bytes > self._max_bytes - taken_bytes:
            error = f"stored events take all of journal.max_bytes = {self._max_bytes}, so that new ones stay with VOD"
            remedy = (
                "Bring the sinks back, purge dead letters (`vodpoller deadletters purge`), or raise journal.max_bytes"
            )
        return JournalStatus(
            path=str(self._path),
            writable=not error,
            error=error,
            remedy=remedy,
            stored_bytes=taken_bytes,
            limit_bytes=self._max_bytes,
        )

    def flush(self, *, even_if_nothing_waits: bool = False) -> None:
        with suppress(StorageError):
            self._check_in_place()
        self._shrink_wal()
        has_work = self._unwritten or self._unwritten.has_positions or self.commits.waiting or self._failing
        if not (has_work or even_if_nothing_waits):
            return
        unwritten = self._unwritten.snapshot()
        rows = [(key, sink, *times) for (key, sink), times in unwritten.pairs.items()]

        def work(db: sqlite3.Connection) -> None:
            # A transaction that changes nothing succeeds on a full disk, too.
            db.execute("INSERT OR REPLACE INTO marks VALUES ('written', ?)", (self._wall(),))
            db.executemany("INSERT OR REPLACE INTO ledger VALUES (?, ?, ?, ?)", rows)
            db.executemany("DELETE FROM letters WHERE key = ? AND sink = ?", [row[:2] for row in rows])
            for sink, position in unwritten.positions.items():
                set_position(db, sink, position)

        try:
            self.commits.write(work, durable=False)
        except StorageError:
            return
        self._unwritten.remove(unwritten)
        self._recovered()

    def _shrink_wal(self) -> None:
        """Cut the WAL. SQLite goes on at its end, and cuts nothing, as long as somebody reads at every checkpoint."""
        if self._wal_bytes() > WAL_KEPT_BYTES and self._monotonic() >= self._next_wal_try:
            self._next_wal_try = self._monotonic() + WAL_RETRY_SECS
            with self.commits.lock, self._read_lock, suppress(sqlite3.Error):
                try:
                    self.commits.db.execute(f"PRAGMA busy_timeout = {WAL_WAIT_SECS * 1000:.0f}")
                    self.commits.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                finally:
                    self.commits.db.execute(f"PRAGMA busy_timeout = {BUSY_SECS * 1000:.0f}")
            size_bytes = self._wal_bytes()
            if size_bytes > WAL_LARGE_BYTES:
                self._telemetry.repeated(
                    "warning",
                    "wal.grown",
                    cause="wal",
                    path=f"{self._path}-wal",
                    size_bytes=size_bytes,
                    hint="another process reads the journal without a pause, which keeps it from being cut:"
                    f" `fuser {self._path}` names it",
                )
            else:
                self._telemetry.reset("wal")

    def _wal_bytes(self) -> int:
        try:
            return self._path.with_name(f"{self._path.name}-wal").stat().st_size
        except OSError:
            return 0

    def prune(self, share: float = 1.0) -> None:
        # An index by age would cost more at each event than all else in the ledger. Keys are hashes, so equal ranges of
        # them hold equal numbers of rows: each call looks at the next ones, in short transactions.
        now = self._wall()
        with suppress(StorageError):  # it is put off
            for _ in range(round(SLICES * share)):
                first, self._next_slice = self._next_slice, (self._next_slice + 1) % SLICES
                self.commits.write(partial(self._prune_slice, first, now), durable=False)

    def _prune_slice(self, first: int, now: float, db: sqlite3.Connection) -> None:
        occurrences, deleted = delete_slice(
            db,
            first,
            now=now,
            confirmed_before=now - CONFIRMED_KEPT_SECS,
            before=now - self._ledger_secs,
        )
        self._occurrences.forget(occurrences)
        if deleted:
            self._telemetry.log.debug("journal.pruned", rows=deleted)

    def shift(self, secs: float) -> None:
        # What this process stamped is moved along, so that nothing ages or waits by the jump.
        recent = self._wall() - secs - CONFIRMED_KEPT_SECS

        with suppress(StorageError):
            self.commits.write(
                lambda db: shift(db, secs, run=self._run, started_at=self._started_at, recent=recent), durable=False
            )
            self._started_at += secs

    def _failed(self, error: Exception) -> None:
        self._failing = True
        message = str(error)
        if is_corrupt(error):
            message = self._corrupt = way_out(self._path, error)
        self._trouble = message
        self._telemetry.count(Count.JOURNAL_ERRORS)
        self._telemetry.repeated("error", "journal.failed", cause=message, error_message=message, path=str(self._path))

    def _recovered(self) -> None:
        if self._failing and self._corrupt is None:
            self._failing = False
            suppressed = self._telemetry.reset()
            self._telemetry.log.info("journal.recovered", suppressed_lines=suppressed or 0)
