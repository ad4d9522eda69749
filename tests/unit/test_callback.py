"""Received callbacks: from the socket to the sinks, and the answer."""

import hashlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from ipaddress import ip_network

import pytest

from tests.callbacks import OK, Receiving, Source, body, request, said
from tests.helpers import named
from tests.polling import until
from vodpoller.callback import receiver, server
from vodpoller.errors import RejectedError, SkippedError, StorageError, TransientError
from vodpoller.secret import Secret


@pytest.fixture
def receiving(tmp_path, log):
    made = Receiving(tmp_path, log)
    yield made
    made.close()


@pytest.fixture
def unanswered(monkeypatch):
    """A context for requests that are to get no answer: their connections end sooner. Others would get none in time."""

    @contextmanager
    def context():
        with monkeypatch.context() as patched:
            patched.setattr(server, "ANSWER_SECS", 0.3)
            yield

    return context


def settled(lines, number=1):
    return until(lambda: (found := named(lines, "event.settled"))[number - 1 :] and found)


# --- answered, and not answered ---------------------------------------------------------------------------------------


def test_an_event_that_cannot_be_stored_is_not_answered(receiving, lines, monkeypatch, unanswered):
    receiving.start()
    receiving.sink.fail_always(RejectedError("never"))
    monkeypatch.setattr(receiving.journal, "store", raise_(StorageError("the disk is full")))
    with unanswered():
        assert receiving.push(body()) is None
    (line,) = settled(lines)
    assert (line["settlement"], line["reason"], line["confirmed"]) == ("leave", "journal_failed", False)
    until(lambda: receiving.counted("unanswered") == 1)


@pytest.mark.system
def test_events_that_come_again_after_a_full_disk_are_delivered(receiving, lines, monkeypatch, unanswered):
    receiving.start()
    receiving.sink.fail_always(RejectedError("never"))
    with monkeypatch.context() as full, unanswered():
        full.setattr(receiving.journal, "store", raise_(StorageError("the disk is full")))
        assert [receiving.push(body(number)) for number in range(3)] == [None] * 3
        settled(lines, 3)
    receiving.sink.behaviour = lambda events: None
    assert [receiving.push(body(number)) for number in range(3)] == [OK] * 3
    assert len(set(receiving.sink.accepted)) == 3


def test_an_occurrence_that_cannot_be_written_is_not_answered(receiving, lines, monkeypatch, unanswered):
    receiving.start()
    monkeypatch.setattr(receiving.journal, "identify", raise_(StorageError("the disk is full")))
    with unanswered():
        assert receiving.push({"EventType": "FileDeleted", "FileDeleteEvent": {}}) is None
    assert settled(lines)[0]["reason"] == "journal_failed"
    assert not receiving.sink.accepted


def test_a_callback_is_answered_with_200_and_an_empty_body(receiving, lines):
    receiving.start()
    assert receiving.push(body()) == OK
    (line,) = settled(lines)
    assert (line["settlement"], line["reason"], line["confirm_result"]) == ("confirm", "delivered", "confirmed")
    assert (line["source"], line["pull_request_id"]) == ("pushed", "")
    assert line["lease_left_secs"] + line["duration_secs"] == pytest.approx(4, abs=0.01)
    until(lambda: receiving.counted("accepted") == 1)


def test_an_event_that_comes_again_reaches_its_sink_once(receiving, lines):
    receiving.start()
    assert reason_of(receiving, lines) == (OK, "confirm", "delivered")
    assert reason_of(receiving, lines) == (OK, "confirm", "already_delivered")
    assert len(receiving.sink.accepted) == 1


def raise_(error):
    def fail(*_args, **_kwargs):
        raise error

    return fail


# --- each reason ------------------------------------------------------------------------------------------------------


