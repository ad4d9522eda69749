import errno
import fcntl
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import FakeClock, event, full_disk, log_into, named
from tests.polling import until
from vodpoller.errors import JournalError, JournalFullError, StorageError, UnusableJournalError
from vodpoller.journal import wal as wal_module
from vodpoller.journal.contract import CONFIRMED_KEPT_SECS, Known, Letter, NewDeadLetter, Position
from vodpoller.journal.group_commit import DEFERRED_MAX
from vodpoller.journal.place import cannot_open
from vodpoller.journal.schema import ROW_OVERHEAD_BYTES, SCHEMA_VERSION
from vodpoller.journal.sqlite import SqliteJournal
from vodpoller.journal.unwritten import Snapshot, Unwritten
from vodpoller.telemetry import Telemetry

NOW = 1_800_000_000.0


@pytest.fixture
def wall():
    return FakeClock(NOW)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.db"


def connect_without_waiting(path, factory=sqlite3.Connection):
    """A connection that fails at once if the file is locked, so that no test waits."""
    return sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False, factory=factory)


@pytest.fixture
def opened(path, log, wall):
    """Opens journals, one after the other, and closes those that are still open at the end of the test."""
    journals = []

    def open_one(**more):
        settings = {
            "max_bytes": 10**9,
            "ledger_days": 14,
            "telemetry": Telemetry(log),
            "wall": wall,
            "connect": connect_without_waiting,
            **more,
        }
        journals.append(SqliteJournal(path, **settings))
        return journals[-1]

    yield open_one
    for journal in journals:
        try:
            journal.commits.db.execute("SELECT 1")
        except sqlite3.ProgrammingError:
            continue
        journal.close()


@pytest.fixture
def journal(opened):
    return opened()


def letter(number=0, sink="it", **more):
    return Letter(event=event(number), sink=sink, **{"dead": False, "reason": "sink_failed", **more})


def accept(journal, *numbers, sink="it", position=None):
    journal.accept(sink, [event(number).key for number in numbers], position)


def known(journal, number=0, sink="it"):
    return journal.known([(event(number).key, sink)]).get((event(number).key, sink))


def rows(path, query):
    """The result of the query as another process sees it."""
    with closing(sqlite3.connect(path, timeout=0)) as db:
        return db.execute(query).fetchall()


def change(path, statement):
    with closing(sqlite3.connect(path, timeout=0)) as db, db:
        db.execute(statement)


class Locked:
    """Another process that holds the write lock."""

    def __init__(self, path):
        self.db = sqlite3.connect(path, isolation_level=None)

    def __enter__(self):
        self.db.execute("BEGIN IMMEDIATE")

    def __exit__(self, *args):
        self.db.execute("ROLLBACK")
        self.db.close()


# --- opening ----------------------------------------------------------------------------------------------------------


@pytest.mark.system
def test_a_second_journal_on_the_same_file_is_refused(journal, opened):
    with pytest.raises(JournalError, match="another process has this journal open"):
        opened()


@pytest.mark.system
def test_another_process_is_refused_until_the_first_has_closed(journal, path):
    code = (
        "import sys; from pathlib import Path; from tests.helpers import log_into\n"
        "from vodpoller.errors import JournalError; from vodpoller.journal.sqlite import *\n"
        "try: SqliteJournal(Path(sys.argv[1]), max_bytes=1, ledger_days=1, telemetry=Telemetry(log_into([]))).close()\n"
        "except JournalError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(path)]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=30, check=True)
    assert "another process has this journal open" in result.stdout
    journal.close()
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=30, check=True)
    assert result.stdout == ""


@pytest.mark.parametrize(
    "content", [b"this is not a database at all, it is a text" * 100, b"SQLite format 3\0" + b"\xff" * 4096]
)
def test_a_corrupt_file_is_reported_and_not_changed(opened, path, content):
    path.write_bytes(content)
    with pytest.raises(UnusableJournalError, match=r"the journal is corrupt.*copy.*\.recover.*delivered twice"):
        opened()
    assert path.read_bytes() == content


def test_a_damaged_page_is_found_at_the_start(opened, path):
    journal = opened()
    accept(journal, *range(2000))
    journal.close()
    content = bytearray(path.read_bytes())
    content[8 * 4096 : 9 * 4096] = b"\x5a" * 4096
    path.write_bytes(content)
    with pytest.raises(UnusableJournalError, match="corrupt"):
        opened()


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 99])
def test_a_journal_of_a_later_version_is_not_touched(opened, path, version):
    opened().close()
    change(path, f"PRAGMA user_version = {version}")
    message = f"version {version}, and this vodpoller knows versions up to {SCHEMA_VERSION}: install the vodpoller that"
    with pytest.raises(UnusableJournalError, match=message):
        opened()
    assert rows(path, "PRAGMA user_version") == [(version,)]


@pytest.mark.parametrize("table", ["cookies", "letters"])
def test_a_database_of_another_program_is_not_touched(opened, path, table):
    change(path, f"CREATE TABLE {table} (id)")
    before = path.read_bytes()
    with pytest.raises(UnusableJournalError, match="another program's database"):
        opened()
    assert path.read_bytes() == before


