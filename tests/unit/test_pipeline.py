import re
import sqlite3
import threading
import time
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property

import pytest

from tests.helpers import MemorySink, event, named
from tests.polling import until
from vodpoller.batch import Batch
from vodpoller.delivery.in_flight import DeliveryWait, InFlight
from vodpoller.delivery.worker import Worker
from vodpoller.errors import (
    JournalFullError,
    LeaseLostError,
    OperatorError,
    RefusedHandlesError,
    RejectedError,
    StoppingError,
    StorageError,
    ThrottledError,
    TransientError,
)
from vodpoller.events.event import Lease, Malformed, PulledEvent, make_event
from vodpoller.journal.contract import Known
from vodpoller.journal.sqlite import SqliteJournal
from vodpoller.liveness import Liveness
from vodpoller.pipeline import Pipeline
from vodpoller.router import Router
from vodpoller.telemetry import Count, Duration, Telemetry
from vodpoller.vod.confirmer import Confirmer


@dataclass(frozen=True)
class Source:
    name: str = "main"
    sub_app_id: int | None = None
    on_failure: str = "store"
    unrouted: str | None = "dead_letter"


@dataclass(frozen=True)
class Route:
    sinks: tuple
    event_types: tuple | None = None
    where: str | None = None
    sources: tuple | None = None
    name: str = "r"


LEAVES = Source(unrouted="leave")


class FakeVod:
    """Records the handles that it confirms, or raises the error that the test sets."""

    def __init__(self):
        self.confirmed = []
        self.refusal = None
        self.at_confirm = lambda: None

    def await_confirm_slot(self, timeout_secs):
        return True

    def confirm(self, sub_app_id, handles, timeout_secs=None):
        self.at_confirm()
        if self.refusal is not None:
            raise self.refusal
        self.confirmed += handles
        return "r-confirm"


class Bench:
    """A whole pipeline on a real journal, with real workers and sinks in memory."""

    def __init__(self, tmp_path, log, sinks=("a", "b")):
        self.log = log
        self.telemetry = Telemetry(log)
        self.vod = FakeVod()
        self.in_flight = InFlight()
        self.ahead_secs = 0.0
        self.requests_per_sec = 100.0
        self.journal_path = tmp_path / "journal.db"
        self.journal = SqliteJournal(
            self.journal_path,
            max_bytes=10**7,
            ledger_days=14,
            telemetry=Telemetry(log),
            monotonic=self.monotonic,
        )
        self.journal.commits.db.execute("PRAGMA busy_timeout = 0")
        self.sinks = {name: MemorySink(batch_events=16) for name in sinks}
        self.workers = {
            name: Worker(
                name=name,
                sink=sink,
                ledger=self.journal,
                in_flight=self.in_flight,
                queue_max_events=100,
                breaker_failures=100,
                telemetry=Telemetry(log),
                liveness=Liveness(),
            )
            for name, sink in self.sinks.items()
        }
        for worker in self.workers.values():
            worker.start()
        self.routes = [Route(sinks=tuple(sinks), event_types=("NewFileUpload",))]

    def monotonic(self):
        return time.monotonic() + self.ahead_secs

    def rows(self, query):
        with closing(sqlite3.connect(self.journal_path)) as db:
            return db.execute(query).fetchall()

    @cached_property
    def pipeline(self):
        return Pipeline(
            router=Router(self.routes),
            workers=self.workers,
            in_flight=self.in_flight,
            journal=self.journal,
            confirmer=Confirmer(vod=self.vod, telemetry=self.telemetry, liveness=Liveness(), reserve_secs=5.0),
            confirm_reserve_secs=5.0,
            requests_per_sec=self.requests_per_sec,
            telemetry=self.telemetry,
            monotonic=self.monotonic,
        )

    def process(self, *events, source=None, wait=None, lease_secs=30.0, malformed=(), is_untried=False):
        self.vod.confirmed.clear()
        now = self.monotonic()
        batch = Batch(
            source=source or Source(),
            events=[PulledEvent(handle=handle, event=event) for handle, event in events],
            malformed=malformed,
            lease=Lease(starts_at=now, secs=lease_secs),
            received_at=now,
            request_id="r-pull",
            is_untried=is_untried,
        )
        self.pipeline.process(batch, wait or DeliveryWait())
        return self.vod.confirmed

    def known(self, number, sink):
        return self.journal.known([(event(number).key, sink)]).get((event(number).key, sink))

    def close(self):
        for worker in self.workers.values():
            worker.sink.gate.set()
            worker.stop()
            assert worker.join(10)
        assert len(self.in_flight) == 0
        self.journal.close()


