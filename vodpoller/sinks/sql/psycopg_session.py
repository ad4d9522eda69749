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

_SHOWN_CHARACTERS: Final = 400
_STATEMENT_TIME_SHARE: Final = 0.9
"""Share of the time left: the server cancels a statement a little before the connection is aborted."""


def connect(dsn: str, *, secs: float) -> "PsycopgSession":
    """Connect and log in.

    Args:
        dsn: A connection string of libpq; its own settings are not changed.
        secs: Time limit for all hosts together, in seconds.

    Raises:
        DatabaseError: The connection cannot be opened.
    """
    with _translated():
        return PsycopgSession(psycopg.connect(_conninfo(dsn, secs), autocommit=True, prepare_threshold=None))


def _conninfo(dsn: str, secs: float) -> str:
    given = conninfo_to_dict(dsn)
    hosts = str(given.get("host") or given.get("hostaddr") or "").count(",") + 1
    ours: dict[str, Any] = {
        "application_name": "vodpoller",
        "connect_timeout": max(int(secs / hosts), 1),
        # Half of the time, so that time for a new connection is left if this one turns out to be dead.
        "tcp_user_timeout": int(secs * 500),
    }
    if hosts > 1:  # another host may accept writes now
        ours["target_session_attrs"] = "read-write"
    return make_conninfo(**{**ours, **given, "client_encoding": "UTF8"})


class PsycopgSession:
    """One connection; see `Session`.

    Args:
        connection: An open connection in autocommit mode: statements begin and end the transactions.
    """

    def __init__(self, connection: "psycopg.Connection[tuple[Any, ...]]") -> None:
        self._connection = connection

    def begin(self, secs: float) -> None:
        timeout_ms = max(int(secs * _STATEMENT_TIME_SHARE * 1000), 1)
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
            result = self._connection.pgconn.prepare(b"", text.encode())
        if result.status != pq.ExecStatus.COMMAND_OK:
            state = result.error_field(pq.DiagnosticField.SQLSTATE) or b""
            raise DatabaseError(result.error_message.decode(errors="replace"), state.decode())

    def commit(self) -> None:
        self._execute("COMMIT", None)

    def rollback(self) -> None:
        self._execute("ROLLBACK", None)

    def abort(self) -> None:
        with suppress(psycopg.Error, OSError), socket.socket(fileno=os.dup(self._connection.pgconn.socket)) as same:
            same.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with suppress(psycopg.Error):
            self._connection.close()

    def _execute(self, sql: str, values: Values | None) -> "psycopg.Cursor[tuple[Any, ...]]":
        with _translated():
            return self._connection.execute(sql, values)


class _Numbered:
    """Replaces named placeholders by the numbered ones of the server."""

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
        raise DatabaseError(_text_of(error), error.sqlstate or _state_of_driver(error)) from error


def _state_of_driver(error: psycopg.Error) -> str:
    """The SQLSTATE for an error of the driver itself."""
    is_about_connection = isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
    return verdicts.NO_ANSWER if is_about_connection else verdicts.GENERAL


def _text_of(error: psycopg.Error) -> str:
    """The text of an error, without the lines that show the statement."""
    text = error.diag.message_primary or str(error)
    if error.diag.message_detail:
        text += f" ({error.diag.message_detail})"
    return text[:_SHOWN_CHARACTERS]