@pytest.mark.parametrize("missing", ["marks", "positions"])
def test_a_journal_that_lacks_a_table_is_reported_as_corrupt(opened, path, missing):
    opened().close()
    change(path, f"DROP TABLE {missing}")
    with pytest.raises(UnusableJournalError, match=f"corrupt .no such table: {missing}"):
        opened()


def test_a_large_journal_is_not_read_whole_at_the_start(opened, path, monkeypatch):
    opened().close()
    monkeypatch.setattr("vodpoller.journal.opening.QUICK_CHECK_BYTES", 0)
    statements = []

    class RecordingConnection(sqlite3.Connection):
        def execute(self, statement, *parameters):
            statements.append(statement)
            return super().execute(statement, *parameters)

    opened(connect=partial(connect_without_waiting, factory=RecordingConnection))
    assert "PRAGMA journal_mode = WAL" in statements
    assert not any("quick_check" in statement for statement in statements)


@pytest.mark.parametrize(
    ("code", "kind", "advice"),
    [
        (sqlite3.SQLITE_READONLY, UnusableJournalError, "must belong to the user that runs vodpoller"),
        (sqlite3.SQLITE_FULL, JournalError, "Is the disk full"),
        (sqlite3.SQLITE_NOTADB, UnusableJournalError, "recover"),
    ],
)
def test_an_error_of_sqlite_at_opening_names_what_to_do(path, code, kind, advice):
    error = sqlite3.OperationalError("no")
    error.sqlite_errorcode = code
    shown = cannot_open(path, error)
    assert type(shown) is kind
    assert advice in str(shown)


def test_a_folder_that_cannot_be_made_is_reported(tmp_path, log):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UnusableJournalError, match="folder cannot be made"):
        SqliteJournal(tmp_path / "file" / "journal.db", max_bytes=1, ledger_days=1, telemetry=Telemetry(log))


@pytest.mark.parametrize("kind", ["folder", "null", "pipe", "link to a folder"])
def test_what_is_not_a_regular_file_is_refused_without_a_lock_file(tmp_path, log, kind):
    path = {"null": Path("/dev/null")}.get(kind, tmp_path / "it")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a folder":
        path.symlink_to(tmp_path)
    with pytest.raises(UnusableJournalError, match=r"a journal is a regular file: set journal\.path to one"):
        SqliteJournal(path, max_bytes=1, ledger_days=1, telemetry=Telemetry(log))
    assert not path.with_name(f"{path.name}.lock").exists()


@pytest.mark.parametrize("name", [":memory:", "file:x?mode=memory"])
def test_a_name_that_is_special_to_sqlite_is_a_plain_file(tmp_path, log, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with closing(SqliteJournal(Path(name), max_bytes=10**6, ledger_days=1, telemetry=Telemetry(log))) as journal:
        journal.store([letter(1)])
    assert (tmp_path / name).stat().st_size > 0


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, JournalError),
        (errno.EMFILE, JournalError),
        (errno.EROFS, UnusableJournalError),
        (errno.EACCES, UnusableJournalError),
    ],
)
@pytest.mark.parametrize("part", ["folder", "lock", "file"])
def test_only_errors_that_a_person_must_fix_stop_the_service(tmp_path, log, monkeypatch, code, kind, part):
    path = tmp_path / "sub" / "journal.db"
    refused = {"folder": path.parent, "lock": path.with_name("journal.db.lock"), "file": path}[part]
    make, open_file = Path.mkdir, os.open

    def fails(name):
        if Path(name) == refused:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", lambda self, *mode, **more: (fails(self), make(self, *mode, **more)))
    monkeypatch.setattr(os, "open", lambda name, *args, **more: (fails(name), open_file(name, *args, **more))[1])
    with pytest.raises(JournalError, match=os.strerror(code)) as raised:
        SqliteJournal(path, max_bytes=1, ledger_days=1, telemetry=Telemetry(log))
    assert type(raised.value) is kind


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_missing_file_locks_are_not_reported_as_a_second_daemon(opened, monkeypatch, code):
    def refuse(fd, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UnusableJournalError, match=r"cannot be locked: .*local disk") as raised:
        opened()
    assert "another process" not in str(raised.value)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_other_users_cannot_read_the_files_of_the_journal(path, log, umask):
    before = os.umask(umask)
    try:
        with closing(SqliteJournal(path, max_bytes=10**6, ledger_days=1, telemetry=Telemetry(log))) as journal:
            journal.store([letter(1)])
            modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    finally:
        os.umask(before)
    assert set(modes) == {"journal.db", "journal.db-wal", "journal.db-shm", "journal.db.lock"}
    assert set(modes.values()) == {0o640 & ~umask}


@pytest.mark.parametrize(("before", "after"), [(0o644, 0o640), (0o666, 0o660), (0o600, 0o600)])
def test_files_of_an_earlier_version_are_closed_to_other_users(opened, path, before, after):
    opened().close()
    path.chmod(before)
    opened()
    assert stat.S_IMODE(path.stat().st_mode) == after
    assert stat.S_IMODE(path.with_name("journal.db-wal").stat().st_mode) == after


