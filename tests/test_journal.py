import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import FakeClock, event, log_into, named, until
from vodpoller.delivery import Delivery, Portion, Position
from vodpoller.errors import JournalError, StorageError
from vodpoller.journal import CONFIRMED_KEPT_SECS, Journal, Known, Letter

NOW = 1_800_000_000.0


@pytest.fixture
def wall():
    return FakeClock(NOW)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.db"


@pytest.fixture
def opened(path, log, wall):
    """Opens journals, one after the other, and closes what is still open."""
    journals = []

    def open_one(**more):
        settings = {"max_bytes": 10**9, "ledger_days": 14, "log": log, "wall": wall, **more}
        journals.append(Journal(path, **settings))
        # What is locked is known to be: nobody need wait for it.
        for connection in (journals[-1]._writer, journals[-1]._reader):
            connection.execute("PRAGMA busy_timeout = 0")
        return journals[-1]

    yield open_one
    for journal in journals:
        try:
            journal._writer.execute("SELECT 1")
        except sqlite3.ProgrammingError:
            continue
        journal.close()


@pytest.fixture
def journal(opened):
    return opened()


def letter(number=0, sink="it", **more):
    return Letter(event=event(number), sink=sink, **{"dead": False, "reason": "errored", **more})


def accepted(number=0, sink="it", *, stored=False):
    delivery = Delivery(event(number), sink, deadline=None)
    delivery.stored = stored
    return delivery


def accept(journal, *numbers, sink="it", position=None, stored=False):
    journal.accept(sink, [accepted(number, sink, stored=stored) for number in numbers], position)


def known(journal, number=0, sink="it"):
    return journal.known([(event(number).key, sink)]).get((event(number).key, sink))


def rows(path, query):
    """What another process sees."""
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


def test_a_second_journal_on_the_same_file_is_kept_out(journal, opened):
    with pytest.raises(JournalError, match="another process has this journal open"):
        opened()


def test_another_process_is_kept_out_until_the_first_is_done(journal, path):
    code = (
        "import sys; from pathlib import Path; from tests.helpers import log_into; from vodpoller.journal import *\n"
        "try: Journal(Path(sys.argv[1]), max_bytes=1, ledger_days=1, log=log_into([])).close()\n"
        "except JournalError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(path)]
    root = Path(__file__).parent.parent
    said = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=30, check=True)
    assert "another process has this journal open" in said.stdout
    journal.close()
    said = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=30, check=True)
    assert said.stdout == ""


@pytest.mark.parametrize(
    "content", [b"this is no database at all, it is a text" * 100, b"SQLite format 3\0" + b"\xff" * 4096]
)
def test_a_corrupt_file_is_said_to_be_and_is_not_touched(opened, path, content):
    path.write_bytes(content)
    with pytest.raises(JournalError, match="the journal is corrupt"):
        opened()
    assert path.read_bytes() == content


def test_a_page_that_was_damaged_is_noticed_at_the_start(opened, path):
    journal = opened()
    accept(journal, *range(2000))
    journal.close()
    content = bytearray(path.read_bytes())
    content[8 * 4096 : 9 * 4096] = b"\x5a" * 4096
    path.write_bytes(content)
    with pytest.raises(JournalError, match="corrupt"):
        opened()


def test_a_journal_of_a_later_version_is_not_touched(opened, path):
    opened().close()
    change(path, "PRAGMA user_version = 2")
    with pytest.raises(JournalError, match=r"version 2.*install the vodpoller that wrote it"):
        opened()
    assert rows(path, "PRAGMA user_version") == [(2,)]


def test_a_place_that_cannot_hold_a_journal_is_said(tmp_path, log):
    (tmp_path / "file").write_text("x")
    with pytest.raises(JournalError, match="folder cannot be made"):
        Journal(tmp_path / "file" / "journal.db", max_bytes=1, ledger_days=1, log=log)
    (tmp_path / "folder").mkdir()
    with pytest.raises(JournalError, match="cannot be opened"):
        Journal(tmp_path / "folder", max_bytes=1, ledger_days=1, log=log)


def test_a_journal_that_could_not_be_opened_can_be_once_the_cause_is_gone(opened, path):
    path.write_bytes(b"this is no database at all, it is a text" * 100)
    with pytest.raises(JournalError):
        opened()
    path.unlink()
    assert opened().counts() == {}


