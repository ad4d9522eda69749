"""Connections to a database: opened within a time limit, kept while they are good, cut when a call takes too long."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from math import inf
from typing import Any, Protocol, TypeVar

from vodpoller.sinks.sql.verdicts import NO_ANSWER, DatabaseError, Verdict

_T = TypeVar("_T")
Values = Mapping[str, object]


class Session(Protocol):
    """One connection. Its methods raise `DatabaseError` only; one thread at a time calls them, but for `cut`."""

    def begin(self, secs: float) -> None:
        """Begin a transaction, whose statements the database itself is to give up after that many seconds."""

    def query(self, sql: str, values: Values) -> list[tuple[Any, ...]]:
        """The rows of a query."""

    def run(self, sql: str, values: Values) -> int:
        """Run a statement; returns the number of rows that it changed. Rows that it brings are dropped."""

    def run_many(self, sql: str, rows: Sequence[Values]) -> None:
        """Run a statement once for each row."""

    def check(self, sql: str) -> None:
        """Have a statement read, not run."""

    def commit(self) -> None:
        """Returning means that the transaction is durable, as far as the database's settings make it so."""

    def rollback(self) -> None:
        """End the transaction, as if it had not been."""

    def cut(self) -> None:
        """End what another thread waits for, now; that thread gets an error. Raises nothing."""

    def close(self) -> None:
        """Close it. Raises nothing."""


class Sessions:
    """The connections of one sink.

    Args:
        connect: Opens one within a number of seconds; may take longer, and goes on in its thread then.
        monotonic: The clock of time limits, in seconds.
    """

    def __init__(self, connect: Callable[[float], Session], monotonic: Callable[[], float]) -> None:
        self._connect = connect
        self._monotonic = monotonic
        self._watch = _Watch(monotonic)
        self._lock = threading.Lock()
        self._idle: list[Session] = []
        self._busy: set[Session] = set()
        self._stale: set[Session] = set()
        self._closed = False

    def use(self, work: Callable[[Session, float], _T], ends_at: float) -> _T:
        """Do something with a connection.

        If one that was kept turns out to be broken, it is done again with a new one: `work` must be such that doing it
        twice does what doing it once does.

        Args:
            work: Gets the connection, and the seconds that are left. It leaves no transaction open.
            ends_at: Monotonic time at which the connection is cut.

        Raises:
            DatabaseError: It failed, or did not end in time.
        """
        kept = self._take()
        if kept is not None:
            try:
                return self._use(kept, work, ends_at)
            except DatabaseError as error:
                if error.verdict is not Verdict.CONNECTION or self._monotonic() >= ends_at:
                    raise
        return self._use(self._open(ends_at - self._monotonic()), work, ends_at)

    def forget(self) -> None:
        """Use none again of those that are open now."""
        with self._lock:
            idle, self._idle = self._idle, []
            self._stale |= self._busy
        for session in idle:
            session.close()

    def close(self) -> None:
        """Close those that are idle, and cut those that are in use. No other is opened."""
        with self._lock:
            self._closed = True
            busy = tuple(self._busy)
        self.forget()
        for session in busy:
            session.cut()
        self._watch.close()

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
        session = _within(lambda: self._connect(secs), secs)
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
                self._watch.begin(session, ends_at)
                done = work(session, secs)
            finally:
                was_cut = self._watch.end(session)
        except DatabaseError as error:
            if was_cut:
                raise DatabaseError(f"no answer within {secs:.3g} s", NO_ANSWER) from error
            is_good = error.verdict is not Verdict.CONNECTION
            if not is_good:
                self.forget()
            raise
        else:
            is_good = not was_cut
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


class _Watch:
    """Cuts connections whose time is over, for drivers that wait for an answer as long as it takes.

    Args:
        monotonic: The clock of time limits, in seconds.
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._changed = threading.Condition()
        self._ends_at: dict[Session, float] = {}
        self._cut: set[Session] = set()
        self._wakes_at = inf
        self._thread: threading.Thread | None = None
        self._closed = False

    def begin(self, session: Session, ends_at: float) -> None:
        """Cut a connection at a time, unless `end` comes first."""
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="time limits", daemon=True)
                self._thread.start()
            self._ends_at[session] = ends_at
            if ends_at < self._wakes_at:
                self._changed.notify()

    def end(self, session: Session) -> bool:
        """Leave a connection alone from now on. Returns whether it has been cut."""
        with self._changed:
            self._ends_at.pop(session, None)
            was_cut = session in self._cut
            self._cut.discard(session)
            return was_cut

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
                    self._cut.add(session)
                    session.cut()
                self._wakes_at = min(self._ends_at.values(), default=inf)
                self._changed.wait(None if self._wakes_at == inf else self._wakes_at - now)


def _within(connect: Callable[[], Session], secs: float) -> Session:
    """Look up names, connect and log in, none of which ends in time by itself; what comes too late is closed."""
    done: Future[Session] = Future()

    def run() -> None:
        try:
            session = connect()
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
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
