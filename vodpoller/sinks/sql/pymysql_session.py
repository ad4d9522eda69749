"""A connection to MySQL or MariaDB through PyMySQL."""

import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

import pymysql
from pymysql.cursors import Cursor

from vodpoller.sinks.sql import verdicts
from vodpoller.sinks.sql.mysql import MysqlAddress
from vodpoller.sinks.sql.sessions import Values
from vodpoller.sinks.sql.verdicts import DatabaseError

# Errors whose SQLSTATE is HY000, 23000 or missing, although a more precise one is known.
_STATES: Final = {
    1020: verdicts.SERIALIZATION,  # the record has changed since it was read
    1062: verdicts.UNIQUE,
    1205: verdicts.LOCKED,  # lock wait timeout
    1216: verdicts.FOREIGN_KEY,
    1217: verdicts.FOREIGN_KEY,  # the row has children; PostgreSQL has the same state for it
    1451: verdicts.FOREIGN_KEY,
    1452: verdicts.FOREIGN_KEY,
    1265: verdicts.TOO_LONG,  # data truncated
    1290: verdicts.READ_ONLY,  # --read-only
    1364: verdicts.NULL,  # the column has no default
    1366: "22018",  # not a value of the column's type
    1836: verdicts.READ_ONLY,
    3024: verdicts.CANCELED,
    3819: verdicts.CHECK,
    4025: verdicts.CHECK,  # MariaDB
}
_CLIENT_ERRORS: Final = range(2000, 3000)


def connect(address: MysqlAddress, *, secs: float, timeout_secs: float) -> "PymysqlSession":
    """Connect and log in.

    Args:
        address: The server, the user and the database.
        secs: Time limit for the connection, in seconds.
        timeout_secs: Time limit in seconds of the server's wait for a lock, and of the driver's wait for an answer.

    Raises:
        DatabaseError: The connection cannot be opened.
    """
    lock_wait_secs = max(int(timeout_secs), 1)
    with _translated():
        connection = pymysql.connect(
            host=address.host,
            port=address.port,
            user=address.user,
            password=address.password,
            database=address.database,
            ssl_ca=address.ssl_ca,
            ssl_verify_identity=True if address.ssl_ca else None,
            charset="utf8mb4",
            # These end a login that nothing waits for any more. A call ends before, since its connection is aborted.
            read_timeout=timeout_secs,
            write_timeout=timeout_secs,
            # Independent of the server's settings, a value that does not fit is an error, and times are UTC.
            init_command="SET SESSION sql_mode = CONCAT(@@sql_mode, ',STRICT_ALL_TABLES'), time_zone = '+00:00',"
            f" innodb_lock_wait_timeout = {lock_wait_secs}, lock_wait_timeout = {lock_wait_secs}",
            defer_connect=True,
        )
        sock = _connected(address, secs)
        duplicate = sock.dup()
        try:
            connection.connect(sock)
        except BaseException:
            duplicate.close()
            raise
    return PymysqlSession(connection, duplicate)


def _connected(address: MysqlAddress, secs: float) -> socket.socket:
    if address.unix_socket is None:
        sock = socket.create_connection((address.host, address.port), secs)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # Half of the time, so that time for a new connection is left if this one turns out to be dead.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(secs * 500))
        return sock
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(secs)
        sock.connect(address.unix_socket)
    except OSError:
        sock.close()
        raise
    return sock


class PymysqlSession:
    """One connection; see `Session`.

    Args:
        connection: An open connection.
        duplicate: A duplicate of its socket. The driver's own socket may be inside TLS, and is not accessible.
    """

    def __init__(self, connection: "pymysql.Connection[Cursor]", duplicate: socket.socket) -> None:
        self._connection = connection
        self._duplicate = duplicate

    def begin(self, secs: float) -> None:
        with _translated():
            self._connection.begin()

    def query(self, sql: str, values: Values) -> list[tuple[Any, ...]]:
        with _translated(), self._connection.cursor() as cursor:
            cursor.execute(sql, dict(values))
            return list(cursor.fetchall())

    def run(self, sql: str, values: Values) -> int:
        with _translated(), self._connection.cursor() as cursor:
            return cursor.execute(sql, dict(values))

    def run_many(self, sql: str, rows: Sequence[Values]) -> None:
        with _translated(), self._connection.cursor() as cursor:
            cursor.executemany(sql, rows)

    def check(self, sql: str) -> None:
        text = re.sub(r"%(%|\(\w+\)s)", lambda found: "%" if found[1] == "%" else "?", sql)
        self.run("PREPARE vodpoller_check FROM %(text)s", {"text": text})

    def commit(self) -> None:
        with _translated():
            self._connection.commit()

    def rollback(self) -> None:
        with _translated():
            self._connection.rollback()

    def abort(self) -> None:
        with suppress(OSError):
            self._duplicate.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with suppress(pymysql.Error, OSError):
            self._connection.close()
        self._duplicate.close()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except pymysql.Error as error:
        number, message = (*error.args, "", "")[:2]
        text = f"{message} ({number})" if message else str(number or "the connection is closed")
        raise DatabaseError(text, state_of(number, error.sqlstate)) from error
    except OSError as error:
        raise DatabaseError(str(error), verdicts.NO_ANSWER) from error


def state_of(number: Any, sqlstate: str | None) -> str:
    """The SQLSTATE that corresponds to an error.

    Args:
        number: The error number of the server or the driver. 0 and those from 2000 to 2999 are about the connection.
        sqlstate: As the server sent it; None if it sent none.
    """
    if number in _STATES:
        return _STATES[number]
    if sqlstate:
        return sqlstate
    return (
        verdicts.GENERAL if isinstance(number, int) and number and number not in _CLIENT_ERRORS else verdicts.NO_ANSWER
    )
