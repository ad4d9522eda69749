"""The sinks `postgresql` and `mysql` with real servers, which are killed, frozen and restarted."""

import threading
import time
from contextlib import contextmanager

import pytest

from tests.helpers import event, named, sink_context
from tests.polling import until
from tests.sinks.cutting_proxy import CuttingProxy
from tests.sinks.servers import free_port
from tests.sinks.sql_harnesses import MysqlHarness, PostgresqlHarness
from vodpoller.errors import ConfigError, PartialFailureError, RejectedError, TransientError
from vodpoller.sinks import Doubt
from vodpoller.sinks.sql.mysql import DIALECT as MYSQL
from vodpoller.sinks.sql.postgresql import DIALECT as POSTGRESQL
from vodpoller.testing import SLACK_SECS, sink_conformance

pytestmark = pytest.mark.long

TestPostgresql = sink_conformance(PostgresqlHarness)
TestMysql = sink_conformance(MysqlHarness)

DIALECTS = {PostgresqlHarness: POSTGRESQL, MysqlHarness: MYSQL}
COUNT_ONE = "UPDATE counted SET number = number + 1"
HOSTILE = (
    b'{"EventType":"FileDeleted","FileDeleteEvent":{"FileId":184467440737095516161234,"FileId":"again",'
    b'"Title":"\\u0000 \\ud83c \xe9\x9b\xaa","Ratio":1.10,  "Deep":[1e400]}}'
)


@pytest.fixture(params=[PostgresqlHarness, MysqlHarness], ids=["postgresql", "mysql"])
def database(request, tmp_path):
    harness = request.param(tmp_path)
    yield harness
    harness.close()


@contextmanager
def opened(database, log=None, **settings):
    settings = {"dsn": database.server.dsn, **settings}
    config = database.sink_class.Config(type=database.sink_type, **settings)
    sink = database.sink_class("it", config, sink_context(log))
    try:
        yield sink
    finally:
        sink.close()


def make_counter(database):
    for statement in DIALECTS[type(database)].ddl("vodpoller_inbox"):
        database.run(statement)
    database.run("DROP TABLE IF EXISTS counted")
    database.run("CREATE TABLE counted (number integer NOT NULL)")
    database.run("INSERT INTO counted VALUES (0)")


def counted(database):
    return database.run("SELECT number FROM counted")[0][0]


def rows(database):
    return database.run("SELECT count(*) FROM vodpoller_events")[0][0]


def raw_event(body, number=0):
    made = event(number)
    return type(made)(source="main", sub_app_id=None, type="FileDeleted", key=made.key, body=body, content=made.content)


@pytest.mark.parametrize("cut", ["before", "after"])
def test_a_repeat_after_a_lost_commit_answer_adds_no_row_twice(database, cut):
    make_counter(database)
    with CuttingProxy(database.server.port) as proxy, opened(database, dsn=database.server.dsn_at(proxy.port)) as sink:
        proxy.cuts.append(cut)
        with pytest.raises(TransientError):
            sink.deliver([event(1), event(2)], 10.0)
        assert rows(database) == (2 if cut == "after" else 0)
        sink.deliver([event(1), event(2), event(3)], 10.0)
    assert rows(database) == 3


@pytest.mark.parametrize("cut", ["before", "after"])
def test_a_statement_whose_commit_lost_its_answer_has_run_once(database, cut):
    make_counter(database)
    with (
        CuttingProxy(database.server.port) as proxy,
        opened(database, dsn=database.server.dsn_at(proxy.port), statement=COUNT_ONE) as sink,
    ):
        sink.deliver([event(0)], 10.0)
        proxy.cuts.append(cut)
        sink.deliver([event(1), event(2)], 10.0)  # on a kept connection, so that it is repeated at once
        assert proxy.cuts == []
        assert counted(database) == 3


def test_a_server_that_was_killed_is_used_again_after_its_start(database):
    with opened(database) as sink:
        sink.deliver([event(1)], 10.0)
        database.server.kill()
        with pytest.raises(TransientError):
            sink.deliver([event(2)], 10.0)
        database.server.start()
        sink.deliver([event(1), event(2)], 10.0)
        database.reconnect()
        assert rows(database) == 2


def test_a_restart_between_two_calls_fails_neither(database):
    with opened(database) as sink:
        sink.deliver([event(1)], 10.0)
        database.server.kill()
        database.server.start()
        sink.deliver([event(2)], 10.0)
        database.reconnect()
        assert rows(database) == 2