def test_the_folder_is_made(tmp_path, log):
    with closing(Journal(tmp_path / "a" / "b" / "journal.db", max_bytes=1, ledger_days=1, log=log)) as journal:
        assert journal.counts() == {}


# --- storing ----------------------------------------------------------------------------------------------------------


def test_what_is_stored_is_in_the_file_when_the_call_returns(journal, path):
    journal.store([letter(1), letter(2, dead=True, reason="rejected", error="no")])
    stored = rows(path, "SELECT state, reason, error, confirmed, body FROM letters ORDER BY id")
    assert stored == [("pending", "errored", "", 0, event(1).body), ("dead", "rejected", "no", 0, event(2).body)]


def test_what_stands_in_for_an_event_is_committed_with_a_full_sync(journal):
    levels = []
    journal._write(lambda db: levels.append(db.execute("PRAGMA synchronous").fetchone()[0]), durable=True)
    journal._write(lambda db: levels.append(db.execute("PRAGMA synchronous").fetchone()[0]), durable=False)
    assert levels == [2, 1]


@pytest.mark.parametrize("how", ["store", "bury"])
def test_the_commits_that_must_be_durable_are(journal, how, monkeypatch):
    durable = []
    write = journal._write
    monkeypatch.setattr(journal, "_write", lambda work, *, durable: seen(work, durable))

    def seen(work, is_durable):
        durable.append(is_durable)
        write(work, durable=is_durable)

    if how == "store":
        journal.store([letter()])
    else:
        journal.bury(1, attempts=1, reason="rejected", error="no")
    assert durable == [True]


def test_storing_a_pair_again_changes_nothing(journal, path):
    journal.store([letter(1, attempts=3, error="first")])
    journal.store([letter(1, dead=True, error="second"), letter(1, "other")])
    assert rows(path, "SELECT sink, state, attempts, error FROM letters") == [
        ("it", "pending", 3, "first"),
        ("other", "pending", 0, ""),
    ]


def test_nothing_of_what_is_too_much_is_stored(opened, lines):
    journal = opened(max_bytes=2 * 600)
    journal.store([letter(1)])
    with pytest.raises(StorageError, match=r"journal.max_bytes = 1200"):
        journal.store([letter(2), letter(3)])
    assert journal.counts() == {("it", "pending"): 1}
    assert named(lines, "journal.failed")
    journal.store([])


def test_room_that_was_made_is_found_again(opened):
    journal = opened(max_bytes=600)
    journal.store([letter(1)])
    journal.forget([journal.due("it", 1)[0].row])
    journal.flush()
    journal.prune()
    assert not journal.has_letters
    journal.store([letter(2)])


def test_lanes_that_store_at_once_take_no_more_than_the_room_there_is(opened):
    journal = opened(max_bytes=2 * 600)
    refused = []

    def store(number):
        try:
            journal.store([letter(number)])
        except StorageError as error:
            refused.append(str(error))

    lanes = [threading.Thread(target=store, args=(number,)) for number in range(8)]
    with journal._write_lock:  # each finds that there is room, and waits for its turn to write
        for lane in lanes:
            lane.start()
        until(lambda: len(journal._queue) == len(lanes))
    for lane in lanes:
        lane.join()
    assert len(journal.due("it", 100)) == 2
    assert len(refused) == 6
    assert all("journal.max_bytes = 1200" in error for error in refused)


@pytest.mark.parametrize("broken", ["locked", "full", "read-only"])
def test_a_store_that_cannot_be_written_says_so_and_leaves_nothing(journal, path, broken, lines, wall):
    lock = Locked(path)
    if broken == "locked":
        lock.__enter__()
    elif broken == "full":
        pages = journal._writer.execute("PRAGMA page_count").fetchone()[0]
        journal._writer.execute(f"PRAGMA max_page_count = {pages}")
    else:
        journal._writer.execute("PRAGMA query_only = ON")
    many = [letter(number) for number in range(200)]
    for _ in range(3):
        with pytest.raises(StorageError, match="the journal cannot be written"):
            journal.store(many)
    if broken == "locked":
        lock.__exit__()
    else:
        lock.db.close()
    journal._writer.execute("PRAGMA max_page_count = 1000000")
    journal._writer.execute("PRAGMA query_only = OFF")
    assert journal.counts() == {}
    assert len(named(lines, "journal.failed")) == 1
    journal.flush()
    assert len(named(lines, "journal.recovered")) == 1
    journal.store(many)
    assert journal.counts() == {("it", "pending"): 200}


