"""The operator's actions on the journal, tested within one process."""

import fcntl
import json
import sqlite3
import threading
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers import FakeClock, event, full_disk
from vodpoller.errors import JournalError, UnusableJournalError
from vodpoller.journal import operator as letters_module
from vodpoller.journal.contract import Known, Letter, NewDeadLetter
from vodpoller.journal.operator import CHUNK_ROWS, Backlog, Filter, Letters, as_json_value, time_since
from vodpoller.journal.schema import SCHEMA_VERSION
from vodpoller.journal.sqlite import SqliteJournal
from vodpoller.telemetry import Telemetry

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
    opened = SqliteJournal(path, max_bytes=10**9, ledger_days=5, telemetry=Telemetry(log), wall=wall)
    yield opened
    opened.close()


@pytest.fixture
def letters(journal, path, wall):
    with Letters(path, writable=True, wall=wall) as opened:
        yield opened


def letter(number=0, sink="hook", *, event_type="NewFileUpload", task_id=None, **more):
    of_event = event(number, event_type=event_type, **({"TaskId": task_id} if task_id else {}))
    return Letter(event=of_event, sink=sink, **{"dead": True, "reason": "rejected", "error": "no", **more})


def ids(letters, **wanted):
    return [row.id for row in letters.stored(Filter(**wanted))]


def states(path):
    with closing(sqlite3.connect(path)) as db:
        return db.execute("SELECT sink, state, reason, attempts, due_at FROM letters ORDER BY id").fetchall()


class Routes:
    """A router that chooses the sinks by the event type."""

    def __init__(self, **targets):
        self._targets = targets

    def route(self, event):
        return SimpleNamespace(sinks=self._targets.get(event.type, ()))


def replay(letters, *sinks, router=None, to=None, **wanted):
    """Replay; return the number of events that were made due and the number of those that cannot be."""
    portions = list(letters.replay(Filter(**wanted), router=router or Routes(), sinks=sinks, to=to))
    return sum(done for done, _ in portions), sum(undone for _, undone in portions)


# --- journals that cannot be used -------------------------------------------------------------------------------------


def test_a_missing_journal_is_reported_with_when_it_is_made(path):
    with pytest.raises(JournalError, match="the journal does not exist yet: vodpoller makes it when it first runs"):
        Letters(path)
    assert not path.exists()


def test_a_folder_is_not_a_journal(path):
    path.mkdir()

    with pytest.raises(UnusableJournalError, match="this is a folder, and a journal is a regular file"):
        Letters(path)


@pytest.mark.parametrize("parts", [["x" * 300], ["x" * 200] * 3], ids=["for the file system", "for SQLite"])
def test_a_path_that_is_too_long_is_reported(tmp_path, parts):
    path = tmp_path.joinpath(*parts)
    if len(parts) > 1:
        path.parent.mkdir(parents=True)
        path.touch()
    with pytest.raises(JournalError, match=r"the journal cannot be read: .*commands need the rights of"):
        Letters(path)


def make_journal(path, log, *letters):
    """Make a journal that no daemon has open."""
    with closing(SqliteJournal(path, max_bytes=10**9, ledger_days=5, telemetry=Telemetry(log))) as journal:
        journal.store(letters)


def test_a_journal_that_another_program_locks_cannot_be_read(path, log, monkeypatch):
    monkeypatch.setattr(letters_module, "BUSY_SECS", 0.0)
    make_journal(path, log)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(JournalError, match="cannot be read: database is locked"):
            Letters(path)
        other.execute("ROLLBACK")


def test_damage_while_the_journal_is_read_is_reported(path, log):
    make_journal(path, log, *[letter(number) for number in range(50)])
    with Letters(path) as letters:
        content = path.read_bytes()
        path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
        with pytest.raises(UnusableJournalError, match="recover"):
            letters.backlogs()


