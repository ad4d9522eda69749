"""`vodpoller run` with a callback source: restarts, reloads, and sockets from systemd."""

import hashlib
import json
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest

from tests.polling import until
from tests.processes import DaemonProcess, HeldPort, environment, needs, run_command

PATH = "/vod"


def body(number):
    return json.dumps({"EventType": "NewFileUpload", "FileUploadEvent": {"FileId": str(number)}})


def configure(system, port, *, sinks=None, source="", more=""):
    """Write a configuration with one callback source and no API key."""
    sinks = system.archive_sink if sinks is None else sinks
    names = [line.split(".", 1)[1].rstrip("]") for line in sinks.splitlines() if line.startswith("[sinks.")]
    system.config_path.write_text(
        f'[[sources]]\nname = "pushed"\ntype = "callback"\nlisten = "127.0.0.1:{port}"\npath = "{PATH}"\n{source}\n'
        f'[[routes]]\nname = "all"\nsinks = {json.dumps(names)}\n{sinks}\n'
        f'[journal]\npath = "{system.journal}"\n{more}\n'
    )
    return system.config_path


def ask(port, data, *, timeout=30):
    """Send bytes on a new connection; returns all bytes until the other side closes it."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as sock:
        sock.sendall(data)
        found = b""
        while part := sock.recv(65536):
            found += part
        return found


def push(port, text, **more):
    """Push one event; returns the status of the answer, or None without an answer."""
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text.encode())}\r\n\r\n"
    try:
        answer = ask(port, (head + text).encode(), **more)
    except ConnectionResetError:
        return None
    return int(answer.split()[1]) if answer else None


def status_of(system):
    """The status of the only source. The daemon must have no problem."""
    done = run_command("status", "-c", system.config_path, "--json")
    assert done.returncode == 0, done.stdout
    (source,) = json.loads(done.stdout)["sources"]
    return source


def file_ids(system):
    return sorted(json.loads(line)["FileUploadEvent"]["FileId"] for line in system.lines())


@pytest.fixture
def port():
    with HeldPort() as held:
        yield held.number


def test_without_a_source_that_pulls_it_runs_without_a_key(system, port):
    configure(system, port)
    daemon = system.daemon()
    assert push(port, body(1)) == 200
    assert file_ids(system) == ["1"]
    assert daemon.terminate()[0] == 0
    assert not daemon.problems()


def test_without_a_callback_source_h11_is_not_needed():
    modules = "vodpoller.cli.daemons, vodpoller.cli.check, vodpoller.checkup.checks"
    code = f"import sys; sys.modules['h11'] = None; import {modules}"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


def test_an_address_in_use_ends_the_start_with_1(system):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        configure(system, taken.getsockname()[1])
        daemon = system.daemon(started=False)
        assert daemon.process.wait(30) == 1
        assert "another program listens there" in daemon.tail()


def test_the_status_shows_the_source(system, port):
    configure(system, port)
    system.daemon()
    push(port, body(1))
    until(lambda: status_of(system)["last_callback_at"])
    source = status_of(system)
    assert (source["type"], source["error"]) == ("callback", "")


def test_check_shows_the_address_of_callbacks(system, port):
    configure(system, port)
    done = run_command("check", "-c", system.config_path)
    assert f"by callbacks to 127.0.0.1:{port}{PATH}, not signed" in done.stdout
    assert "key:" not in done.stdout


def test_once_delivers_what_is_due_without_a_source_that_pulls(system, port):
    configure(system, port)
    assert run_command("once", "-c", system.config_path).returncode == 0


# --- both kinds of source ---------------------------------------------------------------------------------------------


def test_an_event_that_is_pushed_and_then_pulled_is_delivered_once(system, port):
    simulator = system.simulator()
    texts = [json.dumps({"EventType": "X", "XEvent": {"TaskId": f"1-X-{number}"}}) for number in range(20)]
    pushed = f'[[sources]]\nname = "pushed"\ntype = "callback"\nlisten = "127.0.0.1:{port}"\npath = "{PATH}"'
    system.configure(simulator.url, source=f"sub_app_id = 7\n{pushed}\nsub_app_id = 7")
    daemon = system.daemon()
    assert [push(port, text) for text in texts] == [200] * 20
    simulator.feed(*(text[:-1] + ', "YEvent": null}' for text in texts))
    until(lambda: system.has_delivered_all(simulator))
    assert len(system.lines()) == 20

    def pulled():
        return [line["reason"] for line in daemon.log("event.settled") if line["source"] == "main"]

    until(lambda: len(pulled()) == 20, what=daemon.tail)
    assert set(pulled()) == {"already_delivered"}


# --- a full disk, a kill, a burst -------------------------------------------------------------------------------------


def push_all(port, numbers):
    """Push these events at the same time; returns the statuses."""
    with ThreadPoolExecutor(len(numbers)) as pushing:
        return list(pushing.map(lambda number: push(port, body(number)), numbers))


def test_on_a_full_disk_nothing_is_answered_and_no_event_is_lost(system, port):
    configure(system, port)
    daemon = system.daemon()
    assert push(port, body(0)) == 200
    limits = resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (1, limits[1]))  # as on a full disk
    assert push_all(port, range(1, 21)) == [None] * 20
    resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, limits)
    until(lambda: set(push_all(port, range(1, 21))) == {200}, secs=60)
    until(lambda: file_ids(system) == sorted(map(str, range(21))), secs=60)


def test_callbacks_repeated_across_kills_are_delivered_once(system, port):
    configure(system, port)
    answered = set()

    def push_until_answered(number):
        while number not in answered:
            with suppress(OSError):
                if push(port, body(number)) == 200:
                    answered.add(number)

    daemon = system.daemon()
    with ThreadPoolExecutor(8) as pushing:
        pushed = [pushing.submit(push_until_answered, number) for number in range(300)]
        for number in (60, 120, 180):
            until(lambda number=number: len(answered) >= number)
            daemon.kill()
            daemon = system.daemon()
        for it in pushed:
            it.result()
    assert file_ids(system) == sorted(map(str, range(300)))


def test_a_burst_beyond_the_speed_of_a_sink_is_answered_and_delivered(system, port):
    script = json.dumps(f'read -r line; sleep 1; echo "$line" >> {system.archive}')
    sink = f'[sinks.slow]\ntype = "exec"\nconcurrency = 32\ncommand = ["/bin/sh", "-c", {script}]\n'
    configure(system, port, sinks=sink, source="max_events_in_flight = 8")
    system.daemon()
    assert push_all(port, range(40)) == [200] * 40
    until(lambda: file_ids(system) == sorted(map(str, range(40))), secs=60)


# --- a stop -----------------------------------------------------------------------------------------------------------


def slow_sink(secs):
    return f'[sinks.slow]\ntype = "exec"\ncommand = ["/bin/sh", "-c", "cat > /dev/null; sleep {secs}"]\n'


def test_a_stop_waits_for_running_callbacks(system, port):
    configure(system, port, sinks=slow_sink(1))
    daemon = system.daemon()
    answers = []
    pushing = threading.Thread(target=lambda: answers.append(push(port, body(1))))
    with socket.create_connection(("127.0.0.1", port)) as begun:
        begun.sendall(f"POST {PATH} HTTP/1.1\r\n".encode())
        pushing.start()
        until(lambda: status_of(system)["connections"] == 2)
        daemon.signal(signal.SIGTERM)
        daemon.await_log("daemon.stopping")
        text = body(2)
        begun.sendall(f"Host: x\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())
        begun.settimeout(30)
        assert begun.recv(1000).startswith(b"HTTP/1.1 200")
    pushing.join()
    assert (answers, daemon.process.wait(30)) == ([200], 0)
    assert not daemon.problems()


def test_a_silent_client_delays_neither_a_reload_nor_a_stop(system, port):
    short = "[daemon]\nshutdown_secs = 1\n"
    configure(system, port, more=short)
    daemon = system.daemon()
    with socket.create_connection(("127.0.0.1", port)):
        until(lambda: status_of(system)["connections"] == 1)
        configure(system, port, more=short + '[log]\nlevel = "debug"\n')
        assert run_command("reload", "-c", system.config_path).returncode == 0
        (line,) = daemon.log("daemon.reloaded")
        assert "executed_anew_for" not in line
        with socket.create_connection(("127.0.0.1", port)):
            until(lambda: status_of(system)["connections"] == 1)
            assert daemon.terminate()[0] == 0


# --- a reload ---------------------------------------------------------------------------------------------------------


def test_a_reload_keeps_the_port_open_and_answers_all(system, port):
    configure(system, port)
    daemon = system.daemon()
    answers, is_over = [], threading.Event()

    def pushing():
        number = 0
        while not is_over.is_set():
            answers.append(push(port, body(number)))
            number += 1

    thread = threading.Thread(target=pushing)
    thread.start()
    for level in ("warning", "info"):
        until(lambda: answers)
        configure(system, port, more=f'[log]\nlevel = "{level}"')
        done = run_command("reload", "-c", system.config_path, timeout_secs=60)
        assert done.returncode == 0, done.stderr + daemon.tail()
        answers.clear()
    until(lambda: answers)
    is_over.set()
    thread.join()
    assert set(answers) == {200}
    ids = file_ids(system)
    assert len(ids) == len(set(ids))


def signed(number, key):
    expires = str(int(time.time()) + 600)
    sign = hashlib.md5(f"{key}{expires}".encode(), usedforsecurity=False).hexdigest()
    return json.dumps({**json.loads(body(number)), "Sign": sign, "T": expires})


def test_a_reload_reads_the_key_of_the_signature_again(system, port):
    key_path = system.config_path.with_name("sign_key")
    key_path.write_text("the-first-key\n")
    key_path.chmod(0o600)
    configure(system, port, source=f'sign_key_file = "{key_path}"')
    system.daemon()
    key_path.write_text("the-second-key\n")
    assert run_command("reload", "-c", system.config_path).returncode == 0
    assert [push(port, signed(number, key)) for number, key in enumerate(("the-first-key", "the-second-key"))] == [
        403,
        200,
    ]


def test_a_reload_to_an_address_in_use_is_refused(system, port):
    configure(system, port)
    system.daemon()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        configure(system, taken.getsockname()[1])
        done = run_command("reload", "-c", system.config_path)
    assert done.returncode == 78
    assert "another program listens there" in done.stderr + done.stdout
    assert push(port, body(1)) == 200


def test_a_reload_moves_to_another_address(system, port):
    configure(system, port)
    system.daemon()
    with HeldPort() as other:
        configure(system, other.number)
        assert run_command("reload", "-c", system.config_path, timeout_secs=60).returncode == 0
        assert push(other.number, body(1)) == 200
    with pytest.raises(ConnectionRefusedError):
        push(port, body(2))


# --- sockets that another process has opened --------------------------------------------------------------------------

PASS_ON = """
import os, sys
fd = int(sys.argv[1])
os.dup2(fd, 3)
os.environ["LISTEN_PID"], os.environ["LISTEN_FDS"] = str(os.getpid()), "1"
os.execv(sys.executable, [sys.executable, "-m", "vodpoller", "run", "-c", sys.argv[2]])
"""


class Activated(DaemonProcess):
    """`vodpoller run` with a listening socket that is passed to it, as by systemd."""

    def __init__(self, config_path, log_path, listening):
        self.log_path = log_path
        with log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PASS_ON, str(listening.fileno()), config_path],
                stderr=log,
                env=environment(),
                pass_fds=[listening.fileno()],
            )


@contextmanager
def activated(system, listening, name="daemon.log"):
    daemon = Activated(system.config_path, system.folder / name, listening)
    try:
        yield daemon
    finally:
        daemon.kill()


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0), backlog=128) as sock:
        yield sock


def test_a_passed_socket_that_no_source_names_is_exit_78(system, listening, port):
    configure(system, port)
    with activated(system, listening) as daemon:
        assert daemon.process.wait(30) == 78
        assert f"127.0.0.1:{listening.getsockname()[1]}, and no source names it" in daemon.tail()


def test_callbacks_between_two_runs_wait_in_the_passed_socket(system, listening):
    port = listening.getsockname()[1]
    configure(system, port)
    answers = []
    pushing = [threading.Thread(target=lambda n=n: answers.append(push(port, body(n)))) for n in range(20)]
    for number, thread in enumerate(pushing):
        thread.start()
        if number == 9:
            with activated(system, listening) as first:
                first.await_log("daemon.started")
                until(lambda: answers)
    with activated(system, listening, "second.log"):
        for thread in pushing:
            thread.join()
    assert answers.count(200) >= 10
    ids = file_ids(system)
    assert len(ids) == len(set(ids))
    assert len(ids) >= len(answers) - answers.count(None)


def test_the_socket_that_systemd_passes_is_used(system, port):
    needs("systemd-socket-activate")
    configure(system, port)
    with (system.folder / "daemon.log").open("wb") as log:
        command = ["-l", f"127.0.0.1:{port}", sys.executable, "-m", "vodpoller", "run", "-c", system.config_path]
        activating = subprocess.Popen(["systemd-socket-activate", *command], stderr=log, env=environment())
    system.kill_at_end(activating)
    until(lambda: b"Listening on" in (system.folder / "daemon.log").read_bytes())
    assert push(port, body(1)) == 200  # the first connection starts it
    assert file_ids(system) == ["1"]
    activating.send_signal(signal.SIGTERM)
    assert activating.wait(30) == 0


def test_a_reload_that_drops_a_passed_socket_is_refused(system, listening, port):
    configure(system, listening.getsockname()[1])
    with activated(system, listening) as daemon:
        daemon.await_log("daemon.started")
        configure(system, port)
        done = run_command("reload", "-c", system.config_path)
        assert done.returncode == 78
        assert "no source names it" in done.stderr + done.stdout