def test_text_that_sqlite_does_not_take_does_not_keep_an_event_from_being_stored(journal):
    journal.store(
        [Letter(event=event(1, event_type="\ud800"), sink="it", dead=True, reason="x", error="\udfff" * 9000)]
    )
    assert journal.counts() == {("it", "dead"): 1}


def test_a_journal_that_was_replaced_takes_nothing(journal, path):
    path.rename(path.with_name("moved"))
    with pytest.raises(StorageError, match="deleted or replaced"):
        journal.store([letter()])
    assert not journal.is_writable
    path.with_name("moved").rename(path)
    journal.flush()
    assert journal.is_writable
    journal.store([letter()])


# --- group commit -----------------------------------------------------------------------------------------------------


def test_a_write_that_fails_takes_no_other_of_its_group_along(journal, path):
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
    with journal._write_lock:  # all of them queue up behind one commit
        for thread in threads:
            thread.start()
        while len(journal._queue) < 12:
            pass
    for thread in threads:
        thread.join(10)
    assert outcomes == {number: "failed" if number == 5 else "stored" for number in range(12)}
    assert rows(path, "SELECT count(*) FROM letters") == [(11,)]


def test_nobody_believes_that_his_row_was_written_when_another_had_a_bug(journal, path):
    def buggy(db):
        raise OverflowError("a bug")

    outcomes = []

    def write(number):
        try:
            journal._write(buggy if number == 0 else lambda db: insert(db, number), durable=True)
            outcomes.append((number, True))
        except OverflowError:
            outcomes.append((number, False))

    def insert(db, number):
        db.execute("INSERT INTO marks VALUES (?, 0)", (str(number),))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    with journal._write_lock:
        for number, thread in enumerate(threads):
            thread.start()
            while len(journal._queue) <= number:
                pass
    for thread in threads:
        thread.join(10)
    assert sorted(outcomes) == [(0, False), (1, True), (2, True), (3, True)]
    assert rows(path, "SELECT name FROM marks WHERE name <> 'started' ORDER BY name") == [("1",), ("2",), ("3",)]


def test_a_file_that_is_locked_is_waited_for_once_and_not_once_for_each_of_a_group(journal, path, monkeypatch):
    commits = []
    commit = journal._commit
    monkeypatch.setattr(journal, "_commit", lambda batch: (commits.append(len(batch)), commit(batch))[1])
    for number in range(5):
        journal.mark(f"m{number}", NOW)
    with Locked(path), pytest.raises(StorageError):
        journal.store([letter()])
    assert commits == [6]


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


def test_what_nobody_has_seen_is_unknown(journal):
    assert journal.known([(event().key, "it")]) == {}
    assert journal.known([]) == {}


def test_a_pair_is_known_through_its_life(journal, wall):
    journal.store([letter()])
    assert known(journal) is Known.PENDING
    assert known(journal, sink="other") is None
    journal.bury(journal.due("it", 1)[0].row, attempts=1, reason="rejected", error="no")
    assert known(journal) is Known.DEAD
    accept(journal, 0, stored=True)
    assert known(journal) is Known.ACCEPTED
    assert journal.counts() == {}
    wall.advance(10 * 86_400)
    assert known(journal) is Known.ACCEPTED
    journal.confirmed([event().key])
    journal.flush()
    wall.advance(CONFIRMED_KEPT_SECS)
    assert known(journal) is Known.ACCEPTED
    wall.advance(1)
    assert known(journal) is None
    accept(journal, 0)
    assert known(journal) is Known.ACCEPTED
    wall.advance(CONFIRMED_KEPT_SECS + 1)
    assert known(journal) is Known.ACCEPTED


def test_more_pairs_than_a_query_takes_are_known(journal):
    accept(journal, *range(1200))
    pairs = [(event(number).key, "it") for number in range(1300)]
    assert len(journal.known(pairs)) == 1200


def test_what_cannot_be_read_is_not_taken_for_unknown(journal):
    journal._reader.close()
    with pytest.raises(StorageError, match="cannot be read"):
        known(journal)
    journal._reader = sqlite3.connect(":memory:")