def test_a_purge_on_a_full_disk_changes_nothing(journal, letters, path):
    journal.store([letter(number) for number in range(3)])
    with full_disk(), pytest.raises(JournalError, match="cannot be written"):
        list(letters.purge(Filter(sink="hook")))
    assert len(states(path)) == 3


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (0, "another program's database"),
        (SCHEMA_VERSION + 1, f"version {SCHEMA_VERSION + 1}, and this vodpoller knows versions up to {SCHEMA_VERSION}"),
        (99, "version 99"),
    ],
)
def test_a_journal_of_another_version_is_not_touched(path, version, message):
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE letters (id)")
        db.execute(f"PRAGMA user_version = {version}")

    with pytest.raises(UnusableJournalError, match=message):
        Letters(path, writable=True)


def test_a_file_without_tables_is_reported_as_empty(path):
    path.touch()

    with pytest.raises(JournalError, match="the journal is empty"):
        Letters(path)


def test_a_journal_of_0_1_works_before_the_daemon_migrates_it(path):
    with closing(sqlite3.connect(path)) as db:
        db.executescript((Path(__file__).parents[1] / "data" / "journal-0.1.sql").read_text())

    with Letters(path, writable=True) as letters:
        assert ids(letters) == [4, 5, 6, 7]
        assert replay(letters, "hook", sink="hook") == (2, 0)
        assert sum(letters.purge(Filter(sink=""))) == 2
        assert ids(letters, state="pending") == [1, 2, 3, 4, 7]


def test_a_file_that_is_not_a_database_causes_no_traceback(path):
    path.write_bytes(b"this is not a database" * 100)

    with pytest.raises(UnusableJournalError, match=r"journal\.db: the journal is corrupt .*\.recover"):
        Letters(path)


def test_a_journal_without_its_tables_causes_no_traceback(path):
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    with Letters(path) as letters, pytest.raises(JournalError, match="no such table"):
        list(letters.stored(Filter()))


def test_a_journal_opened_for_reading_cannot_be_written(journal, path):
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


def test_a_locked_journal_fails_writes_but_not_reads(journal, path, monkeypatch):
    journal.store([letter()])
    monkeypatch.setattr(letters_module, "BUSY_SECS", 0.0)

    with Letters(path, writable=True) as letters, locked(path):
        assert ids(letters) == [1]
        for write in (lambda: replay(letters, "hook"), lambda: list(letters.purge(Filter()))):
            with pytest.raises(JournalError, match="cannot be written: database is locked"):
                write()
    assert [state for _, state, *_ in states(path)] == ["dead"]


def test_a_write_waits_for_a_journal_that_is_briefly_locked(journal, path):
    journal.store([letter()])
    is_locked, unlock = threading.Event(), threading.Event()

    def hold():
        with locked(path):
            is_locked.set()
            unlock.wait(10)

    other = threading.Thread(target=hold)
    other.start()
    with Letters(path, writable=True) as letters:
        assert is_locked.wait(10)
        threading.Timer(0.1, unlock.set).start()
        assert replay(letters, "hook") == (1, 0)
    other.join()


