"""The common behaviour of the database sinks, with SQLite, which needs no server; and the keys of all three."""

import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace

import pytest
from pydantic import ValidationError

from tests.helpers import event, sink_context
from vodpoller.errors import ConfigError, PartialFailureError, RejectedError, TransientError
from vodpoller.examples import EXAMPLES
from vodpoller.sinks.sql.dialect import COLUMNS
from vodpoller.sinks.sql.mysql import DIALECT as MYSQL
from vodpoller.sinks.sql.mysql import MysqlAddress, MysqlConfig
from vodpoller.sinks.sql.postgresql import DIALECT as POSTGRESQL
from vodpoller.sinks.sql.postgresql import PostgresqlConfig
from vodpoller.sinks.sql.pymysql_session import state_of as state_of_mysql
from vodpoller.sinks.sql.sessions import Sessions
from vodpoller.sinks.sql.sqlite import DIALECT, SqliteConfig, SqliteSink
from vodpoller.sinks.sql.sqlite import state_of as state_of_sqlite
from vodpoller.sinks.sql.verdicts import DatabaseError, Verdict, verdict

COUNT = "UPDATE counted SET number = number + 1"
DSN = "host=db.example dbname=app"


@pytest.fixture
def db(tmp_path):
    """The database file, with a table that counts."""
    db = sqlite3.connect(tmp_path / "rows.db", isolation_level=None)
    db.execute("CREATE TABLE counted (number INTEGER)")
    db.execute("INSERT INTO counted VALUES (0)")
    for table in ("vodpoller_events", "vodpoller_inbox"):
        for statement in DIALECT.ddl(table):
            db.execute(statement)
    yield db
    db.close()


@pytest.fixture
def make(tmp_path):
    made = []

    def make(name="it", **settings):
        config = SqliteConfig(type="sqlite", path=str(tmp_path / "rows.db"), **settings)
        made.append(SqliteSink(name, config, sink_context()))
        return made[-1]

    yield make
    for sink in made:
        sink.close()


def number_in(db):
    return db.execute("SELECT number FROM counted").fetchone()[0]


# --- verdicts ---


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("22001", Verdict.REJECT),  # too long
        ("22P02", Verdict.REJECT),  # not of the type
        ("22003", Verdict.REJECT),
        ("23502", Verdict.REJECT),
        ("23505", Verdict.REJECT),
        ("23514", Verdict.REJECT),
        ("23000", Verdict.REJECT),
        ("23503", Verdict.LATER),  # the parent row may come
        ("P0001", Verdict.LATER),  # RAISE of a user's trigger
        ("45000", Verdict.LATER),  # SIGNAL of a user's trigger
        ("HY000", Verdict.LATER),
        ("42P01", Verdict.ALL_LATER),  # no table
        ("42S02", Verdict.ALL_LATER),
        ("42501", Verdict.ALL_LATER),  # no right
        ("42000", Verdict.ALL_LATER),
        ("28P01", Verdict.ALL_LATER),  # password
        ("40001", Verdict.ALL_LATER),  # serialization
        ("40P01", Verdict.ALL_LATER),  # deadlock
        ("53100", Verdict.ALL_LATER),  # disk full
        ("55P03", Verdict.ALL_LATER),  # lock
        ("57014", Verdict.ALL_LATER),  # statement_timeout
        ("58030", Verdict.ALL_LATER),
        ("XX000", Verdict.ALL_LATER),
        ("25006", Verdict.CONNECTION),  # read-only: another may be the primary
        ("57P01", Verdict.CONNECTION),  # shutdown
        ("57P03", Verdict.CONNECTION),
        ("08006", Verdict.CONNECTION),
        ("", Verdict.CONNECTION),
    ],
)
def test_each_sqlstate_has_its_verdict(state, expected):
    assert verdict(state) is expected


