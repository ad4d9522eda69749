import threading
import time
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property

import pytest

from tests.helpers import MemorySink, event, named, until
from vodpoller.confirmer import Confirmer
from vodpoller.delivery import InFlight, Latch, Worker
from vodpoller.errors import RefusedHandlesError, RejectedError, StorageError, TransientError
from vodpoller.events import Lease, Malformed, PulledEvent, make_event
from vodpoller.journal import Journal, Known
from vodpoller.pipeline import Pipeline
from vodpoller.router import Router
from vodpoller.systemd import Liveness
from vodpoller.vod import Pull


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


class FakeVod:
    """Hands out what a test queues, and remembers what was confirmed."""

    def __init__(self):
        self.confirmed = []
        self.events = ()
        self.malformed = ()
        self.lease_secs = 30.0
        self.failure = None
        self.refusal = None
        self.at_confirm = lambda: None

    def pull(self, source, sub_app_id):
        if self.failure is not None:
            raise self.failure
        lease = Lease(starts_at=time.monotonic(), secs=self.lease_secs)
        return Pull(
            events=tuple(self.events), malformed=tuple(self.malformed), lease=lease, hung_secs=0.0, request_id="r-1"
        )

    def confirm(self, sub_app_id, handles, timeout_secs=None):
        self.at_confirm()
        if self.refusal is not None:
            raise self.refusal
        self.confirmed += handles


class Line:
    """A whole pipeline on a real journal, with real workers and sinks in memory."""

    def __init__(self, tmp_path, log, sinks=("a", "b")):
        self.log = log
        self.vod = FakeVod()
        self.in_flight = InFlight()
        self.journal = Journal(tmp_path / "journal.db", max_bytes=10**7, ledger_days=14, log=log)
        self.journal._writer.execute("PRAGMA busy_timeout = 0")
        self.sinks = {name: MemorySink(batch_events=16) for name in sinks}
        self.workers = {
            name: Worker(
                name=name,
                sink=sink,
                ledger=self.journal,
                in_flight=self.in_flight,
                queue_max_events=100,
                breaker_failures=100,
                log=log,
                liveness=Liveness(),
            )
            for name, sink in self.sinks.items()
        }
        for worker in self.workers.values():
            worker.start()
        self.routes = [Route(sinks=tuple(sinks), event_types=("NewFileUpload",))]

    @cached_property
    def pipeline(self):
        return Pipeline(
            vod=self.vod,
            router=Router(self.routes),
            workers=self.workers,
            in_flight=self.in_flight,
            journal=self.journal,
            confirmer=Confirmer(vod=self.vod, log=self.log),
            confirm_reserve_secs=5.0,
            requests_per_sec=100.0,
            log=self.log,
        )

    def cycle(self, *events, source=None, latch=None, lease_secs=30.0, malformed=()):
        self.vod.events = [PulledEvent(handle=handle, event=event) for handle, event in events]
        self.vod.malformed = malformed
        self.vod.lease_secs = lease_secs
        self.vod.confirmed.clear()
        self.answers = []
        self.pipeline.cycle(source or Source(), on_answer=self.answers.append, latch=latch or Latch())
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
    return line.cycle((f"h{number}", event(number)), **more)


def settled(lines):
    return [(line["settlement"], line["confirmed"], line["sinks"]) for line in named(lines, "event.settled")]


OTHER = make_event({"EventType": "Unheard", "E": {"TaskId": "t-1"}}, source="main", sub_app_id=None)


# --- the pull ---------------------------------------------------------------------------------------------------------


def test_a_pull_that_fails_is_the_lane_s_to_judge(line):
    line.vod.failure = TransientError("no answer")
    with pytest.raises(TransientError):
        line.cycle()
    assert line.answers == []


def test_an_empty_answer_confirms_and_says_nothing(line, lines):
    assert line.cycle() == []
    assert len(line.answers) == 1
    assert lines == []