@pytest.mark.parametrize("daemon", ["runs", "has ended"])
def test_reading_the_journal_makes_no_file(path, log, wall, daemon):
    journal = SqliteJournal(path, max_bytes=10**9, ledger_days=5, telemetry=Telemetry(log), wall=wall)
    journal.store([letter()])
    if daemon == "has ended":
        journal.close()
    before = {file.name for file in path.parent.iterdir()}

    with Letters(path, makes_files=False) as letters:
        assert ids(letters) == [1]
        assert {file.name for file in path.parent.iterdir()} == before
    if daemon == "runs":
        journal.close()


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
        ({"reason": "no_route"}, [3]),
        ({"file_id": "5"}, [5]),
        ({"file_id": "4"}, []),
        ({"file_id": "4", "state": "pending"}, [4]),
        ({"file_id": "5", "sink": "script"}, []),
        ({"file_id": ""}, []),
        ({"task_id": "t2"}, [2]),
        ({"task_id": "t"}, []),
        ({"task_id": "", "sink": "hook"}, [1, 5]),
        ({"task_id": "t2", "file_id": "1"}, []),
        ({"since": NOW + 0.5}, [5]),
        ({"since": NOW + 1}, [5]),
        ({"since": NOW + 1.5}, []),
        ({"last_id": 2}, [1, 2]),
        ({"sink": "hook", "event_type": "*Complete", "reason": "rejected", "since": NOW, "ids": [1, 5]}, [5]),
    ],
)
def test_all_given_filters_must_match(journal, letters, wall, wanted, found):
    journal.store(
        [
            letter(1),
            letter(2, "script", event_type="TranscodeComplete", reason="gave_up", task_id="t2"),
            letter(3, "", event_type="FileDeleted", reason="no_route"),
            letter(4, dead=False, reason="sink_failed"),
        ]
    )
    wall.advance(1)
    journal.store([letter(5, event_type="CreateSnapshotByTimeOffsetComplete")])

    assert ids(letters, **wanted) == found
    assert letters.count(Filter(**wanted)) == len(found)


def test_a_row_has_all_facts_of_a_dead_letter(journal, letters):
    stored = letter(7, attempts=3, error="HTTP status 422")
    journal.store([stored])

    (row,) = letters.stored(Filter())

    assert (row.id, row.key, row.sink) == (1, stored.event.key.hex(), "hook")
    assert (row.reason, row.error, row.attempts, row.stored_at) == ("rejected", "HTTP status 422", 3, NOW)
    assert (row.source, row.event_type, row.size_bytes) == ("main", "NewFileUpload", len(stored.event.body))
    assert (row.state, row.due_at, row.file_id, row.task_id) == ("dead", None, "7", "")
    assert list(letters.with_bodies(Filter())) == [(row, stored.event.body)]


def test_a_pending_row_has_the_time_of_its_next_try(journal, letters):
    journal.store([letter(7, dead=False, due_in_secs=20, task_id="t7")])

    (row,) = letters.stored(Filter(state="pending"))

    assert (row.state, row.due_at, row.task_id) == ("pending", NOW + 20, "t7")


@pytest.mark.parametrize(
    ("body", "file_id", "task_id"),
    [
        (b'{"EventType":"X","XEvent":{"TaskId":"t","FileId":5285890784363430543212}}', "5285890784363430543212", "t"),
        (b'{"EventType":"X","XEvent":{"Task":{"TaskId":"t"},"FileId":"387702"}}', "387702", "t"),
        (b'{"EventType":"X","FileId":"387702","XEvent":{"TaskId":null}}', "387702", ""),
        (b'{"EventType":"X","XEvent":{"FileId":"387702"', "", ""),
        (b"\xff\x00", "", ""),
        (b'["387702"]', "", ""),
        (b"[" * 100_000, "", ""),
    ],
)
def test_ids_are_found_as_in_the_log_whatever_the_body(journal, letters, body, file_id, task_id):
    odd = Letter(event=replace(event(1), body=body), sink="hook", dead=True, reason="rejected")
    journal.store([odd, letter(2, task_id="t2")])

    first, second = letters.stored(Filter())

    assert (first.file_id, first.task_id) == (file_id, task_id)
    assert (second.file_id, second.task_id) == ("2", "t2")
    assert ids(letters, file_id=file_id) == [1]
    assert ids(letters, file_id="2", task_id="t2") == [2]


def test_backlogs_are_counted_by_sink_and_state(journal, letters, wall):
    journal.store([letter(1), letter(2), letter(3, "")])
    wall.advance(60)
    journal.store([letter(4, dead=False), letter(5)])

    assert letters.backlogs() == [
        Backlog(sink="hook", state="pending", events=1, oldest_at=NOW + 60),
        Backlog(sink="", state="dead", events=1, oldest_at=NOW),
        Backlog(sink="hook", state="dead", events=3, oldest_at=NOW),
    ]


