"""The databases in the conformance suite: each harness makes the sink, and makes its calls succeed, fail or hang."""

import sqlite3

import psycopg

from tests.sinks.servers import mariadb, postgresql
from vodpoller.sinks.sql.mysql import DIALECT as MYSQL
from vodpoller.sinks.sql.postgresql import DIALECT as POSTGRESQL
from vodpoller.sinks.sql.sqlite import DIALECT as SQLITE
from vodpoller.testing import SinkHarness


class SqliteHarness(SinkHarness):
    sink_type = "sqlite"

    def __init__(self, tmp_path):
        super().__init__(tmp_path)
        self.path = tmp_path / "rows.db"
        self.db = sqlite3.connect(self.path, isolation_level=None)
        for statement in SQLITE.ddl("vodpoller_events"):
            self.db.execute(statement)

    def build(self, context):
        return self.sink_class("it", self.sink_class.Config(type="sqlite", path=str(self.path)), context)

    def accept(self):
        if self.db.in_transaction:
            self.db.execute("ROLLBACK")
        self.db.execute("DROP TRIGGER IF EXISTS refusing")
        if not self.db.execute("SELECT 1 FROM sqlite_schema WHERE name = 'vodpoller_events'").fetchone():
            self.db.execute("ALTER TABLE hidden RENAME TO vodpoller_events")

    def fail(self):
        self.db.execute("ALTER TABLE vodpoller_events RENAME TO hidden")

    def hang(self):
        self.db.execute("BEGIN IMMEDIATE")

    def reject(self):
        self._refuse("true")

    def refuse(self, event):
        self._refuse(f"NEW.key = '{event.key.hex()}'")

    def _refuse(self, condition):
        self.db.execute(
            f"CREATE TRIGGER refusing BEFORE INSERT ON vodpoller_events WHEN {condition}"
            " BEGIN SELECT RAISE(ABORT, 'not this one'); END"
        )

    def delivered(self, count):
        return [body.encode() for (body,) in self.db.execute("SELECT body FROM vodpoller_events ORDER BY rowid")]

    def close(self):
        self.db.close()


class PostgresqlHarness(SinkHarness):
    sink_type = "postgresql"

    def __init__(self, tmp_path):
        super().__init__(tmp_path)
        self.server = postgresql()
        self.db = self.server.connect()
        self.blocking = None
        self.db.execute("DROP TABLE IF EXISTS vodpoller_events, hidden, vodpoller_inbox")
        for statement in POSTGRESQL.ddl("vodpoller_events"):
            self.db.execute(statement)
        self.db.execute(
            "CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE EXCEPTION 'not this one' USING ERRCODE = 'check_violation'; END $$"
        )

    def run(self, sql):
        cursor = self.db.execute(sql)
        return cursor.fetchall() if cursor.description else []

    def reconnect(self):
        """Connect again after a restart of the server."""
        self.db.close()
        self.db = self.server.connect()

    def build(self, context):
        return self.sink_class("it", self.sink_class.Config(type="postgresql", dsn=self.server.dsn), context)

    def accept(self):
        if self.blocking is not None:
            self.blocking.close()
        self.db.execute("ALTER TABLE IF EXISTS hidden RENAME TO vodpoller_events")
        self.db.execute("DROP TRIGGER IF EXISTS refusing ON vodpoller_events")

    def fail(self):
        self.db.execute("ALTER TABLE vodpoller_events RENAME TO hidden")

    def hang(self):
        self.blocking = psycopg.connect(self.server.dsn)
        self.blocking.execute("LOCK TABLE vodpoller_events")

    def reject(self):
        self._refuse("true")

    def refuse(self, event):
        self._refuse(f"NEW.key = '{event.key.hex()}'")

    def _refuse(self, condition):
        self.db.execute(
            f"CREATE TRIGGER refusing BEFORE INSERT ON vodpoller_events FOR EACH ROW WHEN ({condition})"
            " EXECUTE FUNCTION refuse()"
        )

    def delivered(self, count):
        return [body.encode() for (body,) in self.db.execute("SELECT body::text FROM vodpoller_events ORDER BY ctid")]

    def close(self):
        self.db.close()
        if self.blocking is not None:
            self.blocking.close()


class MysqlHarness(SinkHarness):
    sink_type = "mysql"

    def __init__(self, tmp_path):
        super().__init__(tmp_path)
        self.server = mariadb()
        self.db = self.server.connect()
        self.blocking = None
        self.run("DROP TABLE IF EXISTS vodpoller_events, hidden, vodpoller_inbox")
        for statement in MYSQL.ddl("vodpoller_events"):
            self.run(statement)
        self.run("ALTER TABLE vodpoller_events ADD COLUMN number BIGINT AUTO_INCREMENT UNIQUE")

    def run(self, sql, db=None):
        with (db or self.db).cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall()

    def reconnect(self):
        """Connect again after a restart of the server."""
        self.db.close()
        self.db = self.server.connect()

    def build(self, context):
        return self.sink_class("it", self.sink_class.Config(type="mysql", dsn=self.server.dsn), context)

    def accept(self):
        if self.blocking is not None:
            self.blocking.close()
        if self.run("SHOW TABLES LIKE 'hidden'"):
            self.run("RENAME TABLE hidden TO vodpoller_events")
        self.run("DROP TRIGGER IF EXISTS refusing")

    def fail(self):
        self.run("RENAME TABLE vodpoller_events TO hidden")

    def hang(self):
        self.blocking = self.server.connect()
        self.run("LOCK TABLES vodpoller_events WRITE", self.blocking)

    def reject(self):
        self._refuse("true")

    def refuse(self, event):
        self._refuse(f"NEW.`key` = '{event.key.hex()}'")

    def _refuse(self, condition):
        self.run(
            f"CREATE TRIGGER refusing BEFORE INSERT ON vodpoller_events FOR EACH ROW IF {condition} THEN"
            " SIGNAL SQLSTATE '23000' SET MESSAGE_TEXT = 'not this one'; END IF"
        )

    def delivered(self, count):
        return [body.encode() for (body,) in self.run("SELECT body FROM vodpoller_events ORDER BY number")]

    def close(self):
        for db in (self.db, self.blocking):
            if db is not None and db.open:
                db.close()
