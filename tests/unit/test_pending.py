import sqlite3
import threading
from contextlib import closing
from itertools import pairwise

import pytest

from tests.helpers import FakeClock, MemorySink, event, named
from tests.polling import until
from vodpoller.delivery.in_flight import Delivery, DeliveryWait, InFlight, WaitEnd
from vodpoller.delivery.retrier import GATHER_SECS, Retrier
from vodpoller.delivery.worker import Worker
from vodpoller.errors import RejectedError, SkippedError, StorageError, TransientError
from vodpoller.journal.contract import Known, Letter
from vodpoller.journal.sqlite import SqliteJournal
from vodpoller.liveness import Liveness
from vodpoller.telemetry import Telemetry

GIVE_UP_SECS = 7 * 86_400.0


class Bench:
    def __init__(self, tmp_path, log):
        self._path = tmp_path / "journal.db"
        self.wall = FakeClock(1_800_000_000.0)
        self.monotonic = FakeClock()
        self.journal = SqliteJournal(
            self._path, max_bytes=10**7, ledger_days=14, telemetry=Telemetry(log), wall=self.wall
        )
        self._log = log
        self.in_flight = InFlight()
        self.sink = MemorySink()
        self.worker = self.worker_of("it", self.sink)
        self.worker.start()
        self.retrier = self.retrier_that_gathers(GATHER_SECS)

    def worker_of(self, name, sink):
        return Worker(
            name=name,
            sink=sink,
            ledger=self.journal,
            in_flight=self.in_flight,
            queue_max_events=20,
            breaker_failures=3,
            telemetry=Telemetry(self._log),
            liveness=Liveness(),
            monotonic=self.monotonic,
        )

    def retrier_that_gathers(self, secs, **workers):
        workers = {"it": self.worker, **workers}
        return Retrier(
            journal=self.journal,
            workers=workers,
            in_flight=self.in_flight,
            give_up_after_secs=dict.fromkeys(workers, GIVE_UP_SECS),
            telemetry=Telemetry(self._log),
            monotonic=self.monotonic,
            gather_secs=secs,
        )

    def store(self, *numbers, sink="it"):
        self.journal.store([Letter(event=event(n), sink=sink, dead=False, reason="sink_failed") for n in numbers])

    def tick(self):
        """Run what upkeep runs every second, and wait for the results."""
        self.journal.flush()
        submitted = self.retrier.submit_due()
        self.finish_deliveries()
        return submitted

    def finish_deliveries(self):
        """Wait until all deliveries have ended, and write the results."""
        self.await_deliveries()
        self.journal.flush()

    def await_deliveries(self):
        """Wait until all deliveries have ended."""

        def is_idle():
            self.retrier.write_results(0)
            return len(self.in_flight) == 0

        until(is_idle)

    def known(self, number):
        return self.journal.known([(event(number).key, "it")]).get((event(number).key, "it"))

    def rows(self, columns):
        with closing(sqlite3.connect(self._path)) as db:
            return db.execute(f"SELECT {columns} FROM letters ORDER BY id").fetchall()

    def close(self):
        self.sink.gate.set()
        self.worker.stop()
        assert self.worker.join(10)
        self.journal.close()


@pytest.fixture
def bench(tmp_path, log):
    bench = Bench(tmp_path, log)
    yield bench
    bench.close()


def test_nothing_is_submitted_if_nothing_is_stored(bench):
    assert bench.tick() == 0


def test_an_unreadable_journal_is_read_again_later(bench, monkeypatch):
    def broken(*_):
        raise StorageError("the journal cannot be written: database is locked")

    bench.store(1)
    with monkeypatch.context() as patched:
        patched.setattr(bench.journal, "claim_due", broken)
        assert bench.tick() == 0
    assert bench.rows("state") == [("pending",)]
    assert bench.tick() == 1
    assert bench.known(1) is Known.ACCEPTED


def test_due_rows_are_delivered_once_and_deleted(bench, lines):
    bench.store(1, 2)
    bench.wall.advance(60)
    assert bench.tick() == 2
    assert bench.tick() == 0
    assert sorted(bench.sink.accepted) == sorted([event(1).key, event(2).key])
    assert bench.known(1) is Known.ACCEPTED
    assert bench.journal.counts() == {}
    delivered_lines = named(lines, "pending.delivered")
    assert [(line["sink"], line["attempts"], line["age_secs"]) for line in delivered_lines] == [("it", 1, 60.0)] * 2
    assert bench.retrier.delivered == 2


