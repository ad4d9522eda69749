import pytest

from tests.helpers import FakeClock, log_into
from vodpoller.telemetry import (
    BUCKETS_SECS,
    NO_SINK,
    RECENT_EVENTS,
    REMEMBERED_CHARS,
    REMOVED_SINK,
    Count,
    Distribution,
    Duration,
    Gauge,
    Telemetry,
    sink_label,
)

OF_MAIN = (("source", "main"),)


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def telemetry(clock):
    return Telemetry(log_into([]), monotonic=clock)


def measured(*secs):
    telemetry = Telemetry(log_into([]))
    for each in secs:
        telemetry.measure(Duration.JOURNAL_COMMIT, (), each)
    return telemetry.numbers().durations[Duration.JOURNAL_COMMIT, ()]


@pytest.mark.parametrize(
    ("secs", "bucket"), [(0.0, 0), (0.005, 0), (0.0051, 1), (30.0, len(BUCKETS_SECS) - 1), (31.0, len(BUCKETS_SECS))]
)
def test_a_duration_counts_in_the_first_bucket_that_holds_it(secs, bucket):
    numbers = measured(secs).numbers
    assert [at for at, number in enumerate(numbers) if number] == [bucket]


def test_a_batch_is_measured_once_for_all_its_events(telemetry):
    telemetry.scope().measure(Duration.EVENT_SETTLE, OF_MAIN, 0.2, 16)
    found = telemetry.numbers().durations[Duration.EVENT_SETTLE, OF_MAIN]
    assert (sum(found.numbers), round(found.sum_secs, 9)) == (16, 3.2)


@pytest.mark.parametrize(
    ("times", "share", "secs"),
    [
        ([0.003] * 100, 0.5, 0.0025),
        ([0.003] * 50 + [0.2] * 50, 0.5, 0.005),
        ([0.003] * 50 + [0.2] * 50, 1.0, 0.25),
        ([100.0], 0.95, 30.0),
    ],
)
def test_a_quantile_lies_between_the_bounds_of_its_bucket(times, share, secs):
    assert measured(*times).quantile_secs(share) == pytest.approx(secs)


def test_a_duration_never_measured_has_no_quantile():
    assert Distribution().quantile_secs(0.95) is None


def test_lately_starts_at_the_sample_before_the_last(telemetry, clock):
    scope = telemetry.scope()
    for number in (10, 20, 60):
        scope.count(Count.PULLS, number, source="main", result="events")
        telemetry.measure(Duration.EVENT_SETTLE, OF_MAIN, 1.0, number)
        clock.advance(30)
        scope.sample()
    clock.advance(10)
    lately = telemetry.lately()
    assert (lately.secs, lately.total(Count.PULLS, source="main")) == (40, 60)
    assert lately.per_sec(Count.PULLS) == 1.5
    assert sum(lately.durations[Duration.EVENT_SETTLE, OF_MAIN].numbers) == 60


def test_without_a_sample_lately_starts_at_the_start(telemetry, clock):
    telemetry.scope().count(Count.JOURNAL_ERRORS, 3)
    assert telemetry.lately().per_sec(Count.JOURNAL_ERRORS) == 0.0  # no time has passed
    clock.advance(2)
    assert telemetry.lately().per_sec(Count.JOURNAL_ERRORS) == 1.5


def test_a_gauge_drops_values_that_are_no_longer_known(telemetry):
    assert telemetry.gauge(Gauge.QUEUE_EVENTS) == {}
    telemetry.scope().set(Gauge.QUEUE_EVENTS, {OF_MAIN: 7})
    assert telemetry.gauge(Gauge.QUEUE_EVENTS) == {OF_MAIN: 7}
    telemetry.scope().set(Gauge.QUEUE_EVENTS, {})
    assert telemetry.gauge(Gauge.QUEUE_EVENTS) == {}


def line(number, **more):
    return {"event_type": "FileDeleted", "task_id": "", "file_id": str(number), **more}


def test_the_last_events_are_remembered_the_latest_first(telemetry):
    for at in range(3):
        telemetry.scope().remember(float(at), [line(at * 50 + number) for number in range(50)])
    recent = telemetry.recent()
    assert len(recent) == RECENT_EVENTS
    assert recent[0] == (2.0, line(149))
    assert recent[-1] == (1.0, line(50))


def test_long_values_are_not_remembered_whole(telemetry):
    telemetry.scope().remember(0.0, [line("f" * 1000, failed_snapshots=[{}] * 1000, task_id="t")])
    assert telemetry.recent() == [(0.0, line("f" * REMEMBERED_CHARS, task_id="t"))]


@pytest.mark.parametrize(("sink", "label"), [("hook", "hook"), ("gone", REMOVED_SINK), ("", NO_SINK)])
def test_the_sink_label_of_a_stored_event_is_from_a_closed_set(sink, label):
    assert sink_label(sink, ["hook"]) == label
