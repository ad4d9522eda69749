import threading
import time

import pytest

from tests.helpers import event
from tests.polling import until
from vodpoller.delivery.in_flight import Delivery, DeliveryWait, InFlight, State, WaitEnd
from vodpoller.settlement import DELIVERED, Outcome, Reason, SinkResult

FAILED = SinkResult(outcome=Outcome.FAILED, reason=Reason.SINK_FAILED, why="late")

# --- waiting ----------------------------------------------------------------------------------------------------------


def in_thread(task):
    """Run `task` in a thread; return a function that waits for its result."""
    results = []
    thread = threading.Thread(target=lambda: results.append(task()), daemon=True)
    thread.start()

    def result():
        thread.join(10)
        assert not thread.is_alive()
        return results[0]

    return result


def test_a_wait_whose_time_is_over_ends_out_of_time():
    wait = DeliveryWait(min_wait_secs=0.01)
    wait.add(1)
    assert wait.wait(0.03) is WaitEnd.OUT_OF_TIME


@pytest.mark.parametrize("timeout_secs", [0, -5.0])
def test_a_wait_without_time_left_does_not_wait(timeout_secs):
    wait = DeliveryWait(min_wait_secs=60)
    wait.add(1)
    started = time.monotonic()
    assert wait.wait(timeout_secs) is WaitEnd.OUT_OF_TIME
    assert time.monotonic() - started < 1


def test_a_wait_ends_when_the_last_delivery_is_complete_not_before():
    wait = DeliveryWait()
    wait.add(2)
    result = in_thread(lambda: wait.wait(10))
    wait.count_down()
    assert wait.wait(0.02) is WaitEnd.OUT_OF_TIME
    wait.count_down()
    assert result() is WaitEnd.COMPLETE


def test_a_wait_for_nothing_is_complete():
    assert DeliveryWait().wait(10) is WaitEnd.COMPLETE


def test_a_delivery_that_is_complete_before_the_wait_counts():
    wait = DeliveryWait()
    wait.add(1)
    wait.count_down()
    assert wait.wait(10) is WaitEnd.COMPLETE


def test_an_interruption_before_the_minimum_does_not_end_a_wait():
    wait = DeliveryWait(min_wait_secs=60)
    wait.add(1)
    result = in_thread(lambda: wait.wait(10))
    until(lambda: wait.is_waiting)
    assert wait.interrupt() is False
    assert wait.interrupt(stopping=True) is True
    assert result() is WaitEnd.STOPPING


def test_an_interruption_after_the_minimum_ends_a_wait_once():
    wait = DeliveryWait(min_wait_secs=0.01)
    wait.add(1)
    result = in_thread(lambda: wait.wait(10))
    until(wait.interrupt)
    assert result() is WaitEnd.NEEDED
    assert wait.interrupt() is False


def test_a_wait_that_has_not_begun_is_interrupted_by_a_stop_only():
    wait = DeliveryWait(min_wait_secs=0)
    wait.add(1)
    assert wait.interrupt() is False


def test_a_complete_wait_is_not_interrupted():
    wait = DeliveryWait(min_wait_secs=0)
    wait.add(1)
    wait.count_down()
    assert wait.interrupt() is False
    wait.interrupt(stopping=True)
    assert wait.wait(10) is WaitEnd.COMPLETE


def test_a_stop_that_comes_before_the_wait_ends_it_at_once():
    wait = DeliveryWait(min_wait_secs=60)
    assert wait.interrupt(stopping=True) is True
    wait.add(1)
    assert wait.wait(30) is WaitEnd.STOPPING


def test_a_wait_that_is_over_is_not_interrupted_any_more():
    wait = DeliveryWait(min_wait_secs=0)
    wait.add(1)
    assert wait.wait(0) is WaitEnd.OUT_OF_TIME
    assert wait.interrupt() is False


def test_a_thread_that_is_needed_elsewhere_waits_the_minimum_only():
    wait = DeliveryWait(min_wait_secs=0.02, should_yield=lambda: True)
    wait.add(1)
    started = time.monotonic()
    assert wait.wait(30) is WaitEnd.NEEDED
    assert time.monotonic() - started < 5


# --- in flight --------------------------------------------------------------------------------------------------------


def make(number=0, sink="it", **more):
    return Delivery(event(number), sink, deadline=None, **more)


