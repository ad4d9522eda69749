"""The promises under faults, end to end: the daemon and the simulator as separate processes."""

import gzip
import http.client
import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.polling import until
from tests.processes import ROOT, SECRET_ID, DaemonProcess, HeldPort, bodies_of, cannot_run, differences, environment
from tests.receiver import Answer, Receiver, running_receiver

LEASE_SECS = 1.5


def hook_sink(url, more="timeout_secs = 1"):
    return f'[sinks.hook]\ntype = "webhook"\nurl = "{url}"\n{more}\n'


def numbered(number, **more):
    return json.dumps(
        {"EventType": "Numbered", "NumberedEvent": {"TaskId": f"task-{number}-", "Number": number}} | more
    )


def rows_of(system, sql, *parameters):
    with closing(sqlite3.connect(f"file:{system.journal}?mode=ro", uri=True)) as journal:
        return journal.execute(sql, parameters).fetchall()


def stored(system):
    """Rows of the journal by (sink, state, reason)."""
    return Counter(rows_of(system, "SELECT sink, state, reason FROM letters"))


def failed(system):
    """As `stored`, but `out_of_time` counts as `sink_failed`: an attempt was running after a failed one."""
    found = Counter()
    for (sink, state, reason), number in stored(system).items():
        found[sink, state, "sink_failed" if reason == "out_of_time" else reason] += number
    return found


def assert_all_arrived_once(system, simulator, archive=None):
    lines = system.lines() if archive is None else archive.read_bytes().split(b"\n")[:-1]
    assert differences(bodies_of(simulator.ledger(bodies=True)), lines) == ([], [])


def assert_each_asked_once(receiver, count):
    ids = Counter(received.headers["webhook-id"] for received in receiver.received)
    assert len(ids) == count
    assert set(ids.values()) == {1}


def assert_each_accepted_once(receiver, count):
    ids = Counter(received.headers["webhook-id"] for received in receiver.accepted)
    assert len(ids) == count
    assert set(ids.values()) == {1}


def holds(condition, *, secs, every_secs=0.1):
    """Assert that a condition stays true for `secs`."""
    ends_at = time.monotonic() + secs
    while time.monotonic() < ends_at:
        assert condition()
        time.sleep(every_secs)


# --- between the daemon and the simulator -----------------------------------------------------------------------------


class InterceptingProxy(ThreadingHTTPServer):
    """Passes requests on to the simulator. `intercept` gets each of them first, and may answer differently."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, target):
        super().__init__(("127.0.0.1", 0), _Exchange)
        self.target = urlsplit(target).netloc
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.intercept = lambda exchange: exchange.pass_on()
        self.asked = []
        self.over = threading.Event()

    def __enter__(self):
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self.over.set()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request, client_address):
        pass  # in some tests the daemon closes the connection early

    def confirms(self):
        return [body["EventHandles"] for action, body in list(self.asked) if action == "ConfirmEvents"]

    def pulls(self):
        return sum(action == "PullEvents" for action, _ in list(self.asked))


class _Exchange(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        self.body = self.rfile.read(int(self.headers["Content-Length"]))
        self.action = self.headers["X-TC-Action"]
        self.server.asked.append((self.action, json.loads(self.body)))
        self.server.intercept(self)

    def ask(self, target=None):
        """The answer of the simulator, or of the one at `target`."""
        netloc = urlsplit(target).netloc if target else self.server.target
        with closing(http.client.HTTPConnection(netloc, timeout=30)) as connection:
            connection.request("POST", "/", self.body, dict(self.headers))
            return connection.getresponse().read()

    def pass_on(self):
        self.answer(self.ask())

    def answer(self, body, **headers):
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def with_other_handles(answer, change):
    """A pull's answer with other handles: `change` gets the list of handles and returns the new one."""
    document = json.loads(answer)
    events = document["Response"].get("EventSet") or []
    for event, handle in zip(events, change([event["EventHandle"] for event in events]), strict=True):
        event["EventHandle"] = handle
    return json.dumps(document).encode()


# --- redelivery during a delivery, late success -----------------------------------------------------------------------


def test_if_events_are_left_redeliveries_join_the_running_delivery(system, receiver):
    simulator = system.simulator(visibility_secs=LEASE_SECS, poll_secs=0.3)
    receiver.answer = Answer(after_secs=2.5)
    system.configure(
        simulator.url,
        lease_secs=LEASE_SECS,
        source='unrouted = "dead_letter"\non_failure = "leave"',
        sinks=hook_sink(receiver.url, "timeout_secs = 20\nconcurrency = 4"),
    )
    daemon = system.daemon()
    simulator.feed(*map(numbered, range(8)))

    until(simulator.all_confirmed, secs=20, what=daemon.tail)
    assert daemon.terminate()[0] == 0

    assert_each_asked_once(receiver, 8)
    stats = simulator.stats()
    assert stats["redeliveries"] >= 8
    assert stats["confirms_stale"] == 0  # each was confirmed by its newest handle
    assert stored(system) == {}
    assert daemon.log("event.settled")[-1]["redelivered"]