def test_a_confirm_of_a_stored_event_lets_its_late_acceptance_age(journal, wall):
    journal.store([letter()])
    journal.confirmed([event().key])
    journal.flush()
    accept(journal, 0, stored=True)
    assert known(journal) is Known.ACCEPTED
    wall.advance(CONFIRMED_KEPT_SECS + 1)
    assert known(journal) is None


def test_an_acceptance_that_cannot_be_written_is_known_all_the_same_and_written_later(journal, path, lines):
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


def test_a_pair_that_goes_from_memory_to_the_file_is_known_at_every_moment(journal, path, monkeypatch):
    with Locked(path):
        accept(journal, 1)
    read = journal._known

    def read_and_flush(keys):
        found = read(keys)
        journal.flush()
        return found

    monkeypatch.setattr(journal, "_known", read_and_flush)
    assert known(journal, 1) is Known.ACCEPTED


def test_what_was_in_memory_is_written_at_the_close(journal, path):
    with Locked(path):
        accept(journal, 1)
    journal.close()
    assert rows(path, "SELECT count(*) FROM ledger") == [(1,)]


def test_an_acceptance_of_strange_content_does_not_raise(journal, monkeypatch):
    def broken(work, *, durable):
        raise OverflowError("too large to convert to SQLite INTEGER")

    with monkeypatch.context() as patched:
        patched.setattr(journal, "_write", broken)
        accept(journal, 1)
    assert known(journal, 1) is Known.ACCEPTED


# --- positions --------------------------------------------------------------------------------------------------------


def at(offset_bytes, inode=7):
    return Position(inode=inode, offset_bytes=offset_bytes)


def test_the_mark_of_a_file_is_written_with_its_rows(journal):
    assert journal.position("it") is None
    accept(journal, 1, position=at(100))
    assert journal.position("it") == at(100)
    assert journal.position("other") is None


@pytest.mark.parametrize("inode", [1, 2**63 - 1, 2**63, 2**64 - 1])
def test_inodes_use_all_of_their_bits(journal, inode):
    accept(journal, 1, position=at(100, inode))
    assert journal.position("it") == at(100, inode)
    assert journal.is_writable


def test_the_mark_stays_below_what_is_in_memory_only(journal, path):
    accept(journal, 1, position=at(100))
    with Locked(path):
        accept(journal, 2, position=at(200))
    accept(journal, 3, position=at(300))
    assert journal.position("it") == at(100)
    journal.flush()
    assert journal.position("it") == at(300)


def test_the_mark_of_a_write_that_fails_after_others_that_wait_stays_back(journal, path, monkeypatch):
    """A flush that comes between must not carry the mark of rows that are not written."""
    with Locked(path):
        accept(journal, 1, position=at(100))
    write = journal._write

    def flush_then_fail(work, *, durable):
        monkeypatch.setattr(journal, "_write", write)
        journal.flush()
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(journal, "_write", flush_then_fail)
    accept(journal, 2, position=at(200))
    assert journal.unwritten == 1
    assert journal.position("it") == at(100)
    journal.flush()
    assert journal.position("it") == at(200)


def test_a_mark_that_waits_while_its_rows_are_written_is_written_with_the_next_flush(journal, path, monkeypatch):
    with Locked(path):
        accept(journal, 1, position=at(100))
    write = journal._write

    def flush_then_write(work, *, durable):
        monkeypatch.setattr(journal, "_write", write)
        journal.flush()
        write(work, durable=durable)

    monkeypatch.setattr(journal, "_write", flush_then_write)
    accept(journal, 2, position=at(200))
    journal.flush()
    assert journal.position("it") == at(200)


def test_a_mark_that_waited_never_takes_a_later_one_back(journal, path):
    with Locked(path):
        accept(journal, 1, position=at(100))
    accept(journal, 2, position=at(200))
    journal._unwritten.clear()
    accept(journal, 3, position=at(300))
    journal.flush()
    assert journal.position("it") == at(300)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.sampled_from(["accept", "accept locked", "flush", "flush locked"]), max_size=12))
