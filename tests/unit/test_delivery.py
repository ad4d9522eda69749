import threading
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import FakeClock, MemoryLedger, MemorySink, Sent, event, named, send
from tests.polling import until
from vodpoller.backoff import Backoff
from vodpoller.clock import timestamp
from vodpoller.delivery.breaker import Breaker
from vodpoller.delivery.in_flight import Delivery, InFlight
from vodpoller.delivery.worker import Worker
from vodpoller.errors import PartialFailureError, RejectedError, SkippedError, TransientError
from vodpoller.liveness import Liveness
from vodpoller.settlement import Outcome, Reason
from vodpoller.telemetry import Telemetry

# --- backoff ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 20_000))
def test_a_wait_lies_between_half_of_the_exponential_and_all_of_it(attempt):
    full_secs = min(2.0 * 2 ** min(attempt - 1, 20), 60.0)
    assert full_secs / 2 <= Backoff(first_secs=2.0, max_secs=60.0).secs(attempt) <= full_secs


def test_waits_after_failures_at_the_same_time_differ():
    backoff = Backoff(first_secs=10.0, max_secs=60.0)
    assert len({backoff.secs(1) for _ in range(20)}) > 10


# --- breaker ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def breaker(clock):
    return Breaker(failures=3, monotonic=clock)


def opened(breaker):
    for key in (b"1", b"2", b"3"):
        breaker.failed(key)
    assert breaker.open
    return breaker


def test_one_event_that_keeps_failing_does_not_open_the_breaker(breaker):
    assert {breaker.failed(b"poison") for _ in range(20)} == {False}
    assert not breaker.open


def test_enough_distinct_events_open_the_breaker(breaker):
    assert [breaker.failed(key) for key in (b"1", b"2", b"2", b"3")] == [False, False, False, True]


def test_a_success_between_failures_restarts_the_count(breaker):
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


def test_an_open_breaker_probes_one_event_at_a_time(breaker, clock):
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


def test_pauses_between_probes_grow_to_at_most_half_a_minute(breaker, clock):
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


def test_the_last_probed_event_is_known_for_a_while(breaker, clock):
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


def test_a_success_closes_the_breaker_and_is_reported_once(breaker, clock):
    opened(breaker)
    clock.advance(1.0)
    breaker.start_probe(b"4")
    assert breaker.succeeded() is True
    assert not breaker.open
    assert breaker.succeeded() is False


# --- worker -----------------------------------------------------------------------------------------------------------


class Bench:
    """Makes workers with what they need; `close` stops them and checks that their threads end."""

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
            telemetry=Telemetry(self.log),
            liveness=self.liveness,
            **more,
        )
        self.workers.append(worker)
        worker.start()
        return worker

    def send(self, worker, *numbers, **more):
        return send(worker, self.in_flight, [event(number) for number in numbers], **more)

    def deliver(self, worker, *numbers, **more):
        """Send, wait, and return the reasons of the results."""
        deliveries, sent = self.send(worker, *numbers, **more)
        assert sent.wait(10)
        return reasons(deliveries)

    def close(self):
        for worker in self.workers:
            worker.sink.gate.set()
            worker.stop()
            assert worker.join(10)


def reasons(deliveries):
    return [delivery.result and delivery.result.reason for delivery in deliveries]


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


def test_a_full_queue_refuses_further_events_at_once(bench):
    worker = bench.worker(MemorySink(), queue_max_events=2)
    held, _ = hold_first(bench, worker)
    deliveries, _ = bench.send(worker, 1, 2, 3, 4)
    assert reasons(deliveries) == [None, None, Reason.QUEUE_FULL, Reason.QUEUE_FULL]
    worker.sink.gate.set()
    until(lambda: set(reasons([*held, *deliveries[:2]])) == {Reason.DELIVERED})


