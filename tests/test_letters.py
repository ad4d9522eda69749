"""What an operator does with the journal, seen from inside one process."""

import fcntl
import sqlite3
import threading
from contextlib import closing, contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.helpers import FakeClock, event
from vodpoller import letters as letters_module
from vodpoller.delivery import Delivery
from vodpoller.errors import JournalError
from vodpoller.journal import SCHEMA_VERSION, Journal, Known, Letter
from vodpoller.letters import CHUNK_ROWS, Backlog, Filter, Letters

NOW = 1_800_000_000.0


@pytest.fixture
def wall():
    return FakeClock(NOW)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.db"


@pytest.fixture
def journal(path, log, wall):
    """The journal as the daemon has it open."""
    opened = Journal(path, max_bytes=10**9, ledger_days=5, log=log, wall=wall)
    yield opened
    opened.close()


@pytest.fixture
def letters(journal, path, wall):
    with Letters(path, writable=True, wall=wall) as opened:
        yield opened


def letter(number=0, sink="hook", *, event_type="NewFileUpload", **more):
    of_event = event(number, event_type=event_type)
    return Letter(event=of_event, sink=sink, **{"dead": True, "reason": "rejected", "error": "no", **more})


def ids(letters, **wanted):
    return [row.id for row in letters.stored(Filter(**wanted))]


def states(path):
    with closing(sqlite3.connect(path)) as db:
        return db.execute("SELECT sink, state, reason, attempts, due_at FROM letters ORDER BY id").fetchall()


class Routes:
    """A router that knows by the event type."""

    def __init__(self, **targets):
        self._targets = targets

    def route(self, event):
        return SimpleNamespace(sinks=self._targets.get(event.type, ()))


def replay(letters, *sinks, router=None, **wanted):
    """How many were marked, and how many cannot be."""
    portions = list(letters.replay(Filter(**wanted), router=router or Routes(), sinks=sinks))
    return sum(done for done, _ in portions), sum(undone for _, undone in portions)


# --- journals that cannot be used -------------------------------------------------------------------------------------


def test_without_a_journal_it_is_said_when_there_will_be_one(path):
    with pytest.raises(JournalError, match="there is no journal yet: vodpoller makes it when it first runs"):
        Letters(path)
    assert not path.exists()


def test_a_folder_is_no_journal(path):
    path.mkdir()

    with pytest.raises(JournalError, match="there is no journal yet"):
        Letters(path)


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1])
def test_a_journal_of_another_version_is_not_touched(path, version):
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE letters (id)")
        db.execute(f"PRAGMA user_version = {version}")

    with pytest.raises(JournalError, match=f"no journal of this version of vodpoller .{version}, not {SCHEMA_VERSION}"):
        Letters(path, writable=True)


def test_a_file_that_is_no_database_is_not_a_traceback(path):
    path.write_bytes(b"this is no database" * 100)

    with pytest.raises(JournalError, match=r"journal\.db: the journal cannot be read"):
        Letters(path)


def test_a_journal_without_its_tables_is_not_a_traceback(path):
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    with Letters(path) as letters, pytest.raises(JournalError, match="no such table"):
        list(letters.stored(Filter()))


def test_who_only_reads_cannot_write(journal, path):
    journal.store([letter()])

    with Letters(path) as letters:
        assert letters.count(Filter()) == 1
        with pytest.raises(JournalError, match="cannot be written"):
            replay(letters, "hook")
        with pytest.raises(JournalError, match="cannot be written"):
            list(letters.purge(Filter()))
        assert letters.count(Filter()) == 1


@contextmanager
def locked(path):
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


def test_a_journal_that_stays_locked_fails_the_write_and_not_the_reading(journal, path, monkeypatch):
    journal.store([letter()])
    monkeypatch.setattr(letters_module, "BUSY_SECS", 0.0)

    with Letters(path, writable=True) as letters, locked(path):
        assert ids(letters) == [1]
        for write in (lambda: replay(letters, "hook"), lambda: list(letters.purge(Filter()))):
            with pytest.raises(JournalError, match="cannot be written: database is locked"):
                write()
    assert [state for _, state, *_ in states(path)] == ["dead"]