@pytest.mark.parametrize("fault", ["corrupt", "of a later version", "of another program"])
def test_an_opening_that_fails_leaves_nothing_open(path, log, fault):
    if fault == "corrupt":
        path.write_bytes(b"this is not a database at all, it is a text" * 100)
    else:
        change(path, "PRAGMA user_version = 99" if fault == "of a later version" else "CREATE TABLE cookies (id)")
    with pytest.raises(UnusableJournalError):
        SqliteJournal(path, max_bytes=1, ledger_days=1, telemetry=Telemetry(log))
    held = [link.resolve().name for link in Path("/proc/self/fd").iterdir()]
    assert [name for name in held if name.startswith("journal.db")] == []


# --- storing ----------------------------------------------------------------------------------------------------------


def test_stored_events_are_in_the_file_when_the_call_returns(journal, path):
    journal.store([letter(1), letter(2, dead=True, reason="rejected", error="no")])
    stored = rows(path, "SELECT state, reason, error, confirmed, body FROM letters ORDER BY id")
    assert stored == [("pending", "sink_failed", "", 0, event(1).body), ("dead", "rejected", "no", 0, event(2).body)]


def test_a_durable_write_is_committed_with_a_full_sync(journal):
    levels = []
    journal.commits.write(lambda db: levels.append(db.execute("PRAGMA synchronous").fetchone()[0]), durable=True)
    journal.commits.write(lambda db: levels.append(db.execute("PRAGMA synchronous").fetchone()[0]), durable=False)
    assert levels == [2, 1]


def test_the_sync_level_is_set_only_when_it_changes(journal):
    statements = []
    journal.commits.db.set_trace_callback(statements.append)
    for durable in (True, False, False, True):
        journal.commits.write(lambda _db: None, durable=durable)
    journal.commits.db.set_trace_callback(None)
    assert [sql for sql in statements if sql.startswith("PRAGMA")] == [
        f"PRAGMA synchronous = {level}" for level in ("FULL", "NORMAL", "FULL")
    ]


@pytest.mark.parametrize("how", ["store", "mark_dead"])
def test_the_commits_that_must_be_durable_are(journal, how, monkeypatch):
    journal.store([letter(1)])
    (stored,) = journal.claim_due("it", 1)
    durable = []
    write = journal.commits.write
    monkeypatch.setattr(journal.commits, "write", lambda work, *, durable: seen(work, durable))

    def seen(work, is_durable):
        durable.append(is_durable)
        write(work, durable=is_durable)

    if how == "store":
        journal.store([letter()])
    else:
        journal.mark_dead([NewDeadLetter(claimed=stored, attempts=1, reason="rejected", error="no")])
    assert durable == [True]


ROOM_OF_TEN = 10 * 600


def dead(number, sink="it", reason="rejected"):
    return letter(number, sink, dead=True, reason=reason)


@pytest.mark.parametrize("reason", ["rejected", "no_route", "malformed"])
def test_dead_letters_take_half_and_never_block_pending_events(opened, reason, lines):
    journal = opened(max_bytes=ROOM_OF_TEN)
    with pytest.raises(JournalFullError, match=r"dead letters may take half of journal\.max_bytes = 6000") as raised:
        journal.store([dead(number, reason=reason) for number in range(8)])
    assert raised.value.refused == {event(number).key for number in (5, 6, 7)}
    assert len(named(lines, "journal.failed")) == 1

    with pytest.raises(JournalFullError) as raised:
        journal.store([dead(8, reason=reason), *(letter(number) for number in range(20, 25)), dead(9, reason=reason)])

    assert raised.value.refused == {event(8).key, event(9).key}
    assert journal.counts() == {("it", "dead"): 5, ("it", "pending"): 5}
    with pytest.raises(JournalFullError, match="the journal is full") as raised:
        journal.store([letter(30)])


@pytest.mark.parametrize("way", ["accepted", "purged", "replayed"])
def test_room_that_dead_letters_free_is_used_again(opened, path, way):
    journal = opened(max_bytes=ROOM_OF_TEN)
    journal.store([dead(number) for number in range(5)])
    if way == "accepted":
        accept(journal, 0)
    elif way == "purged":
        change(path, "DELETE FROM letters WHERE id = 1")
    else:
        change(path, "UPDATE letters SET state = 'pending' WHERE id = 1")
    journal.store([dead(10)])
    with pytest.raises(JournalFullError):
        journal.store([dead(11)])


def test_pullers_that_store_at_once_stay_within_max_bytes(opened):
    journal = opened(max_bytes=2 * 600)
    refused = []

    def store(number):
        try:
            journal.store([letter(number)])
        except StorageError as error:
            refused.append(str(error))

    pullers = [threading.Thread(target=store, args=(number,)) for number in range(8)]
    with journal.commits.lock:  # each finds that there is room, and waits for its turn to write
        for puller in pullers:
            puller.start()
        until(lambda: journal.commits.waiting == len(pullers))
    for puller in pullers:
        puller.join()
    assert len(journal.claim_due("it", 100)) == 2
    assert len(refused) == 6
    assert all("journal.max_bytes = 1200" in error for error in refused)