def test_one_rejected_event_of_a_batch_affects_no_other(bench):
    worker = bench.worker(MemorySink(batch_events=10))
    hold_first(bench, worker)
    deliveries, sent = bench.send(worker, 1, 2, 3, 4)
    worker.sink.behaviour = rejecting(2)
    worker.sink.gate.set()
    assert sent.wait(10)
    delivered, rejected = Reason.DELIVERED, Reason.REJECTED
    assert reasons(deliveries) == [delivered, rejected, delivered, delivered]
    assert worker.sink.calls[1:] == [keys(1, 2, 3, 4), keys(1), keys(2), keys(3), keys(4)]


def test_a_batch_that_failed_is_one_failure_to_the_breaker(bench):
    worker = bench.worker(MemorySink(batch_events=10), breaker_failures=2)
    hold_first(bench, worker)
    deliveries, sent = bench.send(worker, 1, 2, 3, 4)
    worker.sink.fail_with(None, TransientError("the disk is full"))
    worker.sink.gate.set()
    assert sent.wait(10)
    assert set(reasons(deliveries)) == {Reason.SINK_FAILED}
    assert not worker.is_open


def test_events_of_a_failed_batch_are_repeated_one_by_one(bench):
    worker = bench.worker(MemorySink(batch_events=10))
    hold_first(bench, worker)
    _, sent = bench.send(worker, 1, 2, deadline_in_secs=10)
    worker.sink.fail_with(None, TransientError("once"))
    worker.sink.gate.set()
    assert sent.wait(10)
    assert worker.sink.calls[1] == keys(1, 2)
    assert sorted(worker.sink.calls[2:]) == sorted([keys(1), keys(2)])


def test_a_partial_failure_applies_to_the_events_it_names(bench):
    worker = bench.worker(MemorySink(batch_events=10))
    hold_first(bench, worker)
    deliveries, sent = bench.send(worker, 1, 2, 3)
    worker.sink.fail_with(None, PartialFailureError({0: RejectedError("no"), 2: TransientError("later")}))
    worker.sink.gate.set()
    assert sent.wait(10)
    assert reasons(deliveries) == [Reason.REJECTED, Reason.DELIVERED, Reason.SINK_FAILED]
    assert bench.ledger.accepted[1:] == [("it", event(2).key)]


@pytest.mark.parametrize("failures", [{7: TransientError("x")}, {-1: TransientError("x")}, {}])
def test_a_partial_failure_without_a_valid_event_accepts_nothing(bench, failures):
    worker = bench.worker(MemorySink())
    worker.sink.fail_with(PartialFailureError(failures))
    assert bench.deliver(worker, 1) == [Reason.SINK_FAILED]
    assert bench.ledger.accepted == []


@pytest.mark.parametrize("error", [TypeError("a bug"), MemoryError()])
def test_an_unforeseen_error_is_transient_and_the_worker_goes_on(bench, lines, error):
    worker = bench.worker(MemorySink())
    worker.sink.fail_with(error)
    assert bench.deliver(worker, 1) == [Reason.SINK_FAILED]
    assert bench.deliver(worker, 1) == [Reason.DELIVERED]
    assert named(lines, "delivery.failed")[0]["exc_info"] is error


def test_a_sink_that_calls_sys_exit_fails_one_call(bench, lines):
    worker = bench.worker(MemorySink())
    worker.sink.fail_with(SystemExit(3))
    assert bench.deliver(worker, 1) == [Reason.SINK_FAILED]
    assert bench.deliver(worker, 1) == [Reason.DELIVERED]
    assert "sys.exit(3)" in named(lines, "delivery.failed")[0]["error_message"]


def test_an_error_in_the_ledger_does_not_end_the_worker(bench, lines, monkeypatch):
    def broken(*args):
        raise RuntimeError("a bug")

    worker = bench.worker(MemorySink())
    with monkeypatch.context() as patched:
        patched.setattr(bench.ledger, "accept", broken)
        assert bench.deliver(worker, 1) == [Reason.SINK_FAILED]
    assert bench.deliver(worker, 2) == [Reason.DELIVERED]
    assert named(lines, "worker.failed")


