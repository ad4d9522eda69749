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
    """Confirms, and remembers what; or fails as a test says."""

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


class Line:
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
def line(tmp_path, log):
    line = Line(tmp_path, log)
    yield line
    line.close()


def one(line, number=1, **more):
    return line.process((f"h{number}", event(number)), **more)


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


def test_events_that_are_left_and_take_much_of_the_quota_are_an_error(line, lines):
    line.requests_per_sec = 0.1  # 96 events a minute
    of_each_minute = [8, 12, 1]
    for number in of_each_minute:
        line.process(*[(f"h{index}", event(index, event_type="Unheard")) for index in range(number)], source=LEAVES)
        line.ahead_secs += 60.0
    (said,) = [it for it in named(lines, "event.left") if it["level"] == "error"]
    assert said["quota_share"] == pytest.approx(12 / 96, abs=0.02)
    assert "route them, or set unrouted" in said["hint"]


def test_dropped_events_that_a_route_seems_to_mean_are_said_once(line, lines):
    line.routes = [Route(sinks=("a",), event_types=("NewFileUplod",))]
    for number in range(3):
        assert line.process(("h", event(number)), source=Source(unrouted="confirm")) == ["h"]
    (said,) = named(lines, "config.warning")
    assert "takes 'NewFileUplod': is that a misspelling?" in said["message"]


def test_what_there_is_room_for_is_stored_and_its_batch_mate_is_left(line, monkeypatch):
    def full(letters):
        raise JournalFullError("max_bytes", refused=[event(1).key])

    monkeypatch.setattr(line.journal, "store", full)
    line.sinks["a"].fail_always(RejectedError("no"))
    assert line.process(("h1", event(1)), ("h2", event(2))) == ["h2"]


@pytest.mark.parametrize(
    ("unrouted", "confirmed", "counts"),
    [
        ("dead_letter", ["h"], {("", "dead"): 1}),
        ("confirm", ["h"], {}),
        ("leave", [], {}),
        (None, ["h"], {("", "dead"): 1}),
    ],
)
def test_an_event_that_no_route_takes_goes_where_its_source_says(line, lines, unrouted, confirmed, counts):
    for _ in range(3):
        assert line.process(("h", OTHER), source=Source(unrouted=unrouted)) == confirmed
    assert line.journal.counts() == counts
    assert len(named(lines, "event.left")) == (unrouted == "leave")
    assert not named(lines, "config.warning")
    assert bool(named(lines, "event.dead")) == bool(counts)


def test_an_unrouted_event_costs_its_batch_mates_nothing(line):
    assert line.process(("h", OTHER), ("h1", event(1)), source=Source(unrouted="leave")) == ["h1"]
    assert line.known(1, "a") is Known.ACCEPTED


def malformed(handle="hm"):
    return Malformed(handle=handle, event=replace(OTHER, content={}), why="it is not JSON")


@pytest.mark.parametrize(
    ("on_failure", "confirmed", "counts"), [("store", ["h1", "hm"], {("", "dead"): 1}), ("leave", ["h1"], {})]
)
def test_a_malformed_event_is_a_dead_letter_and_costs_its_batch_mates_nothing(
    line, lines, on_failure, confirmed, counts
):
    assert line.process(("h1", event(1)), malformed=[malformed()], source=Source(on_failure=on_failure)) == confirmed
    assert line.journal.counts() == counts
    assert named(lines, "event.malformed")[0]["has_handle"] is True


def test_of_a_malformed_event_without_a_handle_there_is_a_line(line, lines):
    assert line.process(("h1", event(1)), malformed=[malformed(None)]) == ["h1"]
    assert line.journal.counts() == {}
    assert named(lines, "event.malformed")[0]["has_handle"] is False


def test_a_where_that_fails_rejects_the_event_at_its_sink_and_not_at_the_others(line, lines):
    line.routes = [Route(sinks=("a",), where="length(Missing)"), Route(sinks=("b",))]
    assert one(line) == ["h1"]
    assert line.known(1, "a") is Known.DEAD
    assert line.known(1, "b") is Known.ACCEPTED
    assert settled(lines) == [("store", "rejected", True, {"a": "rejected", "b": "delivered"})]
    assert "`where` cannot be evaluated" in named(lines, "event.dead")[0]["error_message"]


# --- delivering -------------------------------------------------------------------------------------------------------