def test_marks_are_those_that_the_daemon_wrote(journal, letters):
    journal.note_time("pull", ago_secs=-5.0)
    journal.flush()

    assert letters.noted_times() == {"started": NOW, "written": NOW, "pull": NOW + 5}


@pytest.mark.parametrize(
    ("text", "at"),
    [("90m", NOW - 5400), ("12h", NOW - 43_200), ("3d", NOW - 259_200), ("2026-11-23T08:00:00+00:00", 1_795_420_800.0)],
)
def test_a_time_or_an_age_is_understood(text, at):
    assert time_since(text, NOW) == at


@pytest.mark.parametrize("text", ["", "d", "1y", "yesterday", "9" * 400 + "d"])
def test_text_that_is_neither_a_time_nor_an_age_is_refused(text):
    with pytest.raises(ValueError, match="is neither a time"):
        time_since(text, NOW)


def test_the_body_of_a_row_is_as_it_was_stored(journal, letters):
    journal.store([letter(1)])
    assert letters.body(1) == event(1).body
    assert letters.body(2) is None


class Overtaken(Letters):
    """After each read, another command makes the rows due before this command acts on them."""

    def _read(self, query, values):
        rows = super()._read(query, values)
        if "max(id)" not in query:
            with Letters(self.path, writable=True) as other:
                replay(other, "hook")
        return rows


def test_an_event_that_becomes_pending_during_a_purge_stays(journal, path):
    journal.store([letter(1)])
    with Overtaken(path, writable=True) as letters:
        letters.path = path
        assert list(letters.purge(Filter())) == []
    assert [state for _, state, *_ in states(path)] == ["pending"]


# --- portions ---------------------------------------------------------------------------------------------------------


class Watched(Letters):
    """Remembers the number of rows that each reading took into memory."""

    def _read(self, query, values):
        rows = super()._read(query, values)
        self.most = max(getattr(self, "most", 0), len(rows))
        self.most_bytes = max(getattr(self, "most_bytes", 0), sum(len(row[-1]) for row in rows if "body" in query))
        return rows


@pytest.mark.parametrize("number", [0, 1, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 3 * CHUNK_ROWS])
def test_rows_are_read_in_portions_and_each_once(journal, path, number):
    journal.store([letter(n) for n in range(number)])

    with Watched(path) as letters:
        assert ids(letters) == list(range(1, number + 1))
        assert letters.most <= CHUNK_ROWS


@pytest.mark.parametrize("wanted", [Filter(), Filter(sink="hook"), Filter(state="pending", since=NOW, last_id=9)])
def test_no_portion_sorts_all_rows_again(journal, path, wanted):
    where, values = wanted.where()
    query = f"EXPLAIN QUERY PLAN SELECT id FROM letters WHERE {where} AND id > ? ORDER BY id LIMIT ?"
    with closing(sqlite3.connect(path)) as db:
        plan = " ".join(row[-1] for row in db.execute(query, (*values, 0, CHUNK_ROWS)))
    assert "letters_of_state" in plan
    assert "B-TREE" not in plan, "it sorts"


@pytest.mark.parametrize("limit", [1, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 2 * CHUNK_ROWS, 5 * CHUNK_ROWS])
def test_a_limit_ends_the_reading(journal, letters, limit):
    journal.store([letter(n) for n in range(2 * CHUNK_ROWS + 5)])

    found = [row.id for row in letters.stored(Filter(), limit=limit)]

    assert found == list(range(1, min(limit, 2 * CHUNK_ROWS + 5) + 1))


