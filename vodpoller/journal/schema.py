"""The journal's tables, and the numbered migration steps for older journals.

A step is never changed once it is released, since there are journals that were made with it. A change of the tables is
a new step at the end. (The tables call stored events `letters`.)
"""

import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Final

from vodpoller.errors import UnusableJournalError
from vodpoller.events.codec import decode_json
from vodpoller.events.identity import has_own_id

ROW_OVERHEAD_BYTES: Final = 512
OLDEST_READABLE: Final = 1  # all later versions have the columns that commands use
_TABLES: Final = frozenset({"ledger", "letters", "totals", "positions", "marks"})

_STEPS: Final[Sequence[Sequence[str]]] = (
    # 1: version 0.1. What a stored event takes of journal.max_bytes: its body and ROW_OVERHEAD_BYTES.
    (
        """CREATE TABLE ledger (
            key BLOB NOT NULL, sink TEXT NOT NULL, accepted_at REAL NOT NULL, confirmed_at REAL, PRIMARY KEY (key, sink)
        ) WITHOUT ROWID""",
        """CREATE TABLE letters (
            id INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB NOT NULL, sink TEXT NOT NULL, state TEXT NOT NULL,
            reason TEXT NOT NULL, error TEXT NOT NULL, attempts INTEGER NOT NULL, stored_at REAL NOT NULL,
            due_at REAL NOT NULL, confirmed INTEGER NOT NULL DEFAULT 0, run TEXT NOT NULL, source TEXT NOT NULL,
            sub_app_id INTEGER, event_type TEXT NOT NULL, body BLOB NOT NULL, UNIQUE (key, sink)
        )""",
        "CREATE INDEX letters_due ON letters (state, sink, due_at)",
        "CREATE TABLE totals (letters_bytes INTEGER NOT NULL)",
        "INSERT INTO totals VALUES (0)",
        """CREATE TRIGGER letters_in AFTER INSERT ON letters BEGIN
            UPDATE totals SET letters_bytes = letters_bytes + length(NEW.body) + 512;
        END""",
        """CREATE TRIGGER letters_out AFTER DELETE ON letters BEGIN
            UPDATE totals SET letters_bytes = letters_bytes - length(OLD.body) - 512;
        END""",
        """CREATE TABLE positions (
            sink TEXT PRIMARY KEY, inode INTEGER NOT NULL, offset_bytes INTEGER NOT NULL
        ) WITHOUT ROWID""",
        "CREATE TABLE marks (name TEXT PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID",
    ),
    # 2: the size of dead letters is counted separately, since it has a limit of its own
    (
        "ALTER TABLE totals ADD COLUMN dead_bytes INTEGER NOT NULL DEFAULT 0",
        """UPDATE totals SET dead_bytes = (
            SELECT coalesce(sum(length(body) + 512), 0) FROM letters WHERE state = 'dead'
        )""",
        "DROP TRIGGER letters_in",
        "DROP TRIGGER letters_out",
        """CREATE TRIGGER letters_in AFTER INSERT ON letters BEGIN
            UPDATE totals SET letters_bytes = letters_bytes + length(NEW.body) + 512,
                dead_bytes = dead_bytes + (NEW.state = 'dead') * (length(NEW.body) + 512);
        END""",
        """CREATE TRIGGER letters_out AFTER DELETE ON letters BEGIN
            UPDATE totals SET letters_bytes = letters_bytes - length(OLD.body) - 512,
                dead_bytes = dead_bytes - (OLD.state = 'dead') * (length(OLD.body) + 512);
        END""",
        """CREATE TRIGGER letters_moved AFTER UPDATE OF state ON letters WHEN OLD.state <> NEW.state BEGIN
            UPDATE totals SET dead_bytes = dead_bytes + (NEW.state = 'dead') * (length(NEW.body) + 512)
                - (OLD.state = 'dead') * (length(OLD.body) + 512);
        END""",
    ),
    # 3: reasons have the same names as in the log, in `status` and in the README
    (
        """UPDATE letters SET reason = CASE reason
            WHEN 'unrouted' THEN 'no_route' WHEN 'errored' THEN 'sink_failed' ELSE 'out_of_time'
        END WHERE reason IN ('unrouted', 'errored', 'unsettled')""",
    ),
    # 4: events without an id of their own have a key for each occurrence. Events that were stored before keep their
    # key, which is their content key.
    (
        """CREATE TABLE occurrences (
            id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, content_key BLOB NOT NULL, source TEXT NOT NULL,
            lease_ends_at REAL NOT NULL, acknowledged_at REAL
        )""",
        "CREATE INDEX occurrences_of_content ON occurrences (content_key)",
        """INSERT INTO occurrences (key, content_key, source, lease_ends_at, acknowledged_at)
            SELECT key, key, max(source), max(stored_at), CASE WHEN max(confirmed) THEN max(stored_at) END FROM letters
            WHERE NOT body_has_own_id(body) GROUP BY key ORDER BY min(id)""",
    ),
    # 5: commands read stored events of one state in portions, in the order of their numbers. (A journal that was
    # rescued with sqlite3's `.dump` may have the index but no version number.)
    ("CREATE INDEX IF NOT EXISTS letters_of_state ON letters (state)",),
)
SCHEMA_VERSION: Final = len(_STEPS)


