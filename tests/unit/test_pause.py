import heapq

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import FakeClock
from vodpoller.delivery.pause import Pause, Spacing

CALL_SECS = 5.0


class Receiver:
    """Records when requests reach it, each at some moment of its call; a call begins as soon as it is allowed."""

    def __init__(self, max_per_minute, threads):
        self.max_per_minute = max_per_minute
        self.threads = threads
        self.clock = FakeClock()
        self.arrivals = []
        self.restart()

    def restart(self):
        """Start a new process: the running calls end with the old one."""
        self.ends = []
        self.spacing = Spacing(max_per_minute=self.max_per_minute, call_secs=CALL_SECS, monotonic=self.clock)

    def call(self, lasts, arrives, idle_secs):
        self._run_until(self.clock() + idle_secs)
        while (at := self.spacing.free_at()) > self.clock() or len(self.ends) >= self.threads:
            self._run_until(min([max(at, self.clock()), *self.ends[:1]]))
        self.spacing.begin()
        heapq.heappush(self.ends, self.clock() + lasts * CALL_SECS)
        self.arrivals.append(self.clock() + lasts * arrives * CALL_SECS)

    def _run_until(self, at):
        while self.ends and self.ends[0] <= at:
            self.clock.now = max(self.clock(), heapq.heappop(self.ends))
            self.spacing.end()
        self.clock.now = max(self.clock(), at)

    def maximum_in_a_minute(self):
        # Because of rounding, a distance of exactly 60 s may appear slightly shorter.
        return max(sum(at <= other < at + 60 - 1e-6 for other in self.arrivals) for at in self.arrivals)


fractions = st.floats(0, 1)
calls = st.tuples(
    fractions, fractions, st.sampled_from([0.0, 0.0, 0.0, 1.0, 30.0]), st.sampled_from([False] * 9 + [True])
)


@given(st.integers(1, 8), st.integers(1, 4), st.lists(calls, min_size=1, max_size=60))
def test_no_60_seconds_have_more_arrivals_than_max_per_minute(max_per_minute, threads, calls):
    receiver = Receiver(max_per_minute, threads)
    for lasts, arrives, idle_secs, restarts in calls:
        if restarts:
            receiver.restart()
        receiver.call(lasts, arrives, idle_secs)
    assert receiver.maximum_in_a_minute() <= max_per_minute


def test_short_calls_are_evenly_spaced():
    receiver = Receiver(20, 4)
    for _ in range(100):
        receiver.call(0.0, 0.0, 0.0)
    gaps = [later - earlier for earlier, later in zip(receiver.arrivals, receiver.arrivals[1:], strict=False)]
    assert gaps == pytest.approx([3.0] * 99)


def test_a_call_longer_than_a_minute_takes_only_one_slot():
    clock = FakeClock()
    spacing = Spacing(max_per_minute=2, call_secs=1.0, monotonic=clock)
    clock.advance(600.0)
    spacing.begin()
    begun = []
    for _ in range(600):
        if spacing.free_at() <= clock():
            spacing.begin()
            spacing.end()
            begun.append(clock())
        clock.advance(1.0)
    assert len(begun) == 10


def test_without_a_limit_no_call_is_delayed():
    pause = Pause(max_per_minute=None, call_secs=5.0, monotonic=FakeClock())
    pause.begin()
    pause.end()
    assert not pause.holds
    assert pause.room(1000) is None


@pytest.mark.parametrize("passed_secs", [0.0, 10.0], ids=["during it", "at its end"])
def test_a_wait_that_the_receiver_asked_for_is_named(passed_secs):
    clock = FakeClock()
    pause = Pause(max_per_minute=None, call_secs=5.0, monotonic=clock)
    pause.ask(10.0)
    clock.advance(passed_secs)
    assert (
        pause.why("503 Service Unavailable", "noon") == "the receiver asked to wait until noon: 503 Service Unavailable"
    )


@pytest.mark.parametrize(
    ("asked_secs", "words"),
    [(3600.0, "the receiver asked to wait"), (1.0, "max_per_minute = 20")],
    ids=["asked", "limit"],
)
def test_of_two_reasons_to_wait_the_longer_one_is_named(asked_secs, words):
    pause = Pause(max_per_minute=20, call_secs=5.0, monotonic=FakeClock())
    pause.ask(asked_secs)
    assert words in pause.why("429 Too Many Requests", "noon")