def test_a_sink_that_hangs_holds_only_its_own_thread(bench):
    slow, fast = bench.worker(MemorySink(), name="slow"), bench.worker(MemorySink(), name="fast")
    hold_first(bench, slow)
    assert bench.deliver(fast, 1, 2) == [Reason.DELIVERED] * 2
    assert slow.sink.accepted == []
    assert "sink slow" in bench.liveness.overdue(-10)
    until(lambda: "sink fast" not in bench.liveness.overdue(-10))


def test_an_attempt_is_repeated_within_the_deadline(bench):
    worker = bench.worker(MemorySink())
    worker.sink.fail_with(TransientError("once"))
    deliveries, sent = bench.send(worker, 1, deadline_in_secs=10)
    assert sent.wait(10)
    assert reasons(deliveries)[0] is Reason.DELIVERED
    assert deliveries[0].attempts == 1
    assert worker.sink.calls == [keys(1), keys(1)]


@pytest.mark.system
def test_retry_after_is_honoured(bench):
    worker = bench.worker(MemorySink())
    worker.sink.fail_with(TransientError("busy", retry_after_secs=0.9))
    assert bench.deliver(worker, 1, deadline_in_secs=10) == [Reason.DELIVERED]
    first, second = worker.sink.called_at
    assert 0.85 <= second - first < 5


@pytest.mark.parametrize("deadline_in_secs", [None, -1.0, 0.1, 5.0])
def test_no_attempt_is_repeated_beyond_the_deadline(bench, deadline_in_secs):
    worker = bench.worker(MemorySink())
    worker.sink.fail_always(TransientError("busy", retry_after_secs=6.0))
    started = time.monotonic()
    assert bench.deliver(worker, 1, deadline_in_secs=deadline_in_secs) == [Reason.SINK_FAILED]
    assert time.monotonic() - started < 3
    assert len(worker.sink.calls) == 1


def test_a_rejection_is_not_repeated(bench):
    worker = bench.worker(MemorySink())
    worker.sink.fail_always(RejectedError("no"))
    assert bench.deliver(worker, 1, deadline_in_secs=10) == [Reason.REJECTED]
    assert len(worker.sink.calls) == 1


def test_the_sinks_concurrency_limits_calls_at_the_same_time(bench):
    worker = bench.worker(MemorySink(concurrency=3))
    worker.sink.gate.clear()
    _, sent = bench.send(worker, *range(9))
    until(lambda: worker.sink.running == 3)
    assert sent.wait(0.05) is False
    worker.sink.gate.set()
    assert sent.wait(10)
    assert worker.sink.most_running == 3
    assert sorted(worker.sink.accepted) == sorted(keys(*range(9)))


def test_threads_start_only_when_they_are_needed(bench):
    worker = bench.worker(MemorySink(concurrency=96))
    bench.deliver(worker, 1)
    assert sum(thread.name.startswith(f"sink-{worker.name}-") for thread in threading.enumerate()) == 1


def test_if_no_more_threads_start_the_existing_ones_do_the_work(bench, monkeypatch):
    worker = bench.worker(MemorySink(concurrency=8))

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        deliveries, sent = bench.send(worker, *range(5))
    assert sent.wait(10)
    assert set(reasons(deliveries)) == {Reason.DELIVERED}


def test_the_ledger_is_written_before_the_result_is_set(bench):
    worker = bench.worker(MemorySink())
    results_at_accept = []
    hold_first(bench, worker, first=1)
    deliveries, sent = bench.send(worker, 1)
    bench.ledger.at_accept = lambda: results_at_accept.append(deliveries[0].result)
    worker.sink.gate.set()
    assert sent.wait(10)
    assert bench.ledger.accepted == [("it", event(1).key)]
    assert results_at_accept == [None]


def test_an_event_released_in_the_queue_never_reaches_the_sink(bench):
    worker = bench.worker(MemorySink())
    hold_first(bench, worker)
    _, sent = bench.send(worker, 1)
    sent.leave()
    worker.sink.gate.set()
    assert bench.deliver(worker, 2) == [Reason.DELIVERED]
    assert worker.sink.accepted == keys(1000, 2)