def test_a_late_success_of_a_slow_sink_ends_the_stored_event(system, receiver):
    simulator = system.simulator(visibility_secs=LEASE_SECS, poll_secs=0.3)
    receiver.answer = Answer(after_secs=7)  # beyond the lease, and beyond the first retry of a stored event
    system.configure(simulator.url, lease_secs=LEASE_SECS, sinks=hook_sink(receiver.url, "timeout_secs = 20"))
    daemon = system.daemon()
    simulator.feed(*map(numbered, range(4)))

    until(simulator.all_confirmed, secs=LEASE_SECS + 1)
    assert stored(system) == {("hook", "pending", "out_of_time"): 4}
    until(lambda: stored(system) == {}, secs=15, what=daemon.tail)
    assert daemon.terminate()[0] == 0

    assert_each_asked_once(receiver, 4)
    assert simulator.stats()["redeliveries"] == 0


# --- refused confirms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stale", ["atomic", "per_handle"])
def test_one_stale_handle_among_sixteen_needs_at_most_nine_calls(system, stale):
    simulator = system.simulator(visibility_secs=8, poll_secs=0.3, stale=stale)
    simulator.feed(*map(numbered, range(16)))
    with InterceptingProxy(simulator.url) as proxy:

        def change_the_first_answer(exchange):
            answer = exchange.ask()
            if exchange.action == "PullEvents" and proxy.pulls() == 1:
                answer = with_other_handles(answer, lambda handles: [*handles[:11], "0" * 32, *handles[12:]])
            exchange.answer(answer)

        proxy.intercept = change_the_first_answer
        system.configure(proxy.url, lease_secs=8)
        daemon = system.daemon()

        until(lambda: simulator.stats()["confirmed"] == 15, what=daemon.tail)
        assert simulator.stats()["redeliveries"] == 0
        until(simulator.all_confirmed, secs=30, what=daemon.tail)
        assert daemon.terminate()[0] == 0

        calls = proxy.confirms()
        assert sum(len(handles) > 1 for handles in calls) <= 7
        assert len(calls) <= 9 + 1
    assert simulator.stats()["redeliveries"] == 1
    assert [line["unconfirmed"] for line in daemon.log("confirm.failed")] == [1 if stale == "atomic" else 16]
    assert_all_arrived_once(system, simulator)


def test_a_refusal_after_a_lost_answer_needs_one_call(system):
    simulator = system.simulator(visibility_secs=4, poll_secs=0.3)
    simulator.feed(*map(numbered, range(16)))
    with InterceptingProxy(simulator.url) as proxy:

        def lose_the_first_confirm(exchange):
            answer = exchange.ask()
            if exchange.action == "ConfirmEvents" and len(proxy.confirms()) == 1:
                exchange.close_connection = True
                return
            exchange.answer(answer)

        proxy.intercept = lose_the_first_confirm
        system.configure(proxy.url, lease_secs=4)
        daemon = system.daemon()

        until(lambda: daemon.log("event.settled"))
        holds(lambda: len(proxy.confirms()) == 2, secs=4.5)  # longer than the lease
        assert daemon.terminate()[0] == 0
    assert simulator.all_confirmed()
    assert simulator.stats()["redeliveries"] == 0
    assert_all_arrived_once(system, simulator)


def test_repeated_stale_handles_cause_few_calls_and_a_sub_app_id_hint(system):
    simulator = system.simulator(visibility_secs=LEASE_SECS, poll_secs=0.5)
    simulator.feed(*map(numbered, range(16)))
    spoiled = threading.Event()
    with InterceptingProxy(simulator.url) as proxy:

        def spoil(exchange):
            answer = exchange.ask()
            if exchange.action == "PullEvents" and not spoiled.is_set():
                answer = with_other_handles(answer, lambda handles: [f"no-{handle}" for handle in handles])
            exchange.answer(answer)

        proxy.intercept = spoil
        system.configure(proxy.url, lease_secs=LEASE_SECS)
        daemon = system.daemon()
        refused = daemon.await_log("confirm.refused")
        spoiled.set()
        leases = simulator.stats()["redeliveries"] // 16 + 2  # one more may have begun
        assert len(proxy.confirms()) <= 9 * leases
        assert proxy.pulls() <= 8 * leases

        until(lambda: system.has_delivered_all(simulator), what=daemon.tail)
        assert daemon.terminate()[0] == 0
    assert refused[0]["level"] == "error"
    assert "sub_app_id" in refused[0]["hint"]
    assert_all_arrived_once(system, simulator)


def test_a_wrong_sub_app_id_is_reported_and_tried_seldom(system):
    simulator = system.simulator(poll_secs=0.3, sub_app_id=1500000001)
    simulator.feed(*map(numbered, range(5)))
    system.configure(simulator.url, source='sub_app_id = 1500000002\nunrouted = "dead_letter"')
    daemon = system.daemon()

    (failed,) = daemon.await_log("pull.failed")
    holds(lambda: simulator.requests <= 2, secs=1)
    simulator.control(sub_app_id=1500000002)
    daemon.signal(signal.SIGHUP)
    until(lambda: system.has_delivered_all(simulator))
    assert daemon.terminate()[0] == 0

    assert failed["level"] == "error"
    assert "sub_app_id" in failed["error_message"]
    assert_all_arrived_once(system, simulator)


