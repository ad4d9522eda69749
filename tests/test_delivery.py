import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import FakeClock, MemoryLedger, MemorySink, event, named, send, until
from vodpoller.delivery import Backoff, Breaker, Delivery, InFlight, Latch, Outcome, Settlement, Worker, settle
from vodpoller.errors import PartialFailureError, RejectedError, TransientError
from vodpoller.systemd import Liveness

unhurried = settings(deadline=None)

# --- settle -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_failure", ["store", "leave"])
def test_an_event_without_any_outcome_is_never_settled(on_failure):
    with pytest.raises(ValueError, match="without any outcome"):
        settle([], on_failure=on_failure)


@unhurried
@given(st.lists(st.sampled_from(Outcome), min_size=1), st.sampled_from(["store", "leave"]))
def test_only_what_every_sink_accepted_is_confirmed_without_being_stored(outcomes, on_failure):
    settled = settle(outcomes, on_failure=on_failure)
    if set(outcomes) == {Outcome.DELIVERED}:
        assert settled is Settlement.CONFIRM
    else:
        assert settled is {"store": Settlement.STORE, "leave": Settlement.LEAVE}[on_failure]


# --- backoff ----------------------------------------------------------------------------------------------------------


@unhurried
@given(st.integers(1, 20_000))
def test_a_wait_lies_between_half_of_the_exponential_and_all_of_it(attempt):
    full_secs = min(2.0 * 2 ** min(attempt - 1, 20), 60.0)
    assert full_secs / 2 <= Backoff(first_secs=2.0, most_secs=60.0).secs(attempt) <= full_secs


def test_waits_of_many_who_failed_together_differ():
    backoff = Backoff(first_secs=10.0, most_secs=60.0)
    assert len({backoff.secs(1) for _ in range(20)}) > 10


# --- latch ------------------------------------------------------------------------------------------------------------


def in_thread(task):
    """Run it in a thread; returns a function that waits for its result."""
    results = []
    thread = threading.Thread(target=lambda: results.append(task()), daemon=True)
    thread.start()

    def result():
        thread.join(10)
        assert not thread.is_alive()
        return results[0]

    return result


def test_a_latch_whose_time_is_over_says_so():
    latch = Latch(patience_secs=0.01)
    latch.add(1)
    assert latch.wait(0.03) is False


@pytest.mark.parametrize("timeout_secs", [0, -5.0])
def test_a_latch_without_time_left_does_not_wait(timeout_secs):
    latch = Latch(patience_secs=60)
    latch.add(1)
    started = time.monotonic()
    assert latch.wait(timeout_secs) is False
    assert time.monotonic() - started < 1


def test_a_latch_opens_when_the_last_is_settled_and_not_before():
    latch = Latch()
    latch.add(2)
    result = in_thread(lambda: latch.wait(10))
    latch.settled()
    assert latch.wait(0.02) is False
    latch.settled()
    assert result() is True


def test_a_latch_that_waits_for_nothing_is_open():
    assert Latch().wait(10) is True


def test_settled_before_the_wait_counts():
    latch = Latch()
    latch.add(1)
    latch.settled()
    assert latch.wait(10) is True


def test_a_patient_hurry_does_not_end_a_wait_that_is_young():
    latch = Latch(patience_secs=60)
    latch.add(1)
    result = in_thread(lambda: latch.wait(10))
    until(lambda: latch._patient_until)
    assert latch.hurry() is False
    assert latch.hurry(patiently=False) is True
    assert result() is False


def test_a_patient_hurry_ends_a_wait_that_is_old_once():
    latch = Latch(patience_secs=0.01)
    latch.add(1)
    result = in_thread(lambda: latch.wait(10))
    until(latch.hurry)
    assert result() is False
    assert latch.hurry() is False


def test_a_wait_that_has_not_begun_cannot_be_hurried_patiently():
    latch = Latch(patience_secs=0)
    latch.add(1)
    assert latch.hurry() is False


def test_nothing_is_hurried_where_everything_is_settled():
    latch = Latch()
    latch.add(1)
    latch.settled()
    assert latch.hurry(patiently=False) is False