def test_a_journal_that_is_locked_for_a_moment_is_waited_for(journal, path):
    journal.store([letter()])
    has_it, give_back = threading.Event(), threading.Event()

    def hold():
        with locked(path):
            has_it.set()
            give_back.wait(10)

    other = threading.Thread(target=hold)
    other.start()
    with Letters(path, writable=True) as letters:
        assert has_it.wait(10)
        threading.Timer(0.1, give_back.set).start()
        assert replay(letters, "hook") == (1, 0)
    other.join()


# --- filters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({}, [1, 2, 3, 5]),
        ({"state": "pending"}, [4]),
        ({"ids": [3, 1, 4, 99]}, [1, 3]),
        ({"sink": "hook"}, [1, 5]),
        ({"sink": ""}, [3]),
        ({"sink": "hoo"}, []),
        ({"event_type": "NewFileUpload"}, [1]),
        ({"event_type": "*Complete"}, [2, 5]),
        ({"event_type": "Tr?nscodeComplete"}, [2]),
        ({"event_type": "*complete"}, []),
        ({"event_type": "' OR 1=1 --"}, []),
        ({"reason": "rejected"}, [1, 5]),
        ({"reason": "unrouted"}, [3]),
        ({"since": NOW + 0.5}, [5]),
        ({"since": NOW + 1}, [5]),
        ({"since": NOW + 1.5}, []),
        ({"last_id": 2}, [1, 2]),
        ({"sink": "hook", "event_type": "*Complete", "reason": "rejected", "since": NOW, "ids": [1, 5]}, [5]),
    ],
)
def test_filters_narrow_each_other_down(journal, letters, wall, wanted, found):
    journal.store(
        [
            letter(1),
            letter(2, "script", event_type="TranscodeComplete", reason="gave_up"),
            letter(3, "", event_type="FileDeleted", reason="unrouted"),
            letter(4, dead=False, reason="errored"),
        ]
    )
    wall.advance(1)
    journal.store([letter(5, event_type="CreateSnapshotByTimeOffsetComplete")])

    assert ids(letters, **wanted) == found
    assert letters.count(Filter(**wanted)) == len(found)


def test_a_row_tells_all_that_is_known_of_it(journal, letters):
    stored = letter(7, attempts=3, error="HTTP status 422")
    journal.store([stored])

    (row,) = letters.stored(Filter())

    assert (row.id, row.key, row.sink) == (1, stored.event.key.hex(), "hook")
    assert (row.reason, row.error, row.attempts, row.stored_at) == ("rejected", "HTTP status 422", 3, NOW)
    assert (row.source, row.event_type, row.size_bytes) == ("main", "NewFileUpload", len(stored.event.body))
    assert letters.body(1) == stored.event.body
    assert letters.body(2) is None


def test_what_is_stored_is_summed_up_by_sink_and_state(journal, letters, wall):
    journal.store([letter(1), letter(2), letter(3, "")])
    wall.advance(60)
    journal.store([letter(4, dead=False), letter(5)])

    assert letters.backlogs() == [
        Backlog(sink="hook", state="pending", events=1, oldest_at=NOW + 60),
        Backlog(sink="", state="dead", events=1, oldest_at=NOW),
        Backlog(sink="hook", state="dead", events=3, oldest_at=NOW),
    ]


def test_marks_are_those_that_the_daemon_left(journal, letters):
    journal.mark("pull", NOW + 5)
    journal.flush()

    assert letters.marks() == {"started": NOW, "pull": NOW + 5}


# --- portions ---------------------------------------------------------------------------------------------------------


