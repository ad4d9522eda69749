"""The SQL of the journal: functions that run statements in one transaction, on the connection that has begun it.

They do not use threads, locks, clocks or anything in memory.
"""

import sqlite3
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Final

from vodpoller.journal.contract import CONFIRMED_KEPT_SECS, DUE_HORIZON_SECS, Letter, Position
from vodpoller.journal.schema import ROW_OVERHEAD_BYTES
from vodpoller.settlement import Reason

INODES: Final = 2**64
KEYS_PER_QUERY: Final = 500
_ROWS_PER_STATEMENT: Final = 16

LETTERS_BYTES: Final = "SELECT letters_bytes FROM totals"
_ACCEPTED: Final = (
    "SELECT 1 FROM ledger WHERE key = :key AND sink = :sink AND (confirmed_at IS NULL OR confirmed_at >= :known_since)"
)
_INSERT_LETTER: Final = (
    "INSERT OR IGNORE INTO letters (key, sink, state, reason, error, attempts, stored_at, due_at, run, source,"
    " sub_app_id, event_type, body) SELECT :key, :sink, :state, :reason, :error, :attempts, :now, :due_at, :run,"
    f" :source, :sub_app_id, :event_type, :body WHERE NOT EXISTS ({_ACCEPTED})"
)
# The occurrence of a line in a sink's file: one that VOD may deliver again, or that is pending for the sink.
_OCCURRENCE_OF_LINE: Final = (
    "SELECT key FROM occurrences WHERE content_key = ? AND NOT EXISTS (SELECT 1 FROM ledger WHERE ledger.key ="
    " occurrences.key AND ledger.sink = ?) AND (acknowledged_at IS NULL OR EXISTS (SELECT 1 FROM letters WHERE"
    " letters.key = occurrences.key AND letters.sink = ? AND state = 'pending')) ORDER BY id LIMIT 1"
)
_IS_HELD: Final = f"SELECT EXISTS ({_ACCEPTED}) OR EXISTS (SELECT 1 FROM letters WHERE key = :key AND sink = :sink)"


def insert_accepted(
    db: sqlite3.Connection,
    sink: str,
    rows: Sequence[tuple[bytes, str, float]],
    stored: Sequence[bytes],
    position: Position | None,
) -> None:
    """Enter accepted pairs, move the mark of the sink's file, and delete what is stored for them.

    Args:
        db: In a transaction.
        sink: The sink's name.
        rows: Key, sink and time of each pair.
        stored: Keys of events that may be stored for this sink.
        position: The present end of its file; None if the mark does not move.
    """
    # REPLACE: an old row, whose event was confirmed more than ten minutes ago, is replaced. One statement for many
    # rows, since Python's sqlite3 releases the interpreter's lock for each statement.
    for first in range(0, len(rows), _ROWS_PER_STATEMENT):
        portion = rows[first : first + _ROWS_PER_STATEMENT]
        values = ",".join(["(?, ?, ?, NULL)"] * len(portion))
        db.execute(f"INSERT OR REPLACE INTO ledger VALUES {values}", [*chain.from_iterable(portion)])
    for first in range(0, len(stored), KEYS_PER_QUERY):
        _delete_accepted(db, sink, stored[first : first + KEYS_PER_QUERY])
    set_position(db, sink, position)


def _delete_accepted(db: sqlite3.Connection, sink: str, keys: Sequence[bytes]) -> None:
    """Delete what is stored for accepted pairs; if the event was confirmed, this is entered in their ledger rows."""
    # The list is filled with its last key to a power of two, so that there are few different statements to compile.
    filled = [*keys, *[keys[-1]] * (2 ** (len(keys) - 1).bit_length() - len(keys))]
    of_keys = f"sink = ? AND key IN ({','.join('?' * len(filled))})"
    db.execute(
        "UPDATE ledger SET confirmed_at = accepted_at WHERE (key, sink) IN"
        f" (SELECT key, sink FROM letters WHERE {of_keys} AND confirmed)",
        (sink, *filled),
    )
    db.execute(f"DELETE FROM letters WHERE {of_keys}", (sink, *filled))