def test_a_frozen_server_fails_at_the_time_limit(database):
    with opened(database, timeout_secs=1) as sink:
        sink.deliver([event(1)], 10.0)
        database.server.freeze()
        try:
            for _ in ("over a kept connection", "over a new one"):
                began = time.monotonic()
                with pytest.raises(TransientError, match=r"no (answer|connection) within"):
                    sink.deliver([event(2)], 0.5)
                assert 0.4 < time.monotonic() - began < 0.5 + SLACK_SECS
            until(lambda: "connect" not in {thread.name for thread in threading.enumerate()})  # all threads have ended
        finally:
            database.server.thaw()
        sink.deliver([event(2)], 10.0)
        assert rows(database) == 2


def test_the_connection_to_a_read_only_server_is_replaced(database):
    switch = {
        "postgresql": "ALTER DATABASE postgres SET default_transaction_read_only = {}",
        "mysql": "SET GLOBAL read_only = {}",
    }[database.sink_type]
    with opened(database) as sink:
        database.server.as_admin(switch.format("on"))
        try:
            with pytest.raises(TransientError, match="read-only"):
                sink.deliver([event(1)], 10.0)
        finally:
            database.server.as_admin(switch.format("off"))
        sink.deliver([event(1)], 10.0)
        assert rows(database) == 1


def test_of_several_hosts_the_one_that_works_is_found(tmp_path):
    database = PostgresqlHarness(tmp_path)
    dsn = f"host=127.0.0.1,127.0.0.1 port={free_port()},{database.server.port} user=app dbname=postgres"
    with opened(database, dsn=dsn) as sink:
        sink.deliver([event(1)], 10.0)
        assert rows(database) == 1
    database.close()


def test_a_missing_parent_row_is_awaited_and_delays_no_other(database):
    make_counter(database)
    database.run("DROP TABLE IF EXISTS child")
    database.run("DROP TABLE IF EXISTS parent")
    database.run("CREATE TABLE parent (id varchar(20) PRIMARY KEY)")
    database.run("CREATE TABLE child (parent varchar(20) NOT NULL, FOREIGN KEY (parent) REFERENCES parent (id))")
    database.run("INSERT INTO parent VALUES ('1')")
    with opened(database, statement="INSERT INTO child VALUES (%(file_id)s)") as sink:
        with pytest.raises(PartialFailureError) as raised:
            sink.deliver([event(1), event(2)], 10.0)
        assert {at: type(error) for at, error in raised.value.failures.items()} == {1: TransientError}
        database.run("INSERT INTO parent VALUES ('2')")
        sink.deliver([event(2)], 10.0)
    assert sorted(database.run("SELECT parent FROM child")) == [("1",), ("2",)]


@pytest.mark.parametrize(
    ("column", "statement"),
    [
        ("varchar(3)", "INSERT INTO strict_table VALUES ('too long', %(file_id)s)"),
        ("integer", "INSERT INTO strict_table VALUES (%(event_type)s, %(file_id)s)"),
        ("integer NOT NULL", "INSERT INTO strict_table VALUES (NULL, %(file_id)s)"),
        ("integer CHECK (value > 0)", "INSERT INTO strict_table VALUES (-1, %(file_id)s)"),
        ("integer UNIQUE", "INSERT INTO strict_table VALUES (7, %(file_id)s)"),
    ],
    ids=["too long", "not a number", "null", "check", "unique"],
)
def test_a_value_that_does_not_fit_is_rejected(database, column, statement):
    make_counter(database)
    database.run("DROP TABLE IF EXISTS strict_table")
    database.run(f"CREATE TABLE strict_table (value {column}, other varchar(20))")
    if "UNIQUE" in column:
        database.run("INSERT INTO strict_table VALUES (7, 'of another')")
    with opened(database, statement=statement) as sink, pytest.raises(RejectedError):
        sink.deliver([event(1)], 10.0)
    assert database.run("SELECT count(*) FROM vodpoller_inbox")[0][0] == 0


def test_a_hostile_body_arrives_byte_for_byte(database):
    with opened(database) as sink:
        sink.deliver([raw_event(HOSTILE)], 10.0)
    assert database.delivered(1) == [HOSTILE]


def test_a_body_that_is_not_utf8_is_rejected_and_affects_no_other(database):
    with opened(database) as sink, pytest.raises(PartialFailureError) as raised:
        sink.deliver([raw_event(b'"\xff"'), event(1)], 10.0)
    assert {at: type(error) for at, error in raised.value.failures.items()} == {0: RejectedError}
    assert database.delivered(1) == [event(1).body]