def test_one_dead_sink_of_two_keeps_nothing_from_the_other(line, lines):
    line.sinks["a"].fail_always(RejectedError("no"))
    assert line.process(("h1", event(1)), ("h2", event(2))) == ["h1", "h2"]
    assert [line.known(number, "a") for number in (1, 2)] == [Known.DEAD] * 2
    assert [line.known(number, "b") for number in (1, 2)] == [Known.ACCEPTED] * 2
    assert settled(lines) == [("store", "rejected", True, {"a": "rejected", "b": "delivered"})] * 2


def test_what_every_sink_accepted_is_confirmed_and_not_stored(line, lines):
    assert line.process(("h1", event(1)), ("h2", event(2))) == ["h1", "h2"]
    assert line.journal.counts() == {}
    assert settled(lines) == [("confirm", "delivered", True, {"a": "delivered", "b": "delivered"})] * 2


def test_nothing_is_confirmed_before_the_ledger_holds_it(line):
    then = []
    line.vod.at_confirm = lambda: then.extend(line.known(1, sink) for sink in line.sinks)
    one(line)
    assert then == [Known.ACCEPTED] * 2


def test_nothing_is_confirmed_before_what_a_sink_lacks_is_stored(line):
    then = []
    line.sinks["a"].fail_always(RejectedError("no"))
    line.vod.at_confirm = lambda: then.append(line.known(1, "a"))
    one(line)
    assert then == [Known.DEAD]


def test_an_event_twice_in_a_batch_is_delivered_once_and_both_handles_are_confirmed(line):
    assert line.process(("h1", event(1)), ("h2", event(1))) == ["h1", "h2"]
    assert line.sinks["a"].accepted == [event(1).key]


def test_a_sink_that_has_no_time_left_gets_nothing_and_the_event_is_stored(line):
    line.sinks["a"].gate.clear()
    assert one(line, lease_secs=5.01) == ["h1"]
    assert line.known(1, "a") is Known.PENDING


def test_a_slow_sink_s_event_is_stored_and_confirmed_in_time_and_its_late_success_is_known(line, lines):
    line.sinks["a"].gate.clear()
    started = time.monotonic()
    assert one(line, lease_secs=5.2) == ["h1"]
    assert time.monotonic() - started < 4
    assert line.known(1, "a") is Known.PENDING
    assert line.journal.counts() == {("a", "pending"): 1}
    line.sinks["a"].gate.set()
    until(lambda: line.known(1, "a") is Known.ACCEPTED)
    assert line.journal.counts() == {}
    assert line.sinks["a"].accepted == [event(1).key]
    assert settled(lines) == [("store", "out_of_time", True, {"a": "out_of_time", "b": "delivered"})]


def test_a_success_that_comes_while_the_event_is_being_stored_leaves_no_row(line, monkeypatch):
    store, release = line.journal.store, line.sinks["a"].gate.set
    line.sinks["a"].gate.clear()

    def late(letters):
        release()
        until(lambda: len(line.in_flight) == 0)
        store(letters)

    monkeypatch.setattr(line.journal, "store", late)
    assert one(line, lease_secs=5.1) == ["h1"]
    assert line.known(1, "a") is Known.ACCEPTED


def test_a_wait_that_a_sink_asked_for_is_stored_with_the_event(line):
    line.sinks["a"].fail_always(TransientError("busy", retry_after_secs=600.0))
    one(line)
    assert line.rows("SELECT due_at - stored_at FROM letters") == [(600.0,)]


def test_an_unforeseen_error_leaves_no_pair_on_its_way_for_ever(line, monkeypatch):
    def broken(deliveries):
        raise RuntimeError("a bug")

    with monkeypatch.context() as patched:
        patched.setattr(line.workers["b"], "submit", broken)
        with pytest.raises(RuntimeError):
            one(line)
    until(lambda: len(line.in_flight) == 0)
    assert line.vod.confirmed == []
    assert one(line) == ["h1"]
    assert line.known(1, "b") is Known.ACCEPTED


# --- redelivery -------------------------------------------------------------------------------------------------------


def test_a_redelivered_event_goes_to_the_sinks_that_lack_it_only(line, lines):
    line.sinks["b"].fail_with(RejectedError("no"))
    one(line, source=Source(on_failure="leave"))
    assert one(line, source=Source(on_failure="leave")) == ["h1"]
    assert len(line.sinks["a"].calls) == 1
    assert len(line.sinks["b"].calls) == 2
    assert [line["redelivered"] for line in named(lines, "event.settled")] == [False, True]