@pytest.mark.parametrize(
    ("number", "sqlstate", "expected"),
    [
        (1452, "23000", Verdict.LATER),
        (1217, "23000", Verdict.LATER),
        (1451, "23000", Verdict.LATER),
        (1062, "23000", Verdict.REJECT),
        (1048, "23000", Verdict.REJECT),
        (1406, "22001", Verdict.REJECT),
        (1366, "HY000", Verdict.REJECT),
        (1364, "HY000", Verdict.REJECT),
        (3819, "HY000", Verdict.REJECT),
        (4025, "23000", Verdict.REJECT),
        (1213, "40001", Verdict.ALL_LATER),
        (1205, "HY000", Verdict.ALL_LATER),
        (1020, "HY000", Verdict.ALL_LATER),
        (1146, "42S02", Verdict.ALL_LATER),
        (1045, "28000", Verdict.ALL_LATER),
        (1290, "HY000", Verdict.CONNECTION),
        (1836, "HY000", Verdict.CONNECTION),
        (1053, "08S01", Verdict.CONNECTION),
        (2013, None, Verdict.CONNECTION),
        (0, None, Verdict.CONNECTION),
        ("", None, Verdict.CONNECTION),
        (1105, None, Verdict.LATER),
    ],
)
def test_each_error_of_mysql_has_its_verdict(number, sqlstate, expected):
    assert verdict(state_of_mysql(number, sqlstate)) is expected


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("SQLITE_CONSTRAINT_FOREIGNKEY", "", Verdict.LATER),
        ("SQLITE_CONSTRAINT_UNIQUE", "", Verdict.REJECT),
        ("SQLITE_CONSTRAINT_TRIGGER", "", Verdict.REJECT),
        ("SQLITE_MISMATCH", "", Verdict.REJECT),
        ("SQLITE_ERROR", "malformed JSON", Verdict.LATER),
        ("SQLITE_ERROR", "no such table: rows", Verdict.ALL_LATER),
        ("SQLITE_BUSY_SNAPSHOT", "", Verdict.ALL_LATER),
        ("SQLITE_FULL", "", Verdict.ALL_LATER),
        ("SQLITE_IOERR_FSYNC", "", Verdict.ALL_LATER),
        ("SQLITE_READONLY_DBMOVED", "", Verdict.CONNECTION),
        ("SQLITE_CANTOPEN", "", Verdict.CONNECTION),
    ],
)
def test_each_error_of_sqlite_has_its_verdict(name, text, expected):
    assert verdict(state_of_sqlite(name, text)) is expected


# --- what all have in common ---


def test_a_statement_runs_once_for_repeated_deliveries(db, make):
    for sink in (make(statement=COUNT), make(statement=COUNT)):
        sink.deliver([event(1), event(2)], 5.0)
    assert number_in(db) == 2


def test_two_sinks_with_a_statement_have_their_own_inbox(db, make):
    for name in ("one", "two"):
        make(name, statement=COUNT).deliver([event(1)], 5.0)
    assert number_in(db) == 2


def test_a_statement_that_fails_leaves_nothing_in_the_inbox(db, make):
    db.execute("ALTER TABLE counted RENAME TO hidden")
    sink = make(statement=COUNT)
    with pytest.raises(TransientError, match="no such table"):
        sink.deliver([event(1)], 5.0)
    db.execute("ALTER TABLE hidden RENAME TO counted")
    sink.deliver([event(1)], 5.0)
    assert number_in(db) == 1


def test_only_the_events_of_a_batch_that_lack_a_parent_row_fail(db, make):
    db.execute("CREATE TABLE parent (id TEXT PRIMARY KEY)")
    db.execute("CREATE TABLE child (parent TEXT REFERENCES parent (id) DEFERRABLE INITIALLY DEFERRED)")
    db.execute("INSERT INTO parent VALUES ('1')")
    sink = make(statement="INSERT INTO child VALUES (:file_id)")
    with pytest.raises(PartialFailureError) as raised:
        sink.deliver([event(1), event(2)], 5.0)
    assert {at: type(error) for at, error in raised.value.failures.items()} == {1: TransientError}
    db.execute("INSERT INTO parent VALUES ('2')")
    sink.deliver([event(2)], 5.0)
    assert db.execute("SELECT parent FROM child").fetchall() == [("1",), ("2",)]


def test_a_row_that_another_unique_index_refuses_is_rejected(db, make):
    db.execute("CREATE UNIQUE INDEX one_of_each_file ON vodpoller_events (file_id)")
    sink = make()
    sink.deliver([event(1)], 5.0)
    with pytest.raises(RejectedError):
        sink.deliver([event(1, More="of the same file")], 5.0)


def test_an_event_that_a_trigger_refuses_affects_no_other(db, make):
    sink = make(statement="INSERT INTO counted SELECT 1 WHERE json(:body) IS NOT NULL AND :file_id <> '1'")
    db.execute("CREATE TRIGGER refusing BEFORE INSERT ON counted BEGIN SELECT RAISE(ABORT, 'no'); END")
    with pytest.raises(PartialFailureError) as raised:
        sink.deliver([event(1), event(2)], 5.0)
    assert {at: type(error) for at, error in raised.value.failures.items()} == {1: RejectedError}