def test_a_raw_nul_is_rejected_early_if_the_database_forbids_it(database):
    nul = raw_event(b'{"Title":"\0"}')
    with opened(database) as sink:
        if database.sink_type == "postgresql":
            with pytest.raises(RejectedError, match="raw NUL"):
                sink.examine(nul)
            with pytest.raises(RejectedError, match="raw NUL"):
                sink.deliver([nul], 10.0)
        else:
            sink.examine(nul)
            sink.deliver([nul], 10.0)
            assert database.delivered(1) == [nul.body]


def test_characters_that_no_text_column_holds_are_replaced(database):
    with opened(database) as sink:
        sink.deliver([event(1, event_type="a\0b\ud83c")], 10.0)
    assert list(database.run("SELECT event_type FROM vodpoller_events")) == [("a\ufffdb\ufffd",)]


def test_old_rows_of_the_inbox_are_deleted_by_the_databases_clock(database):
    make_counter(database)
    age = "interval '31 days'" if database.sink_type == "postgresql" else "interval 31 day"
    for sink, then in (("it", f"now() - {age}"), ("it", "now()"), ("other", f"now() - {age}")):
        columns = ", ".join(map(DIALECTS[type(database)].quoted, ("key", "sink", "accepted_at")))
        key = event(100 + len(then)).key.hex()
        database.run(f"INSERT INTO vodpoller_inbox ({columns}) VALUES ('{key}', '{sink}', {then})")
    with opened(database, statement=COUNT_ONE) as sink:
        sink.deliver([event(1)], 10.0)
    left = sorted(sink for (sink,) in database.run("SELECT sink FROM vodpoller_inbox"))
    assert left == ["it", "it", "other"]


def test_the_tables_are_created_with_create_table(database):
    database.run("DROP TABLE vodpoller_events")
    with opened(database) as sink, pytest.raises(TransientError, match="vodpoller example sql"):
        sink.deliver([event(1)], 10.0)
    with opened(database, create_table=True) as sink:
        sink.deliver([event(1)], 10.0)
    with opened(database, create_table=True, statement="SELECT 1") as sink:
        sink.deliver([event(1)], 10.0)
    assert rows(database) == database.run("SELECT count(*) FROM vodpoller_inbox")[0][0] == 1


# --- probe ---


def probe(database, log=None, **settings):
    config = database.sink_class.Config(type=database.sink_type, **{"dsn": database.server.dsn, **settings})
    return database.sink_class.probe("it", config, sink_context(log))


def test_the_probe_names_the_tables_and_writes_nothing(database):
    message = probe(database)
    assert "has the table vodpoller_events" in message
    assert "hunter2" not in message
    make_counter(database)
    assert probe(database, statement=COUNT_ONE).endswith("has the table vodpoller_inbox, and the statement is valid")
    assert (rows(database), counted(database)) == (0, 0)


def test_the_probe_names_a_missing_table_and_a_mistake(database):
    make_counter(database)
    with pytest.raises(ConfigError, match="example sql"):
        probe(database, table="nowhere")
    with pytest.raises(ConfigError, match="numbr"):
        probe(database, statement="UPDATE counted SET number = numbr + 1 WHERE %(key)s <> ''")


def test_the_probe_of_a_server_that_is_down_says_so(database):
    with pytest.raises(ConfigError, match=r"sinks\.it: 127\.0\.0\.1:\d+/"):
        probe(database, dsn=database.server.dsn_at(free_port()))


def test_the_probe_warns_of_commits_that_a_loss_of_power_may_lose(database, log, lines):
    assert not isinstance(probe(database, log), Doubt)
    name, weak, good, setting = {
        "postgresql": ("synchronous_commit", "off", "on", "ALTER DATABASE postgres SET {} = {}"),
        "mysql": ("innodb_flush_log_at_trx_commit", "2", "1", "SET GLOBAL {} = {}"),
    }[database.sink_type]
    database.server.as_admin(setting.format(name, weak))
    try:
        message = probe(database, log)
    finally:
        database.server.as_admin(setting.format(name, good))
    assert isinstance(message, Doubt)
    assert f"; a loss of power may lose committed events, because of {name} = {weak}" in message
    assert [line["setting"] for line in named(lines, "database.nondurable")] == [f"{name} = {weak}"]