def test_a_thread_that_is_needed_elsewhere_waits_for_its_patience_only():
    latch = Latch(patience_secs=0.02, is_needed=lambda: True)
    latch.add(1)
    started = time.monotonic()
    assert latch.wait(30) is False
    assert time.monotonic() - started < 5


# --- in flight --------------------------------------------------------------------------------------------------------


def make(number=0, sink="it", **more):
    return Delivery(event(number), sink, deadline=None, **more)


def test_a_pair_that_is_on_its_way_is_joined():
    in_flight, latch, other = InFlight(), Latch(), Latch()
    first, second = make(), make()
    in_flight.claim([first], latch)
    standing, fresh = in_flight.claim([second], other)
    assert (standing, fresh) == ([first], [])
    in_flight.settle(first, Outcome.DELIVERED)
    assert latch.wait(0)
    assert other.wait(0)
    assert len(in_flight) == 0


def test_the_same_event_at_another_sink_is_another_pair():
    in_flight = InFlight()
    wanted = [make(0, "a"), make(0, "b")]
    assert in_flight.claim(wanted, None) == (wanted, wanted)


def test_a_pair_twice_in_one_claim_is_one_delivery_that_opens_the_latch():
    in_flight, latch = InFlight(), Latch()
    first, second = make(), make()
    assert in_flight.claim([first, second], latch) == ([first, first], [first])
    in_flight.settle(first, Outcome.DELIVERED)
    assert latch.wait(0)


def test_the_first_outcome_counts_and_is_told_once():
    in_flight, told = InFlight(), []
    delivery = make(on_settled=told.append)
    in_flight.claim([delivery], None)
    in_flight.settle(delivery, Outcome.DELIVERED)
    in_flight.settle(delivery, Outcome.ERRORED, TransientError("late"))
    assert delivery.outcome is Outcome.DELIVERED
    assert delivery.error is None
    assert told == [delivery]


def test_what_is_settled_can_be_claimed_anew():
    in_flight, first, second = InFlight(), make(), make()
    in_flight.claim([first], None)
    in_flight.settle(first, Outcome.ERRORED)
    assert in_flight.claim([second], None) == ([second], [second])


@pytest.mark.parametrize(("error", "outcome"), [(None, Outcome.UNSETTLED), (TransientError("x"), Outcome.ERRORED)])
def test_what_waits_and_is_abandoned_never_starts(error, outcome):
    in_flight, latch, delivery = InFlight(), Latch(), make()
    in_flight.claim([delivery], latch)
    delivery.error = error
    in_flight.abandon([delivery], latch)
    assert delivery.outcome is outcome
    assert in_flight.start([delivery]) == []
    assert len(in_flight) == 0


def test_what_runs_is_never_abandoned_and_its_late_success_is_known():
    in_flight, latch, delivery = InFlight(), Latch(), make()
    in_flight.claim([delivery], latch)
    assert in_flight.start([delivery]) == [delivery]
    in_flight.abandon([delivery], latch)
    assert delivery.outcome is None
    assert in_flight.claim([make()], Latch())[0] == [delivery]
    in_flight.settle(delivery, Outcome.DELIVERED)
    assert delivery.outcome is Outcome.DELIVERED
    assert len(in_flight) == 0


def test_what_somebody_else_waits_for_is_not_abandoned():
    in_flight, latch, other, delivery = InFlight(), Latch(), Latch(), make()
    in_flight.claim([delivery, make()], latch)
    in_flight.claim([make()], other)
    in_flight.abandon([delivery, delivery], latch)
    assert delivery.outcome is None
    in_flight.settle(delivery, Outcome.DELIVERED)
    assert other.wait(0)