def insert_recovered(db: sqlite3.Connection, sink: str, keys: Sequence[bytes], now: float) -> None:
    """Enter pairs that were found in a sink's file; a pair that is in the ledger stays as it is."""
    db.executemany(
        # A pair that was confirmed more than ten minutes ago belongs to an earlier event with the same content.
        "INSERT INTO ledger VALUES (?, ?, ?, NULL) ON CONFLICT DO UPDATE"
        " SET accepted_at = excluded.accepted_at, confirmed_at = NULL WHERE confirmed_at < ?",
        [(key, sink, now, now - CONFIRMED_KEPT_SECS) for key in keys],
    )
    if letters_bytes(db):
        db.executemany("DELETE FROM letters WHERE key = ? AND sink = ?", [(key, sink) for key in keys])


def occurrence_of_line(db: sqlite3.Connection, sink: str, content_keys: Iterable[bytes]) -> list[bytes]:
    """Find the occurrence of a line in a sink's file; returns its key, or an empty list if there is none.

    Args:
        db: In a transaction.
        sink: The sink's name.
        content_keys: The content keys that the event of the line may have.
    """
    for content_key in content_keys:
        if row := db.execute(_OCCURRENCE_OF_LINE, (content_key, sink, sink)).fetchone():
            return [row[0]]
    return []


def acknowledge(occurrences: Sequence[tuple[float, bytes]], db: sqlite3.Connection) -> None:
    """Record that VOD no longer has these occurrences.

    Args:
        occurrences: For each, the time in seconds since 1970, and the key.
        db: In a transaction.
    """
    db.executemany("UPDATE occurrences SET acknowledged_at = ? WHERE key = ?", occurrences)


def set_position(db: sqlite3.Connection, sink: str, position: Position | None) -> None:
    """Move the mark of a sink's file, if there is a position."""
    if position is not None:
        # SQLite's integers are signed; inodes of some file systems use all 64 bits.
        inode = position.inode if position.inode < INODES // 2 else position.inode - INODES
        db.execute("INSERT OR REPLACE INTO positions VALUES (?, ?, ?)", (sink, inode, position.offset_bytes))


def row_of(letter: Letter, *, now: float, run: str) -> dict[str, Any]:
    """The row of an event that is to be stored.

    Args:
        letter: The event, and the sink that lacks it.
        now: The time, in seconds since 1970.
        run: Identifies the process that stores it.
    """
    return {
        "key": letter.event.key,
        "sink": letter.sink,
        "state": "dead" if letter.dead else "pending",
        "reason": letter.reason,
        "error": short_text(letter.error),
        "attempts": letter.attempts,
        "now": now,
        "due_at": now + min(letter.due_in_secs, DUE_HORIZON_SECS),
        "run": run,
        "source": letter.event.source,
        "sub_app_id": letter.event.sub_app_id,
        "event_type": short_text(letter.event.type),
        "body": letter.event.body,
        "known_since": now - CONFIRMED_KEPT_SECS,
    }


def insert_letters(
    db: sqlite3.Connection, wanted: Sequence[tuple[Letter, Mapping[str, Any]]], *, max_bytes: int
) -> list[Letter]:
    """Insert the events for which there is room, except those in the ledger. No other thread can take the same room.

    Args:
        db: In a transaction.
        wanted: The events that are to be stored, each with its row.
        max_bytes: Maximum size of all stored events.

    Returns:
        The events that do not fit and are not in the journal already.
    """
    room = max_bytes - letters_bytes(db)
    dead_room = max_bytes // 2 - dead_bytes(db)
    if sum(size_of(letter) for letter, _ in wanted) <= room and (
        sum(size_of(letter) for letter, _ in wanted if letter.dead) <= dead_room
    ):
        db.executemany(_INSERT_LETTER, [row for _, row in wanted])
        return []
    refused = []
    for letter, row in sorted(wanted, key=lambda pair: pair[0].dead):  # pending ones get the room first
        size = size_of(letter)
        if size > room or (letter.dead and size > dead_room):
            if not db.execute(_IS_HELD, row).fetchone()[0]:
                refused.append(letter)
        elif db.execute(_INSERT_LETTER, row).rowcount:
            room -= size
            dead_room -= size if letter.dead else 0
    return refused