@pytest.fixture
def bench(tmp_path, log):
    bench = Bench(tmp_path, log)
    yield bench
    bench.close()


def one(bench, number=1, **more):
    return bench.process((f"h{number}", event(number)), **more)


def settled(lines):
    return [
        (
            line["settlement"],
            line["reason"],
            line["confirmed"],
            {sink: result["reason"] for sink, result in line["sinks"].items()},
        )
        for line in named(lines, "event.settled")
    ]


OTHER = make_event({"EventType": "Unheard", "E": {"TaskId": "t-1"}}, source="main", sub_app_id=None)


# --- unrouted, malformed, where ---------------------------------------------------------------------------------------


def test_left_events_that_use_much_of_the_quota_are_an_error(bench, lines):
    bench.requests_per_sec = 0.1  # 96 events per minute
    left_per_minute = [8, 12, 1]
    for number in left_per_minute:
        bench.process(*[(f"h{index}", event(index, event_type="Unheard")) for index in range(number)], source=LEAVES)
        bench.ahead_secs += 60.0
    (logged,) = [it for it in named(lines, "event.left") if it["level"] == "error"]
    assert logged["quota_share"] == pytest.approx(12 / 96, abs=0.02)
    assert "route them, or set unrouted" in logged["hint"]


def test_a_route_that_may_be_misspelled_is_logged_once(bench, lines):
    bench.routes = [Route(sinks=("a",), event_types=("NewFileUplod",))]
    for number in range(3):
        assert bench.process(("h", event(number)), source=Source(unrouted="confirm")) == ["h"]
    (logged,) = named(lines, "config.warning")
    assert "takes 'NewFileUplod': is that a misspelling?" in logged["message"]


def test_only_events_without_room_in_the_journal_are_left(bench, monkeypatch):
    def full(letters):
        raise JournalFullError("max_bytes", refused=[event(1).key])

    monkeypatch.setattr(bench.journal, "store", full)
    bench.sinks["a"].fail_always(RejectedError("no"))
    assert bench.process(("h1", event(1)), ("h2", event(2))) == ["h2"]


@pytest.mark.parametrize(
    ("unrouted", "confirmed", "counts"),
    [
        ("dead_letter", ["h"], {("", "dead"): 1}),
        ("confirm", ["h"], {}),
        ("leave", [], {}),
        (None, ["h"], {("", "dead"): 1}),
    ],
)
def test_an_event_without_a_route_is_settled_as_unrouted_says(bench, lines, unrouted, confirmed, counts):
    for _ in range(3):
        assert bench.process(("h", OTHER), source=Source(unrouted=unrouted)) == confirmed
    assert bench.journal.counts() == counts
    assert len(named(lines, "event.left")) == (unrouted == "leave")
    assert not named(lines, "config.warning")
    assert bool(named(lines, "event.dead")) == bool(counts)


def test_an_unrouted_event_does_not_affect_others_of_its_batch(bench):
    assert bench.process(("h", OTHER), ("h1", event(1)), source=Source(unrouted="leave")) == ["h1"]
    assert bench.known(1, "a") is Known.ACCEPTED


def malformed(handle="hm"):
    return Malformed(handle=handle, event=replace(OTHER, content={}), why="it is not JSON")


@pytest.mark.parametrize(
    ("on_failure", "confirmed", "counts"), [("store", ["h1", "hm"], {("", "dead"): 1}), ("leave", ["h1"], {})]
)
def test_a_malformed_event_follows_on_failure_and_affects_no_other(bench, lines, on_failure, confirmed, counts):
    assert bench.process(("h1", event(1)), malformed=[malformed()], source=Source(on_failure=on_failure)) == confirmed
    assert bench.journal.counts() == counts
    assert named(lines, "event.malformed")[0]["has_handle"] is True