def test_a_skipped_row_is_deleted_and_logged_as_skipped(bench, lines):
    bench.store(1)

    def skip(event):
        raise SkippedError("nothing to send")

    bench.sink.examined = skip
    assert bench.tick() == 1
    assert bench.known(1) is Known.ACCEPTED
    assert bench.journal.counts() == {}
    assert bench.sink.calls == []
    assert [line["reason"] for line in named(lines, "pending.delivered")] == ["skipped"]


def test_a_row_that_is_rejected_unsent_becomes_a_dead_letter(bench, lines):
    bench.store(1)

    def reject(event):
        raise RejectedError("sinks.it.body: it cannot be evaluated")

    bench.sink.examined = reject
    assert bench.tick() == 1
    assert bench.known(1) is Known.DEAD
    assert bench.sink.calls == []
    assert "cannot be evaluated" in named(lines, "event.dead")[0]["error_message"]


def test_rows_of_other_sinks_and_dead_rows_are_not_submitted(bench):
    bench.store(1, sink="gone")
    bench.journal.store([Letter(event=event(2), sink="it", dead=True, reason="rejected")])
    assert bench.tick() == 0
    assert len(bench.journal.counts()) == 2


def test_a_row_that_fails_backs_off_and_is_finally_given_up(bench, lines):
    bench.store(1)
    bench.sink.fail_always(TransientError("still down"))
    stored_at, waits, age = bench.wall(), [], 0.0
    while age < GIVE_UP_SECS:
        bench.wall.now = stored_at + age
        assert bench.tick() == 1
        assert bench.tick() == 0
        ((state, due_at),) = bench.rows("state, due_at")
        assert state == "pending"
        waits.append(due_at - bench.wall())
        age = max(due_at - stored_at, GIVE_UP_SECS if len(waits) == 12 else 0)
    assert 5 <= waits[0] <= 10
    assert 450 <= waits[-1] <= 900
    assert all(wait <= 900 for wait in waits)
    assert bench.rows("attempts, error") == [(12, "still down")]
    bench.wall.now = stored_at + GIVE_UP_SECS
    assert bench.tick() == 1
    assert bench.rows("state, reason, attempts, error") == [("dead", "gave_up", 13, "still down")]
    assert named(lines, "event.dead")[0]["reason"] == "gave_up"
    assert bench.tick() == 0


def test_a_rejected_row_becomes_a_dead_letter(bench, lines):
    bench.store(1)
    bench.sink.fail_always(RejectedError("no such tenant"))
    bench.tick()
    assert bench.rows("state, reason, error") == [("dead", "rejected", "no such tenant")]
    (line,) = named(lines, "event.dead")
    assert (line["level"], line["sink"], line["error_message"]) == ("error", "it", "no such tenant")
    assert bench.known(1) is Known.DEAD


def test_a_rejection_with_an_open_breaker_makes_no_dead_letter(bench):
    bench.store(*range(6))
    bench.sink.fail_always(RejectedError("404 to everything"))
    bench.tick()
    bench.monotonic.advance(1.0)
    bench.wall.advance(5)
    bench.tick()
    assert bench.journal.counts() == {("it", "dead"): 3, ("it", "pending"): 3}


def test_retry_after_is_honoured(bench):
    bench.store(1)
    bench.sink.fail_always(TransientError("busy", retry_after_secs=700.0))
    bench.tick()
    assert bench.rows("due_at") == [(bench.wall() + 700.0,)]


def test_a_sink_with_an_open_breaker_gets_only_probes(bench):
    bench.store(*range(10))
    bench.sink.fail_always(TransientError("down"))
    bench.tick()
    assert bench.worker.is_open
    before = len(bench.sink.calls)
    bench.wall.advance(1000)
    for _ in range(20):
        assert bench.tick() == 0
    assert len(bench.sink.calls) == before
    bench.monotonic.advance(1.0)
    bench.tick()
    bench.tick()
    assert len(bench.sink.calls) == before + 1


def test_probes_alternate_between_the_stored_events(bench):
    bench.store(*range(6))
    bench.sink.fail_always(TransientError("down"))
    bench.tick()
    probed = len(bench.sink.calls)
    for _ in range(4):
        bench.monotonic.advance(40.0)
        bench.wall.advance(2000.0)
        bench.tick()
    tried = [call[0] for call in bench.sink.calls[probed:]]
    assert len(tried) == 4
    assert all(first != second for first, second in pairwise(tried))


