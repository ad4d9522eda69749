"""Reloads of a whole daemon: by command, by SIGHUP, refused, with a thread that hangs, and with a kill."""

import fcntl
import json
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest

from tests.polling import until
from tests.processes import ServiceManager, bodies_of, differences, environment, run_command

LEASE_SECS = 3.0
SLOW_SECS = 60.0  # enough for a busy machine

NEVER = """
import threading
from vodpoller.sinks import Sink, SinkConfig

class NeverSink(Sink):
    Config = SinkConfig
    timeout_secs = 1.0

    def deliver(self, events, timeout_secs):
        threading.Event().wait()
"""


@pytest.fixture
def plugin(tmp_path):
    """A plug-in folder with a sink of type "never", whose `deliver` never returns."""
    folder = tmp_path / "plugin"
    folder.mkdir()
    (folder / "vodpoller_hang.py").write_text(NEVER)
    info = folder / "vodpoller_hang-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vodpoller-hang\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[vodpoller.sinks]\nnever = vodpoller_hang:NeverSink\n")
    return {"PYTHONPATH": f"{folder}:{environment()['PYTHONPATH']}"}


def numbered(number):
    return json.dumps({"EventType": "NewFileUpload", "FileUploadEvent": {"FileId": str(number)}})


@contextmanager
def two_hundred_events_per_second(simulator):
    """Feed events as long as the block runs."""
    numbers, over = count(), threading.Event()

    def feed():
        while not over.wait(0.1):
            simulator.feed(*(numbered(next(numbers)) for _ in range(20)))

    feeding = threading.Thread(target=feed)
    feeding.start()
    try:
        yield
    finally:
        over.set()
        feeding.join()


def file_sink(system, name):
    return f'[sinks.{name}]\ntype = "file"\npath = "{system.folder / name}.jsonl"\n'


def reload(system, *args, **env):
    return run_command("reload", "-c", system.config_path, *args, timeout_secs=90, **env)