def reason_of(receiving, lines, content=None):
    """Push an event; return its answer, settlement and reason. Its line is written only after the answer."""
    before = len(named(lines, "event.settled"))
    answer = receiving.push(body() if content is None else content)
    line = settled(lines, before + 1)[-1]
    return answer, line["settlement"], line["reason"]


def test_what_a_sink_rejects_is_stored_and_answered(receiving, lines):
    receiving.start()
    receiving.sink.fail_always(RejectedError("never"))
    assert reason_of(receiving, lines) == (OK, "store", "rejected")
    assert reason_of(receiving, lines) == (OK, "store", "already_stored")


def test_what_a_sink_skips_is_answered(receiving, lines):
    receiving.start()

    def skip(event):
        raise SkippedError("nothing to send")

    receiving.sink.examined = skip
    assert reason_of(receiving, lines) == (OK, "confirm", "skipped")
    assert receiving.sink.calls == []


def test_what_no_route_takes_is_a_dead_letter(receiving, lines):
    receiving.start()
    assert reason_of(receiving, lines, {"EventType": "Unknown", "UnknownEvent": {"TaskId": "1"}}) == (
        OK,
        "store",
        "no_route",
    )


def test_what_no_route_takes_is_dropped_if_so_configured(receiving, lines):
    receiving.start(unrouted="confirm")
    assert reason_of(receiving, lines, {"EventType": "Unknown"}) == (OK, "confirm", "no_route")


@pytest.mark.system
def test_an_event_for_a_failing_sink_is_stored_before_the_answer(receiving, lines):
    receiving.start()
    receiving.sink.fail_always(TransientError("away"))
    assert reason_of(receiving, lines) == (OK, "store", "sink_failed")
    assert receiving.journal.counts() == {("archive", "pending"): 1}


def test_an_event_for_a_sink_that_is_down_is_stored_at_once(tmp_path, log, lines):
    made = Receiving(tmp_path, log, breaker_failures=1)
    with closing(made.start()) as receiving:
        receiving.sink.fail_always(TransientError("away"))
        assert reason_of(receiving, lines, body(1)) == (OK, "store", "sink_failed")
        assert reason_of(receiving, lines, body(2)) == (OK, "store", "sink_down")


def test_an_event_for_a_sink_in_a_pause_is_stored(receiving, lines):
    receiving.start()
    receiving.sink.fail_always(TransientError("busy", retry_after_secs=60))
    assert reason_of(receiving, lines, body(1)) == (OK, "store", "sink_failed")
    assert reason_of(receiving, lines, body(2)) == (OK, "store", "sink_paused")


@pytest.mark.system
def test_an_event_is_stored_if_its_sink_is_not_done_in_time(receiving, lines):
    receiving.start()
    receiving.sink.gate.clear()
    assert reason_of(receiving, lines) == (OK, "store", "out_of_time")
    assert named(lines, "event.settled")[0]["duration_secs"] >= 3.4


def test_an_event_for_a_sink_whose_queue_is_full_is_stored(tmp_path, log, lines):
    made = Receiving(tmp_path, log, queue_max_events=1)
    with closing(made.start()) as receiving:
        receiving.sink.gate.clear()
        pushed = [threading.Thread(target=receiving.push, args=(body(number),)) for number in (1, 2)]
        for number, thread in enumerate(pushed, 1):
            thread.start()
            until(lambda number=number: len(receiving.in_flight) >= number)
            until(lambda: receiving.sink.calls)  # the first has left the queue
        assert reason_of(receiving, lines, body(3)) == (OK, "store", "queue_full")
        receiving.sink.gate.set()
        for thread in pushed:
            thread.join()


def test_an_event_is_stored_if_a_stop_runs_out_of_time(receiving, lines):
    receiving.start()
    receiving.sink.gate.clear()
    answers = []
    pushing = threading.Thread(target=lambda: answers.append(receiving.push(body())))
    pushing.start()
    until(lambda: receiving.sink.calls)
    receiving.receiver.stop()
    receiving.receiver.end_waits()
    pushing.join()
    assert answers == [OK]
    assert settled(lines)[0]["reason"] == "stopping"


