"""The metrics that the periodic tasks set; their work on events is tested with whole daemons."""

import pytest

from tests.helpers import event, log_into
from tests.polling import until
from vodpoller.delivery.in_flight import InFlight
from vodpoller.delivery.retrier import Retrier
from vodpoller.errors import OperatorError, TransientError
from vodpoller.journal.contract import Letter
from vodpoller.journal.sqlite import SqliteJournal
from vodpoller.telemetry import Gauge, Telemetry
from vodpoller.upkeep import Upkeep


@pytest.fixture
def telemetry():
    return Telemetry(log_into([]))


@pytest.fixture
def journal(tmp_path, telemetry):
    journal = SqliteJournal(tmp_path / "journal.db", max_bytes=10**7, ledger_days=5, telemetry=telemetry)
    yield journal
    journal.close()


@pytest.fixture
def start(journal, telemetry):
    """Starts the tasks of a daemon with one sink, `hook`, and ends them with the test."""
    started = []

    def start(queues):
        retrier = Retrier(journal=journal, workers={}, in_flight=InFlight(), give_up_after_secs={}, telemetry=telemetry)
        upkeep = Upkeep(
            journal=journal,
            retrier=retrier,
            pollers={},
            sinks=["hook"],
            telemetry=telemetry,
            wall=lambda: 0.0,
            queues=queues,
        )
        upkeep.start()
        started.append(upkeep)
        return upkeep

    yield start
    for upkeep in started:
        upkeep.stop()


def test_dead_letters_are_counted_with_labels_of_a_closed_set(start, journal, telemetry):
    sinks = ["hook", "gone", "gone too", ""]
    journal.store([Letter(event=event(at), sink=it, dead=True, reason="rejected") for at, it in enumerate(sinks)])
    start({})
    assert until(lambda: telemetry.gauge(Gauge.DEAD_LETTERS)) == {
        (("reason", "rejected"), ("sink", "hook")): 1,
        (("reason", "rejected"), ("sink", "(removed)")): 2,
        (("reason", "rejected"), ("sink", "(none)")): 1,
    }
    assert until(lambda: telemetry.gauge(Gauge.JOURNAL_SIZE)) == {(): journal.stored_bytes()}


@pytest.mark.parametrize("error", [OperatorError("no right"), TransientError("no answer")])
def test_an_unknown_backlog_does_not_hide_that_of_another_source(start, telemetry, error):
    def fail():
        raise error

    start({"silent": fail, "main": lambda: 7})
    assert until(lambda: telemetry.gauge(Gauge.QUEUE_EVENTS)) == {(("source", "main"),): 7}


def test_without_a_listener_nothing_is_measured_or_asked(start, telemetry):
    upkeep = start(None)
    until(lambda: upkeep.stored == [])
    assert telemetry.gauge(Gauge.JOURNAL_SIZE) == telemetry.gauge(Gauge.QUEUE_EVENTS) == {}