def test_the_answer_is_told_before_anything_is_delivered(line):
    line.sinks["a"].gate.clear()
    told = threading.Event()
    line.vod.events = [PulledEvent(handle="h1", event=event(1))]
    cycle = threading.Thread(
        target=line.pipeline.cycle,
        args=(Source(),),
        kwargs={"on_answer": lambda pull: line.sinks["a"].calls or told.set(), "latch": Latch()},
    )
    cycle.start()
    assert told.wait(10)
    line.sinks["a"].gate.set()
    cycle.join(10)


# --- unrouted, malformed, where ---------------------------------------------------------------------------------------


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
        assert line.cycle(("h", OTHER), source=Source(unrouted=unrouted)) == confirmed
    assert line.journal.counts() == counts
    assert len(named(lines, "event.left")) == (unrouted == "leave")
    assert bool(named(lines, "event.dead")) == bool(counts)


def test_an_unrouted_event_costs_its_batch_mates_nothing(line):
    assert line.cycle(("h", OTHER), ("h1", event(1)), source=Source(unrouted="leave")) == ["h1"]
    assert line.known(1, "a") is Known.ACCEPTED


def malformed(handle="hm"):
    return Malformed(handle=handle, event=OTHER, why="it is not JSON")


@pytest.mark.parametrize(
    ("on_failure", "confirmed", "counts"), [("store", ["h1", "hm"], {("", "dead"): 1}), ("leave", ["h1"], {})]
)
def test_a_malformed_event_is_a_dead_letter_and_costs_its_batch_mates_nothing(
    line, lines, on_failure, confirmed, counts
):
    assert line.cycle(("h1", event(1)), malformed=[malformed()], source=Source(on_failure=on_failure)) == confirmed
    assert line.journal.counts() == counts
    assert named(lines, "event.malformed")[0]["has_handle"] is True


def test_of_a_malformed_event_without_a_handle_there_is_a_line(line, lines):
    assert line.cycle(("h1", event(1)), malformed=[malformed(None)]) == ["h1"]
    assert line.journal.counts() == {}
    assert named(lines, "event.malformed")[0]["has_handle"] is False


def test_a_where_that_fails_rejects_the_event_at_its_sink_and_not_at_the_others(line, lines):
    line.routes = [Route(sinks=("a",), where="length(Missing)"), Route(sinks=("b",))]
    assert one(line) == ["h1"]
    assert line.known(1, "a") is Known.DEAD
    assert line.known(1, "b") is Known.ACCEPTED
    assert settled(lines) == [("store", True, {"a": "rejected", "b": "delivered"})]
    assert "`where` cannot be evaluated" in named(lines, "event.dead")[0]["error_message"]


# --- delivering -------------------------------------------------------------------------------------------------------


def test_one_dead_sink_of_two_keeps_nothing_from_the_other(line, lines):
    line.sinks["a"].fail_always(RejectedError("no"))
    assert line.cycle(("h1", event(1)), ("h2", event(2))) == ["h1", "h2"]
    assert [line.known(number, "a") for number in (1, 2)] == [Known.DEAD] * 2
    assert [line.known(number, "b") for number in (1, 2)] == [Known.ACCEPTED] * 2
    assert settled(lines) == [("store", True, {"a": "rejected", "b": "delivered"})] * 2


def test_what_every_sink_accepted_is_confirmed_and_not_stored(line, lines):
    assert line.cycle(("h1", event(1)), ("h2", event(2))) == ["h1", "h2"]
    assert line.journal.counts() == {}
    assert settled(lines) == [("confirm", True, {"a": "delivered", "b": "delivered"})] * 2


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
    assert line.cycle(("h1", event(1)), ("h2", event(1))) == ["h1", "h2"]
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
    assert settled(lines) == [("store", True, {"a": "unsettled", "b": "delivered"})]


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


def test_a_success_that_comes_between_the_decision_and_the_storing_leaves_no_row(line, monkeypatch):
    decide = line.pipeline._letters
    line.sinks["a"].gate.clear()

    def late(item):
        line.sinks["a"].gate.set()
        until(lambda: len(line.in_flight) == 0)
        return decide(item)

    monkeypatch.setattr(line.pipeline, "_letters", late)
    assert one(line, lease_secs=5.1) == ["h1"]
    assert line.journal.counts() == {}
    assert line.known(1, "a") is Known.ACCEPTED