def deliveries(claims):
    return [claim.delivery for claim in claims]


def is_complete(wait):
    return wait.wait(0) is WaitEnd.COMPLETE


def test_a_pair_in_flight_is_joined():
    in_flight, wait, other = InFlight(), DeliveryWait(), DeliveryWait()
    first = make()
    with in_flight.claim([first], wait), in_flight.claim([make()], other) as claims:
        assert [(claim.delivery, claim.joined) for claim in claims] == [(first, True)]
        in_flight.complete([first], DELIVERED)
        assert is_complete(wait)
        assert is_complete(other)
        assert len(in_flight) == 0


def test_the_same_event_at_another_sink_is_another_pair():
    in_flight = InFlight()
    wanted = [make(0, "a"), make(0, "b")]
    with in_flight.claim(wanted, None) as claims:
        assert [(claim.delivery, claim.joined) for claim in claims] == [(wanted[0], False), (wanted[1], False)]


def test_a_pair_twice_in_one_claim_is_one_delivery_that_ends_the_wait():
    in_flight, wait = InFlight(), DeliveryWait()
    first, second = make(), make()
    with in_flight.claim([first, second], wait) as claims:
        assert deliveries(claims) == [first, first]
        assert not is_complete(wait)
        in_flight.complete([first], DELIVERED)
        assert is_complete(wait)


def test_the_first_result_counts_and_is_reported_once():
    in_flight, reported = InFlight(), []
    delivery = make(on_complete=lambda _delivery, result: reported.append(result))
    with in_flight.claim([delivery], None):
        in_flight.complete([delivery], DELIVERED)
        in_flight.complete([delivery], FAILED)
    assert delivery.result is DELIVERED
    assert reported == [DELIVERED]


def test_a_complete_pair_can_be_claimed_again():
    in_flight, first, second = InFlight(), make(), make()
    with in_flight.claim([first], None):
        in_flight.complete([first], FAILED)
        with in_flight.claim([second], None) as claims:
            assert [(claim.delivery, claim.joined) for claim in claims] == [(second, False)]


def test_a_delivery_queued_when_its_claim_ends_never_starts():
    in_flight, delivery = InFlight(), make()
    with in_flight.claim([delivery], DeliveryWait()):
        in_flight.queued([delivery])
    assert in_flight.start([delivery]) == []
    assert delivery.result is None
    assert len(in_flight) == 0


@pytest.mark.parametrize("error", [RuntimeError("a bug"), MemoryError(), KeyboardInterrupt()])
@pytest.mark.parametrize("wait", [None, DeliveryWait()])
def test_any_error_in_a_claim_releases_what_was_not_submitted(wait, error):
    in_flight = InFlight()
    with pytest.raises(type(error)), in_flight.claim([make(1), make(2)], wait):
        raise error
    assert len(in_flight) == 0


@pytest.mark.parametrize("more", [{}, {"on_complete": print}])
def test_a_wait_ends_if_the_delivery_it_joins_is_never_submitted(more):
    in_flight, wait = InFlight(), DeliveryWait()
    outer = in_flight.claim([make(1, **more)], None if more else DeliveryWait())
    outer.__enter__()
    with in_flight.claim([make(1)], wait) as claims:
        assert claims[0].joined
        outer.__exit__(None, None, None)
        assert is_complete(wait)
    assert claims[0].delivery.result is None
    assert len(in_flight) == 0


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_error_in_the_middle_of_claiming_leaves_nothing_claimed(at):
    def wanted():
        for number in range(3):
            if number == at:
                raise MemoryError
            yield make(number)

    in_flight = InFlight()
    with pytest.raises(MemoryError), in_flight.claim(wanted(), DeliveryWait()):
        pass
    assert len(in_flight) == 0


def test_a_submitted_delivery_without_a_wait_stays_with_the_worker():
    in_flight, reported = InFlight(), []
    submitted, not_submitted = (make(number, on_complete=lambda it, _: reported.append(it)) for number in (1, 2))
    with in_flight.claim([submitted, not_submitted], None):
        in_flight.queued([submitted])
    with in_flight.claim([make(1)], DeliveryWait()):  # another claim joins it and ends
        pass
    assert in_flight.start([submitted, not_submitted]) == [submitted]
    in_flight.complete([submitted], DELIVERED)
    assert reported == [submitted]


