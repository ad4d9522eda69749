"""What is periodic comes to an end: a reload closes the journal that its tasks use."""

import threading

import pytest

from tests.helpers import log_into
from tests.polling import until
from vodpoller.errors import OperatorError
from vodpoller.telemetry import Gauge, Telemetry
from vodpoller.upkeep import Upkeep


class StubJournal:
    """Counts what its flushing does, and waits in it for the gate."""

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
    """Answers with a number of events that wait, once its gate is open."""
    return SlowVod()


class SlowVod:
    def __init__(self):
        self.gate = threading.Event()
        self.asked = 0
        self.says = "PULL"

    def mode(self):
        if self.says is None:
            raise OperatorError("not allowed")
        return self.says

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


def test_a_task_that_runs_at_the_stop_is_awaited(upkeep, journal):
    until(lambda: journal.flushes)
    upkeep.stop()
    assert not upkeep.join(0.05)
    journal.gate.set()
    assert upkeep.join(30)


def test_a_question_to_vod_holds_no_stop_up_and_its_answer_is_late(upkeep, journal, telemetry, vod):
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
    for vod.says, known in (("PUSH", ["main"]), ("PULL", []), ("PUSH", ["main"]), (cannot_ask, [])):
        # What runs at this moment is not run once more, so it is told again and again.
        until(lambda known=known: (upkeep.run_all_now(), list(upkeep.pushed))[1] == known)


def test_its_threads_end_with_it(upkeep, journal, vod):
    journal.gate.set()
    vod.gate.set()
    until(lambda: journal.flushes)
    own = own_threads()
    assert own
    upkeep.stop()
    until(lambda: not any(thread.is_alive() for thread in own))