def test_a_malformed_event_without_a_handle_is_only_logged(bench, lines):
    assert bench.process(("h1", event(1)), malformed=[malformed(None)]) == ["h1"]
    assert bench.journal.counts() == {}
    assert named(lines, "event.malformed")[0]["has_handle"] is False


def test_a_failing_where_rejects_the_event_only_at_its_own_sink(bench, lines):
    bench.routes = [Route(sinks=("a",), where="length(Missing)"), Route(sinks=("b",))]
    assert one(bench) == ["h1"]
    assert bench.known(1, "a") is Known.DEAD
    assert bench.known(1, "b") is Known.ACCEPTED
    assert settled(lines) == [("store", "rejected", True, {"a": "rejected", "b": "delivered"})]
    assert "`where` cannot be evaluated" in named(lines, "event.dead")[0]["error_message"]


# --- delivering -------------------------------------------------------------------------------------------------------


def test_a_sink_that_rejects_everything_does_not_affect_the_other(bench, lines):
    bench.sinks["a"].fail_always(RejectedError("no"))
    assert bench.process(("h1", event(1)), ("h2", event(2))) == ["h1", "h2"]
    assert [bench.known(number, "a") for number in (1, 2)] == [Known.DEAD] * 2
    assert [bench.known(number, "b") for number in (1, 2)] == [Known.ACCEPTED] * 2
    assert settled(lines) == [("store", "rejected", True, {"a": "rejected", "b": "delivered"})] * 2


def test_an_event_that_all_sinks_accepted_is_confirmed_not_stored(bench, lines):
    assert bench.process(("h1", event(1)), ("h2", event(2))) == ["h1", "h2"]
    assert bench.journal.counts() == {}
    assert settled(lines) == [("confirm", "delivered", True, {"a": "delivered", "b": "delivered"})] * 2


def test_nothing_is_confirmed_before_the_ledger_holds_it(bench):
    then = []
    bench.vod.at_confirm = lambda: then.extend(bench.known(1, sink) for sink in bench.sinks)
    one(bench)
    assert then == [Known.ACCEPTED] * 2


def test_nothing_is_confirmed_before_rejected_pairs_are_stored(bench):
    then = []
    bench.sinks["a"].fail_always(RejectedError("no"))
    bench.vod.at_confirm = lambda: then.append(bench.known(1, "a"))
    one(bench)
    assert then == [Known.DEAD]


def test_an_event_twice_in_a_batch_is_delivered_once_confirmed_twice(bench):
    assert bench.process(("h1", event(1)), ("h2", event(1))) == ["h1", "h2"]
    assert bench.sinks["a"].accepted == [event(1).key]


def test_an_event_without_time_left_for_its_sink_is_stored(bench):
    bench.sinks["a"].gate.clear()
    assert one(bench, lease_secs=5.01) == ["h1"]
    assert bench.known(1, "a") is Known.PENDING


def test_an_event_of_a_slow_sink_is_stored_until_its_late_success(bench, lines):
    bench.sinks["a"].gate.clear()
    started = time.monotonic()
    assert one(bench, lease_secs=5.2) == ["h1"]
    assert time.monotonic() - started < 4
    assert bench.known(1, "a") is Known.PENDING
    assert bench.journal.counts() == {("a", "pending"): 1}
    bench.sinks["a"].gate.set()
    until(lambda: bench.known(1, "a") is Known.ACCEPTED)
    assert bench.journal.counts() == {}
    assert bench.sinks["a"].accepted == [event(1).key]
    assert settled(lines) == [("store", "out_of_time", True, {"a": "out_of_time", "b": "delivered"})]


def test_a_success_while_the_event_is_being_stored_leaves_no_row(bench, monkeypatch):
    store, release = bench.journal.store, bench.sinks["a"].gate.set
    bench.sinks["a"].gate.clear()

    def late(letters):
        release()
        until(lambda: len(bench.in_flight) == 0)
        store(letters)

    monkeypatch.setattr(bench.journal, "store", late)
    assert one(bench, lease_secs=5.1) == ["h1"]
    assert bench.known(1, "a") is Known.ACCEPTED