def test_a_delivery_with_a_callback_is_in_flight_until_forgotten():
    in_flight, reported, wait = InFlight(), [], DeliveryWait()
    delivery = make(on_complete=lambda _delivery, result: reported.append(result))
    with in_flight.claim([delivery], None), in_flight.claim([make()], wait) as claims:
        assert claims[0].joined
        in_flight.complete([delivery], DELIVERED)
        assert reported == [DELIVERED]
        assert not is_complete(wait)
        assert len(in_flight) == 1
        in_flight.forget([delivery])
        assert is_complete(wait)
    assert len(in_flight) == 0


@pytest.mark.parametrize("error", [RuntimeError("a bug"), MemoryError()])
def test_a_failing_callback_affects_no_other_and_leaves_no_delivery(error):
    def broken(_delivery, _result):
        raise error

    in_flight, reported, wait = InFlight(), [], DeliveryWait()
    wanted = [make(1, on_complete=broken), make(2, on_complete=lambda *_: reported.append(2))]
    with in_flight.claim(wanted, wait):
        with pytest.raises(type(error)):
            in_flight.complete(wanted, DELIVERED)
        assert reported == [2]
        in_flight.forget(wanted[1:])
        assert is_complete(wait)
        assert len(in_flight) == 0


def test_a_running_delivery_outlives_its_claim_and_gets_its_result():
    in_flight, delivery = InFlight(), make()
    with in_flight.claim([delivery], DeliveryWait()):
        assert in_flight.start([delivery]) == [delivery]
    assert delivery.state is State.RUNNING
    with in_flight.claim([make()], DeliveryWait()) as claims:
        assert deliveries(claims) == [delivery]
    in_flight.complete([delivery], DELIVERED)
    assert delivery.result is DELIVERED
    assert len(in_flight) == 0


def test_a_delivery_that_another_caller_waits_for_is_kept():
    in_flight, other, delivery = InFlight(), DeliveryWait(), make()
    with in_flight.claim([delivery, make()], DeliveryWait()) as first, in_flight.claim([make()], other):
        in_flight.queued(deliveries(first))
    assert len(in_flight) == 0
    delivery, other = make(), DeliveryWait()
    outer = in_flight.claim([delivery], DeliveryWait())
    outer.__enter__()
    in_flight.queued([delivery])
    with in_flight.claim([make()], other):
        outer.__exit__(None, None, None)
        assert delivery.state is State.QUEUED
        in_flight.complete([delivery], DELIVERED)
        assert is_complete(other)


def test_claims_of_many_threads_never_run_a_pair_twice_at_once():
    in_flight, running, clashes = InFlight(), {}, []

    def puller(seed):
        for turn in range(150):
            wait, wanted = DeliveryWait(min_wait_secs=0), [make((seed + turn) % 3), make((seed * turn) % 3)]
            with in_flight.claim(wanted, wait) as claims:
                fresh = [claim.delivery for claim in claims if not claim.joined]
                for delivery in in_flight.start(fresh) if turn % 4 else []:
                    pair = delivery.event.key
                    if running.get(pair):
                        clashes.append(pair)
                    running[pair] = True
                    time.sleep(0)
                    running[pair] = False
                    in_flight.complete([delivery], DELIVERED)
                wait.wait(0.0005)
        return True

    results = [in_thread(lambda seed=seed: puller(seed)) for seed in range(4)]
    assert all(result() for result in results)
    assert clashes == []
    assert len(in_flight) == 0


# --- late calls -------------------------------------------------------------------------------------------------------


def test_forgetting_twice_does_not_end_the_pairs_next_delivery():
    in_flight = InFlight()
    first = Delivery(event=event(), sink="it", deadline=0.0)
    with in_flight.claim([first], None):
        in_flight.complete([first], DELIVERED)
    second = Delivery(event=event(), sink="it", deadline=0.0)
    with in_flight.claim([second], None):
        in_flight.forget([first])
        assert len(in_flight) == 1
    assert len(in_flight) == 0


def test_a_complete_delivery_is_not_queued_again():
    in_flight = InFlight()
    delivery = Delivery(event=event(), sink="it", deadline=0.0)
    with in_flight.claim([delivery], None):
        in_flight.complete([delivery], DELIVERED)
        in_flight.queued([delivery])
    assert in_flight.start([delivery]) == []