@pytest.mark.parametrize(
    ("code", "noticed"),
    [("UnauthorizedOperation", "confirm.failed"), ("InvalidParameterValue", "confirm.refused")],
)
@pytest.mark.long
def test_a_source_without_confirms_stops_pulling_and_slows_no_other(system, code, noticed):
    refused = system.simulator(events=1000, visibility_secs=30)
    other = system.simulator(rate=40, visibility_secs=30)
    confirms, pulls = [], []
    with InterceptingProxy(other.url) as proxy:

        def intercept(exchange):
            if json.loads(exchange.body)["SubAppId"] == 2:
                exchange.pass_on()
            elif exchange.action == "PullEvents":
                pulls.append(time.time())
                exchange.answer(exchange.ask(refused.url))
            else:
                confirms.append((time.time(), len(json.loads(exchange.body)["EventHandles"])))
                error = {"Code": code, "Message": "It cannot be confirmed."}
                exchange.answer(json.dumps({"Response": {"Error": error, "RequestId": "r"}}).encode())

        proxy.intercept = intercept
        system.configure(
            proxy.url,
            lease_secs=30,
            api="requests_per_sec = 100",
            source='sub_app_id = 1\nunrouted = "dead_letter"\n[[sources]]\nname = "other"\nsub_app_id = 2\n',
            more="[daemon]\nshutdown_secs = 5\n",
        )
        daemon = system.daemon()
        daemon.await_log(noticed)
        # Wait until all pullers hold events that they cannot confirm; at most sixteen calls were running before that. A
        # gap of less than 4 s may also be the pause after a failed pull.
        until(lambda: pulls and time.time() - pulls[-1] > 4 and time.time() - confirms[-1][0] > 1, what=daemon.tail)
        began, pulled, fed = time.time(), len(pulls), other.stats()["fed"]
        holds(lambda: len(pulls) == pulled, secs=6)
        secs = time.time() - began
        rows = other.ledger(first=fed)
        redeliveries = other.stats()["redeliveries"]
        assert daemon.terminate()[0] == 0

    asked = [(at, handles) for at, handles in confirms if began <= at < began + secs]
    assert 1 <= len(asked) <= secs / 2 + 1
    assert {handles for _, handles in asked} == {1}
    assert pulled <= 2 * 16
    assert len(rows) > 100
    late = [row for row in rows if (row["confirmed_at"] or began + secs) - row["born"] > 1]
    assert len(late) < len(rows) / 100
    assert redeliveries == 0


# --- a ledger, or a disk, that cannot be written ----------------------------------------------------------------------