def test_a_journal_without_room_leaves_the_event(tmp_path, log, lines, unanswered):
    made = Receiving(tmp_path, log, journal_max_bytes=200)
    with closing(made.start()) as receiving:
        receiving.sink.fail_always(RejectedError("never"))
        with unanswered():
            assert reason_of(receiving, lines) == (None, "leave", "journal_full")


def test_an_unreadable_body_that_looks_like_an_event_is_stored(receiving, lines):
    receiving.start()
    assert reason_of(receiving, lines, '{"EventType": "NewFileUpload", "FileUploadEvent": {') == (
        OK,
        "store",
        "malformed",
    )


def test_the_old_format_is_stored_and_logged_with_its_remedy(receiving, lines):
    receiving.start()
    old = {"version": "4.0", "eventType": "ClipComplete", "data": {"status": 0}}
    assert reason_of(receiving, lines, old) == (OK, "store", "malformed")
    (line,) = named(lines, "event.malformed")
    assert "set the callback format to 3.0" in line["error_message"]


# --- together ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def together(receiving, monkeypatch, unanswered):
    """Callbacks that arrive while the first is at its sink wait; `push` then lets it go on and returns all answers."""
    monkeypatch.setattr(receiver, "BATCHES_AT_ONCE", 1)
    monkeypatch.setattr(receiver, "LINGER_SECS", 60.0)

    def arrived():
        return receiving.receiver.status()[0].callbacks_in_flight + receiving.counted("unanswered")

    def push(contents, *, in_vain=None):
        receiving.sink.gate.clear()
        with ThreadPoolExecutor(8) as threads:
            first = threads.submit(receiving.push, body(0))
            until(lambda: receiving.sink.calls)
            later = []
            for content in contents:  # in this order
                with unanswered() if content is in_vain else nullcontext():
                    later.append(threads.submit(receiving.push, content))
                    until(lambda: arrived() == 1 + len(later))
            receiving.sink.gate.set()
            return [answer.result() for answer in (first, *later)]

    return push


def test_waiting_callbacks_query_the_journal_once(receiving, together, lines, monkeypatch):
    receiving.start()
    queries = []
    known = receiving.journal.known
    monkeypatch.setattr(receiving.journal, "known", lambda pairs: known(queries.append(list(pairs)) or queries[-1]))
    assert together([body(1), body(2), body(3)]) == [OK] * 4
    assert [len(pairs) for pairs in queries] == [1, 3]
    assert {line["reason"] for line in settled(lines, 4)} == {"delivered"}
    assert len(set(receiving.sink.accepted)) == 4
    until(lambda: receiving.counted("accepted") == 4)


def test_a_refused_callback_affects_no_other_that_waits(receiving, together, lines):
    receiving.start()
    old = {"version": "4.0", "eventType": "NewFileUpload", "data": {}}
    answers = together([body(1), b"\xff", old, body(2)])
    assert [answer[0] for answer in answers] == [200, 200, 400, 200, 200]
    assert sorted(line["reason"] for line in settled(lines, 4)) == ["delivered", "delivered", "delivered", "malformed"]
    until(lambda: receiving.counted("accepted") == 4)
    assert receiving.counted("not_an_event") == 1


def test_an_event_that_waits_twice_reaches_its_sink_once(receiving, together):
    receiving.start()
    assert together([body(1), body(1)]) == [OK] * 3
    assert len(receiving.sink.accepted) == 2


def test_an_error_in_reading_one_callback_affects_no_other(receiving, together, lines, monkeypatch):
    receiving.start()
    read = receiver.read_callback

    def fail_at_two(data, *args, **more):
        if data == json.dumps(body(2)).encode():
            raise ZeroDivisionError
        return read(data, *args, **more)

    monkeypatch.setattr(receiver, "read_callback", fail_at_two)
    assert together([body(1), failing := body(2), body(3)], in_vain=failing) == [OK, OK, None, OK]
    assert receiving.counted("unanswered") == 1
    assert named(lines, "callback.failed")


