"""The simulator pushes events as VOD's normal callbacks do."""

import contextlib
import hashlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import requests

from tests.polling import until
from tests.processes import HeldPort, environment
from tests.receiver import Answer
from vodpoller.simulator import pushing
from vodpoller.simulator.service import Simulator, SimulatorOptions


@pytest.fixture
def run():
    """Starts a simulator that pushes to a URL."""
    with contextlib.ExitStack() as stack:
        yield lambda url, **options: stack.enter_context(Simulator(SimulatorOptions(push=url, seed=7, **options)))


@pytest.fixture
def raw():
    """Starts a server that answers the first data of each connection with the given bytes, then closes it."""
    with contextlib.ExitStack() as stack:

        def start(answer):
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def serve():
                with contextlib.suppress(OSError):
                    while True:
                        connection, _ = server.accept()
                        with connection:
                            connection.recv(65536)
                            connection.sendall(answer)

            thread = threading.Thread(target=serve)
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown, socket.SHUT_RDWR)
            return f"http://127.0.0.1:{server.getsockname()[1]}/"

        yield start


def bodies(count):
    return [json.dumps({"EventType": "Numbered", "Numbered": {"N": number}}) for number in range(count)]


def final_stats(simulator):
    """Wait until every event is confirmed or lost, and return the stats."""

    def found():
        stats = simulator.stats()
        return stats if stats["confirmed"] + stats["lost"] == stats["fed"] else None

    return until(found, what=simulator.stats)


# --- not answered -----------------------------------------------------------------------------------------------------


def test_an_event_without_an_answer_in_time_is_lost_after_3_tries(run, receiver):
    receiver.answer = Answer(hangs=True)
    simulator = run(receiver.url, push_limit_secs=0.2)
    simulator.feed(bodies(2))
    stats = final_stats(simulator)
    assert (stats["lost"], stats["confirmed"], stats["pushes"], stats["pushes_unanswered"]) == (2, 0, 6, 6)
    assert stats["redeliveries"] == 4
    assert len(receiver.received) == 6
    rows = simulator.ledger(lost=True, bodies=True)
    assert [row["body"] for row in rows] == bodies(2)
    assert [(row["lost"], row["confirmed"], row["stranded"], row["times_delivered"]) for row in rows] == [
        (True, False, False, 3)
    ] * 2
    assert simulator.ledger(lost=True, start=1, count=1) == [simulator.ledger()[1]]


def test_a_port_where_no_process_listens_loses_the_event(run):
    with HeldPort() as port:
        simulator = run(port.url)
        simulator.feed(bodies(1))
        assert final_stats(simulator)["pushes_unanswered"] == 3


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000,
    ],
    ids=["nothing", "half a head", "not HTTP", "no status", "a hint", "endless"],
)
def test_an_incomplete_or_invalid_answer_does_not_count(run, raw, answer):
    simulator = run(raw(answer))
    simulator.feed(bodies(1))
    stats = final_stats(simulator)
    assert (stats["lost"], stats["pushes_unanswered"], stats["push_answers"]) == (1, 3, {})


@pytest.mark.system
def test_the_next_try_comes_as_soon_as_one_has_failed(run, receiver):
    receiver.answer = Answer(hangs=True)
    simulator = run(receiver.url, push_limit_secs=2.0)
    simulator.feed(bodies(1))
    until(lambda: len(receiver.received) == 1, what="the first try")
    receiver.answer = Answer()
    stats = final_stats(simulator)
    assert (stats["confirmed"], stats["lost"], stats["pushes"]) == (1, 0, 2)


# --- answered ---------------------------------------------------------------------------------------------------------


def test_each_event_is_posted_once_and_unchanged(run, receiver):
    simulator = run(f"{receiver.url}/of?app=1")
    fed = [*bodies(5), "{}", '{"EventType":"\\u4e2d\\/"}', "{broken", "not an object"]
    simulator.feed(fed)
    stats = final_stats(simulator)
    assert sorted(one.body.decode() for one in receiver.received) == sorted(fed)
    assert {(one.method, one.path) for one in receiver.received} == {("POST", "/callback/of?app=1")}
    assert receiver.received[0].headers == {
        "Host": f"127.0.0.1:{receiver.server_port}",
        "Content-Type": "application/json",
        "Content-Length": str(len(receiver.received[0].body)),
    }
    assert (stats["pushes"], stats["push_answers"], stats["redeliveries"]) == (9, {"204": 9}, 0)
    assert stats["birth_to_confirm_secs"]["p50"] > 0
    assert all(row["confirmed"] for row in simulator.ledger())


