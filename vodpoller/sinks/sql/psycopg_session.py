"""A connection to PostgreSQL through psycopg 3."""

import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

import psycopg
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from vodpoller.sinks.sql import verdicts
from vodpoller.sinks.sql.sessions import Values
from vodpoller.sinks.sql.verdicts import DatabaseError

_SAID_CHARACTERS: Final = 400
_SERVERS_SHARE: Final = 0.9
"""Of the time that is left: the server gives up a little before the connection is cut."""


def connect(dsn: str, *, secs: float) -> "PsycopgSession":
    """Connect and log in.

    Args:
        dsn: A connection string of libpq; what it sets is not changed.
        secs: Seconds that all hosts together may take.

    Raises:
        DatabaseError: It cannot connect.
    """
    with _translated():
        return PsycopgSession(psycopg.connect(_conninfo(dsn, secs), autocommit=True, prepare_threshold=None))


def _conninfo(dsn: str, secs: float) -> str:
    given = conninfo_to_dict(dsn)
    hosts = str(given.get("host") or given.get("hostaddr") or "").count(",") + 1
    ours: dict[str, Any] = {
        "application_name": "vodpoller",
        "connect_timeout": max(int(secs / hosts), 1),
        # Half of the time: so a connection whose other end is gone leaves time for a new one.
        "tcp_user_timeout": int(secs * 500),
    }
    if hosts > 1:  # the one that takes writes may be another since the last time
        ours["target_session_attrs"] = "read-write"
    return make_conninfo(**{**ours, **given, "client_encoding": "UTF8"})


class PsycopgSession:
    """One connection; see `Session`.

    Args:
        connection: Open, in autocommit mode: transactions are begun and ended by statements.
    """

    def __init__(self, connection: "psycopg.Connection[tuple[Any, ...]]") -> None:
        self._connection = connection

    def begin(self, secs: float) -> None:
        timeout_ms = max(int(secs * _SERVERS_SHARE * 1000), 1)
        self._execute(f"BEGIN; SET LOCAL statement_timeout = {timeout_ms}", None)

    def query(self, sql: str, values: Values) -> list[tuple[Any, ...]]:
        with _translated():
            return self._execute(sql, values).fetchall()

    def run(self, sql: str, values: Values) -> int:
        return self._execute(sql, values).rowcount

    def run_many(self, sql: str, rows: Sequence[Values]) -> None:
        with _translated():
            self._connection.cursor().executemany(sql, rows)

    def check(self, sql: str) -> None:
        numbered = _Numbered()
        text = re.sub(r"%(%|\((\w+)\)s)", numbered.replace, sql)
        with _translated():
            read = self._connection.pgconn.prepare(b"", text.encode())
        if read.status != pq.ExecStatus.COMMAND_OK:
            state = read.error_field(pq.DiagnosticField.SQLSTATE) or b""
            raise DatabaseError(read.error_message.decode(errors="replace"), state.decode())

    def commit(self) -> None:
        self._execute("COMMIT", None)

    def rollback(self) -> None:
        self._execute("ROLLBACK", None)

    def cut(self) -> None:
        with suppress(psycopg.Error, OSError), socket.socket(fileno=os.dup(self._connection.pgconn.socket)) as same:
            same.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with suppress(psycopg.Error):
            self._connection.close()

    def _execute(self, sql: str, values: Values | None) -> "psycopg.Cursor[tuple[Any, ...]]":
        with _translated():
            return self._connection.execute(sql, values)


class _Numbered:
    """Makes of named placeholders those that the server itself reads."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def replace(self, found: re.Match[str]) -> str:
        if found[1] == "%":
            return "%"
        return f"${self._numbers.setdefault(found[2], len(self._numbers) + 1)}"


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except psycopg.Error as error:
        raise DatabaseError(_said(error), error.sqlstate or _state_of_driver(error)) from error


def _state_of_driver(error: psycopg.Error) -> str:
    """What stands for an error that is the driver's own."""
    is_of_connection = isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
    return verdicts.NO_ANSWER if is_of_connection else verdicts.GENERAL


def _said(error: psycopg.Error) -> str:
    """Without the lines that show the statement."""
    said = error.diag.message_primary or str(error)
    if error.diag.message_detail:
        said += f" ({error.diag.message_detail})"
    return said[:_SAID_CHARACTERS]