class Watched(Letters):
    """Remembers how many rows each reading took into memory."""

    def _read(self, query, values):
        rows = super()._read(query, values)
        self.most = max(getattr(self, "most", 0), len(rows))
        return rows


@pytest.mark.parametrize("number", [0, 1, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 3 * CHUNK_ROWS])
def test_rows_are_read_in_portions_and_each_once(journal, path, number):
    journal.store([letter(n) for n in range(number)])

    with Watched(path) as letters:
        assert ids(letters) == list(range(1, number + 1))
        assert letters.most <= CHUNK_ROWS


@pytest.mark.parametrize("limit", [1, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 2 * CHUNK_ROWS, 5 * CHUNK_ROWS])
def test_a_limit_ends_the_reading(journal, letters, limit):
    journal.store([letter(n) for n in range(2 * CHUNK_ROWS + 5)])

    found = [row.id for row in letters.stored(Filter(), limit=limit)]

    assert found == list(range(1, min(limit, 2 * CHUNK_ROWS + 5) + 1))


def test_a_slow_reader_holds_nobody_up_and_misses_nothing_that_stays(journal, letters):
    journal.store([letter(n) for n in range(2 * CHUNK_ROWS)])

    reading = letters.stored(Filter())
    seen = [next(reading).id]
    journal.bury(2 * CHUNK_ROWS, attempts=9, reason="gave_up", error="meanwhile")
    journal.forget([CHUNK_ROWS + 1])
    journal.flush()
    rest = list(reading)

    assert seen + [row.id for row in rest] == [n for n in range(1, 2 * CHUNK_ROWS + 1) if n != CHUNK_ROWS + 1]
    assert rest[-1].error == "meanwhile"


def test_replay_and_purge_give_the_daemon_its_turn_between_portions(journal, path):
    journal.store([letter(n) for n in range(3 * CHUNK_ROWS)])

    with Watched(path, writable=True) as letters:
        portions = []
        for done, undone in letters.replay(Filter(), router=Routes(), sinks=["hook"]):
            journal.store([letter(10_000 + len(portions))])  # it fails if the journal is locked
            portions.append((done, undone))
        assert portions == [(CHUNK_ROWS, 0)] * 3
        assert letters.most <= CHUNK_ROWS
        # What came meanwhile was not asked for.
        assert letters.count(Filter()) == 3

        deleted = []
        for number in letters.purge(Filter(state="pending")):
            journal.store([letter(20_000 + len(deleted))])
            deleted.append(number)
        assert deleted == [CHUNK_ROWS] * 3
        assert letters.count(Filter()) == 6


# --- replay -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["rejected", "gave_up"])
def test_what_a_sink_did_not_take_is_due_at_once_and_young_again(journal, letters, path, wall, reason):
    journal.store([letter(1, reason=reason, attempts=12)])
    wall.advance(30 * 86_400)

    assert replay(letters, "hook") == (1, 0)

    assert states(path) == [("hook", "pending", reason, 0, wall())]
    (due,) = journal.due("hook", 10)
    assert (due.event.key, due.attempts, due.stored_at) == (event(1).key, 0, wall())


def test_a_replay_is_of_what_was_asked_for_only(journal, letters):
    journal.store([letter(n) for n in range(1, 4)])

    assert replay(letters, "hook", ids=[2, 77]) == (1, 0)

    assert ids(letters) == [1, 3]
    assert ids(letters, state="pending") == [2]


def test_a_replay_that_was_given_up_halfway_goes_on_where_it_was(journal, letters):
    journal.store([letter(n) for n in range(2 * CHUNK_ROWS + 10)])

    interrupted = letters.replay(Filter(), router=Routes(), sinks=["hook"])
    assert next(interrupted) == (CHUNK_ROWS, 0)
    interrupted.close()

    assert replay(letters, "hook") == (CHUNK_ROWS + 10, 0)
    assert replay(letters, "hook") == (0, 0)


