"""The contract of every journal (`vodpoller.journal.contract`); what concerns SQLite only is in test_journal."""

import sqlite3
import threading
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace

import pytest

from tests.helpers import FakeClock, event
from vodpoller.errors import JournalFullError, StorageError
from vodpoller.journal import place as place_module
from vodpoller.journal.contract import (
    CONFIRMED_KEPT_SECS,
    DUE_HORIZON_SECS,
    ClaimedEvent,
    Journal,
    Known,
    Letter,
    NewDeadLetter,
    Portion,
    Position,
    Pulled,
)
from vodpoller.journal.operator import Filter, Letters
from vodpoller.journal.sqlite import SqliteJournal
from vodpoller.telemetry import Telemetry

LEASE_SECS = 30.0
CONTENT_KEY = b"content"
LEDGER_DAYS = 14
BODY_ROOM = 600  # at least the number of bytes that one event of these tests takes in the journal


class OnSqlite:
    """A SQLite journal, and the faults that can come from outside."""

    def __init__(self, folder, log, monkeypatch):
        monkeypatch.setattr(place_module, "BUSY_SECS", 0)  # in these tests a locked file stays locked
        self.path = folder / "journal.db"
        self.clock = FakeClock(1_800_000_000.0)
        self._log = log
        self._opened = None
        self._faults = ExitStack()

    def open(self, *, max_bytes=10**9):
        """Open the journal; close it first if it is open."""
        self.close()
        self._opened = SqliteJournal(
            self.path,
            max_bytes=max_bytes,
            ledger_days=LEDGER_DAYS,
            telemetry=Telemetry(self._log),
            wall=self.clock,
            monotonic=self.clock,
        )
        return self._opened

    def close(self):
        self._faults.close()
        if self._opened is not None:
            self._opened.close()
        self._opened = None

    def crash(self):
        """Simulate the end of the process: `open` opens a copy of what is in the files now."""
        for file in sorted(self.path.parent.glob(f"{self.path.name}*")):
            (self.path.parent / f"copy-{file.name}").write_bytes(file.read_bytes())
        self.path = self.path.with_name(f"copy-{self.path.name}")

    @contextmanager
    def unwritable(self):
        with closing(sqlite3.connect(self.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield
            other.execute("ROLLBACK")

    def delete(self, *rows, state="pending"):
        """Delete rows as the operator does while the daemon runs."""
        with Letters(self.path, writable=True, wall=self.clock) as letters:
            assert sum(letters.purge(Filter(state=state, ids=rows))) == len(rows)

    def reasons(self):
        with Letters(self.path, wall=self.clock) as letters:
            return {it.sink: it.reason for it in letters.stored(Filter(state="pending"))}

    def ledger_keys(self):
        with closing(sqlite3.connect(self.path)) as db:
            return {key for (key,) in db.execute("SELECT key FROM ledger")}

    def occurrences(self):
        with closing(sqlite3.connect(self.path)) as db:
            return {key for (key,) in db.execute("SELECT key FROM occurrences")}

    def broken(self, how):
        """A journal with events that is now closed, not writable or damaged; and one claimed event of it."""
        journal = self.open()
        accept(journal, *range(500))
        journal.store([letter(number) for number in range(500, 600)])
        (claimed,) = journal.claim_due("it", 1)
        if how == "closed":
            self.close()
        elif how == "unwritable":
            self._faults.enter_context(self.unwritable())
        else:
            journal = self.open()
            with closing(sqlite3.connect(self.path)) as db:  # after this the journal has no page of the file in memory
                db.execute("INSERT INTO marks VALUES ('other', 1)")
                db.commit()
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            with self.path.open("r+b") as file:
                size_bytes = file.seek(0, 2)
                file.seek(4096)
                file.write(b"\x5a" * (size_bytes - 4096))
        return journal, claimed


@pytest.fixture(params=[OnSqlite])
def place(request, tmp_path, log, monkeypatch):
    place = request.param(tmp_path, log, monkeypatch)
    yield place
    place.close()


@pytest.fixture
def journal(place):
    return place.open()


@pytest.fixture
def clock(place):
    return place.clock


def letter(number=0, sink="it", **more):
    return Letter(event=event(number), sink=sink, **{"dead": False, "reason": "sink_failed", **more})


def dead(number=0, sink="it", reason="rejected"):
    return letter(number, sink, dead=True, reason=reason)


def accept(journal, *numbers, sink="it", position=None):
    journal.accept(sink, [event(number).key for number in numbers], position)


def known(journal, number=0, sink="it"):
    pair = (event(number).key, sink)
    return journal.known([pair]).get(pair)


def at(offset_bytes, inode=7):
    return Position(inode=inode, offset_bytes=offset_bytes)


def portion(*numbers, to):
    return Portion(keys=[event(number).key for number in numbers], position=at(to), read=0.5)


def pulled(sent_ago_secs=0.0, source="main"):
    return Pulled(source=source, sent_ago_secs=sent_ago_secs, answered_ago_secs=0.0, lease_secs=LEASE_SECS)


def identify(journal, number=1, sent_ago_secs=0.0):
    """The keys of an answer that has just brought this number of events of equal content without a task id."""
    return journal.identify([CONTENT_KEY] * number, pulled(sent_ago_secs))


def of_occurrence(key, sink="it", **more):
    return Letter(event=replace(event(0), key=key), sink=sink, **{"dead": True, "reason": "rejected", **more})


def claim(journal, limit=10, sink="it"):
    """Claimed events by their numbers, in order."""
    numbers = {event(number).key: number for number in range(60)}
    return {numbers[stored.event.key]: stored for stored in journal.claim_due(sink, limit)}


# --- the ledger -------------------------------------------------------------------------------------------------------


def test_an_event_that_never_came_is_unknown(journal):
    assert journal.known([(event().key, "it")]) == {}
    assert journal.known([]) == {}


def test_a_pair_is_known_through_its_life(journal, clock):
    journal.store([letter()])
    assert known(journal) is Known.PENDING
    assert known(journal, sink="other") is None
    (claimed,) = journal.claim_due("it", 1)
    assert known(journal) is Known.PENDING
    journal.mark_dead([NewDeadLetter(claimed=claimed, attempts=1, reason="rejected", error="no")])
    assert known(journal) is Known.DEAD
    accept(journal, 0)
    assert known(journal) is Known.ACCEPTED
    assert journal.counts() == {}
    clock.advance(10 * 86_400)
    assert known(journal) is Known.ACCEPTED
    journal.confirmed([event().key])
    journal.flush()
    clock.advance(CONFIRMED_KEPT_SECS)
    assert known(journal) is Known.ACCEPTED
    clock.advance(1)
    assert known(journal) is None
    accept(journal, 0)
    assert known(journal) is Known.ACCEPTED
    clock.advance(CONFIRMED_KEPT_SECS + 1)
    assert known(journal) is Known.ACCEPTED


@pytest.mark.parametrize("number", [1200, 2501])
def test_many_pairs_are_known_at_once(journal, number):
    accept(journal, *range(number))
    pairs = [(event(n).key, "it") for n in range(number + 100)]
    assert journal.known(pairs) == dict.fromkeys(pairs[:number], Known.ACCEPTED)


def test_a_late_acceptance_of_a_confirmed_event_expires(journal, clock):
    journal.store([letter()])
    journal.confirmed([event().key])
    journal.flush()
    accept(journal, 0)
    assert known(journal) is Known.ACCEPTED
    clock.advance(CONFIRMED_KEPT_SECS + 1)
    assert known(journal) is None


@pytest.mark.parametrize("was", [[letter(1)], [dead(1)], []])
def test_an_unwritten_acceptance_is_known_and_written_later(place, journal, was):
    journal.store(was)
    with place.unwritable():
        accept(journal, 1, 2)
        assert (known(journal, 1), known(journal, 2)) == (Known.ACCEPTED, Known.ACCEPTED)
        assert not journal.is_writable
        journal.flush()
        assert not journal.is_writable
        assert claim(journal) == {}
    journal.flush()
    assert journal.is_writable
    assert (known(journal, 1), known(journal, 2)) == (Known.ACCEPTED, Known.ACCEPTED)
    assert journal.counts() == {}
    assert place.ledger_keys() == {event(1).key, event(2).key}


@pytest.mark.parametrize("ends", ["flushed", "closed"])
def test_an_unwritten_acceptance_is_known_after_a_restart(place, journal, ends):
    with place.unwritable():
        accept(journal, 1)
    if ends == "flushed":
        journal.flush()
    assert known(place.open(), 1) is Known.ACCEPTED


def test_the_position_in_a_file_is_written_with_its_pairs(journal):
    assert journal.position("it") is None
    accept(journal, 1, position=at(100))
    assert journal.position("it") == at(100)
    assert journal.position("other") is None


@pytest.mark.parametrize("inode", [1, 2**63 - 1, 2**63, 2**64 - 1])
def test_inodes_use_all_of_their_bits(journal, inode):
    accept(journal, 1, position=at(100, inode))
    assert journal.position("it") == at(100, inode)


def test_the_position_never_passes_unwritten_pairs(place, journal):
    accept(journal, 1, position=at(100))
    with place.unwritable():
        accept(journal, 2, position=at(200))
    accept(journal, 3, position=at(300))
    assert journal.position("it") == at(100)
    journal.flush()
    assert journal.position("it") == at(300)


# --- recovery ---------------------------------------------------------------------------------------------------------


def test_events_in_a_file_beyond_its_position_are_accepted(journal):
    journal.store([letter(1), letter(2), letter(1, "other")])
    journal.recover("it", portion(1, 3, to=300))
    assert journal.position("it") == at(300)
    assert [known(journal, number) for number in (1, 2, 3)] == [Known.ACCEPTED, Known.PENDING, Known.ACCEPTED]
    assert journal.counts() == {("it", "pending"): 1, ("other", "pending"): 1}


@pytest.mark.parametrize("numbers", [(1, 2), ()])
def test_each_portion_of_a_recovery_is_kept(place, journal, numbers):
    journal.recover("it", portion(*numbers, to=200))
    journal = place.open()
    assert journal.position("it") == at(200)
    journal.recover("it", portion(3, to=300))
    journal = place.open()
    assert journal.position("it") == at(300)
    assert place.ledger_keys() == {event(number).key for number in (*numbers, 3)}


@pytest.mark.parametrize("secs", [CONFIRMED_KEPT_SECS - 1, CONFIRMED_KEPT_SECS + 1])
def test_a_recovered_pair_confirmed_long_ago_is_a_new_event(journal, clock, secs):
    accept(journal, 1)
    journal.confirmed([event(1).key])
    journal.flush()
    clock.advance(secs)
    journal.recover("it", portion(1, to=300))
    clock.advance(2)
    assert known(journal, 1) is (Known.ACCEPTED if secs > CONFIRMED_KEPT_SECS else None)


def test_a_portion_that_cannot_be_written_changes_nothing(place, journal):
    with place.unwritable(), pytest.raises(StorageError):
        journal.recover("it", portion(1, to=300))
    assert known(journal, 1) is None
    assert journal.position("it") is None


# --- storing ----------------------------------------------------------------------------------------------------------


def test_stored_events_are_there_after_a_restart(place, journal):
    journal.store([letter(1, attempts=4), dead(2)])
    accept(journal, 3, position=at(300))
    journal = place.open()
    assert [known(journal, number) for number in (1, 2, 3)] == [Known.PENDING, Known.DEAD, Known.ACCEPTED]
    assert journal.position("it") == at(300)
    (stored,) = journal.claim_due("it", 10)
    assert (stored.event, stored.sink, stored.attempts) == (event(1), "it", 4)


@pytest.mark.parametrize("first", [letter(1, attempts=3), dead(1)])
def test_storing_a_stored_pair_again_changes_nothing(journal, first):
    journal.store([first])
    before = journal.counts()
    journal.store([letter(1, attempts=9), dead(1)])
    assert journal.counts() == before
    assert [stored.attempts for stored in journal.claim_due("it", 9)] == ([] if first.dead else [3])


@pytest.mark.parametrize("late", [letter(1), dead(1)])
@pytest.mark.parametrize("order", ["accept first", "store first"])
@pytest.mark.parametrize("is_written", [True, False])
def test_a_pair_is_accepted_or_stored_whichever_comes_first(place, journal, late, order, is_written):
    def accept_it():
        if is_written:
            accept(journal, 1)
            return
        with place.unwritable():
            accept(journal, 1)

    steps = [accept_it, lambda: journal.store([late, letter(2)])]
    for step in steps if order == "accept first" else steps[::-1]:
        step()
    assert known(journal, 1) is Known.ACCEPTED
    assert list(claim(journal)) == [2]
    journal.flush()
    assert journal.counts() == {("it", "pending"): 1}


def test_a_pair_that_waits_in_memory_is_not_stored_meanwhile(place, journal):
    with place.unwritable():
        accept(journal, 1)
    journal.store([letter(1), letter(2)])
    assert journal.counts() == {("it", "pending"): 1}


def test_storing_and_accepting_at_once_leave_a_pair_in_one_place(journal):
    start = threading.Barrier(2)

    def run(work):
        start.wait()
        for number in range(40):
            work(number)

    threads = [
        threading.Thread(target=run, args=(work,))
        for work in (lambda number: accept(journal, number), lambda number: journal.store([letter(number)]))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert journal.counts() == {}
    assert {known(journal, number) for number in range(40)} == {Known.ACCEPTED}


def test_a_full_journal_stores_what_fits_and_names_the_others(place):
    journal = place.open(max_bytes=2 * BODY_ROOM)
    journal.store([letter(1)])
    with pytest.raises(JournalFullError, match=r"journal.max_bytes = 1200") as raised:
        journal.store([letter(2), letter(3)])
    assert raised.value.refused == {event(3).key}
    assert journal.counts() == {("it", "pending"): 2}
    journal.store([])


def test_events_already_in_the_journal_need_no_room(place):
    journal = place.open(max_bytes=2 * BODY_ROOM)
    journal.store([letter(1), letter(2)])
    accept(journal, 3)
    with place.unwritable():
        accept(journal, 4)
    journal.store([letter(number) for number in (1, 2, 3, 4)])
    with pytest.raises(JournalFullError) as raised:
        journal.store([letter(1), letter(5)])
    assert raised.value.refused == {event(5).key}


@pytest.mark.parametrize("reason", ["rejected", "no_route", "malformed"])
def test_dead_letters_take_half_and_never_block_pending_events(place, reason):
    journal = place.open(max_bytes=10 * BODY_ROOM)
    journal.store([dead(number, reason=reason) for number in range(4)])
    with pytest.raises(JournalFullError, match=r"half of journal.max_bytes = 6000") as raised:
        journal.store([dead(10, reason=reason), letter(20), dead(11, reason=reason)])
    assert len(raised.value.refused) == 1
    assert raised.value.refused < {event(10).key, event(11).key}
    journal.store([letter(number) for number in range(21, 25)])
    assert journal.counts() == {("it", "dead"): 5, ("it", "pending"): 5}


def test_an_event_that_gives_up_becomes_a_dead_letter_beyond_the_half(place):
    journal = place.open(max_bytes=10 * BODY_ROOM)
    journal.store([dead(number) for number in range(5)])
    journal.store([letter(number) for number in range(20, 25)])
    for claimed in journal.claim_due("it", 10):
        journal.mark_dead([NewDeadLetter(claimed=claimed, attempts=9, reason="gave_up", error="no")])
    assert journal.counts() == {("it", "dead"): 10}
    with pytest.raises(JournalFullError):
        journal.store([dead(50)])


@pytest.mark.parametrize("way", ["accepted", "recovered", "deleted"])
def test_freed_room_is_used_again(place, way):
    journal = place.open(max_bytes=BODY_ROOM)
    journal.store([letter(1)])
    with pytest.raises(JournalFullError):
        journal.store([letter(2)])
    match way:
        case "accepted":
            accept(journal, 1)
        case "recovered":
            journal.recover("it", portion(1, to=100))
        case _:
            place.delete(*[claimed.row for claimed in journal.claim_due("it", 1)])
    journal.store([letter(2)])
    assert journal.counts() == {("it", "pending"): 1}


def test_a_store_that_cannot_be_written_leaves_nothing(place, journal):
    many = [letter(number) for number in range(200)]
    with place.unwritable():
        for _ in range(3):
            with pytest.raises(StorageError):
                journal.store(many)
    journal.flush()
    assert journal.counts() == {}
    journal.store(many)
    assert journal.counts() == {("it", "pending"): 200}


@pytest.mark.parametrize("text", ["\ud800", "\udfff" * 9000, "\0"])
def test_an_event_is_stored_whatever_its_text(journal, text):
    strange = event(1, event_type=text)
    journal.store([Letter(event=strange, sink="it", dead=False, reason="sink_failed", error=text)])
    (claimed,) = journal.claim_due("it", 1)
    assert claimed.event.body == strange.body
    journal.mark_dead([NewDeadLetter(claimed=claimed, attempts=1, reason="gave_up", error=text)])
    assert journal.counts() == {("it", "dead"): 1}


# --- claims -----------------------------------------------------------------------------------------------------------


def test_events_are_due_in_the_order_of_their_time(journal, clock):
    journal.store([letter(1, due_in_secs=20), letter(2, due_in_secs=10), dead(3), letter(4, "other")])
    assert claim(journal) == {}
    clock.advance(20)
    assert claim(journal, 0) == {}
    assert list(claim(journal, 1)) == [2]
    assert list(claim(journal)) == [1]
    assert list(claim(journal, sink="other")) == [4]


@pytest.mark.parametrize("age_secs", [0.0, 60.0, 86_400.5])
def test_a_stored_event_has_its_age(journal, clock, age_secs):
    journal.store([letter(1, attempts=3)])
    clock.advance(age_secs)
    (claimed,) = journal.claim_due("it", 1)
    assert claimed == ClaimedEvent(row=claimed.row, event=event(1), sink="it", attempts=3, age_secs=age_secs)


@pytest.mark.parametrize("back_secs", [60.0, 10 * 365 * 86_400.0])
def test_a_wrong_clock_causes_no_negative_age_or_endless_delay(journal, clock, back_secs):
    clock.advance(back_secs)
    journal.store([letter(1, due_in_secs=10)])
    clock.advance(-back_secs)
    clock.advance(DUE_HORIZON_SECS)
    (claimed,) = journal.claim_due("it", 1)
    assert claimed.age_secs == max(DUE_HORIZON_SECS - back_secs, 0.0)


@pytest.mark.parametrize("limit", [1, 3, 256])
def test_a_claimed_event_is_not_claimed_twice_and_delays_no_other(journal, limit):
    journal.store([letter(number) for number in range(10)])
    given = []
    while claimed := claim(journal, limit):
        assert len(claimed) == min(limit, 10 - len(given))
        given += claimed
    assert given == list(range(10))


def test_more_rows_than_one_query_reads_are_claimed_in_order(journal):
    journal.store([letter(number, due_in_secs=-number) for number in range(1200)])
    claimed = journal.claim_due("it", 1100)
    assert [stored.event for stored in claimed] == [event(number) for number in range(1199, 99, -1)]
    assert len(journal.claim_due("it", 1100)) == 100


def test_concurrent_claims_give_no_event_twice(journal):
    journal.store([letter(number) for number in range(60)])
    start = threading.Barrier(4)
    given = []

    def claim_all():
        start.wait()
        while claimed := claim(journal, 7):
            given.extend(claimed)

    threads = [threading.Thread(target=claim_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(given) == list(range(60))


def test_a_released_event_is_due_at_once(journal):
    journal.store([letter(1, attempts=2), letter(2)])
    claimed = claim(journal)
    journal.release([claimed[1]])
    again = claim(journal)
    assert again == {1: claimed[1]}
    journal.release([again[1], claimed[2]])
    journal.release([])
    assert len(claim(journal)) == 2


@pytest.mark.parametrize("how", ["release", "reschedule", "mark_dead", "accept"])
def test_a_claim_that_has_ended_does_not_end_the_next_one(journal, clock, how):
    journal.store([letter(1)])
    first = claim(journal)[1]
    clock.advance(1)  # so that the second is another claim
    if how == "release":
        journal.release([first])
    elif how == "reschedule":
        journal.reschedule(first, attempts=1, due_in_secs=0, error=None)
        journal.flush()
    elif how == "mark_dead":
        journal.mark_dead([NewDeadLetter(claimed=first, attempts=1, reason="gave_up", error="no")])
    else:
        accept(journal, 1)
    second = claim(journal)
    assert list(second) == ([1] if how in ("release", "reschedule") else [])
    journal.release([first])
    assert claim(journal) == {}


@pytest.mark.parametrize("is_written", [True, False])
def test_an_accepted_event_holds_no_claim_on_one_of_identical_content(place, journal, clock, is_written):
    journal.store([letter(1)])
    assert list(claim(journal)) == [1]
    with nullcontext() if is_written else place.unwritable():
        accept(journal, 1)
    journal.flush()
    journal.confirmed([event(1).key])
    journal.flush()
    clock.advance(CONFIRMED_KEPT_SECS + 1)
    journal.store([letter(1)])
    assert list(claim(journal)) == [1]


def test_a_rescheduled_event_is_not_claimed_before_it_is_written(journal, clock):
    journal.store([letter(1)])
    journal.reschedule(claim(journal)[1], attempts=1, due_in_secs=0, error="no")
    assert claim(journal) == {}
    journal.flush()
    assert claim(journal)[1].attempts == 1


@pytest.mark.parametrize("due_in_secs", [5.0, 700.0])
def test_a_reschedule_keeps_its_claim_until_it_is_written(place, journal, clock, due_in_secs):
    journal.store([letter(1)])
    with place.unwritable():
        journal.reschedule(claim(journal)[1], attempts=1, due_in_secs=due_in_secs, error="no")
        for _ in range(3):
            journal.flush()
            assert claim(journal) == {}
    journal.flush()
    clock.advance(due_in_secs - 1)
    assert claim(journal) == {}
    clock.advance(1)
    assert claim(journal)[1].attempts == 1


@pytest.mark.parametrize("how", ["store", "reschedule"])
def test_a_delay_is_limited_to_15_minutes(journal, clock, how):
    if how == "store":
        journal.store([letter(1, due_in_secs=86_400)])
    else:
        journal.store([letter(1)])
        journal.reschedule(claim(journal)[1], attempts=1, due_in_secs=86_400, error=None)
        journal.flush()
    clock.advance(DUE_HORIZON_SECS - 1)
    assert claim(journal) == {}
    clock.advance(1)
    assert len(claim(journal)) == 1


def test_an_event_that_cannot_be_buried_is_pending_and_due(place, journal):
    journal.store([letter(1)])
    with place.unwritable(), pytest.raises(StorageError):
        journal.mark_dead([NewDeadLetter(claimed=claim(journal)[1], attempts=1, reason="rejected", error="no")])
    assert journal.counts() == {("it", "pending"): 1}
    journal.mark_dead([NewDeadLetter(claimed=claim(journal)[1], attempts=1, reason="gave_up", error="no")])
    assert journal.counts() == {("it", "dead"): 1}
    assert claim(journal) == {}


@pytest.mark.parametrize("how", ["release", "reschedule", "mark_dead", "accept"])
def test_a_deleted_event_stays_deleted_and_can_be_stored_again(place, journal, how):
    journal.store([letter(1), letter(2)])
    claimed = claim(journal)
    place.delete(claimed[1].row)
    assert known(journal, 1) is None
    if how != "accept":  # it comes again while the claim lasts
        journal.store([letter(1)])
        assert claim(journal) == {}
    match how:
        case "release":
            journal.release([claimed[1]])
        case "reschedule":
            journal.reschedule(claimed[1], attempts=9, due_in_secs=600, error="late")
            journal.flush()
        case "mark_dead":
            journal.mark_dead([NewDeadLetter(claimed=claimed[1], attempts=9, reason="gave_up", error="late")])
        case _:
            accept(journal, 1)
    again = claim(journal)
    assert {number: stored.attempts for number, stored in again.items()} == ({} if how == "accept" else {1: 0})


def test_claims_end_with_the_process(place, journal):
    journal.store([letter(1), letter(2)])
    assert len(claim(journal)) == 2
    assert len(claim(place.open())) == 2


# --- upkeep -----------------------------------------------------------------------------------------------------------


def test_counts_are_by_sink_and_state(journal):
    assert journal.counts() == {}
    journal.store([letter(1), letter(2), dead(3), dead(1, "")])
    assert journal.counts() == {("it", "pending"): 2, ("it", "dead"): 1, ("", "dead"): 1}


def test_pairs_of_confirmed_events_are_pruned_after_10_minutes(place, journal, clock):
    accept(journal, 1, 2)
    journal.confirmed([event(1).key])
    journal.flush()
    clock.advance(CONFIRMED_KEPT_SECS - 1)
    journal.prune()
    assert len(place.ledger_keys()) == 2
    clock.advance(2)
    journal.prune()
    assert place.ledger_keys() == {event(2).key}


def test_a_second_confirm_does_not_keep_the_pairs_longer(place, journal, clock):
    accept(journal, 1)
    for secs in (0, CONFIRMED_KEPT_SECS - 1):
        clock.advance(secs)
        journal.confirmed([event(1).key])
        journal.flush()
    clock.advance(2)
    assert known(journal, 1) is None
    journal.prune()
    assert place.ledger_keys() == set()


def test_pairs_of_unconfirmed_events_are_pruned_after_ledger_days(place, journal, clock):
    accept(journal, 1)
    clock.advance(LEDGER_DAYS * 86_400 - 3700)
    accept(journal, 2)
    journal.prune()
    assert len(place.ledger_keys()) == 2
    clock.advance(3701)
    journal.prune()
    assert place.ledger_keys() == {event(2).key}


@pytest.mark.parametrize("calls", [2, 32])
def test_partial_prunes_that_add_up_to_1_prune_everything(place, journal, clock, calls):
    accept(journal, *range(200))
    clock.advance(LEDGER_DAYS * 86_400 + 1)
    left = []
    for _ in range(calls):
        journal.prune(1 / calls)
        left.append(len(place.ledger_keys()))
    assert 0 < left[0] < 200
    assert left[-1] == 0


def test_stored_events_are_never_pruned(journal, clock):
    journal.store([letter(1), dead(2)])
    clock.advance(1000 * 86_400)
    journal.prune()
    assert journal.counts() == {("it", "pending"): 1, ("it", "dead"): 1}


def test_pruning_that_cannot_be_written_is_postponed(place, journal, clock):
    accept(journal, 1)
    clock.advance(LEDGER_DAYS * 86_400 + 1)
    with place.unwritable():
        journal.prune()
    assert len(place.ledger_keys()) == 1
    journal.prune()
    assert place.ledger_keys() == set()


@pytest.mark.parametrize("secs", [3600.0, -3600.0])
def test_a_clock_that_was_set_changes_no_age_and_no_delay(journal, clock, secs):
    journal.store([letter(1, due_in_secs=10)])
    clock.advance(secs)
    journal.shift(secs)
    clock.advance(9)
    assert claim(journal) == {}
    clock.advance(1)
    assert claim(journal)[1].age_secs == 10


# --- events without a task id -----------------------------------------------------------------------------------------


def test_an_arrival_within_the_lease_is_a_new_occurrence(journal, clock):
    first = identify(journal, 2)
    second = identify(journal)
    assert len({*first, *second, CONTENT_KEY}) == 4
    clock.advance(LEASE_SECS)
    assert identify(journal, 3) == [*first, *second]


def test_occurrences_are_found_again_after_a_restart(place, journal, clock):
    keys = identify(journal, 2)
    place.close()
    clock.advance(LEASE_SECS / 2)
    journal = place.open()
    (new,) = identify(journal)
    assert new not in keys
    clock.advance(LEASE_SECS / 2)
    assert identify(journal, 2) == keys


@pytest.mark.parametrize("restarts", [False, True])
def test_a_confirmed_occurrence_is_never_found_again(place, journal, clock, restarts):
    keys = identify(journal, 2)
    journal.confirmed(keys[:1])
    if restarts:
        place.close()
        journal = place.open()
    clock.advance(LEASE_SECS)
    assert identify(journal) == keys[1:]


def test_the_confirm_of_an_occurrence_is_written_at_once(place, journal, clock):
    """Otherwise, after a kill a moment later, the next event of equal content would be taken for this one."""
    keys = identify(journal)
    journal.confirmed(keys)
    with closing(sqlite3.connect(place.path)) as db:
        assert db.execute("SELECT count(*) FROM occurrences WHERE acknowledged_at IS NULL").fetchone() == (0,)


def test_a_lease_that_was_renewed_is_known_after_a_restart(place, journal, clock):
    keys = identify(journal)
    clock.advance(LEASE_SECS)
    assert identify(journal) == keys
    place.close()
    clock.advance(LEASE_SECS - 3)
    journal = place.open()
    assert identify(journal) != keys
    clock.advance(3)
    assert identify(journal) == keys


def test_an_occurrence_that_cannot_be_written_is_not_found_again(place, journal, clock):
    with place.unwritable(), pytest.raises(StorageError):
        identify(journal)
    assert len(place.occurrences()) == 0
    clock.advance(LEASE_SECS)
    (key,) = identify(journal)
    assert place.occurrences() == {key}


@pytest.mark.parametrize("restarts", [False, True])
def test_what_empty_answers_prove_stays_valid(place, journal, clock, restarts):
    keys = identify(journal)
    clock.advance(2 * LEASE_SECS)
    journal.answered_empty(pulled())
    clock.advance(LEASE_SECS)
    journal.answered_empty(pulled())
    if restarts:
        place.close()
        journal = place.open()
        clock.advance(LEASE_SECS)
    assert identify(journal) != keys


def test_a_lost_answer_cancels_what_empty_answers_prove(journal, clock):
    keys = identify(journal)
    clock.advance(LEASE_SECS)
    journal.answer_lost("main", sent_ago_secs=0.0)
    journal.answered_empty(pulled())
    clock.advance(1)
    assert identify(journal) == keys


def test_a_confirmed_occurrence_is_pruned_after_10_minutes(place, journal, clock):
    done, open_ = identify(journal, 2)
    journal.accept("it", [done, open_], None)
    clock.advance(5)
    journal.confirmed([done])
    clock.advance(CONFIRMED_KEPT_SECS - 1)
    journal.prune()
    assert place.occurrences() == place.ledger_keys() == {done, open_}
    clock.advance(2)
    journal.prune()
    assert place.occurrences() == place.ledger_keys() == {open_}


def test_an_unconfirmed_occurrence_is_pruned_after_ledger_days(place, journal, clock):
    (key,) = identify(journal)
    journal.accept("it", [key], None)
    clock.advance(LEDGER_DAYS * 86_400 - 60)
    assert identify(journal) == [key]
    clock.advance(LEDGER_DAYS * 86_400)
    journal.prune()
    assert place.occurrences() == place.ledger_keys() == {key}
    clock.advance(LEASE_SECS + 1)
    journal.prune()
    assert place.occurrences() == place.ledger_keys() == set()
    assert identify(journal) != [key]


def test_an_occurrence_stays_while_something_is_stored_under_its_key(place, journal, clock):
    (key,) = identify(journal)
    journal.store([of_occurrence(key)])
    journal.confirmed([key])
    clock.advance(1000 * 86_400)
    journal.prune()
    assert place.occurrences() == {key}
    place.delete(1, state="dead")
    assert place.occurrences() == {key}
    journal.prune()
    assert place.occurrences() == set()


def test_a_purged_dead_letter_leaves_its_occurrence(place, journal, clock):
    (key,) = identify(journal)
    journal.store([of_occurrence(key)])
    place.delete(1, state="dead")
    clock.advance(LEASE_SECS)
    assert identify(journal) == [key]


def accepted(journal, keys):
    return [key for key in keys if journal.known([(key, "it")]).get((key, "it")) is Known.ACCEPTED]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_line_without_a_key_takes_an_occurrence_the_sink_lacks(journal, number):
    keys = identify(journal, 3)
    journal.accept("it", keys[:1], None)
    journal.accept("other", keys, None)
    journal.recover("it", Portion(keys=(), content_keys=[[b"x", CONTENT_KEY]] * number, position=at(9), read=1.0))
    assert accepted(journal, keys) == keys[: 1 + number]
    assert journal.position("it") == at(9)


def test_a_line_does_not_take_an_occurrence_that_is_done(journal):
    keys = done, stored, open_ = identify(journal, 3)
    journal.store([of_occurrence(stored, dead=False), of_occurrence(done, sink="other")])
    journal.confirmed([done, stored])
    line = Portion(keys=(), content_keys=[[CONTENT_KEY]], position=at(9), read=1.0)
    journal.recover("it", line)
    assert accepted(journal, keys) == [stored]
    assert journal.counts() == {("other", "dead"): 1}
    journal.recover("it", line)
    assert accepted(journal, keys) == [stored, open_]
    journal.recover("it", line)
    assert accepted(journal, keys) == [stored, open_]


@pytest.mark.parametrize("secs", [3600.0, -3600.0])
def test_a_clock_that_was_set_changes_no_lease(place, journal, clock, secs):
    keys = identify(journal)
    clock.advance(secs)
    journal.shift(secs)
    place.close()
    clock.advance(LEASE_SECS - 3)
    journal = place.open()
    assert identify(journal) != keys
    clock.advance(3)
    assert identify(journal) == keys


def test_lines_keep_their_order_if_one_row_could_not_be_written(place, journal):
    """If a row beyond the position were written, its line would be taken for an occurrence that was never delivered."""
    first, second = identify(journal, 2)
    with place.unwritable():
        journal.accept("it", [first], at(10))
    journal.accept("it", [second], at(20))
    (third,) = identify(journal)
    place.crash()
    journal = place.open()
    line = [CONTENT_KEY]
    journal.recover("it", Portion(keys=(), content_keys=[line, line], position=at(20), read=1.0))
    assert accepted(journal, [first, second, third]) == [first, second]


def test_an_occurrence_is_not_acknowledged_before_its_ledger_row(place, journal):
    (first,) = identify(journal)
    with place.unwritable():
        journal.accept("it", [first], at(10))
    journal.confirmed([first])
    (second,) = identify(journal)
    place.crash()
    journal = place.open()
    journal.recover("it", Portion(keys=(), content_keys=[[CONTENT_KEY]], position=at(10), read=1.0))
    assert accepted(journal, [first, second]) == [first]


def test_an_acknowledgement_is_written_with_a_row_that_waited(place, journal, clock):
    (key,) = identify(journal)
    with place.unwritable():
        journal.accept("it", [key], None)
    journal.confirmed([key])
    journal.flush()
    place.close()
    journal = place.open()
    clock.advance(LEASE_SECS)
    assert identify(journal) != [key]


def test_no_pull_starts_while_occurrences_cannot_be_written(place, journal):
    with place.unwritable(), pytest.raises(StorageError):
        identify(journal)
    assert not journal.is_writable
    journal.flush()
    assert journal.is_writable


# --- counts and errors ------------------------------------------------------------------------------------------------


def test_stored_events_are_counted_with_the_age_of_the_oldest(journal, clock):
    journal.store([letter(1)])
    clock.advance(60)
    journal.store([letter(2), letter(3, sink="", dead=True, reason="malformed")])
    clock.advance(5)
    found = {(it.sink, it.state): (it.events, it.oldest_secs) for it in journal.stored()}
    assert found == {("it", "pending"): (2, 65.0), ("", "dead"): (1, 5.0)}


def test_dead_letters_are_counted_by_sink_and_reason(journal):
    journal.store([letter(1), letter(2, dead=True), letter(3, sink="", dead=True, reason="malformed")])
    assert journal.dead_letters() == {("it", "sink_failed"): 1, ("", "malformed"): 1}


def test_the_room_that_is_taken_grows_with_what_is_stored(journal):
    sizes = [journal.stored_bytes()]
    for number in (1, 2):
        journal.store([letter(number)])
        sizes.append(journal.stored_bytes())
    assert sizes[0] == 0 < sizes[1] < sizes[2]


@pytest.mark.parametrize("how", ["closed", "unwritable", "corrupt"])
def test_a_broken_journal_reports_its_error(place, how):
    assert place.open().status().writable
    journal, _ = place.broken(how)
    status = journal.status()
    assert not status.writable
    assert status.error


@pytest.mark.parametrize("sinks", [["it"], ["it", "third"]])
def test_pending_events_of_a_removed_sink_are_marked_until_it_is_back(place, journal, sinks):
    journal.store([letter(1), letter(2, sink="gone"), letter(3, sink="", dead=True, reason="malformed")])
    journal.mark_removed(sinks)
    assert place.reasons() == {"it": "sink_failed", "gone": "sink_removed"}
    assert journal.counts() == {("it", "pending"): 1, ("gone", "pending"): 1, ("", "dead"): 1}
    journal.mark_removed([*sinks, "gone"])
    assert place.reasons() == {"it": "sink_failed", "gone": "out_of_time"}


RAISING = {
    "identify": lambda journal, _: identify(journal),
    "stored": lambda journal, _: journal.stored(),
    "dead_letters": lambda journal, _: journal.dead_letters(),
    "stored_bytes": lambda journal, _: journal.stored_bytes(),
    "mark_removed": lambda journal, _: journal.mark_removed(["other"]),
    "known": lambda journal, _: known(journal),
    "position": lambda journal, _: journal.position("it"),
    "claim_due": lambda journal, _: journal.claim_due("it", 10),
    "counts": lambda journal, _: journal.counts(),
    "recover": lambda journal, _: journal.recover("it", portion(1000, to=9)),
    "store": lambda journal, _: journal.store([letter(1000)]),
    "mark_dead": lambda journal, claimed: journal.mark_dead(
        [NewDeadLetter(claimed=claimed, attempts=1, reason="gave_up", error="no")]
    ),
}
SILENT = {
    "answered_empty": lambda journal, _: journal.answered_empty(pulled()),
    "answer_lost": lambda journal, _: journal.answer_lost("main", sent_ago_secs=1.0),
    "accept": lambda journal, _: accept(journal, 1000, position=at(9)),
    "confirmed": lambda journal, _: journal.confirmed([event(1).key]),
    "release": lambda journal, claimed: journal.release([claimed]),
    "status": lambda journal, _: journal.status(),
    "reschedule": lambda journal, claimed: journal.reschedule(claimed, attempts=1, due_in_secs=1, error="no"),
    "flush": lambda journal, _: journal.flush(),
    "prune": lambda journal, _: journal.prune(),
    "note_time": lambda journal, _: journal.note_time("pull"),
    "shift": lambda journal, _: journal.shift(3600.0),
}


@pytest.mark.system
@pytest.mark.parametrize("method", RAISING)
@pytest.mark.parametrize("how", ["closed", "unwritable", "corrupt"])
def test_a_journal_that_is_broken_raises_storage_errors_only(place, how, method):
    journal, claimed = place.broken(how)
    fails = how != "unwritable" or method in ("identify", "recover", "store", "mark_dead", "mark_removed")
    with pytest.raises(StorageError) if fails else nullcontext():
        RAISING[method](journal, claimed)


@pytest.mark.system
@pytest.mark.parametrize("method", SILENT)
@pytest.mark.parametrize("how", ["closed", "unwritable", "corrupt"])
def test_silent_methods_do_not_raise_on_a_broken_journal(place, how, method):
    journal, claimed = place.broken(how)
    SILENT[method](journal, claimed)
    journal.flush()


def test_each_method_of_the_contract_is_in_one_of_the_tables():
    public = {name for name in vars(Journal) if not name.startswith("_")}
    assert public - {"is_writable", "trouble", "close"} == {*RAISING, *SILENT}