@pytest.mark.parametrize("status", [200, 404, 503])
def test_any_answer_counts_whatever_its_status(run, receiver, status):
    receiver.answer = Answer(status=status)
    simulator = run(receiver.url)
    simulator.feed(bodies(1))
    stats = final_stats(simulator)
    assert (stats["confirmed"], stats["pushes"], stats["push_answers"]) == (1, 1, {str(status): 1})


def test_an_early_hints_answer_is_not_the_final_answer(run, raw):
    simulator = run(raw(b"HTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\nHTTP/1.1 200 OK\r\n\r\n"))
    simulator.feed(bodies(1))
    assert final_stats(simulator)["push_answers"] == {"200": 1}


def test_initial_and_generated_events_are_pushed(run, receiver):
    final_stats(run(receiver.url, events=3, rate=200.0, feed=4))
    until(lambda: len(receiver.received) == 7, what="all that was fed")


def test_concurrent_pushes_are_limited_by_open_files(run, receiver, monkeypatch):
    monkeypatch.setattr(pushing.resource, "getrlimit", lambda _: (202, 1000))
    receiver.answer = Answer(hangs=True)
    simulator = run(receiver.url)
    simulator.feed(bodies(5))
    until(lambda: len(receiver.received) == 2, what="the first two")
    stats = simulator.stats()
    assert (stats["pushing_now"], stats["outstanding"], stats["visible"]) == (2, 2, 3)
    receiver.answer = Answer()
    receiver.released.set()
    assert final_stats(simulator)["confirmed"] == 5


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.system
def test_the_fault_push_lost_spares_the_last_try(run, receiver):
    simulator = run(receiver.url, faults={"push.lost": 1.0}, push_limit_secs=2.0)
    simulator.feed(bodies(4))
    stats = final_stats(simulator)
    assert (stats["confirmed"], stats["pushes"], stats["pushes_unanswered"]) == (4, 12, 8)
    assert stats["faults"] == {"push.lost": 8}
    assert len(receiver.accepted) == 12


@pytest.mark.parametrize("name", ["push.reset", "reset"])
def test_the_fault_push_reset_spares_the_last_try(run, receiver, name):
    simulator = run(receiver.url, faults={name: 1.0})
    simulator.feed(bodies(30))
    stats = final_stats(simulator)
    assert (stats["confirmed"], stats["pushes"], stats["faults"]) == (30, 90, {"push.reset": 60})
    assert 30 < len(receiver.received) < 90


@pytest.mark.system
@pytest.mark.parametrize(("slow_secs", "limit_secs", "pushes"), [(0.3, 20.0, 1), (30.0, 2.0, 2)])
def test_a_slow_answer_counts_if_it_is_in_time(run, receiver, slow_secs, limit_secs, pushes):
    began = time.monotonic()
    faults = {"push.slow": 1.0}
    simulator = run(receiver.url, faults=faults, slow_secs=slow_secs, push_limit_secs=limit_secs, push_tries=2)
    simulator.feed(bodies(1))
    stats = final_stats(simulator)
    assert (stats["confirmed"], stats["pushes"]) == (1, pushes)
    assert time.monotonic() - began >= 0.3


def test_no_fault_hits_the_only_try(run, receiver):
    simulator = run(receiver.url, faults={"push.reset": 1.0}, push_tries=1)
    simulator.feed(bodies(3))
    assert final_stats(simulator)["faults"] == {}


# --- signatures -------------------------------------------------------------------------------------------------------