def mark_removed(sinks: Collection[str], db: sqlite3.Connection) -> None:
    """Set the reason `sink_removed` for pending events of all other sinks, and reset it for events of these sinks."""
    if not letters_bytes(db):
        return
    places = ",".join("?" * len(sinks))
    db.execute(
        f"UPDATE letters SET reason = ? WHERE state = 'pending' AND sink NOT IN ({places})",
        (Reason.SINK_REMOVED.value, *sinks),
    )
    db.execute(
        f"UPDATE letters SET reason = ? WHERE reason = ? AND sink IN ({places})",
        (Reason.OUT_OF_TIME.value, Reason.SINK_REMOVED.value, *sinks),
    )


def delete_slice(
    db: sqlite3.Connection, first: int, *, now: float, confirmed_before: float, before: float
) -> tuple[list[bytes], int]:
    """Delete what the ledger no longer needs, among keys with a given first byte. Times are in seconds since 1970.

    Args:
        db: In a transaction.
        first: The first byte of the keys.
        now: The present time.
        confirmed_before: Pairs and occurrences that were confirmed before this time are deleted.
        before: Pairs that were accepted before this time, and occurrences whose last lease ended before it, are deleted
            if they were never confirmed.

    Returns:
        The keys of the deleted occurrences, and the number of deleted pairs that had no occurrence.
    """
    limits = {
        "first": bytes([first]),
        "last": bytes([first]) + b"\xff" * 32,
        "confirmed_before": confirmed_before,
        "future": now + 60,  # times in the future were written before the clock was set back
        "before": before,
    }
    over = db.execute(
        "DELETE FROM occurrences WHERE key >= :first AND key <= :last AND (acknowledged_at < :confirmed_before"
        " OR acknowledged_at > :future OR (acknowledged_at IS NULL AND lease_ends_at < :before))"
        " AND NOT EXISTS (SELECT 1 FROM letters WHERE letters.key = occurrences.key) RETURNING key",
        limits,
    ).fetchall()
    db.executemany("DELETE FROM ledger WHERE key = ?", over)
    deleted = db.execute(
        "DELETE FROM ledger WHERE key >= :first AND key <= :last AND (confirmed_at < :confirmed_before"
        " OR confirmed_at > :future OR (confirmed_at IS NULL AND accepted_at < :before))"
        " AND NOT EXISTS (SELECT 1 FROM occurrences WHERE occurrences.key = ledger.key)",
        limits,
    ).rowcount
    return [key for (key,) in over], deleted


def shift(db: sqlite3.Connection, secs: float, *, run: str, started_at: float, recent: float) -> None:
    """Move the times that a process has written.

    Args:
        db: In a transaction.
        secs: The number of seconds by which they are moved.
        run: Identifies the process.
        started_at: When it started, by the clock before the jump, in seconds since 1970.
        recent: What was confirmed before this time stays unchanged; also by the clock before the jump.
    """
    db.execute(
        "UPDATE letters SET stored_at = stored_at + ?, due_at = due_at + ? WHERE run = ?",
        (secs, secs, run),
    )
    db.execute(
        "UPDATE ledger SET accepted_at = accepted_at + ?, confirmed_at = confirmed_at + ?"
        " WHERE accepted_at >= ? AND (confirmed_at IS NULL OR confirmed_at >= ?)",
        (secs, secs, started_at, recent),
    )
    db.execute(
        "UPDATE occurrences SET lease_ends_at = lease_ends_at + ?, acknowledged_at = acknowledged_at + ?"
        " WHERE lease_ends_at >= ? AND (acknowledged_at IS NULL OR acknowledged_at >= ?)",
        (secs, secs, started_at, recent),
    )


def size_of(letter: Letter) -> int:
    """The size of a stored event, as it counts for `max_bytes`."""
    return len(letter.event.body) + ROW_OVERHEAD_BYTES


def letters_bytes(db: sqlite3.Connection) -> int:
    """The size of all stored events. Triggers keep it up to date, whichever program writes."""
    (size,) = db.execute(LETTERS_BYTES).fetchone()
    return int(size)


def dead_bytes(db: sqlite3.Connection) -> int:
    """The size of the dead letters."""
    (size,) = db.execute("SELECT dead_bytes FROM totals").fetchone()
    return int(size)


def short_text(text: str) -> str:
    """The text as a TEXT column can hold it: without lone surrogates, and with 2,000 characters at most."""
    return text[:2000].encode(errors="replace").decode()