def test_claims_settlements_and_abandonments_of_many_threads_never_run_a_pair_twice_at_once():
    in_flight, running, clashes = InFlight(), {}, []

    def lane(seed):
        for turn in range(150):
            latch, wanted = Latch(patience_secs=0), [make((seed + turn) % 3), make((seed * turn) % 3)]
            standing, fresh = in_flight.claim(wanted, latch)
            for delivery in in_flight.start(fresh) if turn % 4 else []:
                pair = delivery.event.key
                if running.get(pair):
                    clashes.append(pair)
                running[pair] = True
                time.sleep(0)
                running[pair] = False
                in_flight.settle(delivery, Outcome.DELIVERED)
            if not latch.wait(0.0005):
                in_flight.abandon(standing, latch)
        return True

    results = [in_thread(lambda seed=seed: lane(seed)) for seed in range(4)]
    assert all(result() for result in results)
    assert clashes == []
    assert len(in_flight) == 0


# --- breaker ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def breaker(clock):
    return Breaker(failures=3, monotonic=clock)


def opened(breaker):
    for key in (b"1", b"2", b"3"):
        breaker.failed(key)
    assert breaker.open
    return breaker


def test_one_event_that_fails_again_and_again_opens_nothing(breaker):
    assert {breaker.failed(b"poison") for _ in range(20)} == {False}
    assert not breaker.open


def test_so_many_distinct_events_open_it(breaker):
    assert [breaker.failed(key) for key in (b"1", b"2", b"2", b"3")] == [False, False, False, True]


def test_a_success_between_failures_starts_the_count_anew(breaker):
    breaker.failed(b"1")
    breaker.failed(b"2")
    assert breaker.succeeded() is False
    breaker.failed(b"3")
    breaker.failed(b"4")
    assert not breaker.open


def test_an_open_breaker_waits_before_it_probes(breaker, clock):
    opened(breaker)
    assert not breaker.wants_probe()
    clock.advance(1.0)
    assert breaker.wants_probe()


def test_it_probes_one_event_at_a_time(breaker, clock):
    opened(breaker)
    clock.advance(1.0)
    breaker.start_probe(b"4")
    clock.advance(100)
    assert not breaker.wants_probe()
    breaker.failed(b"another that was under way")
    assert not breaker.wants_probe()
    breaker.failed(b"4")
    assert not breaker.wants_probe()
    clock.advance(30)
    assert breaker.wants_probe()


def test_probes_grow_rarer_and_come_every_half_minute_at_least(breaker, clock):
    opened(breaker)
    waits = []
    for number in range(12):
        waited = 0.0
        while not breaker.wants_probe():
            clock.advance(0.25)
            waited += 0.25
        waits.append(waited)
        breaker.start_probe(b"p%d" % number)
        breaker.failed(b"p%d" % number)
    assert waits[0] <= 1.0
    assert waits[-1] >= 15
    assert max(waits) <= 30


def test_the_last_probe_is_another_event_unless_none_comes_for_a_while(breaker, clock):
    opened(breaker)
    clock.advance(1.0)
    breaker.start_probe(b"4")
    breaker.failed(b"4")
    clock.advance(2.0)
    assert breaker.wants_probe()
    assert breaker.was_probed_last(b"4")
    assert not breaker.was_probed_last(b"5")
    clock.advance(5.0)
    assert not breaker.was_probed_last(b"4")


def test_a_success_closes_it_and_says_so_once(breaker, clock):
    opened(breaker)
    clock.advance(1.0)
    breaker.start_probe(b"4")
    assert breaker.succeeded() is True
    assert not breaker.open
    assert breaker.succeeded() is False


# --- worker -----------------------------------------------------------------------------------------------------------


class Bench:
    """Workers with what they need; ends them, and expects that their threads end."""

    def __init__(self, log):
        self.log = log
        self.in_flight = InFlight()
        self.ledger = MemoryLedger()
        self.liveness = Liveness()
        self.workers = []

    def worker(self, sink, *, name="it", queue_max_events=100, breaker_failures=100, **more):
        worker = Worker(
            name=name,
            sink=sink,
            ledger=self.ledger,
            in_flight=self.in_flight,
            queue_max_events=queue_max_events,
            breaker_failures=breaker_failures,
            log=self.log,
            liveness=self.liveness,
            **more,
        )
        self.workers.append(worker)
        worker.start()
        return worker

    def send(self, worker, *numbers, **more):
        return send(worker, self.in_flight, [event(number) for number in numbers], **more)

    def deliver(self, worker, *numbers, **more):
        """Send, wait, and return the outcomes."""
        deliveries, latch = self.send(worker, *numbers, **more)
        assert latch.wait(10)
        return [delivery.outcome for delivery in deliveries]

    def close(self):
        for worker in self.workers:
            worker.sink.gate.set()
            worker.stop()
            assert worker.join(10)


