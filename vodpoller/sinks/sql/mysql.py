"""The sink `mysql`, also for MariaDB. PyMySQL is imported only when a sink of this type is configured."""

from dataclasses import dataclass
from datetime import datetime
from importlib import import_module
from typing import ClassVar, Final, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from pydantic import Field

from vodpoller.httpclient.address import bracketed
from vodpoller.sinks.sql.config import ServerConfig
from vodpoller.sinks.sql.dialect import PRUNE_MAX_ROWS, Dialect
from vodpoller.sinks.sql.sessions import Session
from vodpoller.sinks.sql.sink import SqlSink

_SESSION: Final = "vodpoller.sinks.sql.pymysql_session"
_EXAMPLE: Final = "mysql://vodpoller:PASSWORD@db.example:3306/app"
_OPTIONS: Final = ("ssl_ca", "unix_socket")
_PORT: Final = 3306


def placeholder(name: str) -> str:
    """The placeholder for a value."""
    return f"%({name})s"


def without_zone(time: datetime) -> datetime:
    """The time without its zone, since DATETIME has none."""
    return time.replace(tzinfo=None)


DIALECT: Final = Dialect(
    name="mysql",
    quote="`",
    placeholder=placeholder,
    time_value=without_zone,
    prune="DELETE FROM vodpoller_inbox WHERE sink = %(sink)s AND accepted_at < NOW(6) - INTERVAL %(days)s DAY"
    f" LIMIT {PRUNE_MAX_ROWS}",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MysqlAddress:
    """The parts of a DSN.

    Args:
        host: Name or address of the server.
        port: Port of the server.
        user: Name of the user who logs in.
        password: The user's password; may be empty.
        database: Name of the database.
        ssl_ca: A PEM file of CA certificates for the server's certificate. None: the connection is encrypted if the
            server supports it, and the certificate is not verified.
        unix_socket: The path of a socket that replaces host and port; None if there is none.
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
        """Parse a DSN.

        Args:
            dsn: `mysql://USER:PASSWORD@HOST:PORT/DATABASE?ssl_ca=PATH`.

        Raises:
            ValueError: It is not such a DSN. The text holds no part of it.
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
    """The settings of a MySQL or MariaDB database."""

    driver: ClassVar[str] = "pymysql"
    extra: ClassVar[str] = "mysql"

    type: Literal["mysql"] = Field(
        description="Each event is a row of a table in MySQL or MariaDB; needs `pip install 'vodpoller[mysql]'`. `dsn`"
        f" is `{_EXAMPLE}`, special characters percent-encoded; `?ssl_ca=PATH` encrypts and verifies,"
        " `?unix_socket=PATH` uses a socket."
    )

    @classmethod
    def problem_in(cls, dsn: str) -> str:
        """As `ServerConfig.problem_in`: `MysqlAddress.read` must be able to parse the DSN."""
        try:
            MysqlAddress.read(dsn)
        except ValueError:  # the texts of urllib may hold a part of the DSN
            return f"is not a DSN with user, host and database (right: {_EXAMPLE}, special characters percent-encoded)"
        return ""

    def place(self) -> str:
        """Host and database, without the password."""
        address = MysqlAddress.read(self.open_dsn())
        server = address.unix_socket or f"{bracketed(address.host)}:{address.port}"
        return f"{server}/{address.database}"


class MysqlSink(SqlSink[MysqlConfig]):
    """Writes rows into MySQL or MariaDB."""

    Config = MysqlConfig
    dialect = DIALECT

    def connect(self, secs: float) -> Session:
        """Connect and log in."""
        address = MysqlAddress.read(self.config.open_dsn())
        session: Session = import_module(_SESSION).connect(address, secs=secs, timeout_secs=self.timeout_secs)
        return session

    def nondurable_settings(self, session: Session) -> list[str]:
        """`innodb_flush_log_at_trx_commit` and, if there is a binary log, `sync_binlog`, if they are not 1."""
        query = "SELECT @@innodb_flush_log_at_trx_commit, @@log_bin, @@sync_binlog"
        ((flush, has_log, sync),) = session.query(query, {})
        return [
            *([f"innodb_flush_log_at_trx_commit = {flush}"] if int(flush) != 1 else []),
            *([f"sync_binlog = {sync}"] if int(has_log) and int(sync) != 1 else []),
        ]