def test_all_stored_events_are_delivered_when_the_sink_is_back(bench):
    bench.store(*range(30))
    bench.sink.fail_always(TransientError("down"))
    bench.tick()
    bench.sink.behaviour = lambda events: None
    for _ in range(12):
        bench.monotonic.advance(40.0)
        bench.wall.advance(1000.0)
        bench.tick()
    assert bench.journal.counts() == {}
    assert sorted(bench.sink.accepted) == sorted(event(number).key for number in range(30))


def test_rows_whose_delivery_still_runs_are_not_submitted_twice(bench):
    bench.store(1)
    bench.sink.gate.clear()
    assert bench.retrier.submit_due() == 1
    until(lambda: bench.sink.running)
    bench.wall.advance(1000)
    assert [bench.retrier.submit_due() for _ in range(3)] == [0, 0, 0]
    bench.sink.gate.set()
    bench.finish_deliveries()
    assert len(bench.sink.calls) == 1


def test_a_row_whose_event_a_puller_is_delivering_is_not_submitted(bench):
    bench.store(1)
    with bench.in_flight.claim([Delivery(event(1), "it", deadline=None)], DeliveryWait()):
        assert bench.retrier.submit_due() == 0
        assert bench.sink.calls == []


def test_a_row_that_was_accepted_meanwhile_is_deleted_undelivered(bench):
    bench.store(1)
    bench.journal.accept("it", [event(1).key], None)
    assert bench.tick() == 0
    assert bench.journal.counts() == {}
    assert bench.sink.calls == []


def test_nothing_is_submitted_while_the_journal_cannot_be_read(bench, monkeypatch):
    def unreadable(pairs):
        raise StorageError("cannot be read")

    bench.store(1)
    with monkeypatch.context() as patched:
        patched.setattr(bench.journal, "known", unreadable)
        assert bench.tick() == 0
    assert bench.sink.calls == []
    bench.wall.advance(2)
    assert bench.tick() == 1
    assert bench.journal.counts() == {}


def test_nothing_is_delivered_while_the_journal_cannot_be_written(bench, monkeypatch):
    bench.store(1, 2)
    with monkeypatch.context() as patched:
        patched.setattr(bench.journal.commits, "db", CannotBegin(sqlite3.OperationalError("disk is full")))
        bench.journal.accept("it", [event(99).key], None)
        assert not bench.journal.is_writable
        bench.retrier.run(0.05)
    assert bench.sink.calls == []
    bench.journal.flush()
    assert bench.tick() == 2


def test_hanging_calls_do_not_block_idle_threads(bench):
    sink = MemorySink(concurrency=16)
    held, over = threading.Semaphore(12), threading.Event()
    sink.behaviour = lambda _events: over.wait(30) if held.acquire(blocking=False) else None
    worker = bench.worker_of("other", sink)
    worker.start()
    retrier = bench.retrier_that_gathers(0.0, other=worker)
    bench.store(*range(40), sink="other")
    try:
        until(lambda: retrier.run(0.05) and len(sink.accepted) == 28)
    finally:
        over.set()
        worker.stop()
        assert worker.join(10)
        retrier.stop()


def test_half_of_the_queue_is_left_for_new_events(bench):
    bench.sink.gate.clear()
    bench.store(*range(50))
    assert bench.retrier.submit_due() == 10
    bench.sink.gate.set()
    bench.finish_deliveries()


class CannotBegin:
    """A connection on which `BEGIN` fails."""

    def __init__(self, error):
        self._error = error

    def execute(self, sql):
        if sql.startswith("BEGIN"):
            raise self._error


def test_an_event_whose_outcome_is_not_written_is_tried_again(bench, monkeypatch):
    bench.store(1)
    bench.sink.fail_with(TransientError("down"))
    with monkeypatch.context() as patched:
        patched.setattr(bench.journal.commits, "db", CannotBegin(ValueError("neither now nor later")))
        bench.tick()
    assert bench.tick() == 1
    assert bench.journal.counts() == {}


