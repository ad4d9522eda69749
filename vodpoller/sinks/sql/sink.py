"""The sink that all databases have in common.

A transaction asks which of its events are known (by the primary key of the table, or by the inbox), and writes the
others. So it may be carried out any number of times: if the answer to a COMMIT is lost, the repetition finds out.
"""

import threading
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import ClassVar, Final, TypeVar

from vodpoller.errors import ConfigError, PartialFailureError, RejectedError, TransientError
from vodpoller.events.event import Event
from vodpoller.events.snapshots import file_id_of, task_id_of
from vodpoller.sinks.contract import Doubt, Sink, SinkContext
from vodpoller.sinks.formats import encode
from vodpoller.sinks.sql.config import SqlConfig
from vodpoller.sinks.sql.dialect import COLUMNS, INBOX, PRUNED_AT_ONCE, Dialect
from vodpoller.sinks.sql.sessions import Session, Sessions, Values
from vodpoller.sinks.sql.verdicts import NO_TABLE, DatabaseError, Verdict

SqlConfigT = TypeVar("SqlConfigT", bound=SqlConfig)

_PRUNE_EACH_SECS: Final = 600.0
_ABSENT: Final = frozenset({NO_TABLE, "42S02"})
_INBOX_COLUMNS: Final = ("key", "sink")
_NOT_IN_TEXT: Final = {
    0: "\N{REPLACEMENT CHARACTER}",
    **dict.fromkeys(range(0xD800, 0xE000), "\N{REPLACEMENT CHARACTER}"),
}


