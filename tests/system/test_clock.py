"""The wall clock is set while the daemon runs: no timer waits for it, and no event ages by it."""

import json

import pytest

from tests.polling import until
from tests.processes import ROOT, SECRET_ID, SECRET_KEY, System
from tests.receiver import Answer, running_receiver
from vodpoller.events.identity import has_own_id

pytestmark = pytest.mark.long

HOUR_SECS = 3600


class Clock:
    """Sets the wall clock of daemons that are started with `env`; see tests/set_clock."""

    def __init__(self, path):
        self._path = path
        self.set_ahead(0)
        self.env = {"PYTHONPATH": f"{ROOT / 'tests' / 'set_clock'}:{ROOT}", "CLOCK_OFFSET_FILE": str(path)}

    def set_ahead(self, secs):
        # Replaced, not rewritten: a reader must never see it empty.
        fresh = self._path.with_suffix(".new")
        fresh.write_text(str(secs))
        fresh.replace(self._path)


@pytest.fixture
def clock(tmp_path):
    return Clock(tmp_path / "offset")


@pytest.fixture
def system(tmp_path):
    with System(tmp_path) as running:
        yield running


@pytest.mark.parametrize("step_secs", [HOUR_SECS, -HOUR_SECS], ids=["forward", "back"])
def test_scheduled_pulls_go_on_when_the_clock_is_set_by_an_hour(system, clock, step_secs):
    simulator = system.simulator(rate=20, secret_id=SECRET_ID, secret_key=SECRET_KEY)
    system.configure(simulator.url, source='unrouted = "confirm"\nlong_poll = false')
    daemon = system.daemon(**clock.env)
    until(lambda: len(system.lines()) >= 20)
    clock.set_ahead(step_secs)
    (stepped,) = daemon.await_log("clock.stepped")
    assert stepped["step_secs"] == pytest.approx(step_secs, abs=3)
    before = len(system.lines())
    until(lambda: len(system.lines()) >= before + 60, secs=8)
    assert daemon.log("clock.corrected"), "requests must be signed with VOD's time"
    assert daemon.terminate()[0] == 0
    stats = simulator.stats()
    assert stats["outstanding"] == 0
    assert stats["redeliveries"] == 0


@pytest.mark.parametrize("step_secs", [HOUR_SECS, -HOUR_SECS], ids=["forward", "back"])
def test_stored_events_are_retried_in_time_after_a_clock_step(system, clock, step_secs):
    simulator = system.simulator(events=30)
    with running_receiver() as receiver:
        receiver.answer = Answer(status=500)
        sinks = system.archive_sink + (
            f'[sinks.hook]\ntype = "webhook"\nurl = "{receiver.url}"\ntimeout_secs = 1\ngive_up_after_secs = 1800\n'
        )
        system.configure(simulator.url, sinks=sinks)
        daemon = system.daemon(**clock.env)
        until(simulator.all_confirmed)
        clock.set_ahead(step_secs)
        daemon.await_log("clock.stepped")
        receiver.answer = Answer(status=200)
        delivered = daemon.await_log("pending.delivered", number=30, secs=60)
        until(lambda: system.has_delivered_all(simulator))
        assert not daemon.log("event.dead"), "an hour that did not pass must not age an event"
        assert max(line["age_secs"] for line in delivered) < 120
        assert sorted(received.body for received in receiver.accepted) == sorted(system.lines())


def test_a_clock_that_is_corrected_after_the_boot_changes_nothing(system, clock):
    simulator = system.simulator(events=50, secret_id=SECRET_ID, secret_key=SECRET_KEY)
    clock.set_ahead(-20 * 365 * 24 * HOUR_SECS)
    system.configure(simulator.url)
    daemon = system.daemon(**clock.env)
    until(lambda: system.has_delivered_all(simulator))
    clock.set_ahead(0)
    daemon.await_log("clock.stepped")
    bodies = [row["body"] for row in simulator.ledger(bodies=True)]
    simulator.feed(*[body for body in bodies if has_own_id(json.loads(body))][:20])
    until(lambda: system.has_delivered_all(simulator))
    assert daemon.terminate()[0] == 0
    assert len(system.lines()) == 50, "events that were just delivered must be recognised"


def test_a_daemon_rotates_once_if_the_clock_passes_midnight_twice(system, clock):
    simulator = system.simulator(events=20)
    system.configure(simulator.url, sinks=system.archive_sink + 'rotate = "daily"\n')
    daemon = system.daemon(**clock.env)
    until(lambda: system.has_delivered_all(simulator))
    for number, ahead_secs in enumerate((24 * HOUR_SECS, 0, 24 * HOUR_SECS)):
        clock.set_ahead(ahead_secs)
        daemon.await_log("clock.stepped", number=number + 1)
        simulator.feed(*(body(10 * number + each) for each in range(10)))
        until(lambda: system.has_delivered_all(simulator))
    assert daemon.terminate()[0] == 0
    assert len(system.lines()) == 30
    assert len(system.lines_of_all_files()) == 50
    assert len(daemon.log("file.rotated")) == 1


def body(number):
    return json.dumps({"EventType": "NewFileUpload", "FileUploadEvent": {"FileId": str(number)}})
