"""The periodic tasks end at a stop, since a reload closes the journal that they use."""

import threading

import pytest

from tests.helpers import log_into
from tests.polling import until
from vodpoller.errors import OperatorError
from vodpoller.telemetry import Gauge, Telemetry
from vodpoller.upkeep import Upkeep


class StubJournal:
    """Counts its flushes; each of them waits for the gate."""

    def __init__(self):
        self.flushes = 0
        self.gate = threading.Event()

    def flush(self):
        self.flushes += 1
        self.gate.wait(30)

    def prune(self, share):
        pass

    def stored(self):
        return []

    def dead_letters(self):
        return {}

    def stored_bytes(self):
        return 0


class StubRetrier:
    def run(self, most_secs):
        return False

    def stop_claiming(self):
        pass


@pytest.fixture
def journal():
    return StubJournal()


@pytest.fixture
def telemetry():
    return Telemetry(log_into([]))


@pytest.fixture
def vod():
    """Answers with a number of waiting events as soon as its gate is open."""
    return SlowVod()


class SlowVod:
    def __init__(self):
        self.gate = threading.Event()
        self.asked = 0
        self.mode_answer = "PULL"

    def mode(self):
        if self.mode_answer is None:
            raise OperatorError("not allowed")
        return self.mode_answer

    def waiting(self):
        self.asked += 1
        self.gate.wait(30)
        return 7


@pytest.fixture
def upkeep(journal, telemetry, vod):
    running = Upkeep(
        journal=journal,
        retrier=StubRetrier(),
        pollers={},
        sinks=[],
        telemetry=telemetry,
        wall=lambda: 0.0,
        queues={"main": vod.waiting, "other": vod.waiting},
        modes={"main": vod.mode, "other": lambda: "PULL"},
    )
    running.start()
    yield running
    journal.gate.set()
    vod.gate.set()
    running.stop()


def own_threads():
    return {thread for thread in threading.enumerate() if "APScheduler" in thread.name or "ThreadPool" in thread.name}


def test_a_stop_waits_for_a_running_task(upkeep, journal):
    until(lambda: journal.flushes)
    upkeep.stop()
    assert not upkeep.join(0.05)
    journal.gate.set()
    assert upkeep.join(30)


def test_a_slow_query_to_vod_does_not_delay_a_stop(upkeep, journal, telemetry, vod):
    journal.gate.set()
    until(lambda: vod.asked)
    upkeep.stop()
    assert upkeep.join(30)
    assert not vod.gate.is_set()
    vod.gate.set()
    until(lambda: not own_threads())
    assert vod.asked == 1
    assert telemetry.gauge(Gauge.QUEUE_EVENTS) == {}


def test_sources_whose_events_are_pushed_are_known(upkeep, journal, vod):
    journal.gate.set()
    vod.gate.set()
    assert list(upkeep.pushed) == []
    cannot_ask = None  # the key lacks the right
    for vod.mode_answer, known in (("PUSH", ["main"]), ("PULL", []), ("PUSH", ["main"]), (cannot_ask, [])):
        # A running task is not started a second time, so the tasks are started until the result is there.
        until(lambda known=known: (upkeep.run_all_now(), list(upkeep.pushed))[1] == known)


def test_the_threads_end_at_a_stop(upkeep, journal, vod):
    journal.gate.set()
    vod.gate.set()
    until(lambda: journal.flushes)
    own = own_threads()
    assert own
    upkeep.stop()
    until(lambda: not any(thread.is_alive() for thread in own))
