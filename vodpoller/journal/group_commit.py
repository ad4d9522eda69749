"""Group commit: one transaction writes for all threads that wait."""

import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from vodpoller.errors import StorageError
from vodpoller.journal.place import is_corrupt

DEFERRED_MAX: Final = 1000

Work = Callable[[sqlite3.Connection], object]


class _Write:
    """Work for the next transaction.

    Args:
        work: The function that writes.
        durable: The transaction must survive a loss of power.
        deferred: No thread waits for it. If it fails for a reason that may pass, the next transaction does it.
        on_end: Called when it is written, or when it can never be written.
    """

    __slots__ = ("deferred", "done", "durable", "error", "on_end", "work")

    def __init__(
        self, work: Work, *, durable: bool, deferred: bool = False, on_end: Callable[[], None] | None = None
    ) -> None:
        self.work = work
        self.durable = durable
        self.deferred = deferred
        self.on_end = on_end
        self.done = False
        self.error: Exception | None = None


class GroupCommit:
    """The writing side of a journal. The first of the waiting threads writes for all.

    Args:
        db: The connection that writes.
        on_failure: Called with the error of each failed write that a caller waited for, and with each error that shows
            that the file is corrupt.
        on_commit: Called with the duration of each transaction, in seconds.

    Attributes:
        db: The connection, to be used only while `lock` is held.
        lock: Held during each transaction.
    """

    def __init__(
        self,
        db: sqlite3.Connection,
        *,
        on_failure: Callable[[Exception], None],
        on_commit: Callable[[float], None] = lambda _secs: None,
    ) -> None:
        self.db = db
        self.lock = threading.Lock()
        self._on_failure = on_failure
        self._on_commit = on_commit
        self._queue: list[_Write] = []
        self._queue_lock = threading.Lock()
        self._is_full: bool | None = None  # whether `PRAGMA synchronous` is FULL; None before it is set

    @property
    def waiting(self) -> int:
        """Number of writes that wait for the next transaction."""
        return len(self._queue)

    def write(self, work: Work, *, durable: bool) -> None:
        """Do the work in a transaction, together with the work of other threads.

        Args:
            work: The function that writes.
            durable: Whether it must survive a loss of power when this returns.

        Raises:
            StorageError: It failed, and nothing of it is in the file; `on_failure` was called.
        """
        mine = _Write(work, durable=durable)
        with self._queue_lock:
            self._queue.append(mine)
        with self.lock:
            if not mine.done:
                self._commit_queue()
        if not mine.done:  # an exception ended the thread that wrote for all
            raise StorageError("the journal was not written")
        if mine.error is not None:
            self._on_failure(mine.error)
            raise StorageError(f"the journal cannot be written: {mine.error}") from mine.error

    def defer(self, work: Work, on_end: Callable[[], None] | None = None) -> None:
        """Do the work in the next transaction that succeeds: for writes whose loss only causes work later.

        Args:
            work: The function that writes.
            on_end: Called when it is written, or when it can never be written.
        """
        with self._queue_lock:
            self._queue.append(_Write(work, durable=False, deferred=True, on_end=on_end))

    def _commit_queue(self) -> None:
        with self._queue_lock:
            batch, self._queue = self._queue, []
        again: list[_Write] = []
        try:
            if not self._commit(batch) and len(batch) > 1:
                for write in batch:  # a write that fails must not make the others fail
                    self._commit([write])
            failed = [write for write in batch if isinstance(write.error, sqlite3.OperationalError)]
            again = [write for write in failed if write.deferred][:DEFERRED_MAX]
        finally:
            if again:
                with self._queue_lock:
                    self._queue = [*again, *self._queue]
            for write in set(batch).difference(again):
                if write.on_end is not None:
                    write.on_end()

    def _commit(self, batch: Sequence[_Write]) -> bool:
        """Commit writes in one transaction. Returns False if one of them may have made it fail.

        If the transaction cannot begin, for example because another process locks the file, all writes fail, and it
        returns True: writing them one by one would not help.
        """
        has_begun = False
        began_at = time.monotonic()
        try:
            durable = any(write.durable for write in batch)
            if durable != self._is_full:
                self.db.execute("PRAGMA synchronous = FULL" if durable else "PRAGMA synchronous = NORMAL")
                self._is_full = durable
            self.db.execute("BEGIN IMMEDIATE")
            has_begun = True
            for write in batch:
                write.work(self.db)
            self.db.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - after any exception, no caller may believe that its row was written
            with suppress(sqlite3.Error):
                self.db.execute("ROLLBACK")
            if is_corrupt(error):  # reported here, since no caller reports the failure of a deferred write
                self._on_failure(error)
            for write in batch:
                write.error, write.done = error, True
            return not has_begun
        self._on_commit(time.monotonic() - began_at)
        for write in batch:
            write.error, write.done = None, True
        return True