@pytest.mark.parametrize("error", [TransientError("down", retry_after_secs=60.0), RejectedError("no")])
def test_a_redelivered_event_that_is_stored_is_not_tried_again_but_confirmed(line, lines, error):
    line.sinks["a"].fail_with(error)
    line.vod.refusal = RefusedHandlesError("stale")
    assert one(line) == []
    counts = line.journal.counts()
    line.vod.refusal = None
    assert one(line) == ["h1"]
    assert len(line.sinks["a"].calls) == 1
    assert line.journal.counts() == counts
    assert [line["confirmed"] for line in named(lines, "event.settled")] == [False, True]


def test_an_event_whose_delivery_still_runs_joins_it(line, lines):
    line.sinks["a"].gate.clear()
    one(line, source=Source(on_failure="leave"), lease_secs=5.1)
    assert line.vod.confirmed == []
    wait = DeliveryWait()
    again = threading.Thread(target=one, args=(line,), kwargs={"source": Source(on_failure="leave"), "wait": wait})
    again.start()
    until(lambda: wait.is_waiting)
    line.sinks["a"].gate.set()
    again.join(10)
    assert line.vod.confirmed == ["h1"]
    assert len(line.sinks["a"].calls) == 1
    assert named(lines, "event.settled")[1]["redelivered"] is True


def test_a_confirmed_event_may_come_again_later_as_a_new_one(line, monkeypatch):
    one(line)
    line.journal.flush()
    now = time.time()
    monkeypatch.setattr(line.journal, "_wall", lambda: now + 601)
    one(line)
    assert len(line.sinks["a"].calls) == 2


# --- events without an id of their own --------------------------------------------------------------------------------

CAST = make_event(
    {"EventType": "MediaCastStatusChanged", "MediaCastStatusChangedEvent": {"CastId": "c1", "Status": "Working"}},
    source="main",
    sub_app_id=None,
)


@pytest.fixture
def casts(line):
    line.routes = [Route(sinks=("a", "b"), event_types=("MediaCastStatusChanged",))]
    return line


def test_equal_events_without_an_id_are_delivered_each(casts, lines):
    assert casts.process(("h1", CAST), ("h2", CAST)) == ["h1", "h2"]
    assert casts.process(("h3", CAST)) == ["h3"]
    accepted = casts.sinks["a"].accepted
    assert accepted == casts.sinks["b"].accepted
    assert len({*accepted, CAST.key}) == 4
    said = named(lines, "event.settled")
    assert [line["key"] for line in said] == [key.hex() for key in accepted]
    assert [line["redelivered"] for line in said] == [False] * 3


def test_one_that_comes_again_goes_to_the_sinks_that_lack_it_under_its_key(casts, lines):
    casts.sinks["b"].fail_with(RejectedError("no"))
    assert casts.process(("h1", CAST), source=Source(on_failure="leave")) == []
    casts.ahead_secs = 31.0
    assert casts.process(("h2", CAST), source=Source(on_failure="leave")) == ["h2"]
    assert [len(casts.sinks[name].calls) for name in "ab"] == [1, 2]
    first, again = named(lines, "event.settled")
    assert first["key"] == again["key"] != CAST.key.hex()
    assert again["redelivered"] is True


def test_one_whose_occurrence_cannot_be_written_is_left_and_its_batch_mates_are_not(casts, lines, monkeypatch):
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
def test_one_that_goes_nowhere_is_not_written_down(line, monkeypatch, unrouted):
    monkeypatch.setattr(line.journal, "identify", None)
    line.process(("h", CAST), source=Source(unrouted=unrouted))


def test_equal_malformed_events_are_a_dead_letter_each(line):
    assert line.process(malformed=[malformed("h1"), malformed("h2")]) == ["h1", "h2"]
    assert line.journal.counts() == {("", "dead"): 2}