def test_whatever_happens_the_mark_is_never_ahead_of_the_rows(tmp_path_factory, steps):
    path = tmp_path_factory.mktemp("marks") / "journal.db"
    with closing(Journal(path, max_bytes=1, ledger_days=1, log=log_into([]))) as journal:
        journal._writer.execute("PRAGMA busy_timeout = 0")
        journal._writer.execute("PRAGMA synchronous = OFF")
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
            mark = journal.position("it")
            written = rows(path, "SELECT count(*) FROM ledger")[0][0]
            assert (mark.offset_bytes if mark else 0) <= written
        journal.flush()
        assert rows(path, "SELECT count(*) FROM ledger") == [(number,)]
        assert (journal.position("it") or at(0)).offset_bytes == number


# --- recovery ---------------------------------------------------------------------------------------------------------


def portion(*numbers, to):
    return Portion(keys=[event(number).key for number in numbers], position=at(to), read=0.5)


def test_what_a_file_holds_beyond_its_mark_enters_the_ledger_and_is_no_longer_pending(journal):
    journal.store([letter(1), letter(2), letter(1, "other")])
    journal.recover("it", portion(1, 3, to=300))
    assert journal.position("it") == at(300)
    assert [known(journal, number) for number in (1, 2, 3)] == [Known.ACCEPTED, Known.PENDING, Known.ACCEPTED]
    assert journal.counts() == {("it", "pending"): 1, ("other", "pending"): 1}


@pytest.mark.parametrize("numbers", [(1, 2), ()])
def test_each_portion_of_a_recovery_is_for_good_with_its_position(opened, journal, path, numbers):
    journal.recover("it", portion(*numbers, to=200))
    assert rows(path, "SELECT count(*) FROM ledger") == [(len(numbers),)]
    assert rows(path, "SELECT offset_bytes FROM positions") == [(200,)]
    journal.recover("it", portion(3, to=300))
    assert rows(path, "SELECT count(*) FROM ledger") == [(len(numbers) + 1,)]
    assert journal.position("it") == at(300)


def test_a_portion_that_cannot_be_written_says_so_and_leaves_the_ledger_as_it_was(journal, path):
    with Locked(path), pytest.raises(StorageError):
        journal.recover("it", portion(1, to=300))
    assert known(journal, 1) is None
    assert journal.position("it") is None


def test_everything_is_there_after_a_restart(opened, wall):
    journal = opened()
    journal.store([letter(1, attempts=4), letter(2, dead=True)])
    accept(journal, 3, position=at(300))
    journal.close()
    journal = opened()
    assert [known(journal, number) for number in (1, 2, 3)] == [Known.PENDING, Known.DEAD, Known.ACCEPTED]
    assert journal.has_letters
    assert journal.position("it") == at(300)
    (pending,) = journal.due("it", 10)
    assert (pending.event, pending.sink, pending.attempts) == (event(1), "it", 4)


def test_everything_that_was_said_to_be_stored_survives_the_end_of_the_process(path):
    code = (
        "import os, sys; from pathlib import Path; from tests.helpers import *; from vodpoller.journal import *\n"
        "journal = Journal(Path(sys.argv[1]), max_bytes=10**9, ledger_days=1, log=log_into([]))\n"
        "journal.store([Letter(event=event(n), sink='it', dead=False, reason='errored') for n in range(9)])\n"
        "os._exit(9)"
    )
    root = Path(__file__).parent.parent
    ended = subprocess.run([sys.executable, "-c", code, str(path)], cwd=root, timeout=30, check=False)
    assert ended.returncode == 9
    assert rows(path, "SELECT count(*) FROM letters") == [(9,)]


# --- what is due ------------------------------------------------------------------------------------------------------


def test_rows_are_due_in_the_order_of_their_time(journal, wall):
    journal.store([letter(1, due_in_secs=20), letter(2, due_in_secs=10), letter(3, dead=True), letter(4, "other")])
    assert journal.due("it", 10) == []
    wall.advance(10)
    assert [row.event for row in journal.due("it", 10)] == [event(2)]
    wall.advance(10)
    assert [row.event for row in journal.due("it", 10)] == [event(2), event(1)]
    assert [row.event for row in journal.due("it", 1)] == [event(2)]
    assert journal.due("it", 0) == []


def test_a_due_time_that_a_wrong_clock_set_has_come(journal, wall):
    wall.advance(10 * 365 * 86_400)
    journal.store([letter(1, due_in_secs=10)])
    wall.now = NOW
    assert [row.event for row in journal.due("it", 10)] == [event(1)]


