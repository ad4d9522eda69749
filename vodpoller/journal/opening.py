"""Opening a journal in SQLite: it is locked, made private, migrated to this version, and tested."""

import os
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vodpoller.journal.place import (
    cannot_make,
    cannot_open,
    check_place,
    lock_journal,
    make_folder,
    make_private,
)
from vodpoller.journal.schema import correct_totals, migrate
from vodpoller.journal.wal import limit_wal
from vodpoller.logs import Logger

QUICK_CHECK_BYTES: Final = 64 * 1024 * 1024  # about a tenth of a second

Connect = Callable[[Path], sqlite3.Connection]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """An open journal file, which no other daemon has.

    Args:
        lock_fd: The descriptor that holds its lock.
        writer: The connection that writes.
        reader: The connection that reads.
        occurrences: Key, content key, source and end of the last lease (in seconds since 1970) of each occurrence that
            VOD may deliver again, the oldest first.
    """

    lock_fd: int
    writer: sqlite3.Connection
    reader: sqlite3.Connection
    occurrences: Sequence[tuple[bytes, bytes, str, float]]


def open_journal(path: Path, *, log: Logger, connect: Connect, now: Callable[[], float]) -> Opened:
    """Open a journal's file; make it and its folder if they are missing.

    Args:
        path: The file.
        log: Destination of a log line if the journal was of an earlier version.
        connect: Opens a connection of SQLite; called twice, for writing and for reading.
        now: The clock, in seconds since 1970.

    Raises:
        UnusableJournalError: It is corrupt, of a later version, or in a place where no journal can be.
        JournalError: Another process has it, or it cannot be opened or written now.
    """
    with ExitStack() as opening:
        check_place(path)
        make_folder(path.parent, log)
        lock_fd = lock_journal(path)
        opening.callback(os.close, lock_fd)
        make_private(path)
        try:
            writer = connect(path)
            opening.callback(writer.close)
            copy = migrate(writer, path)
            _prepare(writer, path, now())
            occurrences = writer.execute(
                "SELECT key, content_key, source, lease_ends_at FROM occurrences WHERE acknowledged_at IS NULL"
                " ORDER BY id"
            ).fetchall()
            reader = connect(path)
            opening.callback(reader.close)
        except sqlite3.Error as error:
            raise cannot_open(path, error) from error
        except OSError as error:
            raise cannot_make(path, error, "cannot be copied before it is migrated to this version") from error
        opening.pop_all()
    if copy is not None:
        log.info("journal.migrated", path=str(path), copy=str(copy))
    return Opened(lock_fd=lock_fd, writer=writer, reader=reader, occurrences=occurrences)


def _prepare(writer: sqlite3.Connection, path: Path, now: float) -> None:
    writer.execute("PRAGMA journal_mode = WAL")
    limit_wal(writer)
    if path.stat().st_size <= QUICK_CHECK_BYTES:
        ((verdict,), *_) = writer.execute("PRAGMA quick_check(1)").fetchall()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        correct_totals(writer)
    for table in ("ledger", "letters", "totals", "positions", "marks", "occurrences"):
        writer.execute(f"SELECT * FROM {table} LIMIT 1").fetchall()
    # This write shows now, not at the first event, whether the file is read-only or the disk is full.
    writer.execute("INSERT OR REPLACE INTO marks VALUES ('started', ?)", (now,))