def test_a_retry_after_is_stored_with_the_event(bench):
    bench.sinks["a"].fail_always(TransientError("busy", retry_after_secs=600.0))
    one(bench)
    assert bench.rows("SELECT due_at - stored_at FROM letters") == [(600.0,)]


def test_an_unexpected_error_leaves_no_pair_in_flight(bench, monkeypatch):
    def broken(deliveries):
        raise RuntimeError("a bug")

    with monkeypatch.context() as patched:
        patched.setattr(bench.workers["b"], "submit", broken)
        with pytest.raises(RuntimeError):
            one(bench)
    until(lambda: len(bench.in_flight) == 0)
    assert bench.vod.confirmed == []
    assert one(bench) == ["h1"]
    assert bench.known(1, "b") is Known.ACCEPTED


# --- redelivery -------------------------------------------------------------------------------------------------------


def test_a_redelivered_event_goes_only_to_sinks_that_lack_it(bench, lines):
    bench.sinks["b"].fail_with(RejectedError("no"))
    one(bench, source=Source(on_failure="leave"))
    assert one(bench, source=Source(on_failure="leave")) == ["h1"]
    assert len(bench.sinks["a"].calls) == 1
    assert len(bench.sinks["b"].calls) == 2
    assert [line["redelivered"] for line in named(lines, "event.settled")] == [False, True]


@pytest.mark.parametrize("error", [TransientError("down", retry_after_secs=60.0), RejectedError("no")])
def test_a_redelivered_stored_event_is_confirmed_and_not_retried(bench, lines, error):
    bench.sinks["a"].fail_with(error)
    bench.vod.refusal = RefusedHandlesError("stale")
    assert one(bench) == []
    counts = bench.journal.counts()
    bench.vod.refusal = None
    assert one(bench) == ["h1"]
    assert len(bench.sinks["a"].calls) == 1
    assert bench.journal.counts() == counts
    assert [line["confirmed"] for line in named(lines, "event.settled")] == [False, True]


def test_an_event_whose_delivery_still_runs_joins_it(bench, lines):
    bench.sinks["a"].gate.clear()
    one(bench, source=Source(on_failure="leave"), lease_secs=5.1)
    assert bench.vod.confirmed == []
    wait = DeliveryWait()
    again = threading.Thread(target=one, args=(bench,), kwargs={"source": Source(on_failure="leave"), "wait": wait})
    again.start()
    until(lambda: wait.is_waiting)
    bench.sinks["a"].gate.set()
    again.join(10)
    assert bench.vod.confirmed == ["h1"]
    assert len(bench.sinks["a"].calls) == 1
    assert named(lines, "event.settled")[1]["redelivered"] is True


def test_a_confirmed_event_may_come_again_later_as_a_new_one(bench, monkeypatch):
    one(bench)
    bench.journal.flush()
    now = time.time()
    monkeypatch.setattr(bench.journal, "_wall", lambda: now + 601)
    one(bench)
    assert len(bench.sinks["a"].calls) == 2


# --- events without a task id -----------------------------------------------------------------------------------------

CAST = make_event(
    {"EventType": "MediaCastStatusChanged", "MediaCastStatusChangedEvent": {"CastId": "c1", "Status": "Working"}},
    source="main",
    sub_app_id=None,
)


@pytest.fixture
def casts(bench):
    bench.routes = [Route(sinks=("a", "b"), event_types=("MediaCastStatusChanged",))]
    return bench


def test_equal_events_without_a_task_id_are_all_delivered(casts, lines):
    assert casts.process(("h1", CAST), ("h2", CAST)) == ["h1", "h2"]
    assert casts.process(("h3", CAST)) == ["h3"]
    accepted = casts.sinks["a"].accepted
    assert accepted == casts.sinks["b"].accepted
    assert len({*accepted, CAST.key}) == 4
    logged = named(lines, "event.settled")
    assert [line["key"] for line in logged] == [key.hex() for key in accepted]
    assert [line["redelivered"] for line in logged] == [False] * 3