def test_the_newest_waiting_callback_is_processed_first(receiving, together, lines, monkeypatch):
    monkeypatch.setattr(receiver, "EVENTS_MAX", 1)
    receiving.start()
    assert together([body(1), body(2), body(3)]) == [OK] * 4
    assert [line["file_id"] for line in settled(lines, 4)] == ["0", "3", "2", "1"]


def test_if_too_many_callbacks_wait_the_oldest_is_not_answered(receiving, together, monkeypatch):
    monkeypatch.setattr(receiver, "WAITING_MAX", 2)
    receiving.start()
    assert together([oldest := body(1), body(2), body(3)], in_vain=oldest) == [OK, None, OK, OK]
    assert receiving.counted("unanswered") == 1


def test_a_callback_without_a_thread_waits_for_the_next_callback(receiving, monkeypatch, unanswered):
    receiving.start()
    start = threading.Thread.start

    def refuse(thread):
        if thread.name.startswith("callback_"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patched, unanswered():
        patched.setattr(threading.Thread, "start", refuse)
        assert receiving.push(body(1)) is None
    assert receiving.push(body(2)) == OK
    until(lambda: len(receiving.sink.accepted) == 2)
    until(lambda: not receiving.receiver.status()[0].callbacks_in_flight)


# --- beyond the maximum of events or connections ----------------------------------------------------------------------


def test_beyond_the_maximum_no_sink_is_tried_and_the_event_is_stored(receiving, lines):
    receiving.start(max_events_in_flight=1)
    receiving.sink.gate.clear()
    pushing = threading.Thread(target=receiving.push, args=(body(1),))
    pushing.start()
    until(lambda: receiving.sink.calls)
    assert reason_of(receiving, lines, body(2)) == (OK, "store", "queue_full")
    until(lambda: receiving.counted("stored_untried") == 1)
    receiving.sink.gate.set()
    pushing.join()
    assert len(receiving.sink.calls) == 1
    assert receiving.journal.counts() == {("archive", "pending"): 1}


def test_beyond_the_maximum_a_delivered_event_is_not_stored(receiving, lines):
    receiving.start(max_events_in_flight=1)
    assert receiving.push(body(2)) == OK
    until(lambda: not receiving.receiver.status()[0].callbacks_in_flight)
    receiving.sink.gate.clear()
    pushing = threading.Thread(target=receiving.push, args=(body(1),))
    pushing.start()
    until(lambda: len(receiving.sink.calls) == 2)
    assert reason_of(receiving, lines, body(2)) == (OK, "confirm", "already_delivered")
    receiving.sink.gate.set()
    pushing.join()


def test_an_event_whose_first_try_is_running_is_stored_at_once(receiving, lines):
    receiving.start(max_events_in_flight=1)
    receiving.sink.gate.clear()
    pushing = threading.Thread(target=receiving.push, args=(body(1),))
    pushing.start()
    until(lambda: receiving.sink.calls)
    assert reason_of(receiving, lines, body(1)) == (OK, "store", "queue_full")
    receiving.sink.gate.set()
    pushing.join()
    until(lambda: not receiving.journal.counts())  # the sink accepted it, so the stored event is deleted


def test_beyond_the_maximum_of_connections_the_next_one_waits(receiving):
    receiving.start(max_connections=2)
    with receiving.connect() as first, receiving.connect(), receiving.connect() as third:
        third.sendall(request(body()))
        until(lambda: receiving.receiver.status()[0].connections == 2)
        third.settimeout(0.2)
        with pytest.raises(TimeoutError):
            third.recv(1)
        third.settimeout(20)
        first.close()
        assert said(third).startswith(b"HTTP/1.1 200")


# --- permitted senders, and events that come again --------------------------------------------------------------------


def test_what_is_not_signed_is_answered_403(receiving, lines):
    receiving.start(sign_key=Secret(value="the-key-at-vod"))
    assert receiving.push(body()) == (403, b"")
    until(lambda: receiving.counted("bad_signature") == 1)
    assert named(lines, "callback.refused")[0]["refused_for"] == "bad_signature"
    assert not named(lines, "event.settled")


def test_what_is_refused_is_not_shown_as_the_last_callback(receiving):
    receiving.start(sign_key=Secret(value="the-key-at-vod"))
    receiving.push(body())
    until(lambda: not receiving.receiver.status()[0].callbacks_in_flight)
    assert receiving.receiver.status()[0].last_callback_at is None


def test_what_is_signed_and_expired_is_delivered_with_one_warning(receiving, lines):
    receiving.start(sign_key=Secret(value="the-key-at-vod"))
    sign = hashlib.md5(b"the-key-at-vod1000000000").hexdigest()
    for number in range(3):
        assert receiving.push(body(number, Sign=sign, T="1000000000")) == OK
    assert len(receiving.sink.accepted) == 3
    (line,) = named(lines, "callback.expired")
    assert (line["source"], line["level"]) == ("pushed", "warning")


def test_a_signed_event_is_the_same_as_without_its_signature(receiving, lines):
    receiving.start()
    assert reason_of(receiving, lines, body(1, Sign="0" * 32, T=1)) == (OK, "confirm", "delivered")
    assert reason_of(receiving, lines, body(1)) == (OK, "confirm", "already_delivered")


def test_a_callback_from_another_network_is_answered_403(receiving):
    receiving.start(allow_from=(ip_network("10.0.0.0/8"),), forwarded_from=(ip_network("127.0.0.1"),))
    assert receiving.push(body()) == (403, b"")
    assert receiving.push(body(), X_Forwarded_For="10.1.2.3") == OK
    until(lambda: (receiving.counted("not_allowed"), receiving.counted("accepted")) == (1, 1))


def test_two_sources_share_an_address(receiving, lines):
    receiving.start(Source(receiving.address), Source(receiving.address, name="other", path="/other", sub_app_id=7))
    assert receiving.push(body()) == OK
    settled(lines)
    assert receiving.push(body(), path="/other") == OK
    assert [line["source"] for line in settled(lines, 2)] == ["pushed", "other"]
    assert len(set(receiving.sink.accepted)) == 2


def test_equal_content_without_a_task_id_is_new_after_an_answer(receiving, lines):
    receiving.start()
    deleted = {"EventType": "FileDeleted", "FileDeleteEvent": {"FileIdSet": ["1"]}}
    assert reason_of(receiving, lines, deleted) == (OK, "confirm", "delivered")
    assert reason_of(receiving, lines, deleted) == (OK, "confirm", "delivered")
    assert len(set(receiving.sink.accepted)) == 2


@pytest.mark.system
def test_an_unanswered_event_without_a_task_id_keeps_its_key(receiving, lines, monkeypatch, unanswered):
    monkeypatch.setattr(receiver, "LEASE_SECS", 1.0)
    receiving.start()
    deleted = {"EventType": "FileDeleted", "FileDeleteEvent": {"FileIdSet": ["1"]}}
    receiving.sink.fail_always(RejectedError("never"))
    began_at = time.monotonic()
    with monkeypatch.context() as full, unanswered():
        full.setattr(receiving.journal, "store", raise_(StorageError("the disk is full")))
        assert receiving.push(deleted) is None
        settled(lines)
    receiving.sink.behaviour = lambda events: None
    until(lambda: time.monotonic() > began_at + 1.0)
    assert receiving.push(deleted) == OK
    first, second = settled(lines, 2)
    assert first["key"] == second["key"]
