"""Connections to a database: opened within a time limit, reused while they work, aborted if a call takes too long."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from math import inf
from typing import Any, Protocol, TypeVar

from vodpoller.sinks.sql.verdicts import NO_ANSWER, DatabaseError, Verdict

_T = TypeVar("_T")
Values = Mapping[str, object]


class Session(Protocol):
    """One connection. Its methods raise `DatabaseError` only, and only `abort` may be called from another thread."""

    def begin(self, secs: float) -> None:
        """Begin a transaction. The database should cancel its statements after this number of seconds."""

    def query(self, sql: str, values: Values) -> list[tuple[Any, ...]]:
        """Run a query; returns its rows."""

    def run(self, sql: str, values: Values) -> int:
        """Run a statement; returns the number of rows that it changed. Result rows are discarded."""

    def run_many(self, sql: str, rows: Sequence[Values]) -> None:
        """Run a statement once for each row."""

    def check(self, sql: str) -> None:
        """Let the database parse a statement without running it."""

    def commit(self) -> None:
        """Commit. On return the transaction is durable, as far as the database's settings ensure it."""

    def rollback(self) -> None:
        """Undo and end the transaction."""

    def abort(self) -> None:
        """End a call of another thread immediately; that call raises an error. Raises nothing itself."""

    def close(self) -> None:
        """Close the connection. Raises nothing."""


class Sessions:
    """The connections of one sink.

    Args:
        connect: Opens a connection within a number of seconds. If it takes longer, it continues in its thread.
        monotonic: The clock for time limits, in seconds.
    """

    def __init__(self, connect: Callable[[float], Session], monotonic: Callable[[], float]) -> None:
        self._connect = connect
        self._monotonic = monotonic
        self._time_limits = _TimeLimits(monotonic)
        self._lock = threading.Lock()
        self._idle: list[Session] = []
        self._busy: set[Session] = set()
        self._stale: set[Session] = set()
        self._closed = False

    def use(self, work: Callable[[Session, float], _T], ends_at: float) -> _T:
        """Call a function with a connection.

        If a reused connection is broken, the function is called again with a new connection. So it must be idempotent.

        Args:
            work: The function. It gets the connection and the number of seconds left, and leaves no transaction open.
            ends_at: Monotonic time, in seconds, at which the connection is aborted.

        Raises:
            DatabaseError: The function failed, or did not end in time.
        """
        kept = self._take()
        if kept is not None:
            try:
                return self._use(kept, work, ends_at)
            except DatabaseError as error:
                if error.verdict is not Verdict.CONNECTION or self._monotonic() >= ends_at:
                    raise
        return self._use(self._open(ends_at - self._monotonic()), work, ends_at)

    def discard_all(self) -> None:
        """Do not use any of the open connections for a further call."""
        with self._lock:
            idle, self._idle = self._idle, []
            self._stale |= self._busy
        for session in idle:
            session.close()

    def close(self) -> None:
        """Close the idle connections, abort those in use, and open no others."""
        with self._lock:
            self._closed = True
            busy = tuple(self._busy)
        self.discard_all()
        for session in busy:
            session.abort()
        self._time_limits.close()

    def _take(self) -> Session | None:
        with self._lock:
            self._check_open()
            if not self._idle:
                return None
            session = self._idle.pop()
            self._busy.add(session)
            return session

    def _open(self, secs: float) -> Session:
        if secs <= 0:
            raise DatabaseError("no time was left to connect", NO_ANSWER)
        session = _connect_within(lambda: self._connect(secs), secs)
        with self._lock:
            if not self._closed:
                self._busy.add(session)
                return session
        session.close()
        raise DatabaseError("the sink is closed", NO_ANSWER)

    def _use(self, session: Session, work: Callable[[Session, float], _T], ends_at: float) -> _T:
        is_good = False
        secs = max(ends_at - self._monotonic(), 0.0)
        try:
            try:
                self._time_limits.begin(session, ends_at)
                done = work(session, secs)
            finally:
                was_aborted = self._time_limits.end(session)
        except DatabaseError as error:
            if was_aborted:
                raise DatabaseError(f"no answer within {secs:.3g} s", NO_ANSWER) from error
            is_good = error.verdict is not Verdict.CONNECTION
            if not is_good:
                self.discard_all()
            raise
        else:
            is_good = not was_aborted
            return done
        finally:
            self._give_back(session, is_good=is_good)

    def _give_back(self, session: Session, *, is_good: bool) -> None:
        with self._lock:
            self._busy.discard(session)
            is_good = is_good and not self._closed and session not in self._stale
            self._stale.discard(session)
            if is_good:
                self._idle.append(session)
                return
        session.close()

    def _check_open(self) -> None:
        if self._closed:
            raise DatabaseError("the sink is closed", NO_ANSWER)


class _TimeLimits:
    """Aborts connections whose time limit is over, since drivers may wait for an answer without a limit.

    Args:
        monotonic: The clock for time limits, in seconds.
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._changed = threading.Condition()
        self._ends_at: dict[Session, float] = {}
        self._aborted: set[Session] = set()
        self._wakes_at = inf
        self._thread: threading.Thread | None = None
        self._closed = False

    def begin(self, session: Session, ends_at: float) -> None:
        """Abort a connection at a monotonic time, unless `end` is called before."""
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="time limits", daemon=True)
                self._thread.start()
            self._ends_at[session] = ends_at
            if ends_at < self._wakes_at:
                self._changed.notify()

    def end(self, session: Session) -> bool:
        """Do not abort the connection any more. Returns whether it has been aborted."""
        with self._changed:
            self._ends_at.pop(session, None)
            was_aborted = session in self._aborted
            self._aborted.discard(session)
            return was_aborted

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while not self._closed:
                now = self._monotonic()
                for session in [session for session, ends_at in self._ends_at.items() if ends_at <= now]:
                    del self._ends_at[session]
                    self._aborted.add(session)
                    session.abort()
                self._wakes_at = min(self._ends_at.values(), default=inf)
                self._changed.wait(None if self._wakes_at == inf else self._wakes_at - now)


def _connect_within(connect: Callable[[], Session], secs: float) -> Session:
    """Connect in another thread, since neither name lookup nor login has a time limit. A late connection is closed."""
    done: Future[Session] = Future()

    def run() -> None:
        try:
            session = connect()
        except Exception as error:  # noqa: BLE001 - raised in the waiting thread
            if done.set_running_or_notify_cancel():
                done.set_exception(error)
            return
        if done.set_running_or_notify_cancel():
            done.set_result(session)
        else:
            session.close()

    threading.Thread(target=run, name="connect", daemon=True).start()
    try:
        return done.result(secs)
    except TimeoutError:
        if done.cancel():
            raise DatabaseError(f"no connection within {secs:.3g} s", NO_ANSWER) from None
        return done.result()