def test_a_redelivered_occurrence_keeps_its_key(casts, lines):
    casts.sinks["b"].fail_with(RejectedError("no"))
    assert casts.process(("h1", CAST), source=Source(on_failure="leave")) == []
    casts.ahead_secs = 31.0
    assert casts.process(("h2", CAST), source=Source(on_failure="leave")) == ["h2"]
    assert [len(casts.sinks[name].calls) for name in "ab"] == [1, 2]
    first, again = named(lines, "event.settled")
    assert first["key"] == again["key"] != CAST.key.hex()
    assert again["redelivered"] is True


def test_only_events_whose_occurrence_is_not_written_are_left(casts, lines, monkeypatch):
    def unwritable(content_keys, pulled):
        raise StorageError("the disk is full")

    monkeypatch.setattr(casts.journal, "identify", unwritable)
    casts.routes.append(Route(sinks=("a",), event_types=("NewFileUpload",)))
    assert casts.process(("h1", CAST), ("h2", event(1)), malformed=[malformed()]) == ["h2"]
    assert casts.sinks["a"].accepted == [event(1).key]
    assert casts.journal.counts() == {}
    assert [(line["settlement"], line["reason"]) for line in named(lines, "event.settled")] == [
        ("leave", "journal_failed"),
        ("confirm", "delivered"),
        ("leave", "journal_failed"),
    ]


@pytest.mark.parametrize("unrouted", ["confirm", "leave"])
def test_an_event_without_a_sink_gets_no_occurrence(bench, monkeypatch, unrouted):
    monkeypatch.setattr(bench.journal, "identify", None)
    bench.process(("h", CAST), source=Source(unrouted=unrouted))


def test_equal_malformed_events_are_a_dead_letter_each(bench):
    assert bench.process(malformed=[malformed("h1"), malformed("h2")]) == ["h1", "h2"]
    assert bench.journal.counts() == {("", "dead"): 2}


# --- when it cannot be stored -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (StorageError("the disk is full"), "journal_failed"),
        (JournalFullError("max_bytes", refused=[OTHER.key]), "journal_full"),
    ],
)
def test_only_an_event_that_cannot_be_stored_is_left(bench, lines, monkeypatch, error, reason):
    def broken(letters):
        raise error

    monkeypatch.setattr(bench.journal, "store", broken)
    bench.routes = [Route(sinks=("a",), event_types=("NewFileUpload",)), Route(sinks=("b",), event_types=("Unheard",))]
    bench.sinks["b"].fail_always(RejectedError("no"))
    assert bench.process(("h1", event(1)), ("h", OTHER)) == ["h1"]
    assert [(line["settlement"], line["reason"]) for line in named(lines, "event.settled")] == [
        ("confirm", "delivered"),
        ("leave", reason),
    ]
    assert named(lines, "event.dead") == []


@pytest.mark.parametrize("is_untried", [False, True])
def test_with_an_unreadable_journal_nothing_is_sent_or_confirmed(bench, lines, monkeypatch, is_untried):
    def unreadable(pairs):
        raise StorageError("cannot be read")

    monkeypatch.setattr(bench.journal, "known", unreadable)
    monkeypatch.setattr(bench.journal, "store", lambda letters: unreadable(()))
    assert one(bench, is_untried=is_untried) == []
    assert bench.sinks["a"].calls == []
    assert settled(lines) == [("leave", "journal_failed", False, {"a": "journal_failed", "b": "journal_failed"})]


def test_on_failure_leave_stores_nothing(bench, lines):
    bench.sinks["a"].fail_with(RejectedError("no"))
    assert one(bench, source=Source(on_failure="leave")) == []
    assert bench.journal.counts() == {}
    assert settled(lines) == [("leave", "left_by_configuration", False, {"a": "rejected", "b": "delivered"})]