def test_old_rows_of_the_inbox_are_deleted_and_those_of_others_kept(db, make):
    for sink, days in (("it", 31), ("it", 29), ("other", 31)):
        db.execute(
            "INSERT INTO vodpoller_inbox VALUES (?, ?, strftime('%Y-%m-%dT%H:%M:%fZ', 'now', ?))",
            (f"{sink}{days}", sink, f"-{days} days"),
        )
    make(statement=COUNT).deliver([event(1)], 5.0)
    keys = [key for (key,) in db.execute("SELECT key FROM vodpoller_inbox ORDER BY key")]
    assert sorted(keys) == sorted([event(1).key.hex(), "it29", "other31"])


def test_a_body_that_is_not_utf8_is_rejected_before_it_is_queued(db, make):
    unreadable = replace(event(1), body=b'"\xff"', content={})
    with pytest.raises(RejectedError, match="not UTF-8"):
        make().examine(unreadable)
    enveloped = make(format="cloudevents")
    for each in (event(2), unreadable):
        enveloped.examine(each)
    enveloped.deliver([unreadable], 10.0)


def test_a_row_has_the_known_fields_of_its_event(db, make):
    sink = make()
    sink.deliver([event(7, event_type="a\0\ud83c")], 5.0)
    (row,) = db.execute(f"SELECT {', '.join(COLUMNS)} FROM vodpoller_events")
    key, source, event_type, file_id, task_id, received_at, body = row
    assert (source, event_type, file_id, task_id) == ("main", "a\ufffd\ufffd", "7", None)
    assert (key, body.encode()) == (event(7, event_type="a\0\ud83c").key.hex(), event(7, event_type="a\0\ud83c").body)
    assert received_at.endswith("+00:00")


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
@pytest.mark.parametrize("is_new_there", [True, False])
def test_a_file_that_was_removed_or_replaced_gets_no_more_rows(db, make, tmp_path, mode, is_new_there):
    db.execute(f"PRAGMA journal_mode = {mode}")
    db.close()
    sink, path = make(), tmp_path / "rows.db"
    sink.deliver([event(1)], 5.0)
    path.rename(tmp_path / "old.db")
    if is_new_there:
        with closing(sqlite3.connect(path)) as fresh:
            fresh.execute(DIALECT.ddl("vodpoller_events")[0])
        sink.deliver([event(2)], 5.0)
        with closing(sqlite3.connect(path)) as fresh:
            assert fresh.execute("SELECT body FROM vodpoller_events").fetchall() == [(event(2).body.decode(),)]
    else:
        with pytest.raises(TransientError, match="unable to open"):
            sink.deliver([event(2)], 5.0)


def test_a_missing_table_is_created_again_with_create_table(db, make):
    sink = make(create_table=True)
    sink.deliver([event(1)], 5.0)
    db.execute("DROP TABLE vodpoller_events")
    with pytest.raises(TransientError, match="no such table"):
        sink.deliver([event(2)], 5.0)
    sink.deliver([event(2)], 5.0)
    assert db.execute("SELECT count(*) FROM vodpoller_events").fetchone() == (1,)


def test_a_missing_file_is_created_only_with_create_table(tmp_path, make):
    path = tmp_path / "rows.db"
    with pytest.raises(TransientError, match="unable to open"):
        make().deliver([event(1)], 5.0)
    config = SqliteConfig(type="sqlite", path=str(path))
    with pytest.raises(ConfigError, match=r"^sinks\.it: "):
        SqliteSink.probe("it", config, sink_context())
    makes = config.model_copy(update={"create_table": True})
    assert SqliteSink.probe("it", makes, sink_context()) == f"{path} will be created"
    assert list(tmp_path.iterdir()) == []
    make(create_table=True).deliver([event(1)], 5.0)
    assert path.exists()
    assert SqliteSink.probe("it", makes, sink_context()) == f"{path} has the table vodpoller_events"


def test_the_probe_names_a_statement_with_a_mistake(db, make, tmp_path):
    config = SqliteConfig(type="sqlite", path=str(tmp_path / "rows.db"), statement="UPDATE counted SET numbr = :key")
    with pytest.raises(ConfigError, match="numbr"):
        SqliteSink.probe("it", config, sink_context())
    good = config.model_copy(update={"statement": COUNT})
    assert SqliteSink.probe("it", good, sink_context()).endswith("and the statement is valid")
    assert number_in(db) == 0


# --- connections ---


class FakeSession:
    def __init__(self):
        self.closed = threading.Event()
        self.was_aborted = threading.Event()

    def abort(self):
        self.was_aborted.set()

    def close(self):
        self.closed.set()


def use(sessions, work=lambda session, secs: session, secs=5.0):
    return sessions.use(work, time.monotonic() + secs)


def lost(session, secs):
    raise DatabaseError("gone", "")


