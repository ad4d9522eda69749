"""What is periodic comes to an end: a reload closes the journal that its tasks use."""

import threading

import pytest

from tests.helpers import log_into
from tests.polling import until
from vodpoller.telemetry import Telemetry
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


class StubRetrier:
    def run(self, most_secs):
        return False

    def stop_claiming(self):
        pass


@pytest.fixture
def journal():
    return StubJournal()


@pytest.fixture
def upkeep(journal):
    running = Upkeep(
        journal=journal,
        retrier=StubRetrier(),
        pollers={},
        sinks=[],
        telemetry=Telemetry(log_into([])),
        wall=lambda: 0.0,
    )
    running.start()
    yield running
    journal.gate.set()
    running.stop()


def test_a_task_that_runs_at_the_stop_is_awaited(upkeep, journal):
    until(lambda: journal.flushes)
    upkeep.stop()
    assert not upkeep.join(0.05)
    journal.gate.set()
    assert upkeep.join(30)


def test_its_threads_end_with_it(upkeep, journal):
    journal.gate.set()
    until(lambda: journal.flushes)
    own = {thread for thread in threading.enumerate() if "APScheduler" in thread.name or "ThreadPool" in thread.name}
    assert own
    upkeep.stop()
    until(lambda: not any(thread.is_alive() for thread in own))