@pytest.mark.parametrize("size_bytes", [1000, 100_000])
def test_bodies_that_are_large_are_read_a_few_at_a_time(journal, path, monkeypatch, size_bytes):
    monkeypatch.setattr(letters_module, "CHUNK_BYTES", 250_000)
    large = [replace(event(n), body=b'{"a":"%s"}' % (b"x" * size_bytes)) for n in range(20)]
    journal.store([Letter(event=one, sink="hook", dead=True, reason="rejected") for one in large])

    with Watched(path, writable=True) as letters:
        assert ids(letters) == list(range(1, 21))
        assert replay(letters, "hook") == (20, 0)
        assert letters.most_bytes < 250_000 + size_bytes + 100


@pytest.mark.parametrize("of", ["stored", "with_bodies"])
def test_a_reader_that_pauses_does_not_block_the_wal_checkpoint(journal, letters, path, of):
    journal.store([letter(n) for n in range(2 * CHUNK_ROWS)])

    reading = getattr(letters, of)(Filter())
    next(reading)
    with closing(sqlite3.connect(path, timeout=0)) as other:
        assert other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
    assert len(list(reading)) == 2 * CHUNK_ROWS - 1


def test_a_slow_reader_blocks_nothing_and_misses_no_row_that_stays(journal, letters):
    journal.store([letter(n, dead=n != 2 * CHUNK_ROWS - 1) for n in range(2 * CHUNK_ROWS)])

    reading = letters.stored(Filter())
    seen = [next(reading).id]
    journal.mark_dead(
        [NewDeadLetter(claimed=journal.claim_due("hook", 1)[0], attempts=9, reason="gave_up", error="meanwhile")]
    )
    journal.accept("hook", [event(CHUNK_ROWS).key], None)
    rest = list(reading)

    assert seen + [row.id for row in rest] == [n for n in range(1, 2 * CHUNK_ROWS + 1) if n != CHUNK_ROWS + 1]
    assert rest[-1].error == "meanwhile"


def test_replay_and_purge_let_the_daemon_write_between_portions(journal, path):
    journal.store([letter(n) for n in range(3 * CHUNK_ROWS)])

    with Watched(path, writable=True) as letters:
        portions = []
        for done, undone in letters.replay(Filter(), router=Routes(), sinks=["hook"]):
            journal.store([letter(10_000 + len(portions))])  # it fails if the journal is locked
            portions.append((done, undone))
        assert portions == [(CHUNK_ROWS, 0)] * 3
        assert letters.most <= CHUNK_ROWS
        # Events that came after the start of the replay are not replayed.
        assert letters.count(Filter()) == 3

        deleted = []
        for number in letters.purge(Filter(state="pending")):
            journal.store([letter(20_000 + len(deleted))])
            deleted.append(number)
        assert deleted == [CHUNK_ROWS] * 3
        assert letters.count(Filter()) == 6


# --- replay -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["rejected", "gave_up"])
def test_a_replayed_event_is_due_at_once_and_its_age_starts_anew(journal, letters, path, wall, reason):
    journal.store([letter(1, reason=reason, attempts=12)])
    wall.advance(30 * 86_400)

    assert replay(letters, "hook") == (1, 0)

    assert states(path) == [("hook", "pending", reason, 0, wall())]
    (due,) = journal.claim_due("hook", 10)
    assert (due.event.key, due.attempts, due.age_secs) == (event(1).key, 0, 0.0)


def test_a_replay_takes_only_the_given_ids(journal, letters):
    journal.store([letter(n) for n in range(1, 4)])

    assert replay(letters, "hook", ids=[2, 77]) == (1, 0)

    assert ids(letters) == [1, 3]
    assert ids(letters, state="pending") == [2]


def test_an_interrupted_replay_can_be_continued(journal, letters):
    journal.store([letter(n) for n in range(2 * CHUNK_ROWS + 10)])

    interrupted = letters.replay(Filter(), router=Routes(), sinks=["hook"])
    assert next(interrupted) == (CHUNK_ROWS, 0)
    interrupted.close()

    assert replay(letters, "hook") == (CHUNK_ROWS + 10, 0)
    assert replay(letters, "hook") == (0, 0)