@contextmanager
def locked(path):
    """Lock the journal, as a command that works on it for too long."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


def test_pulling_waits_while_the_journal_is_locked_and_then_continues(system):
    simulator = system.simulator(rate=100, feed=900, visibility_secs=LEASE_SECS, poll_secs=0.3)
    system.configure(simulator.url, lease_secs=LEASE_SECS)
    daemon = system.daemon()
    until(lambda: simulator.stats()["confirmed"] >= 100)

    with locked(system.journal):
        began = time.monotonic()
        daemon.await_log("journal.failed")
        until(lambda: not simulator.stats()["outstanding"])
        pulls = simulator.stats()["pulls"]
        time.sleep(max(began + 6 - time.monotonic(), 0))
        assert simulator.stats()["pulls"] <= pulls + 1  # one may have been sent already
        assert simulator.stats()["visible"] > 100

    daemon.await_log("journal.recovered")
    until(lambda: system.has_delivered_all(simulator), secs=30, what=daemon.tail)
    assert daemon.terminate()[0] == 0
    assert_all_arrived_once(system, simulator)


def test_a_kill_before_the_ledger_is_written_doubles_nothing(system):
    simulator = system.simulator(rate=100, feed=300, visibility_secs=LEASE_SECS, poll_secs=0.3)
    system.configure(simulator.url, lease_secs=LEASE_SECS)
    daemon = system.daemon()
    until(lambda: simulator.stats()["confirmed"] >= 50)
    with locked(system.journal):
        daemon.await_log("journal.failed")
        daemon.kill()
    daemon = system.daemon()
    until(lambda: system.has_delivered_all(simulator), what=daemon.tail)
    assert daemon.terminate()[0] == 0
    assert daemon.log("file.recovered")
    assert_all_arrived_once(system, simulator)


class FullDisk:
    """A daemon with its own small disk, which can be filled. The user must be allowed to mount a file system."""

    def __init__(self, system, folder):
        self._folder = folder
        self._maps_root = [] if os.geteuid() == 0 else ["--map-root-user"]
        self._start = ["unshare", *self._maps_root, "--mount", "--propagation", "private", "sh", "-c"]
        self._start += ['mount -t tmpfs -o size=3m tmpfs "$0" && exec "$@"', str(folder)]
        self._fillers = []

    def daemon(self, system):
        trial = subprocess.run([*self._start, "true"], capture_output=True, text=True, check=False)
        if trial.returncode:
            cannot_run(f"no file system can be mounted: {trial.stderr.strip()}")
        self._process = _started(system, self._start)
        return self._process

    def seen(self, path):
        """The path by which the test can open a file of the daemon."""
        return type(path)(f"/proc/{self._process.process.pid}/root{path}")

    def fill(self):
        filler = self.seen(self._folder) / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    def free(self):
        (self.seen(self._folder) / "filler").unlink()


class Limit:
    """A daemon whose files cannot grow while the disk is "full": a process limit, which needs no rights."""

    def __init__(self, system, folder):
        pass

    def daemon(self, system):
        self._process = _started(system, [])
        self._limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        return self._process

    def seen(self, path):
        return path

    def fill(self):
        resource.prlimit(self._process.process.pid, resource.RLIMIT_FSIZE, (1, self._limits[1]))

    def free(self):
        resource.prlimit(self._process.process.pid, resource.RLIMIT_FSIZE, self._limits)


class _PipedDaemon(DaemonProcess):
    """A daemon whose log goes through a pipe, so that neither the disk nor the limit stops it."""

    def __init__(self, command, log_path, **more):
        self.log_path = log_path
        with log_path.open("ab") as log:
            self._cat = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log)
        with self._cat.stdin as pipe:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=pipe, env=environment(), **more
            )

    def terminate(self, **more):
        ended = super().terminate(**more)
        self._cat.wait()
        return ended

    def kill(self):
        super().kill()
        self._cat.wait()


def _started(system, before):
    command = [*before, sys.executable, "-m", "vodpoller", "run", "-c", str(system.config_path)]
    daemon = _PipedDaemon(command, system.folder / "daemon.log")
    system.kill_at_end(daemon)
    daemon.await_log("daemon.started")
    return daemon


@pytest.mark.parametrize(
    ("kind", "on_it"), [(FullDisk, "journal"), (FullDisk, "both"), (Limit, "both")], ids=["journal", "both", "limit"]
)
def test_a_full_disk_loses_nothing_and_needs_no_restart_afterwards(system, kind, on_it):
    simulator = system.simulator(visibility_secs=LEASE_SECS, poll_secs=0.3)
    folder = system.folder / "disk"
    folder.mkdir()
    system.journal = folder / "journal.db"
    if on_it == "both":
        system.archive = folder / "events.jsonl"
    # No breaker: it would only prolong the test.
    system.configure(simulator.url, lease_secs=LEASE_SECS, sinks=system.archive_sink + "breaker_failures = 1000\n")
    disk = kind(system, folder)
    daemon = disk.daemon(system)
    archive = disk.seen(system.archive) if on_it == "both" else system.archive
    simulator.feed(*map(numbered, range(20)))
    until(simulator.all_confirmed)

    disk.fill()
    for first in range(20, 320, 50):
        simulator.feed(*map(numbered, range(first, first + 50)))
        time.sleep(0.1)
    daemon.await_log("journal.failed")
    time.sleep(LEASE_SECS)
    assert simulator.stats()["confirmed"] < 320
    assert daemon.process.poll() is None

    disk.free()
    until(simulator.all_confirmed, secs=25, what=daemon.tail)
    daemon.await_log("journal.recovered")
    until(lambda: archive.read_bytes().count(b"\n") == 320)
    assert_all_arrived_once(system, simulator, archive)
    assert daemon.log("puller.failed") == daemon.log("worker.failed") == []
    assert not daemon.log("task.failed")
    assert daemon.terminate()[0] == 0


# --- a dead sink ------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_dead_sink_delays_no_other_and_later_gets_each_event_once(system):
    simulator = system.simulator(rate=500, feed=2000, poll_secs=0.5)
    with HeldPort() as port:
        system.configure(simulator.url, sinks=system.archive_sink + hook_sink(port.url))
        daemon = system.daemon()
        until(lambda: simulator.stats()["confirmed"] > 700, secs=60, what=daemon.tail)
        receiver = Receiver(("127.0.0.1", port.number))
        receiver.answer = Answer(hangs=True)
        with running_receiver(receiver):
            until(simulator.all_confirmed, secs=60, what=lambda: str(simulator.stats()))
            attempts = len(receiver.received)
            # On a busy machine a puller may also store events of the file, because it is needed for the next pull.
            held = sum(number for (sink, _, _), number in stored(system).items() if sink == "hook")
            receiver.answer = Answer()
            until(lambda: not stored(system), secs=60, every_secs=0.2, what=daemon.tail)
            assert daemon.terminate()[0] == 0
            ids = Counter(received.headers["webhook-id"] for received in receiver.accepted)
            order = [received.body for received in receiver.accepted]

    assert_all_arrived_once(system, simulator)
    # Nearly no event waited for the dead sink; the row `slow-sink` of the benchmarks shows the seconds.
    reasons = Counter(line["sinks"]["hook"]["reason"] for line in daemon.log("event.settled"))
    assert reasons["sink_down"] > 0.9 * reasons.total()
    assert held == simulator.stats()["fed"]
    assert attempts <= 6
    assert set(ids.values()) == {1}
    assert len(ids) == held
    assert_oldest_first(simulator, order)


def assert_oldest_first(simulator, order):
    """Only roughly: due times differ from births by up to a second, and several requests run at once."""
    number_of = {row["body"].encode(): row["number"] for row in simulator.ledger(bodies=True)}
    numbers = [number_of[body] for body in order]
    fifth = len(numbers) // 5
    assert sum(numbers[:fifth]) / fifth < sum(numbers[2 * fifth : 3 * fifth]) / fifth < sum(numbers[-fifth:]) / fifth


@pytest.mark.long
def test_a_sink_that_is_slower_than_events_come_delays_no_other(system, receiver):
    simulator = system.simulator(rate=300, feed=1050, poll_secs=0.5)
    receiver.answer = Answer(after_secs=1)  # eight requests at once, so eight events per second
    system.configure(simulator.url, sinks=system.archive_sink + hook_sink(receiver.url, "timeout_secs = 5"))
    daemon = system.daemon()
    until(simulator.all_confirmed, secs=60, what=daemon.tail)
    # On a busy machine a puller may also store events of the file, because it is needed for the next pull.
    until(lambda: len(system.lines()) >= simulator.stats()["fed"], secs=60, what=daemon.tail)
    assert len(receiver.accepted) < simulator.stats()["fed"] / 2, "the file has all of them"
    assert_all_arrived_once(system, simulator)
    assert daemon.log("breaker.opened") == []


def test_a_receiver_that_always_answers_404_makes_no_dead_letter(system, receiver):
    simulator = system.simulator(rate=100, feed=300, poll_secs=0.3)
    receiver.answer = Answer(status=404)
    system.configure(simulator.url, sinks=hook_sink(receiver.url))
    daemon = system.daemon()
    until(simulator.all_confirmed)
    attempts = len(receiver.received)
    receiver.answer = Answer()
    until(lambda: not stored(system), secs=30, what=daemon.tail)
    assert daemon.terminate()[0] == 0
    assert daemon.log("event.dead") == []
    assert attempts <= 20
    assert_each_accepted_once(receiver, 300)


# --- bad events -------------------------------------------------------------------------------------------------------

PLUGIN = """
from typing import Literal
from vodpoller.sinks import Sink, SinkConfig