def test_a_puller_that_must_yield_stores_undelivered_events(bench):
    bench.sinks["a"].gate.clear()
    started = time.monotonic()
    assert one(bench, wait=DeliveryWait(min_wait_secs=0.02, should_yield=lambda: True)) == ["h1"]
    assert time.monotonic() - started < 5
    assert bench.known(1, "a") is Known.PENDING


# --- log lines and counters -------------------------------------------------------------------------------------------


def test_the_fate_of_an_event_is_one_line_with_its_ids(bench, lines):
    content = {
        "EventType": "NewFileUpload",
        "SnapshotByTimeOffsetCompleteEvent": {
            "TaskId": "t-1",
            "FileId": "5285890784273533167",
            "SnapshotInfoSet": [{"ErrCode": 0, "TimeOffset": 10, "Url": "u"}, {"ErrCode": 70000, "TimeOffset": 20}],
        },
    }
    taken = make_event(content, source="main", sub_app_id=None)
    bench.process(("h1", taken))
    (logged,) = named(lines, "event.settled")
    assert logged["level"] == "info"
    assert (logged["source"], logged["event_type"], logged["key"]) == ("main", "NewFileUpload", taken.key.hex())
    assert logged["routes"] == ("r",)
    assert (logged["pull_request_id"], logged["confirm_request_id"]) == ("r-pull", "r-confirm")
    assert logged["sinks"]["a"] == {"outcome": "delivered", "reason": "delivered"}
    assert (logged["task_id"], logged["file_id"]) == ("t-1", "5285890784273533167")
    assert logged["failed_snapshots"] == [{"time_offset_ms": 20, "err_code": 70000}]
    assert 0 <= logged["duration_secs"] < 20
    assert 0 < logged["lease_left_secs"] <= 30


def test_events_are_counted_by_many_pullers_at_once(bench):
    events = [(f"h{number}", event(number)) for number in range(8)]

    def puller():
        for _ in range(5):
            bench.process(*events)

    pullers = [threading.Thread(target=puller) for _ in range(4)]
    for thread in pullers:
        thread.start()
    for thread in pullers:
        thread.join(20)
    assert (bench.telemetry.total(Count.EVENTS_SETTLED), bench.pipeline.unconfirmed_events) == (160, 0)
    assert bench.telemetry.total(Count.CONFIRMS, result="confirmed", source="main") == 160
    outcomes = {
        outcome: bench.telemetry.total(Count.SINK_DELIVERIES, outcome=outcome) for outcome in ("delivered", "known")
    }
    assert sum(outcomes.values()) == 320
    settled = bench.telemetry.numbers().durations[Duration.EVENT_SETTLE, (("source", "main"),)]
    assert sum(settled.numbers) == 160
    assert bench.pipeline.last_confirm_at > 0


def test_an_undocumented_event_type_is_counted_as_other(bench):
    bench.routes = [Route(sinks=("a",))]
    bench.process(("h1", event(1)), ("h2", event(2, event_type="InventedByAnEvent")), ("h3", event(3, event_type="")))
    types = {
        label: bench.telemetry.total(Count.EVENTS_RECEIVED, event_type=label) for label in ("NewFileUpload", "other")
    }
    assert types == {"NewFileUpload": 1, "other": 2}
    assert bench.telemetry.total(Count.EVENTS_RECEIVED) == 3


@pytest.mark.parametrize(("lease_secs", "expired"), [(0.0, 1), (30.0, 0)])
def test_an_event_whose_lease_ended_unconfirmed_is_counted(bench, lease_secs, expired):
    bench.vod.refusal = OperatorError("no right", error_code="UnauthorizedOperation")
    bench.process(("h1", event(1)), lease_secs=lease_secs)
    assert bench.telemetry.total(Count.LEASES_EXPIRED, source="main") == expired


def test_an_event_left_on_purpose_counts_no_expired_lease(bench):
    bench.process(("h1", event(1, event_type="Other")), source=Source(unrouted="leave"), lease_secs=0.0)
    assert bench.telemetry.total(Count.LEASES_EXPIRED) == 0