@pytest.fixture
def bench(log):
    bench = Bench(log)
    yield bench
    bench.close()


def hold_first(bench, worker, *, first=1000, **more):
    """Keep the sink's thread busy with one event, so that others queue up."""
    worker.sink.gate.clear()
    sent = bench.send(worker, first, **more)
    until(lambda: worker.sink.running)
    return sent


def rejecting(*numbers):
    bad = {event(number).key for number in numbers}

    def behave(events):
        if bad & {event.key for event in events}:
            raise RejectedError("it is poison")

    return behave


def keys(*numbers):
    return [event(number).key for number in numbers]


def test_a_full_queue_leaves_events_unsettled_at_once(bench):
    worker = bench.worker(MemorySink(), queue_max_events=2)
    held, _ = hold_first(bench, worker)
    deliveries, _ = bench.send(worker, 1, 2, 3, 4)
    assert [delivery.outcome for delivery in deliveries] == [None, None, Outcome.UNSETTLED, Outcome.UNSETTLED]
    worker.sink.gate.set()
    until(lambda: all(delivery.outcome is Outcome.DELIVERED for delivery in [*held, *deliveries[:2]]))


def test_one_poison_event_condemns_none_of_its_batch(bench):
    worker = bench.worker(MemorySink(batch_events=10))
    hold_first(bench, worker)
    deliveries, latch = bench.send(worker, 1, 2, 3, 4)
    worker.sink.behaviour = rejecting(2)
    worker.sink.gate.set()
    assert latch.wait(10)
    delivered, rejected = Outcome.DELIVERED, Outcome.REJECTED
    assert [delivery.outcome for delivery in deliveries] == [delivered, rejected, delivered, delivered]
    assert worker.sink.calls[1:] == [keys(1, 2, 3, 4), keys(1), keys(2), keys(3), keys(4)]


def test_a_batch_that_failed_is_one_failure_to_the_breaker(bench):
    worker = bench.worker(MemorySink(batch_events=10), breaker_failures=2)
    hold_first(bench, worker)
    deliveries, latch = bench.send(worker, 1, 2, 3, 4)
    worker.sink.fail_with(None, TransientError("the disk is full"))
    worker.sink.gate.set()
    assert latch.wait(10)
    assert {delivery.outcome for delivery in deliveries} == {Outcome.ERRORED}
    assert not worker.is_open


def test_what_failed_in_a_batch_is_repeated_by_itself(bench):
    worker = bench.worker(MemorySink(batch_events=10))
    hold_first(bench, worker)
    _, latch = bench.send(worker, 1, 2, deadline_in_secs=10)
    worker.sink.fail_with(None, TransientError("once"))
    worker.sink.gate.set()
    assert latch.wait(10)
    assert worker.sink.calls[1] == keys(1, 2)
    assert sorted(worker.sink.calls[2:]) == sorted([keys(1), keys(2)])


def test_a_partial_failure_is_of_those_it_names(bench):
    worker = bench.worker(MemorySink(batch_events=10))
    hold_first(bench, worker)
    deliveries, latch = bench.send(worker, 1, 2, 3)
    worker.sink.fail_with(None, PartialFailureError({0: RejectedError("no"), 2: TransientError("later")}))
    worker.sink.gate.set()
    assert latch.wait(10)
    assert [delivery.outcome for delivery in deliveries] == [Outcome.REJECTED, Outcome.DELIVERED, Outcome.ERRORED]
    assert bench.ledger.accepted[1:] == [("it", event(2).key)]