# --- when it cannot be stored -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (StorageError("the disk is full"), "journal_failed"),
        (JournalFullError("max_bytes", refused=[OTHER.key]), "journal_full"),
    ],
)
def test_what_the_journal_cannot_take_stays_with_vod_and_its_batch_mates_do_not(
    line, lines, monkeypatch, error, reason
):
    def broken(letters):
        raise error

    monkeypatch.setattr(line.journal, "store", broken)
    line.routes = [Route(sinks=("a",), event_types=("NewFileUpload",)), Route(sinks=("b",), event_types=("Unheard",))]
    line.sinks["b"].fail_always(RejectedError("no"))
    assert line.process(("h1", event(1)), ("h", OTHER)) == ["h1"]
    assert [(line["settlement"], line["reason"]) for line in named(lines, "event.settled")] == [
        ("confirm", "delivered"),
        ("leave", reason),
    ]
    assert named(lines, "event.dead") == []


@pytest.mark.parametrize("is_untried", [False, True])
def test_a_journal_that_cannot_be_read_delivers_and_confirms_nothing_that_is_not_stored(
    line, lines, monkeypatch, is_untried
):
    def unreadable(pairs):
        raise StorageError("cannot be read")

    monkeypatch.setattr(line.journal, "known", unreadable)
    monkeypatch.setattr(line.journal, "store", lambda letters: unreadable(()))
    assert one(line, is_untried=is_untried) == []
    assert line.sinks["a"].calls == []
    assert settled(lines) == [("leave", "journal_failed", False, {"a": "journal_failed", "b": "journal_failed"})]


def test_on_failure_leave_stores_nothing(line, lines):
    line.sinks["a"].fail_with(RejectedError("no"))
    assert one(line, source=Source(on_failure="leave")) == []
    assert line.journal.counts() == {}
    assert settled(lines) == [("leave", "left_by_configuration", False, {"a": "rejected", "b": "delivered"})]


def test_a_puller_that_is_needed_elsewhere_stores_what_its_sinks_have_not_taken(line):
    line.sinks["a"].gate.clear()
    started = time.monotonic()
    assert one(line, wait=DeliveryWait(min_wait_secs=0.02, should_yield=lambda: True)) == ["h1"]
    assert time.monotonic() - started < 5
    assert line.known(1, "a") is Known.PENDING


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_fate_of_an_event_is_one_line_with_its_ids(line, lines):
    content = {
        "EventType": "NewFileUpload",
        "SnapshotByTimeOffsetCompleteEvent": {
            "TaskId": "t-1",
            "FileId": "5285890784273533167",
            "SnapshotInfoSet": [{"ErrCode": 0, "TimeOffset": 10, "Url": "u"}, {"ErrCode": 70000, "TimeOffset": 20}],
        },
    }
    taken = make_event(content, source="main", sub_app_id=None)
    line.process(("h1", taken))
    (said,) = named(lines, "event.settled")
    assert said["level"] == "info"
    assert (said["source"], said["event_type"], said["key"]) == ("main", "NewFileUpload", taken.key.hex())
    assert said["routes"] == ("r",)
    assert (said["pull_request_id"], said["confirm_request_id"]) == ("r-pull", "r-confirm")
    assert said["sinks"]["a"] == {"outcome": "delivered", "reason": "delivered"}
    assert (said["task_id"], said["file_id"]) == ("t-1", "5285890784273533167")
    assert said["failed_snapshots"] == [{"time_offset_ms": 20, "err_code": 70000}]
    assert 0 <= said["duration_secs"] < 20
    assert 0 < said["lease_left_secs"] <= 30


def test_events_are_counted_by_many_pullers_at_once(line):
    events = [(f"h{number}", event(number)) for number in range(8)]

    def puller():
        for _ in range(5):
            line.process(*events)

    pullers = [threading.Thread(target=puller) for _ in range(4)]
    for thread in pullers:
        thread.start()
    for thread in pullers:
        thread.join(20)
    assert (line.telemetry.total(Count.EVENTS_SETTLED), line.pipeline.unconfirmed_events) == (160, 0)
    assert line.telemetry.total(Count.CONFIRMS, result="confirmed", source="main") == 160
    outcomes = {
        outcome: line.telemetry.total(Count.SINK_DELIVERIES, outcome=outcome) for outcome in ("delivered", "known")
    }
    assert sum(outcomes.values()) == 320
    settled = line.telemetry.numbers().durations[Duration.EVENT_SETTLE, (("source", "main"),)]
    assert sum(settled.numbers) == 160
    assert line.pipeline.last_confirm_at > 0