def test_a_running_delivery_is_joined_and_its_success_is_recorded(bench):
    worker = bench.worker(MemorySink())
    first, sent = hold_first(bench, worker)
    sent.leave()
    again, second = bench.send(worker, 1000)
    assert again == first
    worker.sink.gate.set()
    assert second.wait(10)
    assert worker.sink.calls == [keys(1000)]
    assert bench.ledger.accepted == [("it", event(1000).key)]


def test_a_worker_that_is_stopped_takes_no_more_events(bench):
    worker = bench.worker(MemorySink())
    hold_first(bench, worker)
    queued, _ = bench.send(worker, 1)
    worker.stop()
    assert worker.join(0.02) is False
    assert bench.deliver(worker, 2) == [Reason.STOPPING]
    worker.sink.gate.set()
    assert worker.join(10) is True
    assert queued[0].result is None
    assert worker.sink.accepted == keys(1000)


def test_a_worker_that_is_stopped_repeats_nothing(bench):
    worker = bench.worker(MemorySink())
    deliveries, sent = hold_first(bench, worker, deadline_in_secs=10)
    worker.sink.fail_always(TransientError("x"))
    worker.stop()
    worker.sink.gate.set()
    assert sent.wait(10)
    assert reasons(deliveries)[0] is Reason.SINK_FAILED


@pytest.mark.parametrize(("queue_max_events", "room"), [(10, 4), (3, 0)])
def test_half_of_the_queue_is_kept_for_fresh_events(bench, queue_max_events, room):
    worker = bench.worker(MemorySink(), queue_max_events=queue_max_events)
    hold_first(bench, worker)
    bench.send(worker, 1)
    assert worker.room() == room


# --- the worker's breaker ---------------------------------------------------------------------------------------------


@pytest.fixture
def opened_worker(bench):
    """A worker on a fake clock whose breaker was opened by three events."""
    clock = FakeClock()
    worker = bench.worker(MemorySink(), breaker_failures=3, monotonic=clock)
    worker.clock = clock
    worker.sink.fail_always(TransientError("down"))
    for number in (1, 2, 3):
        assert bench.deliver(worker, number) == [Reason.SINK_FAILED]
    assert worker.is_open
    worker.sink.calls.clear()
    return worker


def test_an_open_breaker_holds_events_back_and_is_logged_once(bench, lines, opened_worker):
    assert bench.deliver(opened_worker, *range(10, 30)) == [Reason.SINK_DOWN] * 20
    assert opened_worker.sink.calls == []
    assert opened_worker.room() == 0
    assert len(named(lines, "breaker.opened")) == 1


def test_one_event_at_a_time_probes_an_open_breaker(bench, opened_worker):
    opened_worker.clock.advance(1.0)
    assert opened_worker.room() == 1
    opened_worker.sink.gate.clear()
    probe, sent = bench.send(opened_worker, 4)
    until(lambda: opened_worker.sink.running)
    assert bench.deliver(opened_worker, 5, 6) == [Reason.SINK_DOWN] * 2
    assert opened_worker.room() == 0
    opened_worker.sink.gate.set()
    assert sent.wait(10)
    assert reasons(probe)[0] is Reason.SINK_FAILED
    assert opened_worker.sink.calls == [keys(4)]


def test_the_next_probe_is_another_event(bench, opened_worker):
    opened_worker.clock.advance(1.0)
    bench.deliver(opened_worker, 4)
    opened_worker.clock.advance(2.0)
    assert bench.deliver(opened_worker, 4) == [Reason.SINK_DOWN]
    assert bench.deliver(opened_worker, 5) == [Reason.SINK_FAILED]
    assert opened_worker.sink.calls == [keys(4), keys(5)]


def test_a_single_event_is_probed_again_after_a_while(bench, opened_worker):
    opened_worker.clock.advance(1.0)
    bench.deliver(opened_worker, 4)
    opened_worker.clock.advance(30.0)
    assert bench.deliver(opened_worker, 4) == [Reason.SINK_FAILED]