class SqlSink(Sink[SqlConfigT]):
    """Writes a row for each event, or runs a statement for it, exactly once.

    Args:
        name: Of the sink.
        config: Its settings.
        context: The log and the clocks; its wall clock is the time in `received_at`.
    """

    dialect: Dialect
    holds_nul: ClassVar[bool] = True

    def __init__(self, name: str, config: SqlConfigT, context: SinkContext) -> None:
        super().__init__(name, config, context)
        self.concurrency = config.concurrency
        self.batch_events = config.batch_max_events
        self.timeout_secs = config.timeout_secs
        self._sessions = Sessions(self.connect, context.monotonic)
        self._lock = threading.Lock()
        self._must_make_table = config.create_table
        self._prune_at = context.monotonic()
        self._remembers_in = config.table if config.statement is None else INBOX
        self._columns = COLUMNS if config.statement is None else _INBOX_COLUMNS
        self._insert = self.dialect.insert(self._remembers_in, self._columns)

    @abstractmethod
    def connect(self, secs: float) -> Session:
        """Open a connection.

        Args:
            secs: Seconds that are left for it.

        Raises:
            DatabaseError: It cannot be opened.
        """

    @abstractmethod
    def frailties(self, session: Session) -> list[str]:
        """What of the database's settings may lose a commit at a loss of power."""

    @classmethod
    def probe(cls, name: str, config: SqlConfigT, context: SinkContext) -> str:
        """Whether the database lets in, has the table, and understands the statement. Nothing is written or made."""
        sink = cls(name, config, context)
        try:
            return sink._sessions.use(lambda session, _: sink._look(session), context.monotonic() + config.timeout_secs)
        except DatabaseError as error:
            raise ConfigError([f"sinks.{name}: {sink._said(error)}"]) from None
        finally:
            sink.close()

    def examine(self, event: Event) -> None:
        """Whether its body is one that a column of text can hold. Only what could never be read may not be."""
        if not event.content and self.config.format != "callback":
            return  # it is in the document as JSON or as base64
        try:
            event.body.decode()
        except UnicodeDecodeError:
            raise RejectedError("the body is not UTF-8, so that no column of text can hold it") from None
        if b"\0" in event.body and not self.holds_nul:
            raise RejectedError("the body holds a raw NUL, which no column of text of this database can hold")

    def deliver(self, events: Sequence[Event], timeout_secs: float) -> None:
        """Write the events in one transaction; if it is refused because of one of them, each in its own."""
        ends_at = self.context.monotonic() + timeout_secs
        rows, failures = self._rows(events)
        try:
            self._write(list(rows.values()), ends_at)
        except DatabaseError as error:
            if error.verdict in (Verdict.CONNECTION, Verdict.ALL_LATER):
                raise TransientError(self._said(error)) from None
            failures |= self._write_singly(rows, ends_at)
        if len(events) == 1 and failures:
            raise failures[0]
        if failures:
            raise PartialFailureError(failures)
        self._prune_if_due(ends_at)

    def reopen(self) -> None:
        """Connect anew from the next call on, with the DSN as it has been read."""
        self._sessions.forget()

    def close(self) -> None:
        """Close the connections; a call that waits for the database ends."""
        self._sessions.close()

    # --- writing ---

    def _rows(self, events: Sequence[Event]) -> tuple[dict[int, Values], dict[int, Exception]]:
        """The values of each event, and what cannot be a text at all; both by position."""
        now = self.dialect.moment(datetime.fromtimestamp(self.context.wall(), UTC))
        rows: dict[int, Values] = {}
        failures: dict[int, Exception] = {}
        for at, event in enumerate(events):
            try:
                self.examine(event)
            except RejectedError as error:
                failures[at] = error
                continue
            rows[at] = {
                "key": event.key.hex(),
                "source": event.source,
                "sub_app_id": event.sub_app_id,
                "event_type": _text(event.type),
                "file_id": _text(file_id_of(event)) or None,
                "task_id": _text(task_id_of(event)) or None,
                "received_at": now,
                "body": encode(event, self.config.format).decode(),
                "sink": self.name,
            }
        return rows, failures

    def _write_singly(self, rows: Mapping[int, Values], ends_at: float) -> dict[int, Exception]:
        """The errors of those that were not written, by position.

        A key that another transaction entered meanwhile is found now: so it is one row, too, that is tried once more.
        """
        failures: dict[int, Exception] = {}
        nothing_goes: TransientError | None = None
        for at, row in rows.items():
            if nothing_goes is not None:
                failures[at] = nothing_goes
                continue
            try:
                self._write([row], ends_at)
            except DatabaseError as error:
                said = self._said(error)
                failures[at] = RejectedError(said) if error.verdict is Verdict.REJECT else TransientError(said)
                if error.verdict in (Verdict.CONNECTION, Verdict.ALL_LATER):
                    nothing_goes = TransientError(said)
        return failures

    def _write(self, rows: Sequence[Values], ends_at: float) -> None:
        if not rows:
            return
        self._sessions.use(lambda session, secs: self._transact(session, rows, secs), ends_at)

    def _transact(self, session: Session, rows: Sequence[Values], secs: float) -> None:
        if self._must_make_table:
            self._make_table(session, secs)
        session.begin(secs)
        try:
            fresh = self._without_known(session, rows)
            if fresh:
                session.run_many(self._insert, [{name: row[name] for name in self._columns} for row in fresh])
            if self.config.statement is not None:
                for row in fresh:
                    session.run(self.config.statement, row)
            session.commit()
        except DatabaseError as error:
            if error.sqlstate in _ABSENT:  # maybe it was there, in a file or at a server that was replaced
                self._must_make_table = self.config.create_table
            if error.verdict is not Verdict.CONNECTION:
                session.rollback()
            raise

    def _without_known(self, session: Session, rows: Sequence[Values]) -> list[Values]:
        of_sink = self.config.statement is not None
        query = self.dialect.known(self._remembers_in, len(rows), of_sink=of_sink)
        values: dict[str, object] = {f"key{at}": row["key"] for at, row in enumerate(rows)}
        if of_sink:
            values["sink"] = self.name
        known = {key for (key,) in session.query(query, values)}
        return [row for row in rows if row["key"] not in known]

    def _make_table(self, session: Session, secs: float) -> None:
        with self._lock:
            if not self._must_make_table:
                return
            session.begin(secs)
            try:
                for statement in self.dialect.ddl(self._remembers_in):
                    session.run(statement, {})
                session.commit()
            except DatabaseError as error:
                if error.verdict is Verdict.CONNECTION:
                    raise
                session.rollback()
                # Whatever it is, it is not the event's: another process may be making the table.
                raise DatabaseError(f"{self._remembers_in} cannot be made: {error}", NO_TABLE) from error
            self._must_make_table = False

    # --- forgetting ---

    def _prune_if_due(self, ends_at: float) -> None:
        with self._lock:
            if self.config.statement is None or self.context.monotonic() < self._prune_at:
                return
            self._prune_at = self.context.monotonic() + _PRUNE_EACH_SECS
        try:
            pruned = self._sessions.use(self._prune, ends_at)
        except DatabaseError as error:
            self.context.log.warning("inbox.unpruned", error_message=self._said(error))
        else:
            if pruned >= PRUNED_AT_ONCE:
                with self._lock:
                    self._prune_at = self.context.monotonic()

    def _prune(self, session: Session, secs: float) -> int:
        session.begin(secs)
        try:
            pruned = session.run(self.dialect.prune, {"sink": self.name, "days": self.config.inbox_days})
            session.commit()
        except DatabaseError as error:
            if error.verdict is not Verdict.CONNECTION:
                session.rollback()
            raise
        return pruned

    # --- saying how it is ---

    def _look(self, session: Session) -> str:
        said = f"{self.config.place()} "
        try:
            session.query(self.dialect.look(self._remembers_in, self._columns), {})
        except DatabaseError as error:
            if not self.config.create_table or error.sqlstate not in _ABSENT:
                raise
            said += f"is there, {self._remembers_in} will be made"
        else:
            said += f"has the table {self._remembers_in}"
        if self.config.statement is not None:
            session.check(self.config.statement)
            said += ", and the statement can be read"
        frailties = self.frailties(session)
        for frailty in frailties:
            self.context.log.warning("database.nondurable", setting=frailty)
        if frailties:
            return Doubt(f"{said}; a loss of power may lose what is committed, because of {' and '.join(frailties)}")
        return said

    def _said(self, error: DatabaseError) -> str:
        advice = " (`vodpoller example sql` prints the tables)" if error.sqlstate in _ABSENT else ""
        return f"{self.config.place()}: {error}{advice}"


def _text(text: str) -> str:
    """The text as columns of all databases can hold it."""
    return text.translate(_NOT_IN_TEXT)