def test_events_of_a_removed_sink_are_not_replayed(journal, letters):
    journal.store([letter(1, "gone"), letter(2)])

    assert replay(letters, "hook") == (1, 1)

    assert ids(letters) == [1]


def test_a_malformed_event_is_not_replayed(journal, letters, path):
    broken = replace(event(1), body=b'{"EventType')
    journal.store([Letter(event=broken, sink="", dead=True, reason="malformed", error="cut")])

    assert replay(letters, "hook", router=Routes(NewFileUpload=("hook",))) == (0, 1)

    assert [(sink, state, reason) for sink, state, reason, *_ in states(path)] == [("", "dead", "malformed")]


def test_an_event_without_a_route_is_routed_by_todays_routes(journal, letters, path):
    journal.store([letter(1, "", reason="no_route"), letter(2, "", reason="no_route", event_type="FileDeleted")])

    assert replay(letters, "hook", "archive", router=Routes(NewFileUpload=("hook", "archive"))) == (1, 1)

    assert [(sink, state) for sink, state, *_ in states(path)] == [
        ("", "dead"),
        ("hook", "pending"),
        ("archive", "pending"),
    ]
    assert {due.event.body for sink in ("hook", "archive") for due in journal.claim_due(sink, 9)} == {event(1).body}
    assert ids(letters) == [2]


def test_a_replay_skips_a_sink_that_has_the_event(journal, letters):
    """No route took the event at first; then VOD delivered it again, and a route took it."""
    journal.store([letter(1, "", reason="no_route")])
    journal.accept("hook", [event(1).key], None)

    replay(letters, "hook", router=Routes(NewFileUpload=("hook",)))

    assert journal.known([(event(1).key, "hook")]) == {(event(1).key, "hook"): Known.ACCEPTED}


def test_a_portion_that_fails_changes_nothing(journal, letters, path):
    journal.store([letter(1), letter(2, "", reason="no_route")])

    class Broken:
        def route(self, event):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError):
        replay(letters, "hook", router=Broken())

    assert [state for _, state, *_ in states(path)] == ["dead", "dead"]
    journal.store([letter(3)])  # the journal is not locked


# --- pending events and other sinks -----------------------------------------------------------------------------------


def test_pending_events_are_made_due_at_once(journal, letters, path, wall):
    journal.store([letter(1, dead=False, reason="sink_failed", attempts=9, due_in_secs=900), letter(2)])
    wall.advance(60)

    assert replay(letters, "hook", state="pending") == (1, 0)

    assert states(path)[0] == ("hook", "pending", "sink_failed", 0, wall())
    assert ids(letters) == [2]


@pytest.mark.parametrize("dead", [True, False])
def test_stored_events_move_to_another_sink(journal, letters, path, wall, dead):
    """Both from a removed sink and from one that exists."""
    journal.store(
        [letter(1, "gone", dead=dead, attempts=3), letter(2, "hook", dead=dead), letter(3, "hook", dead=not dead)]
    )
    journal.confirmed([event(1).key])
    journal.flush()
    state = "dead" if dead else "pending"

    assert replay(letters, "hook", "archive", to="archive", state=state) == (2, 0)

    due = journal.claim_due("archive", 9)
    assert {row.event.key: row.attempts for row in due} == {event(1).key: 0, event(2).key: 0}
    assert sorted((sink, state) for sink, state, *_ in states(path) if sink != "archive") == [
        ("hook", "pending" if dead else "dead")
    ]
    with closing(sqlite3.connect(path)) as db:
        assert [c for (c,) in db.execute("SELECT confirmed FROM letters WHERE sink = 'archive' ORDER BY key")] in (
            [0, 1],
            [1, 0],
        )


def test_events_without_a_sink_move_unless_they_are_malformed(journal, letters):
    broken = replace(event(9), body=b'{"EventType')
    journal.store(
        [
            letter(1, "", reason="no_route"),
            Letter(event=broken, sink="", dead=True, reason="malformed", error="cut"),
        ]
    )

    assert replay(letters, "archive", to="archive") == (1, 1)

    assert [row.event.key for row in journal.claim_due("archive", 9)] == [event(1).key]
    assert ids(letters, reason="malformed") == [2]


