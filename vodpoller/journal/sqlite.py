"""The journal in SQLite, which implements `journal.contract`.

It is one file in WAL mode. A row that replaces an event at VOD is on disk before the caller goes on. Ledger rows may be
written later, since the loss of one causes a duplicate at most.
"""

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, Final

from vodpoller.errors import JournalFullError, StorageError
from vodpoller.events.identity import Occurrence, Occurrences
from vodpoller.journal.claims import Claims
from vodpoller.journal.condition import Condition
from vodpoller.journal.contract import (
    CONFIRMED_KEPT_SECS,
    DUE_HORIZON_SECS,
    ClaimedEvent,
    Journal,
    Known,
    Letter,
    NewDeadLetter,
    Portion,
    Position,
    Pulled,
    StoredCount,
)
from vodpoller.journal.group_commit import GroupCommit
from vodpoller.journal.opening import Connect, open_journal
from vodpoller.journal.place import (
    connect,
)
from vodpoller.journal.statements import (
    INODES,
    KEYS_PER_QUERY,
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
from vodpoller.journal.wal import Wal
from vodpoller.status import JournalStatus
from vodpoller.telemetry import Duration, Telemetry

SLICES: Final = 256


class SqliteJournal(Journal):
    """An open journal in a file. A lock file beside it keeps a second daemon out, so claims can be in memory.

    Args:
        path: The file; its folder is made if it is missing.
        max_bytes: Maximum size of the stored events; beyond it nothing is stored.
        ledger_days: Number of days for which rows of events that were never confirmed are kept.
        telemetry: Destination of log lines and counts.
        wall: The clock for the times of rows, in seconds since 1970.
        monotonic: The clock for leases and retries, in seconds.
        connect: Opens a connection; called twice, for writing and for reading.

    Attributes:
        commits: Does all writes to the file.

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
        connect: Connect = connect,
    ) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._ledger_secs = ledger_days * 86_400
        self._telemetry = telemetry.scope()
        self._wall = wall
        self._monotonic = monotonic
        self._started_at = wall()
        self._run = f"{os.getpid()}-{self._started_at:.6f}"
        self._read_lock = threading.Lock()
        self._unwritten = Unwritten()
        self._claims = Claims(self._read, self._unwritten)
        self._occurrences = Occurrences(monotonic())
        self._lacked_bytes = 0  # size of the smallest pending event among the last that found no room
        self._next_slice = 0
        opened = open_journal(path, log=telemetry.log, connect=connect, now=wall)
        self._lock_fd, self._reader = opened.lock_fd, opened.reader
        self._load_occurrences(opened.occurrences)
        self._condition = Condition(path, self._telemetry)
        self.commits = GroupCommit(
            opened.writer,
            on_failure=self._condition.note_failure,
            on_commit=partial(self._telemetry.measure, Duration.JOURNAL_COMMIT, ()),
        )
        self._wal = Wal(
            path,
            commits=self.commits,
            read_lock=self._read_lock,
            telemetry=self._telemetry,
            monotonic=monotonic,
        )

    def _load_occurrences(self, rows: Iterable[tuple[bytes, bytes, str, float]]) -> None:
        to_monotonic = self._monotonic() - self._wall()
        for key, content_key, source, lease_ends_at in rows:
            self._occurrences.add(
                Occurrence(
                    key=key,
                    content_key=content_key,
                    source=source,
                    lease_ends_at=lease_ends_at + to_monotonic,
                    leased_until=-inf,
                )
            )

    def close(self) -> None:
        self.flush()
        self.abandon()

    def abandon(self) -> None:
        """Close the file at once: what is not written yet is lost, as at a kill."""
        with self.commits.lock, self._read_lock:
            self.commits.db.close()
            self._reader.close()
        os.close(self._lock_fd)

    # --- identity ----------------------------------------------------------------------------------------------------

    def identify(self, content_keys: Sequence[bytes], pulled: Pulled) -> list[bytes]:
        now = self._monotonic()
        lease_ends_at = self._wall() - pulled.sent_ago_secs + pulled.lease_secs
        found, new = self._occurrences.identify(
            content_keys,
            source=pulled.source,
            sent_at=now - pulled.sent_ago_secs,
            answered_at=now - pulled.answered_ago_secs,
            lease_secs=pulled.lease_secs,
            tries_secs=pulled.tries_secs,
        )
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
        # Memory is read before the file: a pair that leaves memory in between is in the file by then.
        unwritten = [pair for pair in wanted if pair in self._unwritten] if self._unwritten else []
        with self._reading():
            for first in range(0, len(keys), KEYS_PER_QUERY):
                found |= self._known(keys[first : first + KEYS_PER_QUERY])
        return found | dict.fromkeys(unwritten, Known.ACCEPTED)

    def _known(self, keys: Sequence[bytes]) -> dict[tuple[bytes, str], Known]:
        places = ",".join("?" * len(keys))
        found = {}
        with self._read_lock:
            if letters_bytes(self._reader):
                letters = self._reader.execute(
                    f"SELECT key, sink, state FROM letters WHERE key IN ({places})",
                    keys,
                )
                for key, sink, state in letters:
                    found[key, sink] = Known.PENDING if state == "pending" else Known.DEAD
            accepted = self._reader.execute(
                f"SELECT key, sink FROM ledger WHERE key IN ({places}) AND (confirmed_at IS NULL OR confirmed_at >= ?)",
                (*keys, self._wall() - CONFIRMED_KEPT_SECS),
            )
            for key, sink in accepted:
                found[key, sink] = Known.ACCEPTED
        return found

    def accept(self, sink: str, keys: Sequence[bytes], position: Position | None) -> None:
        # This transaction finds a row that was stored before it, and a later `store` finds what this one has written.
        now = self._wall()

        def work(db: sqlite3.Connection) -> None:
            insert_accepted(db, sink, [(key, sink, now) for key in keys], keys if letters_bytes(db) else (), position)

        # Lines beyond the mark must have no ledger row, so rows and mark are written together: otherwise a recovery
        # would take one line for another. So pairs that come after unwritten ones wait together with them.
        waits = bool(self._unwritten)
        try:
            if not waits:
                self.commits.write(work, durable=False)
        except Exception:  # noqa: BLE001 - the sink has the events, also if the rows are not written
            waits = True
        if waits:
            self._unwritten.add(sink, keys, accepted_at=now, position=position)
        self._claims.end((key, sink) for key in keys)

    def recover(self, sink: str, portion: Portion) -> None:
        now = self._wall()

        def work(db: sqlite3.Connection) -> None:
            insert_recovered(db, sink, portion.keys, now)
            for content_keys in portion.content_keys:
                # One at a time: for the next line of equal content, the occurrence of this one must be taken already.
                insert_recovered(db, sink, occurrence_of_line(db, sink, content_keys), now)
            set_position(db, sink, portion.position)

        self.commits.write(work, durable=True)

    def position(self, sink: str) -> Position | None:
        rows = self._read("SELECT inode, offset_bytes FROM positions WHERE sink = ?", (sink,))
        row = rows[0] if rows else None
        return Position(inode=row[0] % INODES, offset_bytes=row[1]) if row else None

    def confirmed(self, keys: Sequence[bytes]) -> None:
        now = self._wall()
        places = ",".join("?" * len(keys))
        forgotten = self._occurrences.forget(keys)
        # Recovery takes a line without a ledger row for an occurrence that is not acknowledged. So an occurrence with
        # an unwritten row is acknowledged only together with that row.
        waiting = self._unwritten.confirm(keys, now)
        occurrences = [(now, key) for key in forgotten if key not in waiting]

        def work(db: sqlite3.Connection) -> None:
            db.execute(
                f"UPDATE ledger SET confirmed_at = ? WHERE key IN ({places}) AND confirmed_at IS NULL",
                (now, *keys),
            )
            if letters_bytes(db):
                db.execute(f"UPDATE letters SET confirmed = 1 WHERE key IN ({places})", keys)
            acknowledge(occurrences, db)

        self.commits.defer(work)
        if occurrences:  # written now: after a crash, an equal event would be taken for one of these
            with suppress(StorageError):
                self.commits.write(lambda _db: None, durable=False)

    # --- pending and dead --------------------------------------------------------------------------------------------

    def store(self, letters: Sequence[Letter]) -> None:
        if not letters:
            return
        self._condition.check_in_place()
        now = self._wall()
        wanted = [(letter, row_of(letter, now=now, run=self._run)) for letter in letters]
        refused: list[Letter] = []

        def work(db: sqlite3.Connection) -> None:
            # The statement checks the ledger; pairs that could not be written to it are in memory.
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
                f"dead letters may take half of journal.max_bytes = {self._max_bytes}, and they do: events that would"
                " become dead letters stay with VOD, all other events are stored as usual. Look at the dead letters"
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

    def claim_due(self, sink: str, limit: int) -> list[ClaimedEvent]:
        if self._condition.corrupt:  # it could not be recorded what is delivered now
            raise StorageError(self._condition.corrupt)
        found, accepted = self._claims.claim_due(sink, limit, now=self._wall())
        if accepted:  # rows that a replay made pending again
            self.commits.defer(lambda db: db.executemany("DELETE FROM letters WHERE id = ?", accepted))
        return found

    def release(self, claimed: Iterable[ClaimedEvent]) -> None:
        self._claims.release(claimed)

    def reschedule(self, claimed: ClaimedEvent, *, attempts: int, due_in_secs: float, error: str | None) -> None:
        due_at = self._wall() + min(due_in_secs, DUE_HORIZON_SECS)
        values = (attempts, due_at, None if error is None else short_text(error), claimed.row)
        self.commits.defer(
            lambda db: db.execute(
                "UPDATE letters SET attempts = ?, due_at = ?, error = coalesce(?, error) WHERE id = ?", values
            ),
            on_end=lambda: self._claims.release((claimed,)),
        )

    def mark_dead(self, dead: Sequence[NewDeadLetter]) -> None:
        values = [(it.attempts, it.reason, short_text(it.error), it.claimed.row) for it in dead]
        try:
            self.commits.write(
                lambda db: db.executemany(
                    "UPDATE letters SET state = 'dead', attempts = ?, reason = ?, error = ? WHERE id = ?", values
                ),
                durable=True,
            )
        finally:
            self.release(it.claimed for it in dead)

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

    def dead_letters(self) -> dict[tuple[str, str], int]:
        rows = self._read("SELECT sink, reason, count(*) FROM letters WHERE state = 'dead' GROUP BY sink, reason")
        return {(sink, reason): number for sink, reason, number in rows}

    def stored_bytes(self) -> int:
        ((taken_bytes,),) = self._read(LETTERS_BYTES)
        return int(taken_bytes)

    def _read(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._reading(), self._read_lock:
            return self._reader.execute(query, values).fetchall()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._condition.note_failure(error)
            raise StorageError(f"the journal cannot be read: {error}") from error

    # --- upkeep ------------------------------------------------------------------------------------------------------

    @property
    def is_writable(self) -> bool:
        condition = self._condition
        return not (self._unwritten or condition.is_failing or condition.is_replaced or condition.corrupt)

    @property
    def unwritten(self) -> int:
        """Number of accepted pairs that are in memory only."""
        return len(self._unwritten)

    def note_time(self, name: str, ago_secs: float = 0.0) -> None:
        at = self._wall() - ago_secs
        self.commits.defer(lambda db: db.execute("INSERT OR REPLACE INTO marks VALUES (?, ?)", (name, at)))

    @property
    def trouble(self) -> str:
        return self._condition.trouble if self._condition.is_failing or not self.is_writable else ""

    def status(self) -> JournalStatus:
        self.flush(even_if_nothing_waits=True)
        error, remedy, taken_bytes = self.trouble, self._condition.remedy, 0
        try:
            taken_bytes = self.stored_bytes()
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
            self._condition.check_in_place()
        self._wal.shrink()
        waits = self._unwritten or self.commits.waiting
        if not (waits or self._condition.is_failing or even_if_nothing_waits):
            return
        unwritten = self._unwritten.snapshot()
        rows = [(key, sink, *times) for (key, sink), times in unwritten.pairs.items()]

        def work(db: sqlite3.Connection) -> None:
            # A transaction that changes nothing succeeds on a full disk, too.
            db.execute("INSERT OR REPLACE INTO marks VALUES ('written', ?)", (self._wall(),))
            db.executemany("INSERT OR REPLACE INTO ledger VALUES (?, ?, ?, ?)", rows)
            acknowledge([(confirmed_at, key) for key, _, _, confirmed_at in rows if confirmed_at is not None], db)
            db.executemany("DELETE FROM letters WHERE key = ? AND sink = ?", [row[:2] for row in rows])
            for sink, position in unwritten.positions.items():
                set_position(db, sink, position)

        try:
            self.commits.write(work, durable=False)
        except StorageError:
            return
        self._unwritten.remove(unwritten)
        self._condition.note_success()

    def prune(self, share: float = 1.0) -> None:
        # An index by age would take more time per event than all other work of the ledger. Keys are hashes, so equal
        # ranges of keys have equal numbers of rows: each call examines the next ranges, in short transactions.
        now = self._wall()
        with suppress(StorageError):  # a later call deletes these rows
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
        # The times that this process has written are moved, so that no age or delay changes by the jump.
        recent = self._wall() - secs - CONFIRMED_KEPT_SECS

        with suppress(StorageError):
            self.commits.write(
                lambda db: shift(db, secs, run=self._run, started_at=self._started_at, recent=recent), durable=False
            )
            self._started_at += secs