def reloading_in_background(system):
    return subprocess.Popen(
        [sys.executable, "-m", "vodpoller", "reload", "-c", str(system.config_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def status_of(system, **env):
    return json.loads(run_command("status", "--json", "-c", system.config_path, **env).stdout)


def break_file(system):
    system.config_path.write_text(system.config_path.read_text() + "\n[api\n")


def assert_all_arrived_once(simulator, *paths):
    arrived = [line for path in paths for line in path.read_bytes().splitlines()]
    assert differences(bodies_of(simulator.ledger(bodies=True)), arrived) == ([], [])


# --- refused ----------------------------------------------------------------------------------------------------------


def test_a_reload_without_a_daemon_is_exit_1(system):
    system.configure("http://127.0.0.1:9")
    done = reload(system)
    assert done.returncode == 1
    assert "no daemon listens there" in done.stderr


def test_a_missing_configuration_reloads_no_other_daemon(system):
    done = run_command("reload", "-c", system.folder / "mistyped.toml")
    assert done.returncode == 78
    assert "mistyped.toml: the file does not exist" in done.stderr


def test_a_broken_file_is_refused_and_the_daemon_continues(system):
    simulator = system.simulator()
    system.configure(simulator.url)
    daemon = system.daemon()
    simulator.feed(numbered(1))
    until(lambda: system.has_delivered_all(simulator))
    good = system.config_path.read_text()
    break_file(system)
    system.archive.rename(f"{system.archive}.1")

    done = reload(system)

    assert done.returncode == 78
    assert f"{system.config_path}: line " in done.stderr
    assert "the daemon continues with the former configuration" in done.stderr
    until(system.archive.exists)  # the files are reopened in any case, as logrotate needs it
    (failed,) = daemon.await_log("reload.failed")
    assert failed["level"] == "error"
    assert str(system.config_path) in failed["problems"][0]
    simulator.feed(numbered(2))
    until(lambda: system.has_delivered_all(simulator))
    assert len(system.lines()) == 1

    done = run_command("status", "-c", system.config_path)  # it reaches the daemon although the file is broken
    assert done.returncode == 1
    assert done.stdout.startswith("PROBLEM configuration: the reload at ")
    system.config_path.write_text(good)
    last = status_of(system)["reload"]
    assert (last["successful"], len(last["problems"])) == (False, 1)
    assert last["last_success_at"] <= last["at"]

    assert reload(system).returncode == 0
    assert status_of(system)["problems"] == []
    assert daemon.terminate()[0] == 0


@pytest.mark.parametrize(
    ("sinks", "words"),
    [
        ('[sinks.archive]\ntype = "carrier-pigeon"\n', "carrier-pigeon"),
        ('[sinks.hook]\ntype = "webhook"\nurl = "http://127.0.0.1:9/hook"\n', "sinks.hook"),
        ('[sinks.archive]\ntype = "exec"\ncommand = ["/nonexistent/program"]\n', "/nonexistent/program"),
    ],
    ids=["unknown type", "receiver that cannot be reached", "program that is missing"],
)
def test_an_unusable_configuration_is_refused_without_a_stop(system, sinks, words):
    simulator = system.simulator()
    system.configure(simulator.url)
    daemon = system.daemon()
    system.configure(simulator.url, sinks=sinks)
    done = reload(system)
    assert done.returncode == 78
    assert words in done.stderr
    assert len(daemon.log("daemon.started")) == 1
    simulator.feed(numbered(1))
    until(lambda: system.has_delivered_all(simulator))
    assert len(system.lines()) == 1


def test_a_failed_build_restores_the_former_configuration(system):
    simulator = system.simulator()
    system.configure(simulator.url)
    daemon = system.daemon()
    system.configure(simulator.url, sinks=file_sink(system, "taken"))
    # A probe only reports the lock, since it may be the daemon's own.
    with (system.folder / "taken.jsonl.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = reload(system)
    assert done.returncode == 78
    assert "another process writes to" in done.stderr
    assert len(daemon.await_log("daemon.started", number=2)) == 2
    simulator.feed(numbered(1))
    until(lambda: system.has_delivered_all(simulator))
    assert len(system.lines()) == 1
    assert reload(system).returncode == 0
    assert daemon.terminate()[0] == 0


def test_the_journal_may_change_once_nothing_is_stored_in_it(system):
    simulator = system.simulator()
    poor = '[sinks.hook]\ntype = "exec"\ncommand = ["/bin/false"]\n'
    system.configure(simulator.url, sinks=poor)
    daemon = system.daemon()
    simulator.feed(numbered(1))
    until(simulator.all_confirmed)
    former, system.journal = system.journal, system.folder / "other.db"
    system.configure(simulator.url, sinks=poor)

    done = reload(system, "--pid", daemon.process.pid)
    assert done.returncode == 78
    assert "journal.path: cannot be changed while 1 events are stored" in done.stderr
    assert reload(system).returncode == 1  # no daemon listens at the new path

    with system.config_path.open() as given:
        text = given.read()
    system.config_path.write_text(text.replace(str(system.journal), str(former)))
    assert run_command("deadletters", "purge", "--yes", "-c", system.config_path).returncode == 0
    system.config_path.write_text(text)
    assert reload(system, MAINPID=str(daemon.process.pid)).returncode == 0
    assert system.journal.exists()
    assert not former.with_name(f"{former.name}.sock").exists()
    assert status_of(system)["journal"]["path"] == str(system.journal)
    simulator.feed(numbered(2))
    until(simulator.all_confirmed)
    assert daemon.terminate()[0] == 0


# --- done -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["command", "signal"])
def test_a_changed_route_under_load_loses_and_doubles_nothing(system, by):
    simulator = system.simulator()
    system.configure(simulator.url, sinks=file_sink(system, "before"))
    before, after = system.folder / "before.jsonl", system.folder / "after.jsonl"
    daemon = system.daemon()
    with two_hundred_events_per_second(simulator):
        until(lambda: len(system.lines(before)) >= 100)
        system.configure(simulator.url, sinks=file_sink(system, "after"))
        if by == "command":
            done = reload(system)
            assert (done.returncode, done.stdout) == (0, "reloaded: the daemon now uses the new configuration\n")
        else:
            daemon.signal(signal.SIGHUP)
            assert daemon.await_log("daemon.reloaded", secs=SLOW_SECS)[0]["changed"] is True
        first = before.stat().st_size
        until(lambda: len(system.lines(after)) >= 100)
    until(lambda: system.has_delivered_all(simulator), secs=SLOW_SECS)

    assert before.stat().st_size == first
    until(lambda: status_of(system)["settled_events"] == simulator.stats()["fed"])  # counts survive a reload
    assert daemon.terminate()[0] == 0
    assert simulator.stats()["redeliveries"] == 0
    assert_all_arrived_once(simulator, before, after)


def test_the_same_configuration_stops_nothing(system):
    simulator = system.simulator()
    system.configure(simulator.url)
    daemon = system.daemon()
    done = reload(system)
    assert done.returncode == 0
    assert "the configuration has not changed" in done.stdout
    (line,) = daemon.await_log("daemon.reloaded")
    assert line["changed"] is False
    assert len(daemon.log("daemon.started")) == 1


def test_systemd_is_notified_of_begin_and_end_of_a_reload(system):
    simulator = system.simulator()
    system.configure(simulator.url)
    with ServiceManager(system.folder / "notify") as manager:
        daemon = system.daemon(NOTIFY_SOCKET=manager.path)
        until(lambda: manager.messages("READY=1"))
        began_at = time.monotonic_ns() // 1000
        system.configure(simulator.url, sinks=file_sink(system, "other"))
        assert reload(system).returncode == 0
        until(lambda: len(manager.messages("READY=1")) == 2)
        (message,) = manager.messages("RELOADING=1")
        assert began_at <= int(message.partition("MONOTONIC_USEC=")[2]) <= time.monotonic_ns() // 1000
        break_file(system)
        assert reload(system).returncode == 78
        until(lambda: len(manager.messages("READY=1")) == 3)
        until(lambda: manager.messages("STATUS=the last reload was refused"))
        assert manager.messages("STOPPING=1") == []
        assert daemon.terminate()[0] == 0


def sizes(daemon):
    """The numbers of threads and of descriptors of a daemon."""
    return [sum(1 for _ in Path(f"/proc/{daemon.process.pid}/{it}").iterdir()) for it in ("task", "fd")]


def sizes_at_rest(daemon):
    """The `sizes` once they stay the same: some threads start only at their first task."""
    seen = []

    def stay():
        seen.append(sizes(daemon))
        return len(seen) > 20 and all(it == seen[-1] for it in seen[-20:])

    until(stay, every_secs=0.1, secs=60, what=lambda: str(seen[-20:]))
    return seen[-1]


@pytest.mark.timeout(400)
@pytest.mark.long
def test_fifty_reloads_leave_no_thread_and_no_descriptor(system, receiver):
    simulator = system.simulator(poll_secs=0.05)
    others = '[sinks.out]\ntype = "stdout"\n[sinks.run]\ntype = "exec"\ncommand = ["/bin/true"]\n'
    others += f'[sinks.hook]\ntype = "webhook"\nurl = "{receiver.url}"\n'
    system.configure(simulator.url, sinks=system.archive_sink + others)
    daemon = system.daemon()

    def reload_with(number):
        more = f"[daemon]\nshutdown_secs = {20 + number % 7}"
        system.configure(simulator.url, sinks=system.archive_sink + others, more=more)
        simulator.feed(numbered(number))
        before = len(daemon.log("daemon.reloaded"))
        daemon.signal(signal.SIGHUP)
        daemon.await_log("daemon.reloaded", number=before + 1, secs=SLOW_SECS)
        until(simulator.all_confirmed)

    for number in range(5):
        reload_with(number)
    threads, descriptors = sizes_at_rest(daemon)
    for number in range(5, 50):
        reload_with(number)
    until(lambda: sizes(daemon)[0] <= threads + 1 and sizes(daemon)[1] <= descriptors + 2)
    assert len(daemon.log("daemon.started")) == 51
    assert daemon.terminate()[0] == 0
    assert len(system.lines()) == 50


# --- problems during a reload -----------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_hanging_sink_is_ended_by_executing_the_program_again(system, plugin):
    simulator = system.simulator()
    shutdown = "[daemon]\nshutdown_secs = 6"
    system.configure(simulator.url, sinks='[sinks.never]\ntype = "never"\n', more=shutdown)
    with ServiceManager(system.folder / "notify") as manager:
        watched = {"NOTIFY_SOCKET": manager.path, "WATCHDOG_USEC": "3000000"}
        began = time.monotonic()
        daemon = system.daemon(**plugin, **watched)
        start_secs = time.monotonic() - began
        simulator.feed(*map(numbered, range(20)))
        until(simulator.all_confirmed)
        system.configure(simulator.url, sinks=system.archive_sink + '[sinks.never]\ntype = "never"\n', more=shutdown)
        done = reload(system)

        assert done.returncode == 0, done.stderr
        assert "executed itself again, because a thread hung: sink never" in done.stdout
        assert daemon.process.poll() is None
        (line,) = daemon.await_log("daemon.reloaded")
        assert line["executed_anew_for"] == ["sink never"]
        until(lambda: len(manager.messages("READY=1")) == 2)
        (began,) = (at for at, text in manager.received if text.startswith("RELOADING=1"))
        ended = [at for at, text in manager.received if text == "READY=1"][1]
        assert ended - began < 6 + max(5, 3 * start_secs)
        fed_at = [at for at, text in manager.received if text == "WATCHDOG=1" and began < at < ended]
        assert len(fed_at) >= 4
    simulator.feed(*map(numbered, range(20, 40)))
    until(lambda: len(system.lines()) == 20)
    assert status_of(system, **plugin)["pid"] == daemon.process.pid


@pytest.mark.long
def test_status_is_answered_while_a_reload_lasts(system, plugin):
    simulator = system.simulator()
    shutdown = "[daemon]\nshutdown_secs = 6"
    system.configure(simulator.url, sinks='[sinks.never]\ntype = "never"\n', more=shutdown)
    daemon = system.daemon(**plugin)
    simulator.feed(numbered(1))
    until(simulator.all_confirmed)
    with reloading_in_background(system) as same:
        assert same.wait(SLOW_SECS) == 0
    system.configure(simulator.url, sinks=system.archive_sink, more=shutdown)
    with reloading_in_background(system) as asking:
        until(lambda: status_of(system)["reload"].get("under_way"))
        assert asking.wait(SLOW_SECS) == 0
    assert daemon.process.poll() is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.long
def test_a_stop_signal_during_a_reload_ends_it_in_time(system, plugin, number):
    simulator = system.simulator()
    shutdown = "[daemon]\nshutdown_secs = 6"
    system.configure(simulator.url, sinks='[sinks.never]\ntype = "never"\n', more=shutdown)
    daemon = system.daemon(**plugin)
    simulator.feed(numbered(1))
    until(simulator.all_confirmed)
    system.configure(simulator.url, sinks=system.archive_sink, more=shutdown)
    with reloading_in_background(system) as asking:
        until(lambda: status_of(system)["reload"].get("under_way"))
        daemon.signal(number)
        assert daemon.process.wait(6 + 5) == 0
        assert asking.wait(SLOW_SECS) == 1
        assert "a signal asked for the end" in asking.stderr.read()


@pytest.mark.parametrize(
    "failpoint",
    [f"{step}-journal:{when}:{number}" for step, number in (("close", 1), ("open", 2)) for when in ("before", "after")],
)
def test_a_kill_during_a_reload_loses_and_doubles_nothing(system, failpoint):
    simulator = system.simulator(visibility_secs=LEASE_SECS)
    system.configure(simulator.url, lease_secs=LEASE_SECS)
    daemon = system.daemon(failpoint=failpoint)
    with two_hundred_events_per_second(simulator):
        until(lambda: len(system.lines()) >= 50)
        system.configure(simulator.url, lease_secs=LEASE_SECS, more="[daemon]\nshutdown_secs = 20")
        daemon.signal(signal.SIGHUP)
        daemon.await_failpoint()
        system.daemon()
    until(lambda: system.has_delivered_all(simulator), secs=SLOW_SECS)
    assert_all_arrived_once(simulator, system.archive)