class PickyConfig(SinkConfig):
    type: Literal["picky"]
    path: str


class PickySink(Sink):
    Config = PickyConfig
    batch_events = 16

    def __init__(self, name, config, context):
        self._file = open(config.path, "ab", buffering=0)

    def deliver(self, events, timeout_secs):
        if any(b"task-7-" in event.body for event in events):
            None + 1
        for event in events:
            self._file.write(event.body + bytes([10]))

    def close(self):
        self._file.close()
"""

HANGS = """body=$(cat); case "$body" in *task-11-*) sleep 300 & echo $! > "$0.pid"; sleep 300;; esac
echo "$body" >> "$0"
"""


def is_alive(pid):
    """Whether the process runs; a zombie does not."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


class Picky(Receiver):
    def answer_to(self, received):
        if b"task-3-" in received.body:
            return Answer(status=500)
        return Answer(status=422 if b"task-5-" in received.body else 204)


def test_bad_events_of_every_kind_affect_no_other_event_and_no_worker(system):
    plugin = system.folder / "plugin"
    info = plugin / "vodpoller_picky-1.0.dist-info"
    info.mkdir(parents=True)
    (plugin / "vodpoller_picky.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vodpoller-picky\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vodpoller.sinks]\npicky = vodpoller_picky:PickySink\n")
    by_exec, by_plugin = system.folder / "by_exec", system.folder / "by_plugin"
    simulator = system.simulator(visibility_secs=3, poll_secs=0.3)
    with running_receiver(Picky()) as receiver:
        sinks = {
            "archive": system.archive_sink,
            "hook": hook_sink(receiver.url),
            "command": '[sinks.command]\ntype = "exec"\ntimeout_secs = 1\n'
            f"command = {json.dumps(['sh', '-c', HANGS, str(by_exec)])}\n",
            "plugin": f'[sinks.plugin]\ntype = "picky"\npath = "{by_plugin}"\n',
            "chosen": f'[sinks.chosen]\ntype = "file"\npath = "{system.folder}/chosen.jsonl"\n',
        }
        all_but_chosen = json.dumps([name for name in sinks if name not in ("chosen", "command")])
        system.configure(
            simulator.url,
            sinks="".join(sinks.values()),
            routes=f'[[routes]]\nname = "all"\nsinks = {all_but_chosen}\n'
            '[[routes]]\nname = "small"\nevent_types = ["Numbered"]\nsinks = ["command"]\n'
            '[[routes]]\nname = "some"\nsinks = ["chosen"]\n'
            'where = "starts_with(NumberedEvent.TaskId, `\\"task\\"`)"\n',
        )
        daemon = system.daemon(PYTHONPATH=f"{plugin}:{ROOT}")
        fed = [numbered(number) for number in range(40)]
        fed[9] = json.dumps({"EventType": "Numbered", "NumberedEvent": {"TaskId": 9}})
        fed.append(
            json.dumps({"EventType": "Large", "NumberedEvent": {"TaskId": "task-large", "Name": "x" * 5_000_000}})
        )
        simulator.feed(*fed)

        until(simulator.all_confirmed, what=daemon.tail)
        until(lambda: len(system.lines()) == 41)
        until(lambda: len(receiver.accepted) == 39)
        until(lambda: by_plugin.read_bytes().count(b"\n") == 40)
        until(lambda: by_exec.read_bytes().count(b"\n") == 39)
        until(
            lambda: (
                failed(system)
                == {
                    ("hook", "pending", "sink_failed"): 1,
                    ("hook", "dead", "rejected"): 1,
                    ("chosen", "dead", "rejected"): 1,
                    ("plugin", "pending", "sink_failed"): 1,
                    ("command", "pending", "sink_failed"): 1,
                }
            ),
            what=lambda: str(failed(system)),
        )
        forked = int((system.folder / "by_exec.pid").read_text())
        until(lambda: not is_alive(forked))

        simulator.feed(numbered(100))  # all workers live
        until(lambda: len(system.lines()) == 42 and len(receiver.accepted) == 40)
        until(lambda: b"task-100-" in by_plugin.read_bytes() and b"task-100-" in by_exec.read_bytes())
        assert daemon.terminate()[0] == 0
    assert_all_arrived_once(system, simulator)
    taken = [each for each in [*fed, numbered(100)] if "task-7-" not in each]
    assert differences(taken, by_plugin.read_text().splitlines()) == ([], [])
    assert simulator.stats()["redeliveries"] == 0
    assert daemon.log("breaker.opened") == []


