import os
import socket
import threading
import time
import uuid

import pytest

from vodpoller.liveness import Liveness
from vodpoller.systemd import Notifier


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    """A service manager's socket: (what NOTIFY_SOCKET holds, the socket)."""
    name = f"vodpoller-{uuid.uuid4()}"
    address, bound = (str(tmp_path / "n"),) * 2 if request.param == "path" else (f"@{name}", f"\0{name}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(bound)
        listening.settimeout(5)
        yield address, listening


def received(listening):
    return listening.recv(65536)


def silent(listening):
    listening.settimeout(0.02)
    with pytest.raises(TimeoutError):
        listening.recv(65536)
    return True


@pytest.mark.parametrize("address", ["", "/nonexistent/socket", "@nothing-listens-here", "/" + "x" * 300])
def test_a_manager_that_does_not_listen_causes_no_error(address):
    notifier = Notifier(address)
    notifier.ready()
    notifier.status("fine")
    notifier.alive()
    notifier.stopping()


@pytest.mark.parametrize(
    ("method", "datagram"), [("ready", b"READY=1"), ("stopping", b"STOPPING=1"), ("alive", b"WATCHDOG=1")]
)
def test_each_state_is_one_datagram(manager, method, datagram):
    address, listening = manager
    getattr(Notifier(address), method)()
    assert received(listening) == datagram


def test_a_reload_sends_the_time_when_it_began(manager):
    address, listening = manager
    before = time.monotonic_ns() // 1000
    Notifier(address).reloading()
    state, began = received(listening).split(b"\n")
    assert state == b"RELOADING=1"
    name, _, usec = began.partition(b"=")
    assert name == b"MONOTONIC_USEC"
    assert before <= int(usec) <= time.monotonic_ns() // 1000


@pytest.mark.parametrize(
    ("secs", "datagram"), [(120, b"EXTEND_TIMEOUT_USEC=120000000"), (0.5, b"EXTEND_TIMEOUT_USEC=500000")]
)
def test_extend_asks_for_more_time_to_start(manager, secs, datagram):
    address, listening = manager
    Notifier(address).extend(secs)
    assert received(listening) == datagram


def test_several_assignments_are_lines_of_one_datagram(manager):
    address, listening = manager
    Notifier(address).notify("READY=1", "STATUS=fine")
    assert received(listening) == b"READY=1\nSTATUS=fine"


def test_a_status_is_sent_only_if_it_changed(manager):
    address, listening = manager
    notifier = Notifier(address)
    for text in ("fine", "fine", "worse", "worse"):
        notifier.status(text)
    assert received(listening) == b"STATUS=fine"
    assert received(listening) == b"STATUS=worse"
    assert silent(listening)


def test_a_status_of_several_lines_assigns_nothing_else(manager):
    address, listening = manager
    Notifier(address).status("cannot pull:\r\n<html>\nSTOPPING=1\n")
    assert received(listening) == b"STATUS=cannot pull: <html> STOPPING=1"


def test_characters_of_a_status_that_cannot_be_encoded_are_replaced(manager):
    address, listening = manager
    Notifier(address).status("VOD says \ud800")
    assert received(listening) == b"STATUS=VOD says ?"


def test_a_status_too_long_for_a_datagram_causes_no_error(manager):
    Notifier(manager[0]).status("x" * 10_000_000)


@pytest.mark.parametrize(
    ("environ", "secs"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "60000000"}, 60.0),
        ({"WATCHDOG_USEC": "1500000", "WATCHDOG_PID": str(os.getpid())}, 1.5),
        ({"WATCHDOG_USEC": "1500000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_period_must_be_meant_for_this_process(environ, secs):
    assert Notifier.of(environ).watchdog_secs == secs


# --- liveness ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def liveness(clock):
    return Liveness(monotonic=clock)


def in_other_thread(task, *args):
    """Run the task in a thread that then stays, since the identity of an ended thread may be used again."""
    done, end = threading.Event(), threading.Event()

    def run():
        task(*args)
        done.set()
        end.wait(10)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert done.wait(10)
    return end.set


def test_a_step_past_its_deadline_and_the_grace_is_overdue(liveness, clock):
    liveness.begin("puller main", 10.0)
    clock.advance(40.0)
    assert liveness.overdue(30.0) == {}
    clock.advance(0.5)
    assert liveness.overdue(30.0) == {"puller main": 30.5}


def test_a_step_that_ended_is_never_overdue(liveness, clock):
    liveness.begin("puller main", 10.0)
    liveness.end()
    clock.advance(1000.0)
    assert liveness.overdue(30.0) == {}


def test_an_end_without_a_beginning_does_no_harm(liveness):
    liveness.end()
    assert liveness.overdue(0.0) == {}


def test_a_new_step_of_a_thread_replaces_the_last_one(liveness, clock):
    liveness.begin("a", 10.0)
    clock.advance(100.0)
    liveness.begin("b", 10.0)
    assert liveness.overdue(30.0) == {}


@pytest.mark.parametrize("hung_first", [True, False])
def test_a_hanging_thread_is_not_hidden_by_one_of_the_same_name(liveness, clock, hung_first):
    release = in_other_thread(liveness.begin, "sink hook", 1.0 if hung_first else 1000.0)
    liveness.begin("sink hook", 1000.0 if hung_first else 1.0)
    clock.advance(100.0)
    assert liveness.overdue(30.0) == {"sink hook": 99.0}
    release()


def test_of_two_hanging_threads_the_longest_counts(liveness, clock):
    release = in_other_thread(liveness.begin, "sink hook", 1.0)
    clock.advance(10.0)
    liveness.begin("sink hook", 1.0)
    clock.advance(90.0)
    assert liveness.overdue(30.0) == {"sink hook": 99.0}
    release()