def test_a_connection_that_comes_too_late_is_closed():
    late, go = FakeSession(), threading.Event()

    def connect(secs):
        go.wait(5)
        return late

    with pytest.raises(DatabaseError, match="no connection within"):
        use(Sessions(connect, time.monotonic), secs=0.05)
    go.set()
    assert late.closed.wait(5)


def test_a_call_that_does_not_end_is_cut_and_its_connection_closed():
    def hang(session, secs):
        assert session.was_aborted.wait(5)
        lost(session, secs)

    session = FakeSession()
    sessions = Sessions(lambda secs: session, time.monotonic)
    with pytest.raises(DatabaseError, match="no answer within"):
        use(sessions, hang, secs=0.05)
    assert session.closed.is_set()


def test_a_good_connection_is_kept_and_a_broken_one_replaced_at_once():
    sessions = Sessions(lambda secs: FakeSession(), time.monotonic)
    first = use(sessions)
    assert use(sessions) is first
    second = use(sessions, lambda session, secs: lost(session, secs) if session is first else session)
    assert second is not first
    assert first.closed.is_set()
    with pytest.raises(DatabaseError):
        use(Sessions(lambda secs: FakeSession(), time.monotonic), lost)


def test_an_unexpected_error_closes_the_connection():
    session = FakeSession()
    sessions = Sessions(lambda secs: session, time.monotonic)
    with pytest.raises(ZeroDivisionError):
        use(sessions, lambda session, secs: 1 / 0)
    assert session.closed.is_set()


def test_a_connection_in_use_at_a_reload_is_closed_after_its_use():
    sessions = Sessions(lambda secs: FakeSession(), time.monotonic)

    def reload_meanwhile(session, secs):
        sessions.discard_all()
        assert not session.closed.is_set()
        return session

    assert use(sessions, reload_meanwhile).closed.is_set()


def test_closing_cuts_used_connections_and_opens_no_more():
    sessions = Sessions(lambda secs: FakeSession(), time.monotonic)
    began = threading.Event()
    held = []

    def hang(session, secs):
        held.append(session)
        began.set()
        session.was_aborted.wait(5)

    thread = threading.Thread(target=use, args=(sessions, hang))
    thread.start()
    assert began.wait(5)
    sessions.close()
    thread.join(5)
    assert held[0].closed.is_set()
    with pytest.raises(DatabaseError, match="closed"):
        use(sessions)


# --- keys ---


@pytest.mark.parametrize(
    ("config", "settings", "expected"),
    [
        (SqliteConfig, {"path": "x", "table": "a;b"}, "not the name of a table"),
        (SqliteConfig, {"path": "x", "statement": "SELECT :nme"}, "'nme'"),
        (SqliteConfig, {"path": "x", "statement": "SELECT 1", "table": "t"}, "keep one of the two"),
        (SqliteConfig, {"path": "x", "inbox_days": 13}, "(give_up_after_secs and 7 days more)"),
        (SqliteConfig, {"path": "x", "give_up_after_secs": 30 * 86_400.0}, "at least 37 ("),
        (PostgresqlConfig, {"dsn": DSN, "statement": "SELECT %(nme)s"}, "'nme'"),
        (PostgresqlConfig, {"dsn": DSN, "statement": "SELECT 1 % 2"}, "%% for a percent sign"),
        (PostgresqlConfig, {"dsn": DSN, "batch_max_events": 1001}, "1000"),
        (PostgresqlConfig, {}, "is missing"),
        (PostgresqlConfig, {"dsn": "hst=hunter2"}, "not a connection string"),
        (MysqlConfig, {"dsn": "mysql://u:hunter2@h:port/db"}, "not a DSN"),
        (MysqlConfig, {"dsn": "mysql://u:hunter2@h/"}, "not a DSN"),
        (MysqlConfig, {"dsn": "mysql://u:hunter2@h/db?tls=1"}, "not a DSN"),
        (MysqlConfig, {"dsn": "postgresql://u:hunter2@h/db"}, "not a DSN"),
    ],
)
def test_invalid_keys_are_reported_without_any_part_of_a_dsn(config, settings, expected):
    name = config.__name__.removesuffix("Config").lower()
    with pytest.raises(ValidationError) as raised:
        config(type=name, **settings)
    assert expected in str(raised.value)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    ("config", "dsn", "driver"),
    [(PostgresqlConfig, DSN, "psycopg"), (MysqlConfig, "mysql://u@h/d", "pymysql")],
)
def test_a_missing_driver_is_named_with_the_extra_that_has_it(config, dsn, driver, monkeypatch):
    name = config.__name__.removesuffix("Config").lower()
    monkeypatch.setitem(sys.modules, driver, None)
    with pytest.raises(ValidationError) as raised:
        config(type=name, dsn=dsn)
    (found,) = raised.value.errors()
    assert found["loc"] == ("type",)
    assert f"pip install 'vodpoller[{name}]'" in found["msg"]


