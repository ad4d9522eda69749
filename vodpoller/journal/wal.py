"""The journal's write-ahead log (WAL): it is kept small, and a warning is logged if that is not possible."""

import sqlite3
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from vodpoller.journal.group_commit import GroupCommit
from vodpoller.journal.place import BUSY_SECS
from vodpoller.telemetry import Scope

WAL_KEPT_BYTES: Final = 8 * 1024 * 1024  # SQLite's own checkpoints, at 4 MiB, keep it smaller if no process reads
WAL_LARGE_BYTES: Final = 64 * 1024 * 1024
WAL_RETRY_SECS: Final = 5.0
WAL_WAIT_SECS: Final = 0.1  # all writes wait meanwhile


def limit_wal(db: sqlite3.Connection) -> None:
    """Make a connection cut the WAL to `WAL_KEPT_BYTES` after it has transferred it into the file."""
    db.execute(f"PRAGMA journal_size_limit = {WAL_KEPT_BYTES}")


class Wal:
    """The WAL of an open journal.

    Args:
        path: The journal.
        commits: What writes it.
        read_lock: Held while this process reads it.
        telemetry: Destination of log lines.
        monotonic: The clock, in seconds.
    """

    def __init__(
        self,
        path: Path,
        *,
        commits: GroupCommit,
        read_lock: threading.Lock,
        telemetry: Scope,
        monotonic: Callable[[], float],
    ) -> None:
        self._path = path
        self._commits = commits
        self._read_lock = read_lock
        self._telemetry = telemetry
        self._monotonic = monotonic
        self._next_try = 0.0

    def shrink(self) -> None:
        """Cut the WAL if it is too long. SQLite lets it grow while another process is reading at each checkpoint."""
        if self._size_bytes() > WAL_KEPT_BYTES and self._monotonic() >= self._next_try:
            self._next_try = self._monotonic() + WAL_RETRY_SECS
            with self._commits.lock, self._read_lock, suppress(sqlite3.Error):
                try:
                    self._commits.db.execute(f"PRAGMA busy_timeout = {WAL_WAIT_SECS * 1000:.0f}")
                    self._commits.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                finally:
                    self._commits.db.execute(f"PRAGMA busy_timeout = {BUSY_SECS * 1000:.0f}")
            size_bytes = self._size_bytes()
            if size_bytes > WAL_LARGE_BYTES:
                self._telemetry.repeated(
                    "warning",
                    "wal.grown",
                    cause="wal",
                    path=f"{self._path}-wal",
                    size_bytes=size_bytes,
                    hint="another process reads the journal without a pause, so that the WAL cannot be cut:"
                    f" `fuser {self._path}` names the process",
                )
            else:
                self._telemetry.reset("wal")

    def _size_bytes(self) -> int:
        try:
            return self._path.with_name(f"{self._path.name}-wal").stat().st_size
        except OSError:
            return 0