def test_the_last_events_are_remembered_with_short_texts(bench, lines):
    long = event(1, FileUploadEvent={"FileId": "f" * 1_000_000, "TaskId": "t"})
    bench.process(("h1", long))
    ((_, kept),) = bench.telemetry.recent()
    assert (kept["file_id"], kept["task_id"], kept["reason"]) == ("f" * 200, "t", "delivered")
    (logged,) = named(lines, "event.settled")
    assert len(logged["file_id"]) == 1_000_000


@pytest.mark.parametrize(
    ("error", "result"),
    [
        (None, "confirmed"),
        (RefusedHandlesError("stale", error_code="InvalidParameterValue", request_id="r-9"), "refused"),
        (OperatorError("no right", error_code="UnauthorizedOperation", request_id="r-9"), "not_allowed"),
        (LeaseLostError("over"), "lease_ended"),
        (StoppingError("stopping"), "stopping"),
        (RuntimeError("a bug"), "no_answer"),
    ],
)
def test_the_line_names_the_result_and_the_call_of_the_confirm(bench, lines, error, result):
    bench.vod.refusal = error
    one(bench)
    (logged,) = named(lines, "event.settled")
    assert (logged["confirm_result"], logged["confirmed"]) == (result, error is None)
    if getattr(error, "error_code", ""):
        assert (logged["confirm_error_code"], logged["confirm_request_id"]) == (error.error_code, "r-9")


@pytest.mark.parametrize(
    ("error", "result"), [(TransientError("lost"), "no_answer"), (ThrottledError("slower"), "throttled")]
)
def test_the_line_names_why_a_confirm_failed_until_the_lease_ended(bench, lines, error, result):
    bench.vod.refusal = error
    one(bench, lease_secs=0.3)
    assert named(lines, "event.settled")[0]["confirm_result"] == result


def test_a_refusal_after_a_lost_answer_is_named_in_the_line(bench, lines):
    errors = [TransientError("lost"), RefusedHandlesError("stale")]

    def fail():
        bench.vod.refusal = errors.pop(0)

    bench.vod.at_confirm = fail
    one(bench)
    (logged,) = named(lines, "event.settled")
    assert (logged["confirm_result"], logged["confirmed"]) == ("refused_after_lost", False)
    bench.journal.flush()
    # VOD has forgotten the event: an equal event in ten minutes is a new one.
    assert bench.rows("SELECT confirmed_at IS NOT NULL FROM ledger") == [(1,), (1,)]
    assert bench.pipeline.unconfirmed_events == 0


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("a bug")])
def test_an_unexpected_error_leaves_no_event_without_its_line(bench, lines, monkeypatch, error):
    def broken(letters):
        raise error

    bench.sinks["a"].fail_always(RejectedError("no"))
    monkeypatch.setattr(bench.journal, "store", broken)
    with pytest.raises(type(error)):
        bench.process(("h1", event(1)), ("h2", event(2)))
    assert bench.vod.confirmed == []
    assert [line["confirmed"] for line in named(lines, "event.settled")] == [False, False]


# --- one handle for several events ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_handle_is_confirmed_only_if_every_event_that_has_it_may_be(bench, lines, where):
    items = [("shared", event(1)), ("shared", event(2)), ("alone", event(3))]
    items.insert(where, ("shared", OTHER))
    assert bench.process(*items, source=Source(unrouted="leave")) == ["alone"]
    reasons = [(line["event_type"], line["reason"], line["confirmed"]) for line in named(lines, "event.settled")]
    assert reasons.count(("NewFileUpload", "shared_handle", False)) == 2
    assert reasons.count(("NewFileUpload", "delivered", True)) == 1
    assert reasons.count(("Unheard", "no_route", False)) == 1


def test_a_handle_shared_with_a_malformed_event_is_not_confirmed(bench, lines):
    source = Source(on_failure="leave")
    assert bench.process(("hm", event(1)), ("h2", event(2)), malformed=[malformed("hm")], source=source) == ["h2"]
    assert [line["reason"] for line in named(lines, "event.settled")] == [
        "shared_handle",
        "delivered",
        "left_by_configuration",
    ]


def test_a_handle_whose_events_may_all_be_confirmed_is_confirmed_once(bench):
    assert bench.process(("shared", event(1)), ("shared", event(2))) == ["shared"]