def test_a_signed_body_has_two_more_members(run, receiver):
    simulator = run(receiver.url, push_sign_key="a-key", clock_skew_secs=1000)
    simulator.feed([*bodies(20), "{}"])
    final_stats(simulator)
    kinds = set()
    for one in receiver.received:
        body = json.loads(one.body)
        sign, expires = body.pop("Sign"), body.pop("T")
        assert sign == hashlib.md5(f"a-key{expires}".encode()).hexdigest()
        assert 1500 < int(expires) - time.time() < 1601
        assert body == {} or set(body) == {"EventType", "Numbered"}
        kinds.add(type(expires))
    assert kinds == {int, str}


def test_a_body_that_is_not_an_object_is_pushed_unsigned(run, receiver):
    run(receiver.url, push_sign_key="a-key").feed(["[]"])
    until(lambda: receiver.received, what="the push")
    assert receiver.received[0].body == b"[]"


# --- both modes -------------------------------------------------------------------------------------------------------


def called(simulator, action):
    headers = {"X-TC-Action": action, "X-TC-Version": "2018-07-17"}
    return requests.post(simulator.url, "{}", headers=headers, timeout=10).json()["Response"]


def test_events_can_be_pulled_as_soon_as_the_mode_is_pull(run, receiver):
    simulator = run(receiver.url, poll_secs=0.0)
    simulator.feed(bodies(2))
    final_stats(simulator)
    assert called(simulator, "PullEvents")["EventSet"] is None
    simulator.control(mode="PULL")
    simulator.feed(bodies(3))
    assert len(called(simulator, "PullEvents")["EventSet"]) == 3
    assert len(receiver.received) == 2


def test_waiting_events_are_pushed_as_soon_as_there_is_a_url(receiver):
    with Simulator(SimulatorOptions(mode="PUSH")) as simulator:
        simulator.feed(bodies(3))
        assert simulator.stats()["visible"] == 3
        simulator.control(push=receiver.url)
        assert final_stats(simulator)["confirmed"] == 3


def test_events_fed_before_the_start_are_pushed(receiver):
    simulator = Simulator(SimulatorOptions(push=receiver.url))
    simulator.feed(bodies(2))
    with simulator:
        assert final_stats(simulator)["confirmed"] == 2


@pytest.mark.parametrize("mode", [None, "PUSH", "PULL"])
def test_describe_event_config_shows_mode_and_url(run, receiver, mode):
    config = called(run(receiver.url, mode=mode), "DescribeEventConfig")
    assert (config["Mode"], config["NotificationUrl"]) == (mode or "PUSH", receiver.url)


# --- stopping, and the command ----------------------------------------------------------------------------------------


def test_a_stop_ends_the_running_pushes(receiver):
    receiver.answer = Answer(hangs=True)
    with Simulator(SimulatorOptions(push=receiver.url, push_limit_secs=600)) as simulator:
        simulator.feed(bodies(3))
        until(lambda: len(receiver.received) == 3, what="the pushes")
    stats = simulator.stats()
    assert (stats["pushing_now"], stats["confirmed"], stats["lost"]) == (0, 0, 0)


@pytest.fixture
def command():
    """Starts `vodpoller simulate`."""
    with contextlib.ExitStack() as stack:

        def start(*args):
            process = subprocess.Popen(
                [sys.executable, "-m", "vodpoller", "simulate", *args],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment(),
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            return process, SimpleNamespace(url=process.stdout.readline().strip())

        yield start


@pytest.mark.system
def test_the_command_lists_lost_events_at_its_end(command, tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text("\n".join(bodies(2)))
    with HeldPort() as port:
        process, simulator = command("--events-file", str(path), "--push", port.url)
        url = f"{simulator.url}/_ledger?lost=1&bodies=1"
        until(lambda: len(requests.get(url, timeout=10).json()) == 2, what="both are lost")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert sorted(out.splitlines()) == bodies(2)
    assert err == "vodpoller: number of lost events (no post of them was answered): 2\n"


@pytest.mark.system
def test_the_command_says_that_nothing_was_lost(command, receiver):
    process, simulator = command("--events", "2", "--push", receiver.url, "--push-sign-key", "k", "--push-tries", "1")
    until(lambda: requests.get(f"{simulator.url}/_stats", timeout=10).json()["confirmed"] == 2, what="both")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert (out, err) == ("", "vodpoller: number of lost events (no post of them was answered): 0\n")
    assert all("Sign" in json.loads(one.body) for one in receiver.received)