def test_a_rejection_while_the_breaker_is_open_is_a_failure(bench, opened_worker):
    opened_worker.sink.fail_always(RejectedError("404 to everything"))
    opened_worker.clock.advance(1.0)
    assert bench.deliver(opened_worker, 4) == [Reason.SINK_FAILED]


def test_a_success_closes_the_breaker(bench, lines, opened_worker):
    opened_worker.sink.behaviour = lambda events: None
    opened_worker.clock.advance(1.0)
    assert bench.deliver(opened_worker, 4) == [Reason.DELIVERED]
    assert not opened_worker.is_open
    assert bench.deliver(opened_worker, 5, 6) == [Reason.DELIVERED] * 2
    assert len(named(lines, "breaker.closed")) == 1


def test_rejections_of_distinct_events_open_the_breaker(bench):
    worker = bench.worker(MemorySink(), breaker_failures=3)
    worker.sink.fail_always(RejectedError("404 to everything"))
    found = [bench.deliver(worker, number)[0] for number in range(6)]
    assert found == [Reason.REJECTED] * 3 + [Reason.SINK_DOWN] * 3


def test_queued_events_are_not_attempted_when_the_breaker_opens(bench):
    worker = bench.worker(MemorySink(), breaker_failures=1)
    worker.sink.fail_always(TransientError("down"))
    hold_first(bench, worker)
    queued, sent = bench.send(worker, 1, 2, 3)
    worker.sink.gate.set()
    assert sent.wait(10)
    assert reasons(queued) == [Reason.SINK_DOWN] * 3
    assert worker.sink.calls == [keys(1000)]


def test_a_breaker_that_opens_also_ends_repetitions(bench):
    worker = bench.worker(MemorySink(), breaker_failures=2)
    worker.sink.fail_always(TransientError("down"))
    first, sent = bench.send(worker, 1, deadline_in_secs=10)
    until(lambda: worker.sink.calls and worker.status().queued)
    assert bench.deliver(worker, 2, deadline_in_secs=10) == [Reason.SINK_FAILED]
    assert sent.wait(10)
    assert reasons(first)[0] in (Reason.SINK_DOWN, Reason.SINK_FAILED)
    assert len(worker.sink.calls) <= 3


def test_a_repeated_failure_is_one_log_line(bench, lines):
    worker = bench.worker(MemorySink())
    worker.sink.fail_always(TransientError("down"))
    for number in range(20):
        bench.deliver(worker, number)
    assert len(named(lines, "delivery.failed")) == 1


# --- the receiver's pause ---------------------------------------------------------------------------------------------


@pytest.fixture
def paused(bench):
    """A worker on a fake clock whose receiver asked for a pause of ten minutes."""
    clock = FakeClock()
    worker = bench.worker(MemorySink(concurrency=2), breaker_failures=2, monotonic=clock, wall=clock)
    worker.clock = clock
    worker.sink.fail_always(TransientError("429 Too Many Requests", retry_after_secs=600.0))
    assert bench.deliver(worker, 1) == [Reason.SINK_FAILED]
    worker.sink.behaviour = lambda events: None
    worker.sink.calls.clear()
    return worker


def test_an_overloaded_receiver_gets_nothing_during_its_pause(bench, paused):
    for number in range(10, 25):
        assert bench.deliver(paused, number) == [Reason.SINK_PAUSED]
        paused.clock.advance(30.0)
    assert paused.sink.calls == []
    assert paused.room() == 0
    paused.clock.advance(150.0)
    assert bench.deliver(paused, 2) == [Reason.DELIVERED]