def refuse_later_version(path: Path, version: int) -> None:
    """Refuse a journal that a later vodpoller wrote; nothing in it is changed.

    Args:
        path: The journal.
        version: The version of the journal.

    Raises:
        UnusableJournalError: The version is later than this program's.
    """
    if version > SCHEMA_VERSION:
        raise UnusableJournalError(
            f"{path}: the journal is of version {version}, and this vodpoller knows versions up to {SCHEMA_VERSION}:"
            " install the vodpoller that wrote it, or a later one (or put the copy from before its update,"
            f" {path.name}.v{SCHEMA_VERSION} if there is one, in its place: what was stored since then is not in it)"
        )


def version_of(db: sqlite3.Connection, path: Path) -> int:
    """The version of a journal, 0 for a file without tables.

    Args:
        db: The open file.
        path: Its name.

    Raises:
        UnusableJournalError: It is a database of another program.
        sqlite3.Error: It cannot be read.
    """
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version == 0:
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables >= _TABLES:  # sqlite3's `.dump`, which can rescue a corrupt file, leaves the number out
            if "occurrences" in tables:
                return 4
            columns = {row[1] for row in db.execute("PRAGMA table_info(totals)")}
            return 2 if "dead_bytes" in columns else 1
        if tables:
            raise UnusableJournalError(
                f"{path}: this is not a journal of vodpoller but another program's database: set journal.path to a file"
                " that does not exist yet (for example /var/lib/vodpoller/journal.db)"
            )
    return int(version)


def migrate(db: sqlite3.Connection, path: Path) -> Path | None:
    """Migrate a journal to this program's version, in one transaction; an older journal is copied first.

    Args:
        db: The open file. No other daemon may have it.
        path: Its name; the copy is `PATH.vN`, where N is the old version.

    Returns:
        The copy, None if none was needed.

    Raises:
        UnusableJournalError: It is of a later version, or of another program.
        sqlite3.Error: It cannot be read or written; the journal is unchanged.
        OSError: The copy cannot be made; the journal is unchanged.
    """
    version = version_of(db, path)
    refuse_later_version(path, version)
    if version == SCHEMA_VERSION and db.execute("PRAGMA user_version").fetchone()[0]:
        return None
    db.create_function("body_has_own_id", 1, _body_has_own_id, deterministic=True)
    db.execute("BEGIN IMMEDIATE")
    try:
        copy = _copy(path, version) if 0 < version < SCHEMA_VERSION else None
        for step in _STEPS[version:]:
            for statement in step:
                db.execute(statement)
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        db.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise
    return copy


def _body_has_own_id(body: bytes) -> bool:
    try:
        content = decode_json(body.decode())
    except ValueError:  # the body of a malformed event
        return False
    return isinstance(content, dict) and has_own_id(content)


def correct_totals(db: sqlite3.Connection) -> None:
    """Correct the totals in a file that has lost rows, or whose rows were rescued without its triggers.

    Raises:
        sqlite3.Error: It cannot be read or written.
    """
    (found,) = db.execute(
        "SELECT coalesce(sum(length(body) + ?), 0), coalesce(sum((state = 'dead') * (length(body) + ?)), 0)"
        " FROM letters",
        (ROW_OVERHEAD_BYTES, ROW_OVERHEAD_BYTES),
    ).fetchall()
    if db.execute("SELECT letters_bytes, dead_bytes FROM totals").fetchall() != [found]:
        db.execute("BEGIN IMMEDIATE")
        db.execute("DELETE FROM totals")
        db.execute("INSERT INTO totals (letters_bytes, dead_bytes) VALUES (?, ?)", found)
        db.execute("COMMIT")


def _copy(path: Path, version: int) -> Path:
    """Copy the whole journal, with the content of its WAL, to a file beside it; returns the copy."""
    copy = path.with_name(f"{path.name}.v{version}")
    unfinished = copy.with_name(f"{copy.name}.unfinished")
    fd = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
    try:
        # Another connection reads it, since ours is in the transaction that blocks writers.
        with closing(sqlite3.connect(path.absolute())) as source, closing(sqlite3.connect(unfinished)) as target:
            source.backup(target)
        os.fsync(fd)
        unfinished.replace(copy)
        _sync_folder(copy.parent)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise
    finally:
        os.close(fd)
    return copy


def _sync_folder(folder: Path) -> None:
    """Sync a folder if the file system can: no promise depends on the copy, which is for a person."""
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