@pytest.mark.parametrize("broken", ["locked", "full", "read-only"])
def test_a_store_that_fails_is_reported_and_stores_nothing(journal, path, broken, lines, wall):
    lock = Locked(path)
    if broken == "locked":
        lock.__enter__()
    elif broken == "full":
        pages = journal.commits.db.execute("PRAGMA page_count").fetchone()[0]
        journal.commits.db.execute(f"PRAGMA max_page_count = {pages}")
    else:
        journal.commits.db.execute("PRAGMA query_only = ON")
    many = [letter(number) for number in range(200)]
    for _ in range(3):
        with pytest.raises(StorageError, match="the journal cannot be written"):
            journal.store(many)
    if broken == "locked":
        lock.__exit__()
    else:
        lock.db.close()
    journal.commits.db.execute("PRAGMA max_page_count = 1000000")
    journal.commits.db.execute("PRAGMA query_only = OFF")
    assert journal.counts() == {}
    assert len(named(lines, "journal.failed")) == 1
    journal.flush()
    assert len(named(lines, "journal.recovered")) == 1
    journal.store(many)
    assert journal.counts() == {("it", "pending"): 200}


def test_events_already_stored_need_no_room(opened):
    size = ROW_OVERHEAD_BYTES + len(event(1).body)
    journal = opened(max_bytes=int(2.5 * size))
    journal.store([letter(1)])
    journal.store([letter(1), letter(2)])
    assert journal.counts() == {("it", "pending"): 2}
    with pytest.raises(JournalFullError):
        journal.store([letter(3)])


def test_mark_removed_does_nothing_without_stored_events(journal):
    journal.mark_removed(["it"])
    assert journal.counts() == {}


def test_status_tries_to_write(journal, path):
    found = journal.status()
    assert (found.writable, found.error, found.path, found.limit_bytes) == (True, "", str(path), 10**9)

    with full_disk():
        found = journal.status()
        assert found.writable is False
        assert "disk" in found.error
        assert journal.trouble == found.error

    assert journal.status().writable is True
    assert journal.trouble == ""


@pytest.mark.parametrize("what", ["store", "accept", "confirmed"])
def test_it_recovers_only_when_something_is_written(journal, lines, what):
    with full_disk():
        if what == "accept":
            accept(journal, 1)
        elif what == "confirmed":
            journal.confirmed([event(1).key])
        else:
            with pytest.raises(StorageError):
                journal.store([letter(1)])
        for _ in range(3):
            journal.flush()
        assert not named(lines, "journal.recovered")
        assert not journal.status().writable

    journal.flush()
    assert len(named(lines, "journal.recovered")) == 1


def test_a_deleted_journal_is_reported_with_a_remedy(journal, path):
    path.unlink()
    found = journal.status()
    assert not found.writable
    assert "deleted or replaced" in found.error
    assert "Put the file back" in found.remedy


def test_a_full_journal_is_not_writable_until_there_is_room(opened, path):
    journal = opened(max_bytes=3 * ROW_OVERHEAD_BYTES)
    with pytest.raises(JournalFullError):
        journal.store([letter(number) for number in range(9)])
    found = journal.status()
    assert not found.writable
    assert f"journal.max_bytes = {3 * ROW_OVERHEAD_BYTES}" in found.error
    assert "raise journal.max_bytes" in found.remedy
    assert 0 < found.stored_bytes <= found.limit_bytes

    journal.accept("it", [claimed.event.key for claimed in journal.claim_due("it", 100)], None)
    assert journal.status().writable


def test_an_event_with_text_that_sqlite_refuses_is_stored(journal):
    journal.store(
        [Letter(event=event(1, event_type="\ud800"), sink="it", dead=True, reason="x", error="\udfff" * 9000)]
    )
    assert journal.counts() == {("it", "dead"): 1}


def test_a_journal_that_was_replaced_cannot_be_written(journal, path):
    path.rename(path.with_name("moved"))
    with pytest.raises(StorageError, match="deleted or replaced"):
        journal.store([letter()])
    assert not journal.is_writable
    path.with_name("moved").rename(path)
    journal.flush()
    assert journal.is_writable
    journal.store([letter()])


# --- group commit -----------------------------------------------------------------------------------------------------


def test_writers_get_an_error_if_the_writing_thread_ends(journal):
    def end(db):
        raise SystemExit

    outcomes = []

    def write(work):
        try:
            journal.commits.write(work, durable=True)
        except (StorageError, SystemExit) as error:
            outcomes.append(type(error))

    threads = [threading.Thread(target=write, args=(work,)) for work in (end, lambda db: None)]
    with journal.commits.lock:  # one of them writes for both
        for thread in threads:
            thread.start()
        until(lambda: journal.commits.waiting == 2)
    for thread in threads:
        thread.join(10)
    assert set(outcomes) == {StorageError, SystemExit}


def test_a_failed_write_does_not_fail_others_of_its_group(journal, path):
    change(
        path, "CREATE TRIGGER no BEFORE INSERT ON letters WHEN new.sink = 'bad' BEGIN SELECT RAISE(ABORT, 'no'); END"
    )
    outcomes = {}

    def store(number):
        sink = "bad" if number == 5 else "good"
        try:
            journal.store([letter(number, sink)])
            outcomes[number] = "stored"
        except StorageError:
            outcomes[number] = "failed"

    threads = [threading.Thread(target=store, args=(number,)) for number in range(12)]
    with journal.commits.lock:  # all of them queue up behind one commit
        for thread in threads:
            thread.start()
        while journal.commits.waiting < 12:
            pass
    for thread in threads:
        thread.join(10)
    assert outcomes == {number: "failed" if number == 5 else "stored" for number in range(12)}
    assert rows(path, "SELECT count(*) FROM letters") == [(11,)]