def test_an_undocumented_type_is_counted_under_another_name(line):
    line.routes = [Route(sinks=("a",))]
    line.process(("h1", event(1)), ("h2", event(2, event_type="InventedByAnEvent")), ("h3", event(3, event_type="")))
    types = {
        label: line.telemetry.total(Count.EVENTS_RECEIVED, event_type=label) for label in ("NewFileUpload", "other")
    }
    assert types == {"NewFileUpload": 1, "other": 2}
    assert line.telemetry.total(Count.EVENTS_RECEIVED) == 3


@pytest.mark.parametrize(("lease_secs", "expired"), [(0.0, 1), (30.0, 0)])
def test_an_event_whose_lease_ended_unconfirmed_is_counted(line, lease_secs, expired):
    line.vod.refusal = OperatorError("no right", error_code="UnauthorizedOperation")
    line.process(("h1", event(1)), lease_secs=lease_secs)
    assert line.telemetry.total(Count.LEASES_EXPIRED, source="main") == expired


def test_an_event_that_is_left_on_purpose_has_no_expired_lease(line):
    line.process(("h1", event(1, event_type="Other")), source=Source(unrouted="leave"), lease_secs=0.0)
    assert line.telemetry.total(Count.LEASES_EXPIRED) == 0


def test_the_fates_of_the_last_events_are_kept_with_short_texts(line, lines):
    long = event(1, FileUploadEvent={"FileId": "f" * 1_000_000, "TaskId": "t"})
    line.process(("h1", long))
    ((_, kept),) = line.telemetry.recent()
    assert (kept["file_id"], kept["task_id"], kept["reason"]) == ("f" * 200, "t", "delivered")
    (said,) = named(lines, "event.settled")
    assert len(said["file_id"]) == 1_000_000


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
def test_the_line_names_what_came_of_the_confirm_and_of_which_call(line, lines, error, result):
    line.vod.refusal = error
    one(line)
    (said,) = named(lines, "event.settled")
    assert (said["confirm_result"], said["confirmed"]) == (result, error is None)
    if getattr(error, "error_code", ""):
        assert (said["confirm_error_code"], said["confirm_request_id"]) == (error.error_code, "r-9")


@pytest.mark.parametrize(
    ("error", "result"), [(TransientError("lost"), "no_answer"), (ThrottledError("slower"), "throttled")]
)
def test_a_confirm_that_fails_until_the_lease_ends_says_how(line, lines, error, result):
    line.vod.refusal = error
    one(line, lease_secs=0.3)
    assert named(lines, "event.settled")[0]["confirm_result"] == result


def test_a_handle_that_is_refused_after_a_lost_answer_is_said_to_be_so(line, lines):
    errors = [TransientError("lost"), RefusedHandlesError("stale")]

    def fail():
        line.vod.refusal = errors.pop(0)

    line.vod.at_confirm = fail
    one(line)
    (said,) = named(lines, "event.settled")
    assert (said["confirm_result"], said["confirmed"]) == ("refused_after_lost", False)
    line.journal.flush()
    assert line.rows("SELECT confirmed_at IS NOT NULL FROM ledger") == [
        (1,),
        (1,),
    ]  # VOD has forgotten it: an equal event in ten minutes is a new one
    assert line.pipeline.unconfirmed_events == 0


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("a bug")])
def test_an_unforeseen_error_leaves_no_event_without_its_line(line, lines, monkeypatch, error):
    def broken(letters):
        raise error

    line.sinks["a"].fail_always(RejectedError("no"))
    monkeypatch.setattr(line.journal, "store", broken)
    with pytest.raises(type(error)):
        line.process(("h1", event(1)), ("h2", event(2)))
    assert line.vod.confirmed == []
    assert [line["confirmed"] for line in named(lines, "event.settled")] == [False, False]


# --- one handle for several events ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_handle_is_confirmed_only_if_every_event_that_has_it_may_be(line, lines, where):
    items = [("shared", event(1)), ("shared", event(2)), ("alone", event(3))]
    items.insert(where, ("shared", OTHER))
    assert line.process(*items, source=Source(unrouted="leave")) == ["alone"]
    reasons = [(line["event_type"], line["reason"], line["confirmed"]) for line in named(lines, "event.settled")]
    assert reasons.count(("NewFileUpload", "shared_handle", False)) == 2
    assert reasons.count(("NewFileUpload", "delivered", True)) == 1
    assert reasons.count(("Unheard", "no_route", False)) == 1