# --- claims that must be released -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("a bug")])
@pytest.mark.parametrize("where", ["claim", "known", "submit", "queued"])
def test_an_error_before_the_worker_does_not_block_the_next_try(bench, monkeypatch, where, error):
    def broken(*args):
        raise error

    bench.store(*range(5))
    places = {"claim": bench.in_flight, "known": bench.journal, "submit": bench.worker, "queued": bench.in_flight}
    place = places[where]
    with monkeypatch.context() as patched:
        patched.setattr(place, where, broken)
        with pytest.raises(type(error)):
            bench.retrier.submit_due()
    bench.finish_deliveries()
    bench.tick()  # they are still due: nothing was written about them
    assert bench.journal.counts() == {}
    assert sorted(bench.sink.accepted) == sorted(event(number).key for number in range(5))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("a bug")])
@pytest.mark.parametrize(
    ("failing", "answer"),
    [("reschedule", TransientError("down")), ("mark_dead", RejectedError("no")), ("age", TransientError("down"))],
)
def test_an_error_in_writing_a_result_does_not_block_the_next_try(bench, monkeypatch, failing, answer, error):
    def broken(*args, **more):
        raise error

    bench.store(1)
    bench.sink.fail_with(answer)
    with monkeypatch.context() as patched:
        if failing == "age":
            bench.sink.gate.clear()
            assert bench.retrier.submit_due() == 1
            patched.setattr(bench.retrier, "_monotonic", broken)
            bench.sink.gate.set()
            with pytest.raises(type(error)):
                bench.finish_deliveries()
        else:
            patched.setattr(bench.journal, failing, broken)
            with pytest.raises(type(error)):
                bench.tick()
    bench.monotonic.advance(60)
    bench.wall.advance(60)
    bench.tick()
    assert bench.sink.accepted == [event(1).key]


@pytest.mark.parametrize("secs", [30.0, GIVE_UP_SECS])
def test_a_row_ages_while_it_is_delivered(bench, secs, lines):
    bench.store(1)
    bench.sink.fail_with(TransientError("down"))
    bench.sink.gate.clear()
    bench.wall.advance(60)
    assert bench.retrier.submit_due() == 1
    bench.monotonic.advance(secs)
    bench.sink.gate.set()
    bench.finish_deliveries()
    assert bench.known(1) is (Known.DEAD if secs == GIVE_UP_SECS else Known.PENDING)
    bench.monotonic.advance(60)
    bench.wall.advance(1000)
    if secs < GIVE_UP_SECS:
        bench.tick()
        assert named(lines, "pending.delivered")[0]["age_secs"] == 1060.0


@pytest.mark.parametrize("answer", [TransientError("down"), TransientError("busy", retry_after_secs=700.0)])
def test_a_row_is_not_tried_again_before_its_result_is_written(bench, answer):
    bench.store(1)
    bench.sink.fail_always(answer)
    assert bench.retrier.submit_due() == 1
    bench.await_deliveries()
    assert [bench.retrier.submit_due() for _ in range(3)] == [0, 0, 0]
    bench.journal.flush()
    assert [bench.retrier.submit_due() for _ in range(3)] == [0, 0, 0]
    bench.monotonic.advance(1000)
    bench.wall.advance(1000)
    assert bench.tick() == 1
    assert len(bench.sink.calls) == 2


def test_a_dead_letter_is_logged_only_if_it_is_written(bench, monkeypatch, lines):
    bench.store(1)
    bench.sink.fail_always(RejectedError("no such tenant"))
    with monkeypatch.context() as patched:
        patched.setattr(bench.journal.commits, "db", CannotBegin(sqlite3.OperationalError("disk is full")))
        bench.tick()
    assert named(lines, "event.dead") == []
    assert bench.known(1) is Known.PENDING
    bench.wall.advance(1000)
    bench.tick()
    assert len(named(lines, "event.dead")) == 1


# --- portions ---------------------------------------------------------------------------------------------------------


class CountedConnection:
    """The connection that writes; it counts its transactions."""

    def __init__(self, connection):
        self._connection = connection
        self.commits = 0

    def execute(self, sql, *parameters):
        self.commits += sql == "COMMIT"
        return self._connection.execute(sql, *parameters)

    def __getattr__(self, name):
        return getattr(self._connection, name)


def fails_some(events):
    """Accept, reject and fail in turn, by the remainder of the FileId divided by 3."""
    number = int(events[0].content["FileUploadEvent"]["FileId"]) % 3
    if number:
        raise RejectedError("no") if number == 1 else TransientError("down")