def test_a_bug_in_one_write_does_not_lose_the_rows_of_others(journal, path):
    def buggy(db):
        raise OverflowError("a bug")

    outcomes = []

    def write(number):
        try:
            journal.commits.write(buggy if number == 0 else lambda db: insert(db, number), durable=True)
            outcomes.append((number, True))
        except StorageError:
            outcomes.append((number, False))

    def insert(db, number):
        db.execute("INSERT INTO marks VALUES (?, 0)", (str(number),))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    with journal.commits.lock:
        for number, thread in enumerate(threads):
            thread.start()
            while journal.commits.waiting <= number:
                pass
    for thread in threads:
        thread.join(10)
    assert sorted(outcomes) == [(0, False), (1, True), (2, True), (3, True)]
    assert rows(path, "SELECT name FROM marks WHERE name <> 'started' ORDER BY name") == [("1",), ("2",), ("3",)]


def test_a_group_waits_for_a_locked_file_only_once(journal, path):
    statements = []
    journal.commits.db.set_trace_callback(statements.append)
    for number in range(5):
        journal.note_time(f"m{number}")
    assert journal.commits.waiting == 5
    with Locked(path), pytest.raises(StorageError):
        journal.store([letter()])
    assert statements.count("BEGIN IMMEDIATE") == 1
    assert journal.commits.waiting == 5


def test_many_threads_at_once_lose_nothing(journal, path):
    def work(number):
        for turn in range(10):
            journal.store([letter(100 * number + turn)])
            accept(journal, 10_000 + 100 * number + turn)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert journal.counts() == {("it", "pending"): 80}
    assert rows(path, "SELECT count(*) FROM ledger") == [(80,)]
    assert journal.unwritten == 0


# --- the ledger -------------------------------------------------------------------------------------------------------


def test_an_unwritten_acceptance_is_known_and_written_later(journal, path, lines):
    journal.store([letter(1)])
    with Locked(path):
        accept(journal, 1, 2)
        assert (known(journal, 1), known(journal, 2)) == (Known.ACCEPTED, Known.ACCEPTED)
        assert not journal.is_writable
        assert journal.unwritten == 2
        journal.flush()
        assert journal.unwritten == 2
    assert rows(path, "SELECT count(*) FROM ledger") == [(0,)]
    journal.flush()
    assert journal.is_writable
    assert rows(path, "SELECT count(*) FROM ledger") == [(2,)]
    assert journal.counts() == {}
    assert (known(journal, 1), known(journal, 2)) == (Known.ACCEPTED, Known.ACCEPTED)
    assert len(named(lines, "journal.failed")) == len(named(lines, "journal.recovered")) == 1


def test_a_pair_stays_known_while_it_moves_from_memory_to_the_file(opened, path):
    after_reading = []

    class Connection(sqlite3.Connection):
        def execute(self, statement, *values):
            found = super().execute(statement, *values)
            for act in after_reading if "FROM ledger WHERE key IN" in statement else ():
                act()
            return found

    journal = opened(connect=partial(connect_without_waiting, factory=Connection))
    with Locked(path):
        accept(journal, 1)
    after_reading.append(journal.flush)
    assert known(journal, 1) is Known.ACCEPTED
    assert rows(path, "SELECT count(*) FROM ledger") == [(1,)]


def test_pairs_in_memory_are_written_at_the_close(journal, path):
    with Locked(path):
        accept(journal, 1)
    journal.close()
    assert rows(path, "SELECT count(*) FROM ledger") == [(1,)]


def test_accept_does_not_raise_on_an_unexpected_error(journal, monkeypatch):
    def broken(work, *, durable):
        raise OverflowError("too large to convert to SQLite INTEGER")

    with monkeypatch.context() as patched:
        patched.setattr(journal.commits, "write", broken)
        accept(journal, 1)
    assert known(journal, 1) is Known.ACCEPTED


# --- positions --------------------------------------------------------------------------------------------------------


def test_a_pair_that_changes_during_a_write_is_written_next():
    unwritten = Unwritten()
    unwritten.add("it", [b"k", b"l"], accepted_at=1.0, position=at(10))
    written = unwritten.snapshot()
    unwritten.add("it", [b"k"], accepted_at=2.0, position=at(20))
    unwritten.remove(written)
    assert unwritten.snapshot() == Snapshot({(b"k", "it"): (2.0, None)}, {"it": at(20)})


def at(offset_bytes, inode=7):
    return Position(inode=inode, offset_bytes=offset_bytes)


def test_the_position_stays_before_pairs_that_are_only_in_memory(journal, path):
    accept(journal, 1, position=at(100))
    with Locked(path):
        accept(journal, 2, position=at(200))
    accept(journal, 3, position=at(300))
    assert journal.position("it") == at(100)
    journal.flush()
    assert journal.position("it") == at(300)