def test_a_handle_that_a_malformed_event_shares_is_kept_with_it(line, lines):
    source = Source(on_failure="leave")
    assert line.process(("hm", event(1)), ("h2", event(2)), malformed=[malformed("hm")], source=source) == ["h2"]
    assert [line["reason"] for line in named(lines, "event.settled")] == [
        "shared_handle",
        "delivered",
        "left_by_configuration",
    ]


def test_a_handle_whose_events_may_all_be_confirmed_is_confirmed_once(line):
    assert line.process(("shared", event(1)), ("shared", event(2))) == ["shared"]


# --- why it was stored ------------------------------------------------------------------------------------------------


def stored(line, columns="reason, error"):
    return line.rows(f"SELECT {columns} FROM letters ORDER BY id")


@pytest.fixture
def sick(line):
    """A line whose sink `a` has a breaker that one failure opens."""
    line.workers["a"].stop()
    line.workers["a"] = Worker(
        name="a",
        sink=line.sinks["a"],
        ledger=line.journal,
        in_flight=line.in_flight,
        queue_max_events=1,
        breaker_failures=1,
        telemetry=Telemetry(line.log),
        liveness=Liveness(),
    )
    line.workers["a"].start()
    return line


@pytest.mark.parametrize(
    ("error", "reason", "why"),
    [
        (TransientError("connection refused"), "sink_down", r"down since 20\d\d-.*Z: connection refused"),
        (TransientError("429", retry_after_secs=90.0), "sink_paused", r"asked to wait until 20\d\d-.*Z: 429"),
    ],
)
def test_an_event_that_was_not_attempted_is_stored_with_the_reason(sick, lines, error, reason, why):
    sick.sinks["a"].fail_always(error)
    one(sick, 1)
    one(sick, 2)
    assert settled(lines)[1] == ("store", reason, True, {"a": reason, "b": "delivered"})
    (_, (second_reason, second_error)) = stored(sick)
    assert second_reason == reason
    assert re.search(why, second_error)


def test_an_event_that_finds_the_queue_full_is_stored_with_the_reason(sick, lines):
    sick.sinks["a"].gate.clear()
    sick.process(*((f"h{number}", event(number)) for number in range(4)), lease_secs=5.4)
    reasons = [line["sinks"]["a"]["reason"] for line in named(lines, "event.settled")]
    assert reasons.count("queue_full") >= 2
    assert set(reasons) == {"queue_full", "out_of_time"}
    assert sorted(reason for (reason,) in stored(sick, "reason")) == sorted(reasons)
    assert all(error for (error,) in stored(sick, "error"))


@pytest.mark.parametrize(("at_sink", "place"), [(True, "had not answered"), (False, "waited in the sink's queue")])
def test_an_event_that_a_stop_interrupts_is_stored_with_the_reason(line, lines, at_sink, place):
    line.sinks["a"].gate.clear()
    if not at_sink:
        line.process(("h0", event(0)), lease_secs=5.1)
    wait = DeliveryWait()
    thread = threading.Thread(target=one, args=(line,), kwargs={"wait": wait})
    thread.start()
    until(lambda: wait.is_waiting and line.sinks["a"].calls and line.known(1, "b") is Known.ACCEPTED)
    wait.interrupt(stopping=True)
    thread.join(10)
    assert settled(lines)[-1] == ("store", "stopping", True, {"a": "stopping", "b": "delivered"})
    assert place in stored(line)[-1][1]


def test_what_a_stopped_worker_does_not_take_says_so(line, lines):
    line.workers["a"].stop()
    one(line)
    assert stored(line) == [("stopping", "the daemon was stopping")]


def test_what_is_known_already_says_so(line, lines):
    line.sinks["a"].fail_with(TransientError("down", retry_after_secs=60.0))
    line.vod.refusal = RefusedHandlesError("stale")
    one(line)
    line.vod.refusal = None
    one(line)
    assert settled(lines)[-1] == ("store", "already_stored", True, {"a": "already_stored", "b": "already_delivered"})
    assert stored(line, "reason, error, attempts") == [("sink_failed", "down", 1)]


def test_a_second_pipeline_on_the_same_journal_after_a_crash_delivers_nothing_twice(tmp_path, log):
    line = Line(tmp_path, log)
    line.vod.refusal = RefusedHandlesError("stale")
    one(line)
    line.close()
    with closing(Line(tmp_path, log)) as again:
        assert one(again) == ["h1"]
        assert again.sinks["a"].calls == []
