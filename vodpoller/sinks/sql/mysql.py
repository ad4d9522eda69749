"""Events as rows of a table in MySQL or MariaDB. PyMySQL is imported only when a sink of this type is configured."""

from dataclasses import dataclass
from datetime import datetime
from importlib import import_module
from typing import ClassVar, Final, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from pydantic import Field

from vodpoller.httpclient.address import bracketed
from vodpoller.sinks.sql.config import ServerConfig
from vodpoller.sinks.sql.dialect import PRUNED_AT_ONCE, Dialect
from vodpoller.sinks.sql.sessions import Session
from vodpoller.sinks.sql.sink import SqlSink

_SESSION: Final = "vodpoller.sinks.sql.pymysql_session"
_EXAMPLE: Final = "mysql://vodpoller:PASSWORD@db.example:3306/app"
_OPTIONS: Final = ("ssl_ca", "unix_socket")
_PORT: Final = 3306


def place(name: str) -> str:
    """The placeholder of a value."""
    return f"%({name})s"


def without_zone(moment: datetime) -> datetime:
    """A time as DATETIME holds it."""
    return moment.replace(tzinfo=None)


DIALECT: Final = Dialect(
    name="mysql",
    quote="`",
    place=place,
    moment=without_zone,
    prune="DELETE FROM vodpoller_inbox WHERE sink = %(sink)s AND accepted_at < NOW(6) - INTERVAL %(days)s DAY"
    f" LIMIT {PRUNED_AT_ONCE}",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MysqlAddress:
    """What a DSN says.

    Args:
        host: Name or address.
        port: Of the server.
        user: Who logs in.
        password: Maybe empty.
        database: Its name.
        ssl_ca: A PEM file with what vouches for the server's certificate; None: encrypted if the server can, and not
            verified.
        unix_socket: The path of a socket, in place of host and port.
    """

    host: str
    port: int
    user: str
    password: str
    database: str
    ssl_ca: str | None
    unix_socket: str | None

    @classmethod
    def read(cls, dsn: str) -> "MysqlAddress":
        """Read a DSN.

        Args:
            dsn: `mysql://USER:PASSWORD@HOST:PORT/DATABASE?ssl_ca=PATH`.

        Raises:
            ValueError: It is not one; the text holds no part of it.
        """
        parts = urlsplit(dsn)
        options = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
        if parts.scheme != "mysql":
            raise ValueError("it does not begin with mysql://")
        if set(options) - set(_OPTIONS):
            raise ValueError(f"it has an option other than {' and '.join(_OPTIONS)}")
        database = unquote(parts.path.removeprefix("/"))
        if not (parts.username and database and (parts.hostname or "unix_socket" in options)):
            raise ValueError("it lacks the user, the host or the database")
        return cls(
            host=parts.hostname or "localhost",
            port=parts.port or _PORT,
            user=unquote(parts.username),
            password=unquote(parts.password or ""),
            database=database,
            ssl_ca=options.get("ssl_ca"),
            unix_socket=options.get("unix_socket"),
        )


class MysqlConfig(ServerConfig):
    """A database of MySQL or MariaDB."""

    driver: ClassVar[str] = "pymysql"
    extra: ClassVar[str] = "mysql"

    type: Literal["mysql"] = Field(
        description="Each event is a row of a table in MySQL or MariaDB; needs `pip install 'vodpoller[mysql]'`. `dsn`"
        f" is `{_EXAMPLE}`, special characters percent-encoded; `?ssl_ca=PATH` encrypts and verifies,"
        " `?unix_socket=PATH` takes a socket."
    )

    @classmethod
    def problem_in(cls, dsn: str) -> str:
        """Whether it can be read."""
        try:
            MysqlAddress.read(dsn)
        except ValueError:  # those of urllib may hold a part of it
            return f"is not a DSN with user, host and database (right: {_EXAMPLE}, special characters percent-encoded)"
        return ""

    def place(self) -> str:
        """Host and database."""
        address = MysqlAddress.read(self.open_dsn())
        where = address.unix_socket or f"{bracketed(address.host)}:{address.port}"
        return f"{where}/{address.database}"


class MysqlSink(SqlSink[MysqlConfig]):
    """Writes rows into MySQL or MariaDB."""

    Config = MysqlConfig
    dialect = DIALECT

    def connect(self, secs: float) -> Session:
        """Connect and log in."""
        address = MysqlAddress.read(self.config.open_dsn())
        session: Session = import_module(_SESSION).connect(address, secs=secs, timeout_secs=self.timeout_secs)
        return session

    def frailties(self, session: Session) -> list[str]:
        """`innodb_flush_log_at_trx_commit` and, if there is a binary log, `sync_binlog`, if they are not 1."""
        query = "SELECT @@innodb_flush_log_at_trx_commit, @@log_bin, @@sync_binlog"
        ((flush, has_log, sync),) = session.query(query, {})
        return [
            *([f"innodb_flush_log_at_trx_commit = {flush}"] if int(flush) != 1 else []),
            *([f"sync_binlog = {sync}"] if int(has_log) and int(sync) != 1 else []),
        ]