@pytest.mark.parametrize("dead", [True, False])
def test_a_move_to_its_own_sink_is_a_replay(journal, letters, path, dead):
    journal.store([letter(1, dead=dead)])

    assert replay(letters, "hook", to="hook", state="dead" if dead else "pending") == (1, 0)

    assert [(sink, state) for sink, state, *_ in states(path)] == [("hook", "pending")]


@pytest.mark.parametrize("there", ["pending", "dead", "accepted"])
def test_a_move_to_a_sink_that_knows_the_event_brings_it_there_once(journal, letters, path, there):
    journal.store([letter(1, "gone")])
    if there == "accepted":
        journal.accept("hook", [event(1).key], None)
    else:
        journal.store([letter(1, "hook", dead=there == "dead")])

    assert replay(letters, "hook", to="hook", ids=[1]) == (1, 0)

    assert [(sink, state) for sink, state, *_ in states(path)] == [("hook", "pending")]
    expected = Known.ACCEPTED if there == "accepted" else Known.PENDING
    assert journal.known([(event(1).key, "hook")]) == {(event(1).key, "hook"): expected}
    assert len(journal.claim_due("hook", 9)) == (0 if there == "accepted" else 1)
    journal.flush()
    assert len(states(path)) == (0 if there == "accepted" else 1)


def outcomes_of(journal, row):
    """The actions that the daemon may take on a row when its delivery is over."""
    return {
        "accepted": lambda: journal.accept(row.sink, [row.event.key], None),
        "failed": lambda: journal.reschedule(row, attempts=7, due_in_secs=600, error="late"),
        "given up": lambda: journal.mark_dead([NewDeadLetter(claimed=row, attempts=7, reason="gave_up", error="late")]),
        "not attempted": lambda: journal.release([row]),
    }


OUTCOMES = ["accepted", "failed", "given up", "not attempted"]


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_a_row_that_is_purged_while_it_is_delivered_stays_purged(journal, letters, path, outcome):
    journal.store([letter(1, dead=False), letter(2, dead=False)])
    row, other = sorted(journal.claim_due("hook", 9), key=lambda due: due.row)
    journal.release([other])

    assert sum(letters.purge(Filter(state="pending", ids=[row.row]))) == 1
    journal.store([letter(3, dead=False)])
    outcomes_of(journal, row)[outcome]()
    journal.flush()

    assert {due.event.key for due in journal.claim_due("hook", 9)} == {event(2).key, event(3).key}


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_a_row_that_moves_during_its_delivery_arrives_once(journal, letters, path, wall, outcome):
    journal.store([letter(1, dead=False)])
    (row,) = journal.claim_due("hook", 9)

    assert replay(letters, "hook", "archive", to="archive", state="pending") == (1, 0)
    outcomes_of(journal, row)[outcome]()
    journal.flush()

    assert journal.claim_due("hook", 9) == []
    (moved,) = journal.claim_due("archive", 9)
    assert (moved.event.key, moved.attempts) == (event(1).key, 0)
    assert [(sink, state) for sink, state, *_ in states(path)] == [("archive", "pending")]


@pytest.mark.parametrize("to", ["archive", None])
def test_a_row_that_is_accepted_before_its_move_does_not_move(journal, path, to):
    journal.store([letter(1, dead=False), letter(2, dead=False)])
    rows = {due.event.key: due for due in journal.claim_due("hook", 9)}

    class Slow(Letters):
        def _read(self, query, values):
            found = super()._read(query, values)
            if "body" in query and rows:
                outcomes_of(journal, rows.pop(event(1).key))["accepted"]()
                rows.clear()
            return found

    with Slow(path, writable=True) as letters:
        assert replay(letters, "hook", "archive", to=to, state="pending") == (1, 0)

    assert [(sink, state) for sink, state, *_ in states(path)] == [(to or "hook", "pending")]
    assert journal.known([(event(1).key, "hook")]) == {(event(1).key, "hook"): Known.ACCEPTED}