@pytest.mark.parametrize("failures", [{7: TransientError("x")}, {-1: TransientError("x")}, {}])
def test_a_partial_failure_that_names_no_event_of_the_call_accepts_nothing(bench, failures):
    worker = bench.worker(MemorySink())
    worker.sink.fail_with(PartialFailureError(failures))
    assert bench.deliver(worker, 1) == [Outcome.ERRORED]
    assert bench.ledger.accepted == []


@pytest.mark.parametrize("error", [TypeError("a bug"), MemoryError()])
def test_an_error_that_nobody_foresaw_is_transient_and_the_worker_goes_on(bench, lines, error):
    worker = bench.worker(MemorySink())
    worker.sink.fail_with(error)
    assert bench.deliver(worker, 1) == [Outcome.ERRORED]
    assert bench.deliver(worker, 1) == [Outcome.DELIVERED]
    assert named(lines, "delivery.failed")[0]["exc_info"] is error


def test_a_sink_that_wants_to_end_the_process_fails_one_call(bench, lines):
    worker = bench.worker(MemorySink())
    worker.sink.fail_with(SystemExit(3))
    assert bench.deliver(worker, 1) == [Outcome.ERRORED]
    assert bench.deliver(worker, 1) == [Outcome.DELIVERED]
    assert "sys.exit(3)" in named(lines, "delivery.failed")[0]["error_message"]


def test_an_error_in_the_ledger_does_not_end_the_worker(bench, lines, monkeypatch):
    def broken(*args):
        raise RuntimeError("a bug")

    worker = bench.worker(MemorySink())
    with monkeypatch.context() as patched:
        patched.setattr(bench.ledger, "accept", broken)
        assert bench.deliver(worker, 1) == [Outcome.ERRORED]
    assert bench.deliver(worker, 2) == [Outcome.DELIVERED]
    assert named(lines, "lane.failed")


def test_a_sink_that_hangs_holds_only_its_own_thread(bench):
    slow, fast = bench.worker(MemorySink(), name="slow"), bench.worker(MemorySink(), name="fast")
    hold_first(bench, slow)
    assert bench.deliver(fast, 1, 2) == [Outcome.DELIVERED] * 2
    assert slow.sink.accepted == []
    assert "sink slow" in bench.liveness.overdue(-10)
    until(lambda: "sink fast" not in bench.liveness.overdue(-10))


def test_an_attempt_is_repeated_within_the_deadline(bench):
    worker = bench.worker(MemorySink())
    worker.sink.fail_with(TransientError("once"))
    deliveries, latch = bench.send(worker, 1, deadline_in_secs=10)
    assert latch.wait(10)
    assert deliveries[0].outcome is Outcome.DELIVERED
    assert deliveries[0].attempts == 1
    assert worker.sink.calls == [keys(1), keys(1)]


def test_retry_after_is_honoured(bench):
    worker = bench.worker(MemorySink())
    worker.sink.fail_with(TransientError("busy", retry_after_secs=0.9))
    assert bench.deliver(worker, 1, deadline_in_secs=10) == [Outcome.DELIVERED]
    first, second = worker.sink.called_at
    assert 0.85 <= second - first < 5


@pytest.mark.parametrize("deadline_in_secs", [None, -1.0, 0.1, 5.0])
def test_no_attempt_is_repeated_beyond_the_deadline(bench, deadline_in_secs):
    worker = bench.worker(MemorySink())
    worker.sink.fail_always(TransientError("busy", retry_after_secs=6.0))
    started = time.monotonic()
    assert bench.deliver(worker, 1, deadline_in_secs=deadline_in_secs) == [Outcome.ERRORED]
    assert time.monotonic() - started < 3
    assert len(worker.sink.calls) == 1


def test_a_rejection_is_not_repeated(bench):
    worker = bench.worker(MemorySink())
    worker.sink.fail_always(RejectedError("no"))
    assert bench.deliver(worker, 1, deadline_in_secs=10) == [Outcome.REJECTED]
    assert len(worker.sink.calls) == 1