def test_more_events_than_the_queue_holds_are_delivered_in_one_run(bench):
    bench.store(*range(100))
    assert bench.retrier.run(60) is False
    assert len(bench.sink.accepted) == 100
    assert bench.journal.counts() == {}


def test_stored_events_are_delivered_in_the_order_of_due_times(bench):
    for number in (3, 1, 4, 0, 2):
        bench.wall.advance(1)
        bench.store(number)
    for number in range(10, 70):
        bench.store(number)
    bench.wall.advance(1)
    bench.retrier.run(60)
    assert bench.sink.accepted == [event(number).key for number in (3, 1, 4, 0, 2, *range(10, 70))]


def test_gathered_results_are_written_in_one_transaction(bench):
    counted = bench.journal.commits.db = CountedConnection(bench.journal.commits.db)
    bench.retrier = bench.retrier_that_gathers(60)
    bench.store(*range(9))
    before = counted.commits
    bench.retrier.run(60)
    assert counted.commits == before + 1
    assert len(bench.sink.accepted) == 9


def test_an_event_stays_in_flight_until_its_result_is_written(bench):
    bench.store(1)
    bench.retrier.submit_due()
    until(lambda: bench.retrier.results)
    wait = DeliveryWait()
    with bench.in_flight.claim([Delivery(event(1), "it", deadline=None)], wait) as claims:
        assert claims[0].joined
        assert bench.known(1) is Known.PENDING
        bench.retrier.write_results(0)
        assert wait.wait(0) is WaitEnd.COMPLETE
        assert bench.known(1) is Known.ACCEPTED
    assert len(bench.sink.calls) == 1


def test_a_full_disk_neither_loses_nor_repeats_events(bench, monkeypatch, lines):
    bench.retrier = bench.retrier_that_gathers(60)
    bench.store(0, 1, 2)
    bench.sink.behaviour = fails_some
    with monkeypatch.context() as patched:
        patched.setattr(bench.journal.commits, "db", CannotBegin(sqlite3.OperationalError("disk is full")))
        bench.retrier.run(60)
        assert [bench.known(number) for number in (0, 1, 2)] == [Known.ACCEPTED, Known.PENDING, Known.PENDING]
        assert not bench.journal.is_writable
        assert len(bench.sink.calls) == 3
        # The failed event stays claimed until that can be written; the rejected one is due.
        (due,) = bench.journal.claim_due("it", 9)
        assert due.event == event(1)
        bench.journal.release([due])
    assert bench.rows("state") == [("pending",)] * 3
    bench.journal.flush()
    assert bench.journal.is_writable
    assert bench.rows("state, attempts") == [("pending", 0), ("pending", 1)]
    assert named(lines, "event.dead") == []


def test_a_hanging_sink_does_not_delay_stored_events_of_others(bench):
    hanging = MemorySink()
    hanging.gate.clear()
    worker = bench.worker_of("hangs", hanging)
    worker.start()
    try:
        bench.retrier = bench.retrier_that_gathers(GATHER_SECS, hangs=worker)
        bench.store(*range(40), sink="hangs")
        bench.store(*range(100))

        def has_all():
            assert bench.retrier.run(0.05) is True
            return len(bench.sink.accepted) == 100

        until(has_all)
        assert bench.journal.counts() == {("hangs", "pending"): 40}
        hanging.gate.set()
        assert bench.retrier.run(60) is False
        assert len(hanging.accepted) == 40
    finally:
        hanging.gate.set()
        worker.stop()
        assert worker.join(10)


def test_a_stop_writes_results_and_leaves_other_events_pending(bench):
    bench.store(*range(30))
    bench.sink.gate.clear()
    bench.retrier.submit_due()
    until(lambda: bench.sink.running)
    bench.retrier.stop_claiming()
    bench.worker.stop()
    bench.sink.gate.set()
    assert bench.worker.join(10)
    bench.retrier.stop()
    assert bench.journal.counts() == {("it", "pending"): 29}
    assert bench.known(0) is Known.ACCEPTED
    assert bench.retrier.run(60) is False
    assert bench.retrier.submit_due() == 0


def test_a_stop_ends_a_run_that_waits_for_a_hanging_sink(bench):
    bench.store(1)
    bench.sink.gate.clear()
    running = threading.Thread(target=bench.retrier.run, args=(600,))
    running.start()
    until(lambda: bench.sink.running)
    bench.retrier.stop()
    running.join(10)
    assert not running.is_alive()
    assert bench.known(1) is Known.PENDING
