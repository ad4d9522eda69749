"""What a process inherits: descriptors, signals, locale, orphans."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.polling import until
from tests.processes import ServiceManager, cannot_run, environment, run_command, running_system

EX_CONFIG = 78
CLOSED = ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"]
LOCALES = {
    "utf-8": {},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "gbk output": {"PYTHONIOENCODING": "gbk"},
    "ascii output": {"PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}
STDOUT_SINK = '[sinks.out]\ntype = "stdout"\n'


def started(args, *, redirections="", under=(), cwd=None, **env):
    """Start a command of vodpoller from a shell, which can close descriptors as cron or a container may do."""
    return subprocess.Popen(
        [*under, "bash", "-c", f'exec "$0" -m vodpoller "$@" {redirections}', sys.executable, *map(str, args)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=cwd,
        env=environment(**env),
    )


def ended(process, *, secs=60):
    """Wait for the end; returns exit code, stdout and stderr. A traceback fails the test."""
    output, errors = process.communicate(timeout=secs)
    assert b"Traceback" not in errors + output, errors
    return process.returncode, output, errors


def dead_letters(system, simulator, *bodies):
    """Store these events in the journal as dead letters."""
    system.configure(
        simulator.url,
        sinks=system.archive_sink,
        routes='[[routes]]\nname = "n"\nevent_types = ["N"]\nsinks = ["archive"]\n',
    )
    simulator.feed(*bodies)
    daemon = system.daemon()
    until(simulator.all_confirmed)
    assert daemon.terminate()[0] == 0


# --- descriptors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", CLOSED)
@pytest.mark.long
def test_exit_codes_are_the_same_with_closed_descriptors(system, closed):
    simulator = system.simulator()
    dead_letters(system, simulator, '{"EventType":"Other"}')
    config = ["-c", system.config_path]
    for args, code in (
        (["--version"], 0),
        (["--help"], 0),
        (["no-such-command"], 2),
        (["schema"], 0),
        (["check", *config], 0),
        (["check", "--connect", *config], 0),
        (["check", "-c", system.folder / "nowhere"], EX_CONFIG),
        (["status", *config], 1),
        (["deadletters", "list", *config], 0),
        (["deadletters", "list", "--json", *config], 0),
        (["deadletters", "show", "1", *config], 0),
        (["deadletters", "purge", "7", *config], 1),
        (["deadletters", "replay", "7", *config], 1),
        (["once", *config], 0),
    ):
        done = run_command(*args, closed=[int(redirection[0]) for redirection in closed.split()])
        assert done.returncode == code, args
        assert "Traceback" not in done.stdout + done.stderr
    for args in (["once", *config], ["deadletters", "purge", "--yes", *config]):  # as a user starts them
        assert ended(started(args, redirections=closed))[0] == 0


@pytest.mark.parametrize("redirection", ["1>&-", "0<&- 1>&- 2>&-", "1</dev/null"])
@pytest.mark.parametrize("command", ["run", "once"])
@pytest.mark.long
def test_a_stdout_sink_refuses_an_unwritable_standard_output(system, command, redirection):
    simulator = system.simulator(events=5)
    system.configure(simulator.url, sinks=STDOUT_SINK)
    code, _, errors = ended(started([command, "-c", system.config_path], redirections=redirection))
    assert code == EX_CONFIG
    if "2>" not in redirection:
        assert b"sinks.out: standard output is" in errors
    assert simulator.stats()["confirmed"] == 0


@pytest.mark.parametrize("closed", CLOSED)
@pytest.mark.long
def test_the_daemon_works_with_closed_descriptors_and_harms_no_file(system, closed):
    simulator = system.simulator(events=20)
    system.configure(simulator.url)
    process = started(["run", "-c", system.config_path], redirections=closed)
    try:
        until(lambda: system.has_delivered_all(simulator))
        for fd in range(3):
            assert system.folder not in Path(f"/proc/{process.pid}/fd/{fd}").readlink().parents
        process.send_signal(signal.SIGTERM)
        assert ended(process)[0] == 0
    finally:
        process.kill()
    assert len(system.lines()) == 20


@pytest.mark.parametrize("redirection", [">/dev/full", "1</dev/null"])
@pytest.mark.parametrize("args", [["schema"], ["--help"], ["check"], ["status"]])
def test_an_output_that_cannot_be_written_is_a_clear_error(system, args, redirection):
    if args[0] in ("check", "status"):
        simulator = system.simulator()
        dead_letters(system, simulator)
        args = [*args, "-c", system.config_path]
    code, _, errors = ended(started(args, redirections=redirection))
    assert code == 1
    assert b"vodpoller: the output cannot be written: " in errors


# --- signals ----------------------------------------------------------------------------------------------------------


def slow_python(folder, module):
    """An environment in which the import of a module waits until the file "go on" exists, for 30 s at most.

    The file "importing" is created when the import begins.
    """
    (folder / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        f"            open({str(folder / 'importing')!r}, 'w').close()\n"
        f"            ends_at = time.monotonic() + 30\n"
        f"            while time.monotonic() < ends_at and not os.path.exists({str(folder / 'go on')!r}):\n"
        "                time.sleep(0.01)\n"
        "sys.meta_path.insert(0, Slow())\n"
    )
    env = environment()
    return {"PYTHONPATH": f"{folder}:{env['PYTHONPATH']}"}


@pytest.mark.parametrize("module", ["click", "vodpoller.config.load", "vodpoller.daemon"])
@pytest.mark.long
def test_a_sighup_during_the_start_is_done_after_it(system, module):
    simulator = system.simulator()
    system.configure(simulator.url)
    daemon = system.daemon(started=False, **slow_python(system.folder, module))
    until((system.folder / "importing").exists)
    daemon.signal(signal.SIGHUP)
    (system.folder / "go on").touch()
    daemon.await_log("daemon.reloaded")
    assert daemon.log("daemon.started")
    assert daemon.terminate()[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("module", ["click", "vodpoller.config.load", "vodpoller.daemon"])
def test_a_stop_signal_during_the_start_ends_it_with_0(system, module, number):
    simulator = system.simulator(events=3)
    system.configure(simulator.url)
    daemon = system.daemon(started=False, **slow_python(system.folder, module))
    until((system.folder / "importing").exists)
    daemon.signal(number)
    (system.folder / "go on").touch()
    assert daemon.process.wait(30) == 0
    assert daemon.tail() == ""
    assert simulator.stats()["confirmed"] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_during_recovery_ends_it_with_0(system, number):
    simulator = system.simulator()
    system.configure(simulator.url)
    line = '{"EventType":"T","TEvent":{"TaskId":"%d"}}\n'
    system.archive.write_text("".join(line % turn for turn in range(400_000)))
    daemon = system.daemon(started=False)
    until(system.journal.exists)
    time.sleep(0.5)  # any moment of the recovery is fine
    daemon.signal(number)
    assert daemon.process.wait(30) == 0
    assert daemon.log("daemon.started") == []
    assert "Traceback" not in daemon.tail()
    assert len(system.lines()) == 400_000


@pytest.mark.parametrize("module", ["click", "vodpoller.daemon"])
@pytest.mark.parametrize("args", [["once"], ["check"], ["demo"], ["simulate"], ["deadletters", "replay"]], ids=" ".join)
def test_ctrl_c_prints_no_traceback(system, args, module):
    system.configure("http://127.0.0.1:9")
    module = "vodpoller.simulator.service" if args == ["simulate"] and module != "click" else module
    module = "vodpoller.config.load" if args == ["check"] and module != "click" else module
    if args[0] not in ("demo", "simulate"):
        args = [*args, "-c", system.config_path]
    if "replay" in args:
        module = "vodpoller.journal.operator"
    process = started(args, **slow_python(system.folder, module))
    until((system.folder / "importing").exists)
    process.send_signal(signal.SIGINT)
    (system.folder / "go on").touch()
    assert ended(process)[0] in (1, -signal.SIGINT)


# --- output that is not read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pipe", "socket"])
@pytest.mark.long
def test_an_unread_log_delays_neither_events_nor_the_stop(system, kind):
    simulator = system.simulator(rate=400, feed=1500)
    system.configure(simulator.url, more="[daemon]\nshutdown_secs = 8")
    if kind == "pipe":
        reading, writing = os.pipe()
    else:
        reading, writing = (end.detach() for end in socket.socketpair())
    process = subprocess.Popen(
        [sys.executable, "-m", "vodpoller", "run", "-c", system.config_path], stderr=writing, env=environment()
    )
    os.close(writing)
    try:
        until(simulator.all_confirmed, secs=40)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert time.monotonic() - began < 12
        with os.fdopen(reading, "rb") as unread:
            lines = unread.read().splitlines()
        assert 10 < len(lines) < 1400
        assert all(json.loads(line)["event"] for line in lines[:-1])
    finally:
        process.kill()
    assert len(system.lines()) == 1500


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("args", [["schema"], ["deadletters", "list", "--json"]], ids=" ".join)
def test_a_command_with_a_stuck_reader_ends_by_a_signal(system, args, number):
    if args[0] == "deadletters":
        simulator = system.simulator()
        dead_letters(system, simulator, '{"EventType":"Other"}')
        args = [*args, "-c", system.config_path]
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(4096))
    os.set_blocking(writing, True)
    process = subprocess.Popen(
        [sys.executable, "-m", "vodpoller", *args], stdout=writing, stderr=subprocess.PIPE, env=environment()
    )
    try:
        until(lambda: "pipe" in (system.folder / f"/proc/{process.pid}/wchan").read_text(), secs=30)
        process.send_signal(number)
        assert process.wait(10) == -number
        assert process.stderr.read() == b""
    finally:
        process.kill()
        process.stderr.close()
        os.close(writing)
        os.close(reading)


@pytest.mark.long
def test_a_stdout_sink_whose_reader_is_stuck_delays_no_other(system):
    simulator = system.simulator(rate=200, feed=1500, visibility_secs=4)
    system.configure(
        simulator.url, lease_secs=4, sinks=system.archive_sink + STDOUT_SINK, more="[daemon]\nshutdown_secs = 8"
    )
    process = started(["run", "-c", system.config_path])
    try:
        until(lambda: len(system.lines()) == 1500 and simulator.all_confirmed(), secs=60)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.stderr.close()
        assert process.wait(20) == 0
        assert time.monotonic() - began < 12
    finally:
        process.kill()
        process.stdout.close()


# --- the watchdog -----------------------------------------------------------------------------------------------------


def beats(manager):
    return [at for at, message in manager.received if message.startswith("WATCHDOG=1")]


@pytest.mark.parametrize("watchdog_secs", [1.5, 3])
def test_the_watchdog_is_fed_in_a_third_of_its_period(system, watchdog_secs):
    simulator = system.simulator()
    system.configure(simulator.url)
    with ServiceManager(system.folder / "notify") as manager:
        system.daemon(NOTIFY_SOCKET=manager.path, WATCHDOG_USEC=str(int(watchdog_secs * 1e6)))
        until(lambda: len(beats(manager)) >= 6, secs=15)
        times = beats(manager)[:6]
    assert 5 * watchdog_secs / 3 * 0.8 < times[-1] - times[0] < 5 * watchdog_secs * 0.9


# --- the end ----------------------------------------------------------------------------------------------------------


def process_ids_of(marker):
    done = subprocess.run(["pgrep", "-f", marker], capture_output=True, text=True, check=False)
    return done.stdout.split()


@pytest.mark.parametrize("stubborn", ["", "trap '' TERM; "])
def test_a_command_that_outlasts_the_stop_ends_with_the_daemon(system, stubborn):
    marker = f"{system.folder}/marker"
    script = system.folder / "slow"
    script.write_text(f"#!/bin/sh\n{stubborn}while true; do sleep 0.1; done\n")
    script.chmod(0o755)
    sink = f'[sinks.slow]\ntype = "exec"\ncommand = ["{script}", "{marker}"]\ntimeout_secs = 600\n'
    simulator = system.simulator(events=2, visibility_secs=30)
    system.configure(simulator.url, lease_secs=30, sinks=sink, more="[daemon]\nshutdown_secs = 4")
    daemon = system.daemon()
    until(lambda: len(process_ids_of(marker)) >= 2)

    code, took_secs = daemon.terminate()

    assert code == 0
    assert took_secs < 8
    assert daemon.log("sink.stuck")
    assert process_ids_of(marker) == []


# --- locales ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("locale", LOCALES)
@pytest.mark.long
def test_no_command_fails_on_any_character(system, locale):
    simulator = system.simulator()
    dead_letters(system, simulator, '{"EventType":"视频\U0001f600","X":"\U0001f600 ü ß \\u202e"}', '{"EventType":"é"}')
    for args in (["list"], ["list", "--json"], ["show", "1"], ["show", "2"], ["show", "1", "--json"], ["replay", "1"]):
        process = started(["deadletters", *args, "-c", system.config_path], **LOCALES[locale])
        code, output, _ = ended(process)
        assert code == (1 if args[0] == "replay" else 0)
        assert output
    assert ended(started(["status", "-c", system.config_path], **LOCALES[locale]))[0] == 1  # no daemon runs


@pytest.mark.parametrize("locale", ["utf-8", "C", "gbk output"])
@pytest.mark.parametrize("name", ["事件\U0001f600", os.fsdecode(b"\xff\xfe")], ids=["emoji", "no utf-8"])
@pytest.mark.long
def test_paths_of_any_characters_work_in_any_locale(tmp_path, name, locale):
    folder = tmp_path / name
    folder.mkdir()
    # TOML cannot contain a name that is not text: such a folder is the working directory instead.
    written = "" if name == os.fsdecode(b"\xff\xfe") else f"{folder}/"
    with running_system(tmp_path) as system:
        simulator = system.simulator(events=5)
        sinks = f'[sinks.archive]\ntype = "file"\npath = "{written}events.jsonl"\n'
        text = system.configure(simulator.url, sinks=sinks).read_text()
        text = text.replace(f'path = "{system.journal}"', f'path = "{written}journal.db"')
        (folder / "config.toml").write_text(text.replace(str(system.key_path), "key"))
        shutil.copy(system.key_path, folder / "key")
        config = ["-c", folder / "config.toml"]
        env = LOCALES[locale]

        for args, wanted in (["check"], 0), (["once"], 0), (["status"], 1):  # 1: no daemon runs
            code, _, errors = ended(started([*args, *config], cwd=folder, **env))
            assert code == wanted, errors
        assert ended(started(["check", "-c", folder / "nowhere.toml"], **env))[0] == EX_CONFIG
    assert len((folder / "events.jsonl").read_bytes().splitlines()) == 5
    assert (folder / "journal.db").exists()


# --- process 1 --------------------------------------------------------------------------------------------------------

AS_PROCESS_1 = """
import ctypes, os, pathlib, signal, subprocess, sys, time
assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER: the parent of orphans, as process 1 is
from vodpoller.process import let_signals_act, fork_and_reap_orphans
reaper = os.getpid()
signal.signal(signal.SIGINT, signal.SIG_DFL)
fork_and_reap_orphans()
let_signals_act()
print(os.getpid(), flush=True)
"""
LEAVES_ORPHANS = """
for turn in range(20):
    subprocess.run(["sh", "-c", "(sleep 0.1; exit 3) & exit 0"], check=True)
    assert subprocess.run(["sh", "-c", f"exit {turn}"]).returncode == turn