def test_what_belongs_to_a_sink_that_is_no_more_stays(journal, letters):
    journal.store([letter(1, "gone"), letter(2)])

    assert replay(letters, "hook") == (1, 1)

    assert ids(letters) == [1]


def test_what_cannot_be_read_stays(journal, letters, path):
    broken = replace(event(1), body=b'{"EventType')
    journal.store([Letter(event=broken, sink="", dead=True, reason="malformed", error="cut")])

    assert replay(letters, "hook", router=Routes(NewFileUpload=("hook",))) == (0, 1)

    assert [(sink, state, reason) for sink, state, reason, *_ in states(path)] == [("", "dead", "malformed")]


def test_what_no_route_took_is_routed_by_todays_routes(journal, letters, path):
    journal.store([letter(1, "", reason="unrouted"), letter(2, "", reason="unrouted", event_type="FileDeleted")])

    assert replay(letters, "hook", "archive", router=Routes(NewFileUpload=("hook", "archive"))) == (1, 1)

    assert [(sink, state) for sink, state, *_ in states(path)] == [
        ("", "dead"),
        ("hook", "pending"),
        ("archive", "pending"),
    ]
    assert {due.event.body for sink in ("hook", "archive") for due in journal.due(sink, 9)} == {event(1).body}
    assert ids(letters) == [2]


def test_what_a_sink_has_already_is_not_brought_to_it_again(journal, letters):
    """No route took the event at first; then VOD brought it again, and one did."""
    journal.store([letter(1, "", reason="unrouted")])
    journal.accept("hook", [Delivery(event(1), "hook", deadline=None)], None)

    replay(letters, "hook", router=Routes(NewFileUpload=("hook",)))

    assert journal.known([(event(1).key, "hook")]) == {(event(1).key, "hook"): Known.ACCEPTED}


def test_a_portion_that_fails_is_not_done_at_all(journal, letters, path):
    journal.store([letter(1), letter(2, "", reason="unrouted")])

    class Broken:
        def route(self, event):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError):
        replay(letters, "hook", router=Broken())

    assert [state for _, state, *_ in states(path)] == ["dead", "dead"]
    journal.store([letter(3)])  # and nothing is locked


# --- purge ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "left"),
    [
        ({}, [3]),
        ({"ids": [1]}, [2, 3]),
        ({"sink": "script"}, [1, 3]),
        ({"last_id": 1}, [2, 3]),
        ({"ids": [3]}, [1, 2, 3]),
    ],
)
def test_purge_deletes_what_was_asked_for_and_no_pending_ones(journal, letters, path, wanted, left):
    journal.store([letter(1), letter(2, "script"), letter(3, dead=False)])

    assert sum(letters.purge(Filter(**wanted))) == 3 - len(left)

    assert sorted(ids(letters) + ids(letters, state="pending")) == left


def test_what_was_purged_makes_room(journal, letters):
    journal.store([letter(n) for n in range(300)])
    assert journal.has_letters

    assert sum(letters.purge(Filter())) == 300

    assert not journal.has_letters


# --- the daemon beside it ---------------------------------------------------------------------------------------------


def test_an_open_journal_is_in_use_and_a_closed_one_is_not(path, log, wall):
    journal = Journal(path, max_bytes=10**9, ledger_days=5, log=log, wall=wall)
    with Letters(path) as letters:
        assert letters.is_in_use()
        journal.close()
        assert not letters.is_in_use()
        path.with_name("journal.db.lock").unlink()
        assert not letters.is_in_use()


def test_asking_whether_it_is_in_use_does_not_keep_a_daemon_out(path, log, wall):
    with path.with_name("journal.db.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # as the question does, for an instant
        threading.Timer(0.03, fcntl.flock, (lock, fcntl.LOCK_UN)).start()
        Journal(path, max_bytes=10**9, ledger_days=5, log=log, wall=wall).close()
        with Letters(path) as letters:
            assert not letters.is_in_use()