@pytest.mark.parametrize("wait_secs", [600.0, 7.5])
def test_the_result_of_a_paused_event_names_the_end_of_the_pause(bench, wait_secs):
    clock = FakeClock(1_800_000_000.0)
    worker = bench.worker(MemorySink(), monotonic=clock, wall=clock)
    worker.sink.fail_always(TransientError("503 Service Unavailable", retry_after_secs=wait_secs))
    bench.deliver(worker, 1)
    (delivery,), sent = bench.send(worker, 2)
    assert sent.wait(10)
    assert delivery.result.retry_after_secs == wait_secs
    assert "503 Service Unavailable" in delivery.result.why
    assert f"until {timestamp(clock() + wait_secs)}" in delivery.result.why
    assert worker.status().paused_until == clock() + wait_secs


def test_a_probe_waits_for_the_end_of_a_pause_too(bench, paused):
    paused.sink.fail_always(TransientError("busy", retry_after_secs=100.0))
    paused.clock.advance(601.0)
    assert bench.deliver(paused, 2) == [Reason.SINK_FAILED]
    assert paused.is_open
    paused.clock.advance(40.0)
    assert bench.deliver(paused, 3) == [Reason.SINK_PAUSED]
    paused.clock.advance(61.0)
    assert bench.deliver(paused, 4) == [Reason.SINK_FAILED]
    assert len(paused.sink.calls) == 2


@pytest.mark.system
def test_events_that_can_wait_for_a_pauses_end_stay_in_the_queue(bench):
    worker = bench.worker(MemorySink())
    worker.sink.fail_with(TransientError("busy", retry_after_secs=0.7))
    _, first = bench.send(worker, 1, deadline_in_secs=60)
    until(lambda: worker.status().paused_until)
    _, second = bench.send(worker, 2, deadline_in_secs=60)
    assert first.wait(10)
    assert second.wait(10)
    assert sorted(worker.sink.accepted) == sorted(keys(1, 2))
    assert worker.sink.called_at[1] - worker.sink.called_at[0] >= 0.69


def test_queued_events_that_cannot_wait_for_a_pauses_end_are_stored(bench):
    worker = bench.worker(MemorySink())
    worker.sink.fail_always(TransientError("busy", retry_after_secs=600.0))
    hold_first(bench, worker)
    queued, sent = bench.send(worker, 1, 2, deadline_in_secs=25)
    worker.sink.gate.set()
    assert sent.wait(10)
    assert reasons(queued) == [Reason.SINK_PAUSED] * 2
    assert len(worker.sink.calls) == 1


# --- a number of calls per minute -------------------------------------------------------------------------------------


class Robot:
    """A receiver that accepts 20 messages per minute; records by a fake clock when they arrive."""

    def __init__(self, bench):
        self.bench = bench
        self.clock = FakeClock()
        self.arrived_at = []
        self.claims = []  # kept, because a claim that ends releases its deliveries
        self.started_at = self.clock()

    def worker(self):
        sink = MemorySink(concurrency=4, max_per_minute=20)
        sink.behaviour = lambda events: self.arrived_at.append(self.clock())
        self.started_at = self.clock()
        return self.bench.worker(sink, queue_max_events=1000, monotonic=self.clock, wall=self.clock)

    def send(self, worker, *numbers, lease_secs=25.0):
        wanted = [Delivery(event(number), "it", deadline=self.clock() + lease_secs) for number in numbers]
        sent = Sent(self.bench.in_flight, wanted)
        self.claims.append(sent)
        worker.submit(sent.fresh)
        return sent


@pytest.fixture
def robot(bench):
    return Robot(bench)


def test_20_per_minute_are_never_exceeded_in_5_minutes_with_a_restart(bench, robot):
    worker, number, sent = robot.worker(), 0, []
    for second in range(1, 301):
        if second == 150:
            sent.clear()
            worker.stop()
            assert worker.join(10)
            bench.in_flight = InFlight()
            worker = robot.worker()
        robot.clock.advance(1.0)
        sent.extend(robot.send(worker, number, number + 1, lease_secs=10_000.0).deliveries)
        number += 2
        # The first arrives 4 s after the start (1 s, the time limit of a call, and 3 s), then one every 3 s.
        of_this_run = int(robot.clock() - robot.started_at - 1) // 3
        # A call's end counts for the limit, and the result is set after it: the clock must not advance before.
        until(lambda due=of_this_run: sum(delivery.result is not None for delivery in sent) == due)
    assert len(robot.arrived_at) == 99
    assert max(sum(at <= other < at + 60 for other in robot.arrived_at) for at in robot.arrived_at) == 20
    assert min(later - earlier for earlier, later in pairwise(robot.arrived_at)) == 3.0