def children():
    return pathlib.Path(f"/proc/{reaper}/task/{reaper}/children").read_text().split()
ends_at = time.monotonic() + 20
while children() != [str(os.getpid())]:
    assert time.monotonic() < ends_at, children()
    time.sleep(0.05)
"""


@pytest.mark.parametrize("code", [0, 7])
def test_orphans_are_reaped_and_no_exit_code_is_lost(code):
    script = f"{AS_PROCESS_1}{LEAVES_ORPHANS}sys.exit({code})"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), check=False, timeout=60, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_process_1_passes_signals_on_and_returns_the_exit_code(number):
    process = subprocess.Popen(
        [sys.executable, "-c", f"{AS_PROCESS_1}time.sleep(60)"], env=environment(), stdout=subprocess.PIPE
    )
    try:
        assert int(process.stdout.readline()) != process.pid
        process.send_signal(number)
        assert process.wait(20) == 128 + number
    finally:
        process.kill()
        process.stdout.close()


def can_be_process_1():
    command = shutil.which("unshare")
    return (
        command is not None
        and subprocess.run(
            [command, "--pid", "--fork", "--mount-proc", "true"], check=False, capture_output=True
        ).returncode
        == 0
    )


@pytest.mark.parametrize("leaves", ["sleep 0.2 &", "setsid sh -c 'sleep 0.2; exit 3' &"])
@pytest.mark.long
def test_a_daemon_that_is_process_1_leaves_no_zombies(system, leaves):
    if os.geteuid() != 0 or not can_be_process_1():
        cannot_run("only root can make a process number 1")
    script = system.folder / "leaves"
    script.write_text(f"#!/bin/sh\n{leaves}\nexit 0\n")
    script.chmod(0o755)
    look = f"ps -e -o stat= > {system.folder}/states"
    script.write_text(f"#!/bin/sh\n{leaves}\n{look}\nexit 0\n")
    simulator = system.simulator(events=30)
    system.configure(simulator.url, sinks=f'[sinks.it]\ntype = "exec"\ncommand = ["{script}"]\n')
    process = started(["run", "-c", system.config_path], under=["unshare", "--pid", "--fork", "--mount-proc"])
    try:
        until(simulator.all_confirmed, secs=40)
        time.sleep(1)
        simulator.feed('{"EventType":"Last"}')
        until(simulator.all_confirmed)
        assert "Z" not in (system.folder / "states").read_text()
        (children,) = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        os.kill(int(children), signal.SIGTERM)
        code, _, errors = ended(process)
        assert code == 0
        assert b'"confirmed":true' in errors
        assert b"delivery.failed" not in errors
    finally:
        process.kill()