def test_so_many_calls_run_at_once_as_the_sink_says(bench):
    worker = bench.worker(MemorySink(concurrency=3))
    worker.sink.gate.clear()
    _, latch = bench.send(worker, *range(9))
    until(lambda: worker.sink.running == 3)
    assert latch.wait(0.05) is False
    worker.sink.gate.set()
    assert latch.wait(10)
    assert worker.sink.most_running == 3
    assert sorted(worker.sink.accepted) == sorted(keys(*range(9)))


def test_threads_come_as_they_are_needed(bench):
    worker = bench.worker(MemorySink(concurrency=96))
    bench.deliver(worker, 1)
    assert len(worker._threads) == 1


def test_where_no_more_threads_are_to_be_had_those_there_are_do_the_work(bench, monkeypatch):
    worker = bench.worker(MemorySink(concurrency=8))

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        deliveries, latch = bench.send(worker, *range(5))
    assert latch.wait(10)
    assert {delivery.outcome for delivery in deliveries} == {Outcome.DELIVERED}


def test_the_ledger_is_written_before_anyone_hears_of_it(bench):
    worker = bench.worker(MemorySink())
    assert bench.deliver(worker, 1) == [Outcome.DELIVERED]
    assert bench.ledger.accepted == [("it", event(1).key)]
    assert bench.ledger.outcomes_then == [None]


def test_what_was_abandoned_in_the_queue_never_reaches_the_sink(bench):
    worker = bench.worker(MemorySink())
    hold_first(bench, worker)
    deliveries, latch = bench.send(worker, 1)
    bench.in_flight.abandon(deliveries, latch)
    worker.sink.gate.set()
    assert bench.deliver(worker, 2) == [Outcome.DELIVERED]
    assert worker.sink.accepted == keys(1000, 2)


def test_what_runs_is_joined_and_delivered_once_and_its_late_success_is_in_the_ledger(bench):
    worker = bench.worker(MemorySink())
    first, latch = hold_first(bench, worker)
    bench.in_flight.abandon(first, latch)
    again, second_latch = bench.send(worker, 1000)
    assert again == first
    worker.sink.gate.set()
    assert second_latch.wait(10)
    assert worker.sink.calls == [keys(1000)]
    assert bench.ledger.accepted == [("it", event(1000).key)]


def test_a_worker_that_is_stopped_takes_nothing_more(bench):
    worker = bench.worker(MemorySink())
    hold_first(bench, worker)
    queued, _ = bench.send(worker, 1)
    worker.stop()
    assert worker.join(0.02) is False
    assert bench.deliver(worker, 2) == [Outcome.UNSETTLED]
    worker.sink.gate.set()
    assert worker.join(10) is True
    assert queued[0].outcome is None
    assert worker.sink.accepted == keys(1000)


def test_a_worker_that_is_stopped_repeats_nothing(bench):
    worker = bench.worker(MemorySink())
    deliveries, latch = hold_first(bench, worker, deadline_in_secs=10)
    worker.sink.fail_always(TransientError("x"))
    worker.stop()
    worker.sink.gate.set()
    assert latch.wait(10)
    assert deliveries[0].outcome is Outcome.ERRORED


@pytest.mark.parametrize(("queue_max_events", "room"), [(10, 4), (3, 0)])
def test_half_of_the_queue_is_kept_for_fresh_events(bench, queue_max_events, room):
    worker = bench.worker(MemorySink(), queue_max_events=queue_max_events)
    hold_first(bench, worker)
    bench.send(worker, 1)
    assert worker.room() == room


# --- the worker's breaker ---------------------------------------------------------------------------------------------


@pytest.fixture
def sick(bench):
    """A worker on a fake clock whose breaker three events have opened."""
    clock = FakeClock()
    worker = bench.worker(MemorySink(), breaker_failures=3, monotonic=clock)
    worker.clock = clock
    worker.sink.fail_always(TransientError("down"))
    for number in (1, 2, 3):
        assert bench.deliver(worker, number) == [Outcome.ERRORED]
    assert worker.is_open
    worker.sink.calls.clear()
    return worker