@given(st.lists(st.sampled_from(["accept", "accept locked", "flush", "flush locked"]), max_size=12))
def test_the_position_is_never_ahead_of_the_ledger_rows(tmp_path_factory, steps):
    path = tmp_path_factory.mktemp("positions") / "journal.db"
    with closing(SqliteJournal(path, max_bytes=1, ledger_days=1, telemetry=Telemetry(log_into([])))) as journal:
        journal.commits.db.execute("PRAGMA busy_timeout = 0")
        journal.commits.db.execute("PRAGMA synchronous = OFF")
        number = 0
        for step in steps:
            action, *locked = step.split()
            lock = Locked(path)
            if locked:
                lock.__enter__()
            if action == "accept":
                number += 1
                accept(journal, number, position=at(number))
            else:
                journal.flush()
            if locked:
                lock.__exit__()
            else:
                lock.db.close()
            position_now = journal.position("it")
            written = rows(path, "SELECT count(*) FROM ledger")[0][0]
            assert (position_now.offset_bytes if position_now else 0) <= written
        journal.flush()
        assert rows(path, "SELECT count(*) FROM ledger") == [(number,)]
        assert (journal.position("it") or at(0)).offset_bytes == number


@pytest.mark.system
def test_stored_events_survive_the_end_of_the_process(path):
    code = (
        "import os, sys; from pathlib import Path; from tests.helpers import *\n"
        "from vodpoller.journal.sqlite import *\n"
        "log = Telemetry(log_into([]))\n"
        "journal = SqliteJournal(Path(sys.argv[1]), max_bytes=10**9, ledger_days=1, telemetry=log)\n"
        "journal.store([Letter(event=event(n), sink='it', dead=False, reason='sink_failed') for n in range(9)])\n"
        "os._exit(9)"
    )
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", code, str(path)], cwd=root, timeout=30, check=False)
    assert ended.returncode == 9
    assert rows(path, "SELECT count(*) FROM letters") == [(9,)]


# --- what is due ------------------------------------------------------------------------------------------------------


def test_a_rescheduled_row_keeps_its_last_error(journal, path, wall):
    journal.store([letter(1, error="first")])
    (row,) = journal.claim_due("it", 1)
    journal.reschedule(row, attempts=2, due_in_secs=5, error=None)
    journal.flush()
    assert rows(path, "SELECT attempts, due_at, error FROM letters") == [(2, NOW + 5, "first")]
    wall.advance(5)
    (row,) = journal.claim_due("it", 1)
    journal.reschedule(row, attempts=3, due_in_secs=5, error="second")
    journal.flush()
    assert rows(path, "SELECT attempts, error FROM letters") == [(3, "second")]


def test_a_buried_row_has_its_reason(journal, path):
    journal.store([letter(1)])
    (row,) = journal.claim_due("it", 1)
    journal.mark_dead([NewDeadLetter(claimed=row, attempts=1, reason="gave_up", error="\ud800")])
    assert rows(path, "SELECT state, attempts, reason, error FROM letters") == [("dead", 1, "gave_up", "?")]


@pytest.mark.parametrize(("number", "kept"), [(DEFERRED_MAX + 5, DEFERRED_MAX), (10, 10)])
def test_a_reschedule_that_is_dropped_ends_its_claim(journal, path, number, kept):
    """At most `DEFERRED_MAX` reschedules wait in memory for a full disk."""
    journal.store([letter(n) for n in range(number)])
    with Locked(path):
        for row in journal.claim_due("it", number):
            journal.reschedule(row, attempts=1, due_in_secs=60, error="no")
        journal.flush()
        dropped = journal.claim_due("it", number)
    assert len(dropped) == number - kept
    journal.flush()
    assert rows(path, "SELECT count(*) FROM letters WHERE attempts = 1") == [(kept,)]


@pytest.mark.parametrize("error", ["ROLLBACK", "FAIL"])
def test_a_reschedule_that_can_never_be_written_ends_its_claim(journal, path, error):
    journal.store([letter(1), letter(2)])
    change(path, f"CREATE TRIGGER no BEFORE UPDATE ON letters WHEN new.id = 1 BEGIN SELECT RAISE({error}, 'no'); END")
    for row in journal.claim_due("it", 2):
        journal.reschedule(row, attempts=1, due_in_secs=60, error="no")
    assert journal.claim_due("it", 2) == []
    journal.flush()
    assert [row.event for row in journal.claim_due("it", 2)] == [event(1)]


@pytest.mark.parametrize("confirmed_ago_secs", [None, CONFIRMED_KEPT_SECS - 1, CONFIRMED_KEPT_SECS + 1])
def test_a_replayed_row_that_its_sink_has_is_dropped(journal, path, wall, confirmed_ago_secs):
    journal.store([letter(1)])
    accept(journal, 2)
    if confirmed_ago_secs is not None:
        journal.confirmed([event(2).key])
        journal.flush()
        wall.advance(confirmed_ago_secs)
    journal.store([letter(3)])
    key = event(2).key.hex()
    change(path, f"UPDATE letters SET key = x'{key}', state = 'pending' WHERE id = 1")
    is_new = confirmed_ago_secs == CONFIRMED_KEPT_SECS + 1  # identical content after this time is a new event
    assert [row.row for row in journal.claim_due("it", 9)] == ([1, 2] if is_new else [2])
    journal.flush()
    assert journal.counts() == {("it", "pending"): 2 if is_new else 1}