def test_an_event_whose_turn_is_after_its_lease_is_stored_at_once(bench, robot):
    worker = robot.worker()
    sent = robot.send(worker, *range(20))
    refused = [delivery for delivery in sent.deliveries if delivery.result]
    assert reasons(refused) == [Reason.SINK_PAUSED] * 13  # 7 have their turn within 25 s: after 4, 7, … 22 s
    assert [delivery.event.key for delivery in refused] == keys(*range(7, 20))
    assert refused[0].result.retry_after_secs == 25.0
    assert f"it may be sent at {timestamp(robot.clock() + 25.0)} (max_per_minute = 20)" in refused[0].result.why
    assert worker.sink.calls == []


def test_a_released_event_takes_no_turn(bench, robot):
    worker = robot.worker()
    robot.send(worker, *range(7)).leave()
    sent = robot.send(worker, *range(10, 17))
    assert [delivery.result for delivery in sent.deliveries] == [None] * 7


def test_one_stored_event_at_a_time_is_queued_before_fresh_ones(bench, robot):
    worker = robot.worker()
    assert worker.room() == 1
    _, stored = bench.send(worker, 1)
    assert worker.room() == 0
    robot.send(worker, 2)
    robot.clock.advance(4.0)
    robot.send(worker, 3)
    assert stored.wait(10)
    assert worker.sink.accepted == keys(1)
    assert worker.room() == 1


def test_a_probe_waits_for_its_turn_like_any_other_call(bench, robot):
    worker = robot.worker()
    worker.sink.fail_always(TransientError("down"))
    for number in range(100):
        robot.clock.advance(4.0)
        assert robot.send(worker, number, lease_secs=0.1).wait(10)
    assert worker.is_open
    calls = len(worker.sink.calls)
    robot.clock.advance(2.0)
    probe = robot.send(worker, 200)
    assert worker.sink.calls[calls:] == []
    robot.clock.advance(2.0)
    robot.send(worker, 201)
    assert probe.wait(10)
    assert worker.sink.calls[calls:] == [keys(200)]


def test_a_receivers_pause_delays_all_turns(bench, robot):
    worker = robot.worker()
    worker.sink.fail_always(TransientError("45009", retry_after_secs=15.0))
    robot.clock.advance(4.0)
    sent = robot.send(worker, *range(7))
    until(lambda: worker.status().paused_until)
    until(lambda: sum(delivery.result is not None for delivery in sent.deliveries) == 2)
    assert reasons(sent.deliveries[-2:]) == [Reason.SINK_PAUSED] * 2


# --- examined by the sink before queueing -----------------------------------------------------------------------------


def test_a_rejection_before_sending_never_counts_for_the_breaker(bench, lines):
    worker = bench.worker(MemorySink(), breaker_failures=2)

    def reject(event):
        raise RejectedError("sinks.it.body: it cannot be evaluated")

    worker.sink.examined = reject
    deliveries, _ = bench.send(worker, *range(10))
    assert reasons(deliveries) == [Reason.REJECTED] * 10
    assert {delivery.result.outcome for delivery in deliveries} == {Outcome.REJECTED}
    assert "it cannot be evaluated" in deliveries[0].result.why
    assert not worker.is_open
    assert worker.sink.calls == []
    assert "it cannot be evaluated" in named(lines, "delivery.failed")[0]["error_message"]


def test_an_event_is_rejected_unsent_also_while_the_breaker_is_open(bench, opened_worker):
    opened_worker.clock.advance(1.0)

    def reject(event):
        raise RejectedError("sinks.it.body: it cannot be evaluated")

    opened_worker.sink.examined = reject
    assert bench.deliver(opened_worker, 4) == [Reason.REJECTED]
    assert opened_worker.is_open
    assert opened_worker.room() == 1  # for the probe, which was not sent