# --- why it was stored ------------------------------------------------------------------------------------------------


def stored(bench, columns="reason, error"):
    return bench.rows(f"SELECT {columns} FROM letters ORDER BY id")


@pytest.fixture
def fragile(bench):
    """A bench whose sink `a` has a breaker that one failure opens."""
    bench.workers["a"].stop()
    bench.workers["a"] = Worker(
        name="a",
        sink=bench.sinks["a"],
        ledger=bench.journal,
        in_flight=bench.in_flight,
        queue_max_events=1,
        breaker_failures=1,
        telemetry=Telemetry(bench.log),
        liveness=Liveness(),
    )
    bench.workers["a"].start()
    return bench


@pytest.mark.parametrize(
    ("error", "reason", "why"),
    [
        (TransientError("connection refused"), "sink_down", r"down since 20\d\d-.*Z: connection refused"),
        (TransientError("429", retry_after_secs=90.0), "sink_paused", r"asked to wait until 20\d\d-.*Z: 429"),
    ],
)
def test_an_event_that_was_not_attempted_is_stored_with_the_reason(fragile, lines, error, reason, why):
    fragile.sinks["a"].fail_always(error)
    one(fragile, 1)
    one(fragile, 2)
    assert settled(lines)[1] == ("store", reason, True, {"a": reason, "b": "delivered"})
    (_, (second_reason, second_error)) = stored(fragile)
    assert second_reason == reason
    assert re.search(why, second_error)


def test_an_event_that_finds_the_queue_full_is_stored_with_the_reason(fragile, lines):
    fragile.sinks["a"].gate.clear()
    fragile.process(*((f"h{number}", event(number)) for number in range(4)), lease_secs=5.4)
    reasons = [line["sinks"]["a"]["reason"] for line in named(lines, "event.settled")]
    assert reasons.count("queue_full") >= 2
    assert set(reasons) == {"queue_full", "out_of_time"}
    assert sorted(reason for (reason,) in stored(fragile, "reason")) == sorted(reasons)
    assert all(error for (error,) in stored(fragile, "error"))


@pytest.mark.parametrize(("at_sink", "place"), [(True, "had not answered"), (False, "waited in the sink's queue")])
def test_an_event_that_a_stop_interrupts_is_stored_with_the_reason(bench, lines, at_sink, place):
    bench.sinks["a"].gate.clear()
    if not at_sink:
        bench.process(("h0", event(0)), lease_secs=5.1)
    wait = DeliveryWait()
    thread = threading.Thread(target=one, args=(bench,), kwargs={"wait": wait})
    thread.start()
    undone = 1 if at_sink else 2
    until(lambda: wait.is_waiting and bench.sinks["a"].calls and len(bench.in_flight) == undone)
    wait.interrupt(stopping=True)
    thread.join(10)
    assert settled(lines)[-1] == ("store", "stopping", True, {"a": "stopping", "b": "delivered"})
    assert place in stored(bench)[-1][1]


def test_an_event_for_a_stopped_worker_is_stored_with_the_reason(bench, lines):
    bench.workers["a"].stop()
    one(bench)
    assert stored(bench) == [("stopping", "the daemon was stopping")]


def test_sinks_that_have_the_event_already_are_named_in_the_line(bench, lines):
    bench.sinks["a"].fail_with(TransientError("down", retry_after_secs=60.0))
    bench.vod.refusal = RefusedHandlesError("stale")
    one(bench)
    bench.vod.refusal = None
    one(bench)
    assert settled(lines)[-1] == ("store", "already_stored", True, {"a": "already_stored", "b": "already_delivered"})
    assert stored(bench, "reason, error, attempts") == [("sink_failed", "down", 1)]


def test_a_second_pipeline_on_the_same_journal_repeats_nothing(tmp_path, log):
    bench = Bench(tmp_path, log)
    bench.vod.refusal = RefusedHandlesError("stale")
    one(bench)
    bench.close()
    with closing(Bench(tmp_path, log)) as again:
        assert one(again) == ["h1"]
        assert again.sinks["a"].calls == []