def test_a_wait_that_a_sink_asked_for_is_stored_with_the_event(line):
    line.sinks["a"].fail_always(TransientError("busy", retry_after_secs=600.0))
    one(line)
    assert line.journal._reader.execute("SELECT due_at - stored_at FROM letters").fetchall() == [(600.0,)]


def test_an_error_that_nobody_foresaw_leaves_no_pair_on_its_way_for_ever(line, monkeypatch):
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
    again = threading.Thread(target=one, args=(line,), kwargs={"source": Source(on_failure="leave")})
    again.start()
    until(lambda: line.in_flight._deliveries[event(1).key, "a"].latches)
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


# --- when it cannot be stored -----------------------------------------------------------------------------------------


def test_what_the_journal_cannot_take_stays_with_vod_and_its_batch_mates_do_not(line, lines, monkeypatch):
    def broken(letters):
        raise StorageError("the disk is full")

    monkeypatch.setattr(line.journal, "store", broken)
    line.routes = [Route(sinks=("a",), event_types=("NewFileUpload",)), Route(sinks=("b",), event_types=("Unheard",))]
    line.sinks["b"].fail_always(RejectedError("no"))
    assert line.cycle(("h1", event(1)), ("h", OTHER)) == ["h1"]
    assert [line["settlement"] for line in named(lines, "event.settled")] == ["confirm", "leave"]
    assert named(lines, "event.dead") == []
    assert named(lines, "journal.failed")


def test_a_journal_that_cannot_be_read_delivers_and_confirms_nothing_that_is_not_stored(line, monkeypatch):
    def unreadable(pairs):
        raise StorageError("cannot be read")

    monkeypatch.setattr(line.journal, "known", unreadable)
    monkeypatch.setattr(line.journal, "store", lambda letters: unreadable(()))
    assert one(line) == []
    assert line.sinks["a"].calls == []


def test_on_failure_leave_stores_nothing(line, lines):
    line.sinks["a"].fail_with(RejectedError("no"))
    assert one(line, source=Source(on_failure="leave")) == []
    assert line.journal.counts() == {}
    assert settled(lines) == [("leave", False, {"a": "rejected", "b": "delivered"})]


def test_a_lane_that_is_needed_elsewhere_stores_what_its_sinks_have_not_taken(line):
    line.sinks["a"].gate.clear()
    started = time.monotonic()
    assert one(line, latch=Latch(patience_secs=0.02, is_needed=lambda: True)) == ["h1"]
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
    line.cycle(("h1", taken))
    (said,) = named(lines, "event.settled")
    assert said["level"] == "info"
    assert (said["source"], said["event_type"], said["key"]) == ("main", "NewFileUpload", taken.key.hex())
    assert (said["task_id"], said["file_id"]) == ("t-1", "5285890784273533167")
    assert said["failed_snapshots"] == [{"time_offset_ms": 20, "err_code": 70000}]
    assert 0 <= said["duration_secs"] < 20
    assert 0 < said["lease_left_secs"] <= 30


def test_events_are_counted_by_many_lanes_at_once(line):
    pipeline = line.pipeline
    line.vod.events = [PulledEvent(handle=f"h{number}", event=event(number)) for number in range(8)]
    line.vod.refusal = RefusedHandlesError("stale")

    def lane():
        for _ in range(5):
            pipeline.cycle(Source(), on_answer=lambda pull: None, latch=Latch())

    lanes = [threading.Thread(target=lane) for _ in range(4)]
    for thread in lanes:
        thread.start()
    for thread in lanes:
        thread.join(20)
    assert (pipeline.settled_events, pipeline.unsettled_events) == (160, 160)
    assert pipeline.last_pull_at > 0
    assert pipeline.last_confirm_at == 0


def test_a_second_pipeline_on_the_same_journal_after_a_crash_delivers_nothing_twice(tmp_path, log):
    line = Line(tmp_path, log)
    line.vod.refusal = RefusedHandlesError("stale")
    one(line)
    line.close()
    with closing(Line(tmp_path, log)) as again:
        assert one(again) == ["h1"]
        assert again.sinks["a"].calls == []