@pytest.mark.parametrize("how", ["store", "reschedule"])
def test_a_wait_that_a_sink_asked_for_is_kept_up_to_a_quarter_of_an_hour(journal, wall, how):
    if how == "store":
        journal.store([letter(1, due_in_secs=86_400)])
    else:
        journal.store([letter(1)])
        journal.reschedule(journal.due("it", 1)[0].row, attempts=1, due_in_secs=86_400, error=None)
        journal.flush()
    assert journal.due("it", 1) == []
    wall.advance(899)
    assert journal.due("it", 1) == []
    wall.advance(1)
    assert len(journal.due("it", 1)) == 1


def test_a_row_that_is_rescheduled_keeps_what_was_said_last(journal, path, wall):
    journal.store([letter(1, error="first")])
    (row,) = journal.due("it", 1)
    journal.reschedule(row.row, attempts=2, due_in_secs=5, error=None)
    journal.flush()
    assert rows(path, "SELECT attempts, due_at, error FROM letters") == [(2, NOW + 5, "first")]
    journal.reschedule(row.row, attempts=3, due_in_secs=5, error="second")
    journal.flush()
    assert rows(path, "SELECT attempts, error FROM letters") == [(3, "second")]


def test_what_cannot_be_buried_stays_pending(journal, path):
    journal.store([letter(1)])
    (row,) = journal.due("it", 1)
    with Locked(path):
        journal.bury(row.row, attempts=1, reason="rejected", error="no")
    assert journal.counts() == {("it", "pending"): 1}
    journal.bury(row.row, attempts=1, reason="gave_up", error="\ud800")
    assert rows(path, "SELECT state, attempts, reason, error FROM letters") == [("dead", 1, "gave_up", "?")]


def test_counts_are_by_sink_and_state(journal):
    journal.store([letter(1), letter(2), letter(3, dead=True), letter(1, "")])
    assert journal.counts() == {("it", "pending"): 2, ("it", "dead"): 1, ("", "pending"): 1}


# --- upkeep -----------------------------------------------------------------------------------------------------------


def ledger_keys(path):
    return {key for (key,) in rows(path, "SELECT key FROM ledger")}


def test_rows_of_confirmed_events_go_after_ten_minutes(journal, path, wall):
    accept(journal, 1, 2)
    journal.confirmed([event(1).key])
    journal.flush()
    wall.advance(CONFIRMED_KEPT_SECS - 1)
    journal.prune()
    assert len(ledger_keys(path)) == 2
    wall.advance(2)
    journal.prune()
    assert ledger_keys(path) == {event(2).key}


def test_rows_of_unconfirmed_events_go_after_ledger_days(journal, path, wall):
    accept(journal, 1)
    wall.advance(14 * 86_400 - 3700)
    accept(journal, 2)
    journal.prune()
    assert len(ledger_keys(path)) == 2
    wall.advance(3701)
    journal.prune()
    assert ledger_keys(path) == {event(2).key}


def test_rows_that_a_wrong_clock_confirmed_in_the_future_go(journal, path, wall):
    accept(journal, 1)
    wall.advance(86_400)
    journal.confirmed([event(1).key])
    journal.flush()
    wall.now = NOW
    journal.prune()
    assert ledger_keys(path) == set()


def test_letters_are_never_pruned(journal, wall):
    journal.store([letter(1), letter(2, dead=True)])
    wall.advance(1000 * 86_400)
    journal.prune()
    assert journal.counts() == {("it", "pending"): 1, ("it", "dead"): 1}


def test_pruning_a_locked_journal_is_put_off(journal, path, wall):
    accept(journal, 1)
    journal.confirmed([event(1).key])
    journal.flush()
    wall.advance(CONFIRMED_KEPT_SECS + 1)
    with Locked(path):
        journal.prune()
    assert len(ledger_keys(path)) == 1
    journal.prune()
    assert ledger_keys(path) == set()


def test_a_clock_that_was_set_moves_the_rows_of_this_process_along(opened, path, wall):
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


def test_marks_are_what_happened_last(journal, path):
    journal.mark("seen", 1.0)
    journal.mark("seen", 2.0)
    journal.flush()
    assert rows(path, "SELECT at FROM marks WHERE name = 'seen'") == [(2.0,)]


def test_a_flush_without_anything_to_write_writes_nothing(journal, monkeypatch):
    journal.flush()
    monkeypatch.setattr(journal, "_write", None)
    journal.flush()