def test_an_unforeseen_error_in_examining_is_a_failure(bench, lines):
    worker = bench.worker(MemorySink(), breaker_failures=2)
    worker.sink.examined = lambda event: 1 / 0
    assert bench.deliver(worker, 1, 2, 3) == [Reason.SINK_FAILED] * 3
    assert not worker.is_open
    assert named(lines, "delivery.failed")[0]["exc_info"]


def test_a_skipped_event_counts_as_delivered_without_a_call(bench):
    worker = bench.worker(MemorySink(), queue_max_events=1)

    def skip(event):
        raise SkippedError("nothing to send")

    worker.sink.examined = skip
    deliveries, _ = bench.send(worker, *range(10))
    assert reasons(deliveries) == [Reason.SKIPPED] * 10
    assert {delivery.result.outcome for delivery in deliveries} == {Outcome.DELIVERED}
    assert bench.ledger.accepted == [("it", key) for key in keys(*range(10))]
    assert worker.sink.calls == []


def test_skipping_works_while_the_breaker_is_open_and_keeps_it_open(bench, opened_worker):
    def skip(event):
        raise SkippedError("nothing to send")

    opened_worker.sink.examined = skip
    assert bench.deliver(opened_worker, 4, 5) == [Reason.SKIPPED] * 2
    assert opened_worker.is_open


def test_a_skipped_event_takes_no_turn(bench, robot):
    worker = robot.worker()

    def skip_odd(it):
        if it.key in keys(*range(1, 14, 2)):
            raise SkippedError("nothing to send")

    worker.sink.examined = skip_odd
    sent = robot.send(worker, *range(14))
    assert reasons(sent.deliveries) == [None, Reason.SKIPPED] * 7


# --- a lack of memory, or a bug, leaves nothing claimed ---------------------------------------------------------------


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("a bug")])
def test_nothing_stays_in_flight_if_the_ledger_fails(bench, error):
    def broken():
        raise error

    worker = bench.worker(MemorySink(batch_events=4), breaker_failures=3)
    bench.ledger.at_accept = broken
    hold_first(bench, worker)
    deliveries, sent = bench.send(worker, 1, 2, 3)
    worker.sink.gate.set()
    assert sent.wait(10)
    assert reasons(deliveries) == [Reason.SINK_FAILED] * 3
    assert len(bench.in_flight) == 0
    bench.ledger.at_accept = lambda: None


def test_a_requeued_event_belongs_to_the_thread_that_takes_it(bench, monkeypatch):
    worker = bench.worker(MemorySink(concurrency=2, batch_events=2))
    hold_first(bench, worker)
    give_back, slow = worker._give_back, [True]  # noqa: SLF001 - these two steps have no public seam between them

    def late(taken):
        if slow and len(taken) == 2:  # the thread that had the batch waits until another has its events
            slow.clear()
            until(lambda: keys(1) in worker.sink.calls)
        give_back(taken)

    monkeypatch.setattr(worker, "_give_back", late)
    poison = rejecting(1)

    def behave(events):
        if len(events) == 2:
            raise RejectedError("one of them is poison")
        time.sleep(0.2)
        poison(events)

    worker.sink.behaviour = behave
    deliveries, sent = bench.send(worker, 1, 2)
    worker.sink.gate.set()
    assert sent.wait(10)
    assert reasons(deliveries) == [Reason.REJECTED, Reason.DELIVERED]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("a bug")])
def test_nothing_stays_in_flight_if_taking_it_fails(bench, monkeypatch, error):
    worker = bench.worker(MemorySink())
    start, failures = bench.in_flight.start, [error]

    def fail_once(deliveries):
        if failures:
            raise failures.pop()
        return start(deliveries)

    monkeypatch.setattr(bench.in_flight, "start", fail_once)
    assert bench.deliver(worker, 1) == [Reason.DELIVERED]
    assert failures == []