# --- upkeep -----------------------------------------------------------------------------------------------------------


def ledger_keys(path):
    return {key for (key,) in rows(path, "SELECT key FROM ledger")}


def test_rows_that_a_wrong_clock_confirmed_in_future_are_pruned(journal, path, wall):
    accept(journal, 1)
    wall.advance(86_400)
    journal.confirmed([event(1).key])
    journal.flush()
    wall.now = NOW
    journal.prune()
    assert ledger_keys(path) == set()


def test_a_clock_change_shifts_the_rows_of_this_process(opened, path, wall):
    journal = opened()
    journal.store([letter(1, due_in_secs=10)])
    journal.close()
    wall.advance(1)
    journal = opened()
    journal.store([letter(2, due_in_secs=10)])
    wall.advance(3600)
    journal.shift(3600)
    stamps = rows(path, "SELECT stored_at, due_at FROM letters ORDER BY id")
    assert stamps == [(NOW, NOW + 10), (NOW + 3601, NOW + 3611)]


def test_a_mark_keeps_the_last_time_given(journal, path):
    journal.note_time("seen")
    journal.note_time("seen", ago_secs=5.0)
    journal.flush()
    assert rows(path, "SELECT at FROM marks WHERE name = 'seen'") == [(NOW - 5.0,)]


def test_a_flush_without_anything_to_write_writes_nothing(journal, monkeypatch):
    journal.flush()
    monkeypatch.setattr(journal.commits, "write", None)
    journal.flush()


# --- journals of earlier versions -------------------------------------------------------------------------------------

OLD = (Path(__file__).parents[1] / "data" / "journal-0.1.sql").read_text()


def make_old(path, *, mode=0o644):
    """Make a journal as version 0.1 left it."""
    with closing(sqlite3.connect(path)) as db:
        db.executescript(OLD)
        db.execute("PRAGMA journal_mode = WAL")
    path.chmod(mode)


def everything(path):
    tables = ("letters", "ledger", "positions")
    return {table: rows(path, f"SELECT * FROM {table}") for table in tables}


def with_todays_reasons(tables):
    """The tables with the reasons of 0.1 replaced by today's; the reason is the fifth column of `letters`."""
    today = {"unrouted": "no_route", "errored": "sink_failed", "unsettled": "out_of_time"}
    letters = [(*row[:4], today.get(row[4], row[4]), *row[5:]) for row in tables["letters"]]
    assert {row[4] for row in tables["letters"]} & set(today)
    return {**tables, "letters": letters}


def test_a_journal_of_0_1_keeps_all_and_works(opened, path, lines, wall):
    make_old(path)
    before = everything(path)
    journal = opened()
    assert everything(path) == with_todays_reasons(before)
    assert rows(path, "PRAGMA user_version") == [(SCHEMA_VERSION,)]
    assert [known(journal, n, sink) for n, sink in ((1, "hook"), (3, "archive"), (7, "hook"))] == [
        Known.ACCEPTED,
        Known.ACCEPTED,
        Known.DEAD,
    ]
    assert journal.position("archive") == at(4711, 2**64 - 7)
    without_id = [(row[1], row[1], row[11], row[7], None) for row in before["letters"] if row[4] == "malformed"]
    found = rows(path, "SELECT key, content_key, source, lease_ends_at, acknowledged_at FROM occurrences")
    assert found == without_id != []
    assert journal.counts() == {("hook", "pending"): 2, ("gone", "pending"): 1, ("hook", "dead"): 2, ("", "dead"): 2}
    wall.advance(60)
    assert {row.event.key for row in journal.claim_due("hook", 9)} >= {event(4).key}
    assert dict(rows(path, "SELECT name, at FROM marks"))["confirm"] == NOW + 7

    journal.store([letter(50), letter(51, dead=True)])
    assert max(rows(path, "SELECT id FROM letters")) == (9,)
    accept(journal, 4, sink="hook")
    assert known(journal, 4, "hook") is Known.ACCEPTED
    journal.close()
    totals = rows(path, "SELECT letters_bytes, dead_bytes FROM totals")
    size = "sum(length(body) + 512)"
    assert totals == rows(path, f"SELECT {size}, (SELECT {size} FROM letters WHERE state = 'dead') FROM letters")
    assert [line["copy"] for line in named(lines, "journal.migrated")] == [f"{path}.v1"]
    opened().close()
    assert len(named(lines, "journal.migrated")) == 1


def test_the_copy_of_an_older_journal_is_that_journal(opened, path):
    make_old(path)
    change(path, "INSERT INTO marks VALUES ('in the WAL', 1)")
    before = everything(path)
    opened()
    copy = path.with_name("journal.db.v1")
    assert everything(copy) == before
    assert rows(copy, "PRAGMA user_version") == [(1,)]
    assert rows(copy, "SELECT at FROM marks WHERE name = 'in the WAL'") == [(1.0,)]
    assert rows(copy, "PRAGMA integrity_check") == [("ok",)]
    assert stat.S_IMODE(copy.stat().st_mode) & 0o007 == 0
    assert not path.with_name("journal.db.v1.unfinished").exists()