@pytest.mark.parametrize(
    ("config", "statement"),
    [
        (SqliteConfig, "INSERT INTO t VALUES (:key, '12:30 :x') -- :y"),
        (PostgresqlConfig, "SELECT %(key)s WHERE %(body)s::text LIKE '100%%'"),
        (MysqlConfig, "INSERT INTO t SELECT %(received_at)s, %(sub_app_id)s, 5 %% 2"),
    ],
)
def test_a_statement_may_use_colons_and_percent_signs(config, statement):
    where = {
        "SqliteConfig": {"path": "x"},
        "PostgresqlConfig": {"dsn": DSN},
        "MysqlConfig": {"dsn": "mysql://u@h/d"},
    }
    name = config.__name__.removesuffix("Config").lower()
    assert config(type=name, statement=statement, **where[config.__name__]).statement == statement


@pytest.mark.parametrize(
    ("dsn", "place"),
    [
        ("host=a,b port=5433 dbname=app password=hunter2", "a,b:5433/app"),
        ("postgresql://me:hunter2@db.example/app?sslmode=require", "db.example/app"),
        ("dbname=app", "localhost/app"),
    ],
)
def test_the_place_of_postgresql_shows_no_password(dsn, place):
    assert PostgresqlConfig(type="postgresql", dsn=dsn).place() == place


def test_the_dsn_of_mysql_is_read_part_by_part():
    address = MysqlAddress.read("mysql://me:p%40ss@[::1]/app?ssl_ca=/etc/ca.pem")
    assert (address.host, address.port, address.user, address.password) == ("::1", 3306, "me", "p@ss")
    assert (address.database, address.ssl_ca, address.unix_socket) == ("app", "/etc/ca.pem", None)
    by_socket = MysqlConfig(type="mysql", dsn="mysql://me@/app?unix_socket=/run/s")
    assert by_socket.place() == "/run/s/app"


@pytest.mark.parametrize("dialect", [POSTGRESQL, MYSQL, DIALECT], ids=lambda dialect: dialect.name)
def test_the_example_has_both_tables_of_each_database(dialect):
    assert f"-- [{dialect.name}]" in EXAMPLES["sql"].read().decode()
    (events, *_), (inbox, *_) = dialect.ddl("app.rows"), dialect.ddl("vodpoller_inbox")
    assert events.startswith(f"CREATE TABLE IF NOT EXISTS {dialect.quoted('app.rows')} (")
    assert inbox.startswith("CREATE TABLE IF NOT EXISTS vodpoller_inbox (")


@pytest.mark.parametrize("names", [["webhook"], ["postgresql"], ["mysql"], ["sqlite"]], ids=lambda names: names[0])
@pytest.mark.long
def test_a_driver_is_imported_only_for_a_sink_of_its_type(names, tmp_path):
    tables = {
        "webhook": 'url = "http://127.0.0.1:9/"',
        "postgresql": 'dsn = "host=127.0.0.1"',
        "mysql": 'dsn = "mysql://me@127.0.0.1/app"',
        "sqlite": 'path = "rows.db"',
    }
    sinks = "\n".join(f'[sinks.{name}]\ntype = "{name}"\n{tables[name]}\n' for name in names)
    (tmp_path / "config.toml").write_text(
        '[[sources]]\nname = "main"\n[credentials]\nsecret_id = "AKIDme"\nsecret_key = "key-of-this-test"\n'
        f'[[routes]]\nname = "all"\nsinks = {names}\n{sinks}\n[journal]\npath = "{tmp_path}/journal.db"\n'
    )
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "import vodpoller.cli.run, vodpoller.service, vodpoller.daemon\n"
        "from vodpoller.config.load import load\n"
        "from vodpoller.sinks import SinkContext\n"
        "config = load(Path(sys.argv[1]), env={})\n"
        "for name, sink in config.sink_classes.items():\n"
        "    sink(name, config.sinks[name], SinkContext(log=None)).close()\n"
        "modules = {'psycopg', 'pymysql', 'vodpoller.sinks.sql.sink'}\n"
        "print(*sorted(modules & set(sys.modules)))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "config.toml")], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    driver = {"postgresql": ["psycopg"], "mysql": ["pymysql"]}.get(names[0], [])
    shared = ["vodpoller.sinks.sql.sink"] if names != ["webhook"] else []
    assert ended.stdout.split() == [*driver, *shared]