# --- giving up --------------------------------------------------------------------------------------------------------


def test_stored_events_are_given_up_by_age_even_across_restarts(system, receiver):
    simulator = system.simulator(visibility_secs=LEASE_SECS, poll_secs=0.3)
    simulator.feed(*map(numbered, range(4)))
    receiver.answer = Answer(status=503)
    sinks = hook_sink(receiver.url, "timeout_secs = 1\nbreaker_failures = 100\ngive_up_after_secs = 604800")
    system.configure(simulator.url, lease_secs=LEASE_SECS, sinks=sinks)
    daemon = system.daemon()
    until(simulator.all_confirmed, what=daemon.tail)
    daemon.kill()

    # As if it had been stopped for days: the first is older than a week, the second nearly; the third's sink is gone.
    ages_secs = {1: 604_801, 2: 600_000, 3: 5_000_000, 4: 10}
    with closing(sqlite3.connect(system.journal)) as journal, journal:
        for row, age_secs in ages_secs.items():
            journal.execute("UPDATE letters SET stored_at = stored_at - ?, due_at = 0 WHERE id = ?", (age_secs, row))
        journal.execute("UPDATE letters SET sink = 'gone' WHERE id = 3")
    daemon = system.daemon()
    (dead,) = daemon.await_log("event.dead")
    retried = "SELECT id FROM letters WHERE sink = 'hook' AND due_at > 0 ORDER BY id"
    until(lambda: rows_of(system, retried) == [(2,), (4,)])
    daemon.kill()
    assert (dead["reason"], dead["sink"]) == ("gave_up", "hook")
    assert failed(system) == {
        ("hook", "dead", "gave_up"): 1,
        ("hook", "pending", "sink_failed"): 2,
        ("gone", "pending", "sink_removed"): 1,
    }

    receiver.answer = Answer()
    with closing(sqlite3.connect(system.journal)) as journal, journal:
        journal.execute("UPDATE letters SET due_at = 0")
    daemon = system.daemon()
    daemon.await_log("pending.delivered", number=2)
    (stuck,) = daemon.await_log("pending.stuck")
    assert stuck["level"] == "error"
    assert "deadletters replay --pending --sink gone --to SINK" in stuck["hint"]
    assert "deadletters purge --pending --sink gone" in stuck["hint"]
    assert daemon.terminate()[0] == 0
    assert failed(system) == {("hook", "dead", "gave_up"): 1, ("gone", "pending", "sink_removed"): 1}
    assert_each_accepted_once(receiver, 2)


# --- problems with the storage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_journal_that_may_not_be_written_is_reported_at_the_start(system, what):
    simulator = system.simulator(poll_secs=0.3)
    folder = system.folder / "state"
    folder.mkdir()
    system.journal = folder / "journal.db"
    system.configure(simulator.url)
    if what == "file":
        daemon = system.daemon()
        assert daemon.terminate()[0] == 0
        system.journal.chmod(0o444)
    else:
        folder.chmod(0o555)
    requests = simulator.requests
    # Root may write to any file unless it drops that capability.
    without = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    try:
        done = subprocess.run(
            [*without, sys.executable, "-m", "vodpoller", "run", "-c", str(system.config_path)],
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
            env=environment(),
        )
    finally:
        folder.chmod(0o755)
    # The operator must act; with another code systemd would restart it for ever.
    assert done.returncode == 78, done.stderr
    assert str(system.journal) in done.stderr
    assert "read-only" in done.stderr or "must belong to the user" in done.stderr
    assert "Traceback" not in done.stderr
    assert simulator.requests == requests