@pytest.mark.parametrize(
    ("wanted", "left"),
    [({"file_id": "3"}, [1, 2, 4]), ({"task_id": "t"}, [2, 3]), ({"file_id": "2", "task_id": "t"}, [1, 2, 3, 4])],
)
@pytest.mark.parametrize("state", ["dead", "pending"])
def test_purge_and_replay_filter_by_file_id_and_task_id(journal, letters, wanted, left, state):
    def store():
        given = [(1, "t"), (2, "s"), (3, None), (4, "t")]
        journal.store([letter(n, dead=state == "dead", task_id=task_id) for n, task_id in given])

    store()
    gone = [number for number in (1, 2, 3, 4) if number not in left]
    assert replay(letters, "hook", "archive", to="archive", state=state, **wanted) == (len(gone), 0)
    assert ids(letters, state=state, sink="hook") == left

    sum(letters.purge(Filter(state="pending")))
    sum(letters.purge(Filter(state="dead")))
    store()
    assert sum(letters.purge(Filter(state=state, **wanted))) == len(gone)
    assert letters.count(Filter(state=state)) == len(left)


# --- bodies as lines of JSON ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b'{"a":1.10,"b":52858907843634305432}', '{"a":1.10,"b":52858907843634305432}'),
        (b'{"a":1,"a":2}', '{"a":1,"a":2}'),
        (b'{\n "a" : 1,\r\n\t"b" : []}', '{  "a" : 1,  \t"b" : []}'),
        ('{"a":"é😀\u2028\x9b\x7f"}'.encode(), '{"a":"\\u00e9\\ud83d\\ude00\\u2028\\u009b\\u007f"}'),
        (b"[]", "[]"),
        (b'{"a":"tab\there"}', None),
        (b'{"a":NaN}', None),
        (b'{"a":1', None),
        (b'"\xff"', None),
        (b"", None),
        (b"[" * 100_000, None),
        (b"1" * 5000, None),
    ],
)
def test_a_body_is_exported_unchanged_if_it_is_standard_json(body, value):
    assert as_json_value(body) == value
    if value is not None:
        assert json.loads(value) == json.loads(body)


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
def test_purge_deletes_only_the_matching_dead_letters(journal, letters, path, wanted, left):
    journal.store([letter(1), letter(2, "script"), letter(3, dead=False)])

    assert sum(letters.purge(Filter(**wanted))) == 3 - len(left)

    assert sorted(ids(letters) + ids(letters, state="pending")) == left


def test_purged_events_are_no_longer_counted(journal, letters):
    journal.store([letter(n) for n in range(300)])
    assert journal.counts()

    assert sum(letters.purge(Filter())) == 300

    assert not journal.counts()


# --- with a running daemon --------------------------------------------------------------------------------------------


def test_an_open_journal_is_in_use_and_a_closed_one_is_not(path, log, wall):
    journal = SqliteJournal(path, max_bytes=10**9, ledger_days=5, telemetry=Telemetry(log), wall=wall)
    with Letters(path) as letters:
        assert letters.is_in_use()
        journal.close()
        assert not letters.is_in_use()
        path.with_name("journal.db.lock").unlink()
        assert not letters.is_in_use()


def test_the_check_for_a_daemon_does_not_block_a_daemon(path, log, wall):
    with path.with_name("journal.db.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # as `is_in_use` does, for a moment
        threading.Timer(0.03, fcntl.flock, (lock, fcntl.LOCK_UN)).start()
        SqliteJournal(path, max_bytes=10**9, ledger_days=5, telemetry=Telemetry(log), wall=wall).close()
        with Letters(path) as letters:
            assert not letters.is_in_use()
