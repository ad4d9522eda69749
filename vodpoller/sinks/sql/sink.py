"""The base class of the sinks for databases.

A transaction first queries which of its events are known (by the primary key of the table, or by the inbox), and then
writes only the others. So it is idempotent: if the answer to a COMMIT is lost, it is repeated.
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
from vodpoller.sinks.sql.dialect import COLUMNS, INBOX, PRUNE_MAX_ROWS, Dialect
from vodpoller.sinks.sql.sessions import Session, Sessions, Values
from vodpoller.sinks.sql.verdicts import NO_TABLE, DatabaseError, Verdict

SqlConfigT = TypeVar("SqlConfigT", bound=SqlConfig)

_PRUNE_INTERVAL_SECS: Final = 600.0
_NO_TABLE_STATES: Final = frozenset({NO_TABLE, "42S02"})
_INBOX_COLUMNS: Final = ("key", "sink")
_NOT_IN_TEXT: Final = {
    0: "\N{REPLACEMENT CHARACTER}",
    **dict.fromkeys(range(0xD800, 0xE000), "\N{REPLACEMENT CHARACTER}"),
}


class SqlSink(Sink[SqlConfigT]):
    """Writes a row for each event, or runs a statement for it, exactly once.

    Args:
        name: Name of the sink.
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
        self._key_table = config.table if config.statement is None else INBOX
        self._columns = COLUMNS if config.statement is None else _INBOX_COLUMNS
        self._insert = self.dialect.insert(self._key_table, self._columns)

    @abstractmethod
    def connect(self, secs: float) -> Session:
        """Open a connection.

        Args:
            secs: Time limit in seconds.

        Raises:
            DatabaseError: The connection cannot be opened.
        """

    @abstractmethod
    def nondurable_settings(self, session: Session) -> list[str]:
        """The settings of the database that may lose a commit at a loss of power, as texts."""

    @classmethod
    def probe(cls, name: str, config: SqlConfigT, context: SinkContext) -> str:
        """Check that the login, the table and the statement are valid. Nothing is written or created."""
        sink = cls(name, config, context)
        try:
            return sink._sessions.use(
                lambda session, _: sink._check(session), context.monotonic() + config.timeout_secs
            )
        except DatabaseError as error:
            raise ConfigError([f"sinks.{name}: {sink._message(error)}"]) from None
        finally:
            sink.close()

    def examine(self, event: Event) -> None:
        """Reject an event whose body a text column cannot hold; only the body of an unreadable event is such a one."""
        if not event.content and self.config.format != "callback":
            return  # the CloudEvent holds the body as JSON or as base64
        try:
            event.body.decode()
        except UnicodeDecodeError:
            raise RejectedError("the body is not UTF-8, so a text column cannot hold it") from None
        if b"\0" in event.body and not self.holds_nul:
            raise RejectedError("the body holds a raw NUL, which a text column of this database cannot hold")

    def deliver(self, events: Sequence[Event], timeout_secs: float) -> None:
        """Write the events in one transaction; if one of them is refused, write each in its own transaction."""
        ends_at = self.context.monotonic() + timeout_secs
        rows, failures = self._rows(events)
        try:
            self._write(list(rows.values()), ends_at)
        except DatabaseError as error:
            if error.verdict in (Verdict.CONNECTION, Verdict.ALL_LATER):
                raise TransientError(self._message(error)) from None
            failures |= self._write_singly(rows, ends_at)
        if len(events) == 1 and failures:
            raise failures[0]
        if failures:
            raise PartialFailureError(failures)
        self._prune_if_due(ends_at)

    def reopen(self) -> None:
        """Open new connections from the next call on, with the DSN as it was last read."""
        self._sessions.discard_all()

    def close(self) -> None:
        """Close the connections, and end the calls that wait for the database."""
        self._sessions.close()

    # --- writing ---

    def _rows(self, events: Sequence[Event]) -> tuple[dict[int, Values], dict[int, Exception]]:
        """The values of each event, and the errors of the events that are rejected; both by position."""
        now = self.dialect.time_value(datetime.fromtimestamp(self.context.wall(), UTC))
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
        """Write each row in its own transaction. Returns the errors by position.

        A single row is tried again as well: its key may have been inserted by another transaction meanwhile, and is
        now known.
        """
        failures: dict[int, Exception] = {}
        later_error: TransientError | None = None
        for at, row in rows.items():
            if later_error is not None:
                failures[at] = later_error
                continue
            try:
                self._write([row], ends_at)
            except DatabaseError as error:
                text = self._message(error)
                failures[at] = RejectedError(text) if error.verdict is Verdict.REJECT else TransientError(text)
                if error.verdict in (Verdict.CONNECTION, Verdict.ALL_LATER):
                    later_error = TransientError(text)
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
            unknown = self._without_known(session, rows)
            if unknown:
                session.run_many(self._insert, [{name: row[name] for name in self._columns} for row in unknown])
            if self.config.statement is not None:
                for row in unknown:
                    session.run(self.config.statement, row)
            session.commit()
        except DatabaseError as error:
            if (
                error.sqlstate in _NO_TABLE_STATES
            ):  # the file or the server may have been replaced by one without the table
                self._must_make_table = self.config.create_table
            if error.verdict is not Verdict.CONNECTION:
                session.rollback()
            raise

    def _without_known(self, session: Session, rows: Sequence[Values]) -> list[Values]:
        of_sink = self.config.statement is not None
        query = self.dialect.select_known(self._key_table, len(rows), of_sink=of_sink)
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
                for statement in self.dialect.ddl(self._key_table):
                    session.run(statement, {})
                session.commit()
            except DatabaseError as error:
                if error.verdict is Verdict.CONNECTION:
                    raise
                session.rollback()
                # The event is not the cause; for example, another process may be creating the same table.
                raise DatabaseError(f"{self._key_table} cannot be created: {error}", NO_TABLE) from error
            self._must_make_table = False

    # --- pruning ---

    def _prune_if_due(self, ends_at: float) -> None:
        with self._lock:
            if self.config.statement is None or self.context.monotonic() < self._prune_at:
                return
            self._prune_at = self.context.monotonic() + _PRUNE_INTERVAL_SECS
        try:
            pruned = self._sessions.use(self._prune, ends_at)
        except DatabaseError as error:
            self.context.log.warning("inbox.unpruned", error_message=self._message(error))
        else:
            if pruned >= PRUNE_MAX_ROWS:
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

    # --- checking ---

    def _check(self, session: Session) -> str:
        text = f"{self.config.place()} "
        try:
            session.query(self.dialect.check_columns(self._key_table, self._columns), {})
        except DatabaseError as error:
            if not self.config.create_table or error.sqlstate not in _NO_TABLE_STATES:
                raise
            text += f"can be reached, {self._key_table} will be created"
        else:
            text += f"has the table {self._key_table}"
        if self.config.statement is not None:
            session.check(self.config.statement)
            text += ", and the statement is valid"
        settings = self.nondurable_settings(session)
        for setting in settings:
            self.context.log.warning("database.nondurable", setting=setting)
        if settings:
            return Doubt(f"{text}; a loss of power may lose committed events, because of {' and '.join(settings)}")
        return text

    def _message(self, error: DatabaseError) -> str:
        advice = " (`vodpoller example sql` prints the tables)" if error.sqlstate in _NO_TABLE_STATES else ""
        return f"{self.config.place()}: {error}{advice}"


def _text(text: str) -> str:
    """The text with the characters replaced that a text column of some database cannot hold."""
    return text.translate(_NOT_IN_TEXT)