@pytest.mark.parametrize("damage", ["no database", "a page", "cut"])
def test_a_corrupt_journal_is_refused_with_a_remedy(system, damage):
    simulator = system.simulator(events=50, poll_secs=0.3)
    system.configure(simulator.url, sinks=hook_sink("http://127.0.0.1:9/nothing"))
    daemon = system.daemon()
    until(simulator.all_confirmed)
    assert daemon.terminate()[0] == 0
    requests = simulator.requests
    data = system.journal.read_bytes()
    assert len(data) > 20 * 4096
    spoiled = {"no database": b"x" * len(data), "a page": data[:-4096] + bytes(4096), "cut": data[:9000]}
    system.journal.write_bytes(spoiled[damage])

    daemon = system.daemon(started=False)
    assert daemon.process.wait(20) == 78
    assert "corrupt" in daemon.tail()
    assert ".recover" in daemon.tail()
    assert "Traceback" not in daemon.tail()
    assert simulator.requests == requests
    assert system.journal.read_bytes() == spoiled[damage]


@pytest.mark.parametrize("replaced", [False, True])
def test_with_a_deleted_or_replaced_journal_events_stay_at_vod(system, replaced):
    simulator = system.simulator(visibility_secs=LEASE_SECS, poll_secs=0.3)
    system.configure(simulator.url, lease_secs=LEASE_SECS)
    daemon = system.daemon()
    simulator.feed(*map(numbered, range(20)))
    until(simulator.all_confirmed)

    for path in system.folder.glob("journal.db*"):
        if path.suffix != ".lock":
            path.unlink()
    if replaced:
        system.journal.touch()
    (failed, *_) = daemon.await_log("journal.failed")
    until(lambda: not simulator.stats()["pulls_hanging_now"])
    pulls = simulator.stats()["pulls"]
    simulator.feed(*map(numbered, range(20, 40)))
    holds(lambda: simulator.stats()["visible"] == 20, secs=1.2)
    assert simulator.stats()["pulls"] == pulls
    assert daemon.process.poll() is None
    assert daemon.terminate()[0] == 0

    daemon = system.daemon()
    until(lambda: system.has_delivered_all(simulator))
    assert daemon.terminate()[0] == 0
    assert "restart vodpoller" in failed["error_message"]
    assert_all_arrived_once(system, simulator)


def test_with_a_full_journal_events_stay_at_vod_until_there_is_room(system):
    simulator = system.simulator(visibility_secs=LEASE_SECS, poll_secs=0.3, batch=1)
    simulator.feed(*(numbered(number, Name="x" * 400_000) for number in range(12)))
    with HeldPort() as port:
        system.configure(
            simulator.url,
            lease_secs=LEASE_SECS,
            # Without a breaker many pullers store their events at the same moment, when their leases end.
            sinks=system.archive_sink + hook_sink(port.url, "timeout_secs = 1\nbreaker_failures = 1000"),
            more="max_bytes = 1048576",
        )
        daemon = system.daemon()
        daemon.await_log("journal.failed", where=lambda line: "max_bytes" in line["error_message"])
        until(lambda: len(system.lines()) == 12, what=daemon.tail)
        until(lambda: simulator.stats()["redeliveries"] >= 10)
        assert simulator.stats()["confirmed"] == 2
        with running_receiver(Receiver(("127.0.0.1", port.number))) as receiver:
            until(simulator.all_confirmed, secs=20, what=daemon.tail)
            until(lambda: len(receiver.accepted) >= 12 and system.has_delivered_all(simulator), secs=20)
            assert daemon.terminate()[0] == 0
            assert_each_accepted_once(receiver, 12)
    assert_all_arrived_once(system, simulator)


# --- a hostile endpoint -----------------------------------------------------------------------------------------------


def _raw(exchange, *pieces):
    with suppress(OSError):
        for piece in pieces:
            exchange.wfile.write(piece)
    exchange.close_connection = True


def endless_body(exchange):
    with suppress(OSError):
        exchange.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while not exchange.server.over.is_set():
            exchange.wfile.write(b" " * 65536)
    exchange.close_connection = True


def endless_head(exchange):
    _raw(exchange, b"HTTP/1.1 200 OK\r\n", *(b"X-%d: %b\r\n" % (n, b"y" * 1000) for n in range(10_000)), b"\r\n")


def one_long_header(exchange):
    _raw(exchange, b"HTTP/1.1 200 OK\r\nX: ", *[b"y" * 65536] * 160, b"\r\n\r\n")


BOMB = gzip.compress(bytes(30_000_000), 1) * 10  # ten gzip members; made once, since that is slow


def gzip_bomb(exchange):
    exchange.answer(BOMB, Content_Encoding="gzip")


def slow_loris(exchange):
    with suppress(OSError):
        for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b" " * 100_000:
            exchange.wfile.write(bytes([byte]))
            if exchange.server.over.wait(0.05):
                break
    exchange.close_connection = True


def many_events(exchange):
    events = (b'{"EventHandle":"%d","EventType":"Other"}' % number for number in range(100_000))
    exchange.answer(b'{"Response":{"EventSet":[%b],"RequestId":"many"}}' % b",".join(events))


def large_handles(exchange):
    events = (
        b'{"EventHandle":"%b%d","EventType":"Other","N":%d}' % (b"h" * 100_000, number, number) for number in range(16)
    )
    exchange.answer(b'{"Response":{"EventSet":[%b],"RequestId":"large"}}' % b",".join(events))


