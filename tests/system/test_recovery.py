"""Recovery by a whole daemon: of a file with many lines that are not in the ledger, and of one that others change."""

import json
import os
import signal

import pytest

from tests.polling import until
from tests.processes import ServiceManager, bodies_of, canonical, differences

PORTION = 10_000


def body(number):
    return json.dumps({"EventType": "Numbered", "NumberedEvent": {"TaskId": f"task-{number}"}}, separators=(",", ":"))


def fill(path, numbers):
    path.write_text("".join(body(number) + "\n" for number in numbers))


@pytest.mark.long
def test_a_long_recovery_logs_its_progress_and_extends_the_timeout(system, tmp_path):
    simulator = system.simulator()
    system.configure(simulator.url)
    fill(system.archive, range(3 * PORTION))
    with ServiceManager(tmp_path / "notify") as manager:
        daemon = system.daemon(NOTIFY_SOCKET=manager.path)
        until(lambda: manager.messages("READY=1"))
    lines = daemon.log("recovery.progress")
    assert [line["keys"] for line in lines] == [PORTION, 2 * PORTION, 3 * PORTION][: len(lines)]
    assert len(lines) >= 2
    assert all(0 < line["percent"] <= 100 and line["sink"] == "archive" for line in lines)
    assert len(manager.messages("EXTEND_TIMEOUT_USEC=")) > len(lines)
    (line,) = daemon.log("file.recovered")
    assert line["keys"] == 3 * PORTION
    assert daemon.terminate()[0] == 0


@pytest.mark.parametrize(("when", "entered"), [("before:2", PORTION), ("after:2", 2 * PORTION)])
@pytest.mark.long
def test_a_killed_recovery_continues_and_doubles_nothing(system, when, entered):
    simulator = system.simulator()
    system.configure(simulator.url)
    fill(system.archive, range(3 * PORTION + 5))
    doomed = system.daemon(started=False, failpoint=f"recover:{when}")
    until(lambda: doomed.process.poll() is not None, secs=30, what=doomed.tail)
    assert doomed.process.returncode == -signal.SIGKILL
    simulator.feed(*(body(number) for number in (0, PORTION - 1, PORTION, 2 * PORTION, 3 * PORTION + 4)))
    daemon = system.daemon()
    (line,) = daemon.log("file.recovered")
    assert line["keys"] == 3 * PORTION + 5 - entered
    until(lambda: system.has_delivered_all(simulator), what=daemon.tail)
    assert daemon.terminate()[0] == 0
    assert len(system.lines()) == 3 * PORTION + 5


@pytest.mark.parametrize("foreign", [b"hello", b'{"note": 1}\nand a piece', b"\0\xff\n\n"])
@pytest.mark.parametrize("failpoint", ["ledger:before:2", "write:amid:2"])
def test_foreign_bytes_and_a_kill_lose_nothing_and_double_nothing(system, foreign, failpoint):
    simulator = system.simulator(visibility_secs=1.2, poll_secs=0.2)
    system.configure(simulator.url, lease_secs=1.2)
    simulator.feed(*map(body, range(10)))
    doomed = system.daemon(started=False, failpoint=failpoint)
    until(lambda: len(system.lines()) == 10, secs=30, what=doomed.tail)
    with system.archive.open("ab") as file:
        file.write(foreign)
    simulator.feed(*map(body, range(10, 20)))
    until(lambda: doomed.process.poll() is not None, secs=30, what=doomed.tail)
    assert doomed.process.returncode == -signal.SIGKILL
    daemon = system.daemon()
    until(lambda: system.has_delivered_all(simulator), what=daemon.tail)
    assert daemon.terminate()[0] == 0
    data = system.archive.read_bytes()
    assert foreign in data
    known = set(map(canonical, map(body, range(20))))
    lines = [line for line in data.split(b"\n") if line.startswith(b'{"EventType"') and canonical(line) in known]
    assert differences(bodies_of(simulator.ledger(bodies=True)), lines) == ([], [])
    assert daemon.log("file.changed") or b"file.changed" in doomed.log_path.read_bytes()


@pytest.mark.parametrize("rest_bytes", [0, 30])
def test_a_file_emptied_at_run_time_gets_later_events_once(system, rest_bytes):
    simulator = system.simulator(visibility_secs=1.2, poll_secs=0.2)
    system.configure(simulator.url, lease_secs=1.2)
    simulator.feed(*map(body, range(5)))
    # Killed between the lines after the cut and their ledger rows: a line ends at the old mark again.
    doomed = system.daemon(started=False, failpoint="ledger:before:2")
    until(lambda: system.has_delivered_all(simulator), secs=30, what=doomed.tail)
    os.truncate(system.archive, rest_bytes)
    simulator.feed(*map(body, range(5, 9)), *map(body, range(1, 9)))
    until(lambda: doomed.process.poll() is not None, secs=30, what=doomed.tail)
    daemon = system.daemon()
    until(lambda: system.has_delivered_all(simulator), what=daemon.tail)
    assert daemon.terminate()[0] == 0
    lines = [canonical(line) for line in system.lines() if line.endswith(b"}}")]
    assert sorted(lines) == sorted(set(lines))
    assert {canonical(body(number)) for number in range(5, 9)} <= set(lines)
    assert {line["sink"] for line in doomed.log("file.changed")} == {"archive"}