@pytest.mark.parametrize("fault", ["no room for the copy", "a later step fails"])
def test_a_migration_that_fails_leaves_the_journal_as_it_was(opened, path, monkeypatch, fault):
    make_old(path)
    before = everything(path)
    if fault == "no room for the copy":
        monkeypatch.setattr(Path, "replace", lambda *_: raise_(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    else:
        change(path, "ALTER TABLE totals ADD COLUMN dead_bytes INTEGER")
    with monkeypatch.context(), pytest.raises(JournalError):
        opened()
    assert everything(path) == before
    assert rows(path, "PRAGMA user_version") == [(1,)]
    monkeypatch.undo()
    if fault == "no room for the copy":
        assert opened().counts()["hook", "pending"] == 2


def raise_(error):
    raise error


@pytest.mark.parametrize("version", [1, SCHEMA_VERSION])
def test_the_output_of_sqlite3_dump_is_a_journal_again(opened, path, version):
    """`.dump` omits the version, and the totals still count rows that could not be read."""
    make_old(path)
    if version != 1:
        opened().close()
    with closing(sqlite3.connect(path)) as db:
        script = [line for line in db.iterdump() if "'gave_up'" not in line]
    path.unlink()
    with closing(sqlite3.connect(path)) as db:
        db.executescript("\n".join(script))
    journal = opened()
    assert journal.counts()["hook", "dead"] == 1
    taken, of_dead = rows(path, "SELECT letters_bytes, dead_bytes FROM totals")[0]
    assert taken == rows(path, "SELECT sum(length(body) + 512) FROM letters")[0][0]
    assert of_dead == rows(path, "SELECT sum(length(body) + 512) FROM letters WHERE state = 'dead'")[0][0]


# --- corruption that is found later -----------------------------------------------------------------------------------


def damage(path, *, first=1):
    """Overwrite all but the first pages, as a failing disk does."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096 * first)
        file.write(b"\x5a" * (size - 4096 * first))


@pytest.mark.parametrize("found_by", ["known", "store", "claim_due", "prune", "counts", "confirmed"])
def test_later_corruption_is_reported_with_a_remedy_and_stops_pulls(opened, path, lines, wall, found_by):
    journal = opened()
    accept(journal, *range(500))
    journal.store([letter(number) for number in range(500, 600)])
    journal.close()
    journal = opened()
    # A change by another process, so that no reader goes on with the pages that it has in memory.
    change(path, "INSERT INTO marks VALUES ('other', 1)")
    damage(path)
    use = {
        "known": lambda: known(journal, 1),
        "store": lambda: journal.store([letter(1000)]),
        "claim_due": lambda: journal.claim_due("it", 10),
        "prune": journal.prune,
        "counts": journal.counts,
        "confirmed": lambda: (journal.confirmed([event(1).key]), journal.flush()),
    }[found_by]
    for _ in range(3):
        with suppress(StorageError):
            use()
    failures = named(lines, "journal.failed")
    assert len(failures) == 1
    assert failures[0]["level"] == "error"
    for phrase in ("corrupt", ".recover", "delivered twice", "copy"):
        assert phrase in failures[0]["error_message"]
    assert not journal.is_writable
    with pytest.raises(StorageError, match="corrupt"):
        journal.claim_due("it", 1)
    status = journal.status()
    assert not status.writable
    assert "corrupt" in status.error
    assert "A corrupt journal" in status.remedy
    assert named(lines, "journal.recovered") == []


# --- the WAL ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_wal(monkeypatch):
    monkeypatch.setattr(wal_module, "WAL_KEPT_BYTES", 256 * 1024)
    monkeypatch.setattr(wal_module, "WAL_LARGE_BYTES", 1024 * 1024)


@pytest.mark.parametrize("writes", ["stored events", "ledger rows"])
def test_a_wal_that_grew_because_of_a_reader_is_cut_afterwards(opened, path, lines, small_wal, writes):
    now = FakeClock(0.0)
    journal = opened(monotonic=now)
    wal = path.with_name("journal.db-wal")
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM ledger").fetchone()
        number = 0
        while wal.stat().st_size < 3 * 1024 * 1024:
            if writes == "ledger rows":
                accept(journal, *range(number, number + 200))
            else:
                journal.store([letter(n) for n in range(number, number + 200)])
            number += 200
        for _ in range(3):
            now.advance(60)
            journal.flush()
        (warning_line,) = named(lines, "wal.grown")
        assert warning_line["level"] == "warning"
        assert warning_line["size_bytes"] >= 3 * 1024 * 1024
        assert f"fuser {path}" in warning_line["hint"]
    now.advance(60)
    journal.flush()
    assert wal.stat().st_size == 0
    journal.store([letter(10**6)])


def test_a_wal_of_usual_size_is_left_alone(journal, path):
    accept(journal, *range(200))
    size = path.with_name("journal.db-wal").stat().st_size
    journal.flush()
    assert path.with_name("journal.db-wal").stat().st_size == size > 0