def large_answer(exchange):
    event = b'{"EventHandle":"h","EventType":"Other","E":"%b"}' % (b"x" * 16_000_000)
    exchange.answer(b'{"Response":{"EventSet":[%b],"RequestId":"large"}}' % event)


def values_without_end(exchange):
    event = b'{"EventHandle":"h","EventType":"Other","E":[%b0]}' % (b'"",[],' * 1_000_000)
    exchange.answer(b'{"Response":{"EventSet":[%b],"RequestId":"values"}}' % event)


HOSTILE_ANSWERS = {
    "endless body": (endless_body, "pull.failed", "longer than|did not end in time"),
    "endless head": (endless_head, "pull.failed", "a head that is too long"),
    "one long header": (one_long_header, "pull.failed", "a head that is too long"),
    "gzip bomb": (gzip_bomb, "pull.failed", "longer than|did not end in time"),
    "slow loris": (slow_loris, "pull.failed", "no answer within|did not end in time"),
    "many events": (many_events, "pull.failed", "more than 1000 events"),
    "large handles": (large_handles, "pull.failed", "usable EventHandle"),
    "large answer": (large_answer, "pull.failed", "longer than|did not end in time"),
    "values without end": (values_without_end, "answer.salvaged", "values"),
}


def peak_bytes(process):
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


@pytest.mark.parametrize("kind", HOSTILE_ANSWERS)
@pytest.mark.long
def test_a_hostile_endpoint_needs_limited_memory_and_loses_no_event(system, kind):
    behave, event, expected = HOSTILE_ANSWERS[kind]
    simulator = system.simulator(visibility_secs=3, poll_secs=0.3)
    simulator.feed(*map(numbered, range(40)))
    with InterceptingProxy(simulator.url) as proxy:
        hostile = threading.Event()
        hostile.set()
        proxy.intercept = lambda x: behave(x) if hostile.is_set() and x.action == "PullEvents" else x.pass_on()
        system.configure(
            proxy.url,
            api="timeout_secs = 1\nrequests_per_sec = 1000",
            source='unrouted = "confirm"',
            routes='[[routes]]\nname = "numbered"\nevent_types = ["Numbered"]\nsinks = ["archive"]\n',
        )
        daemon = system.daemon()
        lines = daemon.await_log(event)
        holds(lambda: daemon.process.poll() is None, secs=0.7)
        hostile.clear()
        daemon.signal(signal.SIGHUP)
        until(simulator.all_confirmed, secs=20, what=daemon.tail)
        until(lambda: len(system.lines()) == 40)
        peak = peak_bytes(daemon.process)
        assert daemon.terminate()[0] == 0
    assert peak < 250 * 2**20
    assert any(part in lines[0]["error_message"] for part in expected.split("|")), lines[0]["error_message"]
    assert daemon.log("puller.failed") == daemon.log("worker.failed") == []
    assert_all_arrived_once(system, simulator)


def test_an_event_twice_in_an_answer_is_delivered_and_confirmed_once(system):
    simulator = system.simulator(visibility_secs=LEASE_SECS, poll_secs=0.3)
    simulator.feed(*map(numbered, range(8)))
    with InterceptingProxy(simulator.url) as proxy:

        def double(exchange):
            answer = json.loads(exchange.ask())
            if exchange.action == "PullEvents":
                answer["Response"]["EventSet"] = (answer["Response"].get("EventSet") or []) * 2
            exchange.answer(json.dumps(answer).encode())

        proxy.intercept = double
        system.configure(proxy.url, lease_secs=LEASE_SECS)
        daemon = system.daemon()
        until(lambda: system.has_delivered_all(simulator), what=daemon.tail)
        assert daemon.terminate()[0] == 0
    assert simulator.stats()["redeliveries"] == 0
    assert simulator.stats()["confirms_stale"] == 0
    assert_all_arrived_once(system, simulator)


def test_credentials_and_signatures_go_to_no_target_of_a_redirect(system):
    simulator = system.simulator(poll_secs=0.3)
    simulator.feed(*map(numbered, range(8)))
    with running_receiver() as elsewhere, InterceptingProxy(simulator.url) as proxy:
        redirecting = threading.Event()
        redirecting.set()

        def redirect(exchange):
            if not redirecting.is_set():
                exchange.pass_on()
                return
            status = 301 + len(proxy.asked) % 2 * 6
            _raw(exchange, b"HTTP/1.1 %d Elsewhere\r\nLocation: %b\r\n\r\n" % (status, elsewhere.url.encode()))

        proxy.intercept = redirect
        system.configure(proxy.url)
        daemon = system.daemon()
        (failed, *_) = daemon.await_log("pull.failed")
        until(lambda: proxy.pulls() >= 2)
        redirecting.clear()
        daemon.signal(signal.SIGHUP)
        until(lambda: system.has_delivered_all(simulator))
        assert daemon.terminate()[0] == 0
        assert elsewhere.connections == []
    assert "redirects" in failed["error_message"]
    assert SECRET_ID not in daemon.log_path.read_text()
    assert_all_arrived_once(system, simulator)
