"""The sink `postgresql`. psycopg is imported only when a sink of this type is configured."""

from datetime import datetime
from importlib import import_module
from typing import Any, ClassVar, Final, Literal

from pydantic import Field

from vodpoller.sinks.sql.config import ServerConfig
from vodpoller.sinks.sql.dialect import PRUNE_MAX_ROWS, Dialect
from vodpoller.sinks.sql.sessions import Session
from vodpoller.sinks.sql.sink import SqlSink

_SESSION: Final = "vodpoller.sinks.sql.psycopg_session"
_EXAMPLE: Final = "host=db.example dbname=app user=vodpoller sslmode=verify-full"


def placeholder(name: str) -> str:
    """The placeholder for a value."""
    return f"%({name})s"


def unchanged(time: datetime) -> datetime:
    """The same time; the driver converts it."""
    return time


DIALECT: Final = Dialect(
    name="postgresql",
    quote='"',
    placeholder=placeholder,
    time_value=unchanged,
    prune="DELETE FROM vodpoller_inbox WHERE ctid IN (SELECT ctid FROM vodpoller_inbox WHERE sink = %(sink)s"
    f" AND accepted_at < now() - make_interval(days => %(days)s) LIMIT {PRUNE_MAX_ROWS})",
)


class PostgresqlConfig(ServerConfig):
    """The settings of a PostgreSQL database."""

    driver: ClassVar[str] = "psycopg"
    extra: ClassVar[str] = "postgresql"

    type: Literal["postgresql"] = Field(
        description="Each event is a row of a table in PostgreSQL; needs `pip install 'vodpoller[postgresql]'`. `dsn`"
        f" is a connection string of libpq, such as `{_EXAMPLE}` or `postgresql://vodpoller@db.example/app`. If it"
        " names several hosts, the one that accepts writes is used."
    )

    @classmethod
    def problem_in(cls, dsn: str) -> str:
        """As `ServerConfig.problem_in`: libpq must be able to parse the DSN."""
        try:
            _parsed(dsn)
        except (import_module(cls.driver).Error, ValueError):  # the texts of these errors may hold a part of a password
            return f"is not a connection string of libpq (right: {_EXAMPLE})"
        return ""

    def place(self) -> str:
        """Hosts and database, without the password."""
        parts = _parsed(self.open_dsn())
        host = parts.get("host") or parts.get("hostaddr") or "localhost"
        port = f":{parts['port']}" if parts.get("port") else ""
        return f"{host}{port}/{parts.get('dbname') or parts.get('user') or ''}"


class PostgresqlSink(SqlSink[PostgresqlConfig]):
    """Writes rows into PostgreSQL."""

    Config = PostgresqlConfig
    dialect = DIALECT
    holds_nul = False

    def connect(self, secs: float) -> Session:
        """Connect and log in; if there are several hosts, to the one that accepts writes."""
        session: Session = import_module(_SESSION).connect(self.config.open_dsn(), secs=secs)
        return session

    def nondurable_settings(self, session: Session) -> list[str]:
        """`synchronous_commit` and `fsync`, if they are off."""
        shown = {name: session.query(f"SHOW {name}", {})[0][0] for name in ("synchronous_commit", "fsync")}
        return [f"{name} = off" for name, value in shown.items() if value == "off"]


def _parsed(dsn: str) -> dict[str, Any]:
    parts: dict[str, Any] = import_module("psycopg.conninfo").conninfo_to_dict(dsn)
    return parts