def test_an_open_breaker_keeps_events_from_the_sink_and_says_so_once(bench, lines, sick):
    assert bench.deliver(sick, *range(10, 30)) == [Outcome.UNSETTLED] * 20
    assert sick.sink.calls == []
    assert sick.room() == 0
    assert len(named(lines, "breaker.opened")) == 1


def test_one_event_at_a_time_probes_an_open_breaker(bench, sick):
    sick.clock.advance(1.0)
    assert sick.room() == 1
    sick.sink.gate.clear()
    probe, latch = bench.send(sick, 4)
    until(lambda: sick.sink.running)
    assert bench.deliver(sick, 5, 6) == [Outcome.UNSETTLED] * 2
    assert sick.room() == 0
    sick.sink.gate.set()
    assert latch.wait(10)
    assert probe[0].outcome is Outcome.ERRORED
    assert sick.sink.calls == [keys(4)]


def test_the_next_probe_is_another_event(bench, sick):
    sick.clock.advance(1.0)
    bench.deliver(sick, 4)
    sick.clock.advance(2.0)
    assert bench.deliver(sick, 4) == [Outcome.UNSETTLED]
    assert bench.deliver(sick, 5) == [Outcome.ERRORED]
    assert sick.sink.calls == [keys(4), keys(5)]


def test_a_lone_event_is_probed_again_after_a_while(bench, sick):
    sick.clock.advance(1.0)
    bench.deliver(sick, 4)
    sick.clock.advance(30.0)
    assert bench.deliver(sick, 4) == [Outcome.ERRORED]


def test_a_rejection_while_the_breaker_is_open_buries_nothing(bench, sick):
    sick.sink.fail_always(RejectedError("404 to everything"))
    sick.clock.advance(1.0)
    assert bench.deliver(sick, 4) == [Outcome.ERRORED]


def test_a_success_closes_the_breaker(bench, lines, sick):
    sick.sink.behaviour = lambda events: None
    sick.clock.advance(1.0)
    assert bench.deliver(sick, 4) == [Outcome.DELIVERED]
    assert not sick.is_open
    assert bench.deliver(sick, 5, 6) == [Outcome.DELIVERED] * 2
    assert len(named(lines, "breaker.closed")) == 1


def test_rejections_of_distinct_events_open_the_breaker(bench):
    worker = bench.worker(MemorySink(), breaker_failures=3)
    worker.sink.fail_always(RejectedError("404 to everything"))
    outcomes = [bench.deliver(worker, number)[0] for number in range(6)]
    assert outcomes == [Outcome.REJECTED] * 3 + [Outcome.UNSETTLED] * 3


def test_what_is_queued_when_the_breaker_opens_is_left_unsettled(bench):
    worker = bench.worker(MemorySink(), breaker_failures=1)
    worker.sink.fail_always(TransientError("down"))
    hold_first(bench, worker)
    _, latch = queued = bench.send(worker, 1, 2, 3)
    worker.sink.gate.set()
    assert latch.wait(10)
    assert [delivery.outcome for delivery in queued[0]] == [Outcome.UNSETTLED] * 3
    assert worker.sink.calls == [keys(1000)]


def test_what_waits_for_a_repetition_when_the_breaker_opens_is_not_hammered(bench):
    worker = bench.worker(MemorySink(), breaker_failures=2)
    worker.sink.fail_always(TransientError("down"))
    first, latch = bench.send(worker, 1, deadline_in_secs=10)
    until(lambda: worker._delayed)
    assert bench.deliver(worker, 2, deadline_in_secs=10) == [Outcome.ERRORED]
    assert latch.wait(10)
    assert first[0].outcome in (Outcome.UNSETTLED, Outcome.ERRORED)
    assert len(worker.sink.calls) <= 3


def test_a_failure_that_repeats_is_one_line_not_many(bench, lines):
    worker = bench.worker(MemorySink())
    worker.sink.fail_always(TransientError("down"))
    for number in range(20):
        bench.deliver(worker, number)
    assert len(named(lines, "delivery.failed")) == 1
