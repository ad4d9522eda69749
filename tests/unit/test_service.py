"""The process around a daemon: the decisions of a reload, and the effect of each failure during one."""

import socket
import threading
from contextlib import closing
from dataclasses import replace
from queue import Empty, SimpleQueue
from signal import SIGHUP, SIGTERM

import pytest

from tests.helpers import event, log_into, named
from tests.listening import Client
from tests.polling import until
from tests.processes import HeldPort
from vodpoller import service as service_module
from vodpoller.config.load import from_dict
from vodpoller.config.tables import Listener
from vodpoller.errors import ConfigError, JournalError, StoppingError
from vodpoller.handover import Handover
from vodpoller.journal.contract import Letter
from vodpoller.journal.sqlite import SqliteJournal
from vodpoller.service import Service
from vodpoller.status import JournalStatus, Status
from vodpoller.status_socket import ask, socket_path
from vodpoller.systemd import Notifier
from vodpoller.telemetry import Count, Telemetry

READY, RELOADING, STOPPING = "READY=1", "RELOADING=1", "STOPPING=1"


def config_in(folder, *, journal="journal.db", sink="archive", shutdown_secs=5.0):
    data = {
        "api": {"endpoint": "http://127.0.0.1:9"},
        "credentials": {"secret_id": "an-id-of-a-key", "secret_key": "the-key-of-the-id"},
        "sources": [{"name": "main"}],
        "routes": [{"name": "all", "sinks": [sink]}],
        "sinks": {sink: {"type": "file", "path": str(folder / f"{sink}.jsonl")}},
        "journal": {"path": str(folder / journal)},
        "daemon": {"shutdown_secs": shutdown_secs},
    }
    return from_dict(data, where="config.toml", base=folder, env={})


class StubSignals:
    """Replaces real signals, which only the main thread receives."""

    def __init__(self):
        self._received = SimpleQueue()
        self.is_stopping = False

    def catch(self):
        pass

    def reload(self):
        self._received.put(SIGHUP)

    def end(self):
        self.is_stopping = True
        self._received.put(SIGTERM)

    def next(self, timeout_secs):
        try:
            return self._received.get(timeout=timeout_secs)
        except Empty:
            return None


class StubDaemon:
    """Replaces the daemon of one configuration; records what is done with it."""

    def __init__(self, config, done, telemetry):
        self._config, self._done, self.telemetry = config, done, telemetry
        self.stuck = []
        self.while_stopping = lambda: None
        self.start_error = None

    def _record(self, what):
        self._done.append(f"{what} {next(iter(self._config.sinks))}")

    def start(self):
        self._record("start")
        if self.start_error:
            raise self.start_error

    def stop(self):
        self._record("stop")
        self.while_stopping()
        return self.stuck

    def refresh(self):
        self._record("refresh")

    def status(self):
        journal = JournalStatus(path=str(self._config.journal.path), writable=True)
        settled = self.telemetry.total(Count.EVENTS_SETTLED)
        return Status(
            pid=1,
            version="1",
            started_at=1,
            at=2,
            settled_events=settled,
            sources=[],
            sinks=[],
            stored=[],
            journal=journal,
        )

    known_status = status

    def note_times(self):
        pass

    def is_alive(self):
        return True

    def overdue(self):
        return {}

    clock_offset_secs = None


class StubNotifier(Notifier):
    def __init__(self):
        super().__init__("")
        self.sent = []

    def notify(self, *assignments):
        self.sent += assignments

    def states(self):
        return [state for state in self.sent if state in (READY, RELOADING, STOPPING)]


class Running:
    """A service that runs in a thread."""

    def __init__(self, folder, lines):
        self.folder, self.lines = folder, lines
        self.config = config_in(folder)
        self.next_config = self.config
        self.done, self.built, self.executed = [], [], []
        self.build_errors = {}
        self.at_build = lambda daemon: None
        self.execute_error = StoppingError("instead of another program in this process")
        self.signals, self.notifier = StubSignals(), StubNotifier()
        self.exit_codes = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self.service = Service(
            self.config,
            read=self._read,
            make_log=self._make_log,
            notifier=self.notifier,
            signals=self.signals,
            build=self.build,
            execute=self._execute,
        )
        self._thread.start()
        until(lambda: READY in self.notifier.sent)
        return self

    def __exit__(self, *_exception):
        self.signals.end()
        self._thread.join(30)
        assert not self._thread.is_alive()

    def _run(self):
        self.exit_codes.append(self.service.run())

    def _make_log(self, _config):
        return log_into(self.lines)

    def _read(self):
        if isinstance(self.next_config, Exception):
            raise self.next_config
        return self.next_config() if callable(self.next_config) else self.next_config

    def build(self, config, *, telemetry, notifier, signals, clock, sockets):
        name = next(iter(config.sinks))
        errors = self.build_errors.get(name)
        self.done.append(f"build {name}")
        if errors:
            raise errors.pop(0)
        if signals.is_stopping:
            raise StoppingError("a signal asked for the end")
        self.built.append(StubDaemon(config, self.done, telemetry))
        self.at_build(self.built[-1])
        return self.built[-1]

    def _execute(self, handover, signals):
        self.executed.append(handover)
        raise self.execute_error

    def reload(self):
        """Ask, and wait for the answer."""
        self.done.clear()
        return ask(socket_path(self.config.journal.path), {"command": "reload"}, timeout_secs=30)

    def status(self):
        return ask(socket_path(self.config.journal.path), {"command": "status"}, timeout_secs=30)

    def ends_with(self):
        self._thread.join(30)
        return self.exit_codes[0]


@pytest.fixture
def running(tmp_path, lines):
    with Running(tmp_path, lines) as one:
        yield one


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "problems"),
    [
        (
            ConfigError(["config.toml: line 3: no TOML", "config.toml: a: b"]),
            ["config.toml: line 3: no TOML", "config.toml: a: b"],
        ),
        (RuntimeError("a bug"), ["a bug"]),
    ],
    ids=["problems of the file", "a bug"],
)
def test_an_unreadable_configuration_is_refused_without_a_stop(running, lines, error, problems):
    running.next_config = error
    assert running.reload() == {"result": "refused", "problems": problems}
    assert running.done == ["refresh archive"]
    assert named(lines, "reload.failed")[0]["problems"] == problems
    status = running.status()
    assert status["reload"]["successful"] is False
    assert status["problems"][0]["what"] == "configuration"
    assert all(problem in status["problems"][0]["cause"] for problem in problems)
    assert running.notifier.states() == [READY, RELOADING, READY]


def test_a_failed_probe_refuses_the_reload_without_a_stop(running, tmp_path):
    (tmp_path / "other.jsonl").mkdir()
    running.next_config = config_in(tmp_path, sink="other")
    answer = running.reload()
    assert answer["result"] == "refused"
    assert "sinks.other.path" in answer["problems"][0]
    assert running.done == ["refresh archive"]


@pytest.mark.parametrize(
    "error", [ConfigError(["sinks.other: wrong"]), JournalError("sinks.other: wrong"), ValueError("sinks.other: wrong")]
)
def test_if_a_build_fails_the_former_configuration_is_built_again(running, tmp_path, error):
    running.next_config = config_in(tmp_path, sink="other")
    running.build_errors["other"] = [error]
    assert running.reload() == {"result": "refused", "problems": ["sinks.other: wrong"]}
    assert running.done == ["refresh archive", "stop archive", "build other", "build archive", "start archive"]
    assert running.reload()["result"] == "done"


def test_a_daemon_that_cannot_start_is_stopped_again(running, tmp_path):
    running.next_config = config_in(tmp_path, sink="other")

    def spoil(daemon):
        running.at_build = lambda daemon: None
        daemon.start_error = RuntimeError("can't start new thread")

    running.at_build = spoil
    assert running.reload()["problems"] == ["can't start new thread"]
    assert running.done[2:] == ["build other", "start other", "stop other", "build archive", "start archive"]


def test_if_the_former_configuration_fails_too_it_ends_with_1(running, lines, tmp_path):
    running.next_config = config_in(tmp_path, sink="other")
    running.build_errors = {"other": [ConfigError(["wrong"])], "archive": [JournalError("gone")]}
    assert running.reload() == {"result": "ended", "problems": ["wrong"]}
    assert running.ends_with() == 1
    reported = [line["problems"] for line in named(lines, "reload.failed")]
    assert reported == [["the former configuration: gone"], ["wrong"]]
    assert running.notifier.states() == [READY, RELOADING, STOPPING]


def store_one(config):
    journal = SqliteJournal(config.journal.path, max_bytes=10**9, ledger_days=5, telemetry=Telemetry(log_into([])))
    journal.store([Letter(event=event(1), sink="archive", dead=False, reason="sink_failed")])
    journal.close()


def test_the_journal_stays_while_events_are_stored_in_it(running, tmp_path):
    store_one(running.config)
    running.next_config = config_in(tmp_path, journal="other.db")
    answer = running.reload()
    assert answer["result"] == "refused"
    assert "1 events are stored" in answer["problems"][0]
    assert running.done == ["refresh archive"]


def test_the_journal_stays_if_the_stop_itself_stores_events(running, tmp_path):
    SqliteJournal(
        running.config.journal.path, max_bytes=10**9, ledger_days=5, telemetry=Telemetry(log_into([]))
    ).close()
    running.built[0].while_stopping = lambda: store_one(running.config)
    running.next_config = config_in(tmp_path, journal="other.db")
    answer = running.reload()
    assert answer["result"] == "refused"
    assert "1 events are stored" in answer["problems"][0]
    assert running.done == ["refresh archive", "stop archive", "build archive", "start archive"]


def test_the_journal_stays_if_its_stored_events_cannot_be_read(running, tmp_path):
    running.next_config = config_in(tmp_path, journal="other.db")
    answer = running.reload()
    assert "cannot be read" in answer["problems"][0]
    assert running.done == ["refresh archive"]


# --- a thread that hangs ----------------------------------------------------------------------------------------------


def test_a_hanging_thread_causes_an_exec_that_keeps_connections(running, tmp_path):
    running.built[0].stuck = ["sink archive"]
    running.next_config = config_in(tmp_path, sink="other")
    running.reload()
    (handover,) = running.executed
    assert handover.stuck == ["sink archive"]
    assert handover.journal == str(running.config.journal.path)
    assert len(handover.asking) == 1
    assert list(handover.listening) == [str(socket_path(running.config.journal.path))]
    assert "build other" not in running.done


def test_a_stop_that_never_ends_causes_an_exec(tmp_path, lines, monkeypatch):
    monkeypatch.setattr(service_module, "BEYOND_STOP_SECS", -0.5)
    over = threading.Event()
    running = Running(tmp_path, lines)
    running.config = running.next_config = config_in(tmp_path, shutdown_secs=1.0)
    with running:
        running.built[0].while_stopping = over.wait
        running.next_config = config_in(tmp_path, sink="other")
        running.signals.reload()
        running.ends_with()
        over.set()
    assert running.executed[0].stuck == ["closing the journal"]


def test_if_the_program_cannot_be_executed_it_ends_with_1(running, tmp_path):
    running.built[0].stuck = ["sink archive"]
    running.execute_error = OSError(2, "No such file or directory")
    running.next_config = config_in(tmp_path, sink="other")
    answer = running.reload()
    assert answer["result"] == "ended"
    assert "sink archive: a thread hung" in answer["problems"][0]
    assert running.ends_with() == 1


def test_a_request_from_before_the_exec_is_answered(tmp_path, lines):
    asker, connection = socket.socketpair()
    with closing(asker):
        running = Running(tmp_path, lines)
        service = Service(
            running.config,
            read=lambda: running.config,
            make_log=lambda config: log_into(lines),
            notifier=running.notifier,
            signals=running.signals,
            build=running.build,
            handover=Handover(stuck=["sink never"], asking=[connection.detach()]),
        )
        service.run(until=lambda: True)
        asker.settimeout(5)
        assert b'"stuck": ["sink never"]' in asker.recv(1000)
    assert named(lines, "daemon.reloaded")[0]["executed_anew_for"] == ["sink never"]


def test_after_an_exec_a_journal_with_stored_events_is_kept(tmp_path, lines):
    running = Running(tmp_path, lines)
    store_one(running.config)
    service = Service(
        config_in(tmp_path, journal="other.db"),
        read=lambda: running.config,
        make_log=lambda config: log_into(lines),
        notifier=running.notifier,
        signals=running.signals,
        build=running.build,
        handover=Handover(stuck=["sink never"], journal=str(running.config.journal.path)),
    )
    service.run(until=lambda: True)
    assert "1 events are stored" in named(lines, "reload.failed")[0]["problems"][0]
    assert running.built[0].status().journal.path == str(running.config.journal.path)


def test_the_handover_is_removed_from_the_environment():
    environ = {"VODPOLLER_HANDOVER": '{"stuck": ["sink a"], "asking": [7], "listening": {"x": 8}}', "HOME": "/"}
    assert Handover.of(environ) == Handover(stuck=["sink a"], asking=[7], listening={"x": 8})
    assert environ == {"HOME": "/"}
    assert Handover.of(environ) == Handover()


# --- a signal during a reload -----------------------------------------------------------------------------------------


def test_a_signal_while_the_file_is_read_stops_the_daemon(running):
    over = threading.Event()

    def read():
        running.signals.end()
        over.wait(30)
        return running.config

    running.next_config = read
    answer = running.reload()
    assert (answer["result"], running.ends_with()) == ("ended", 0)
    over.set()
    assert running.done == ["refresh archive", "stop archive"]


def test_after_a_signal_during_the_stop_nothing_is_built(running, tmp_path):
    running.built[0].while_stopping = running.signals.end
    running.next_config = config_in(tmp_path, sink="other")
    answer = running.reload()
    assert (answer["result"], running.ends_with()) == ("ended", 0)
    assert running.done == ["refresh archive", "stop archive"]


def test_after_a_signal_during_the_build_nothing_is_started(running, tmp_path):
    running.next_config = config_in(tmp_path, sink="other")
    running.at_build = lambda daemon: None

    def build_error():
        running.signals.end()
        return StoppingError("a signal asked for the end")

    class Errors(list):
        def pop(self, _index):
            return build_error()

    running.build_errors["other"] = Errors([1])
    answer = running.reload()
    assert (answer["result"], running.ends_with()) == ("ended", 0)
    assert running.done == ["refresh archive", "stop archive", "build other"]


# --- done -------------------------------------------------------------------------------------------------------------


def test_the_same_configuration_is_only_refreshed(running, tmp_path, lines):
    running.next_config = replace(config_in(tmp_path), warnings=("logged elsewhere",))
    assert running.reload() == {"result": "done", "changed": False, "stuck": [], "problems": []}
    assert running.done == ["refresh archive"]
    assert named(lines, "daemon.reloaded")[0]["changed"] is False


def test_another_configuration_replaces_the_former_one(running, tmp_path, lines):
    running.next_config = config_in(tmp_path, sink="other")
    assert running.reload()["changed"] is True
    assert running.done == ["refresh archive", "stop archive", "build other", "start other"]
    assert named(lines, "daemon.reloaded")[0]["changed"] is True
    assert running.notifier.states() == [READY, RELOADING, READY]
    assert running.reload()["changed"] is False


def test_probes_are_answered_during_a_build(tmp_path, lines):
    running = Running(tmp_path, lines)
    answers = []
    with HeldPort() as port:
        running.config = replace(running.config, listener=Listener(address=f"127.0.0.1:{port.number}"))

        def ask(_daemon):
            until(lambda: named(lines, "listener.started"))
            answers.extend(Client(port.number).get(path).status for path in ("/healthz", "/readyz", "/metrics"))

        running.at_build = ask
        with running:
            answers.extend(Client(port.number).get(path).status for path in ("/healthz", "/readyz", "/metrics"))
    assert answers == [200, 503, 503, 200, 200, 200]


def test_after_a_reload_the_socket_writes_to_the_new_log(running, tmp_path, lines):
    new_lines = []
    running.lines = new_lines
    running.next_config = config_in(tmp_path, sink="other")
    running.reload()
    lines.clear()
    running.built[-1].status = None
    with pytest.raises(ConnectionError):
        running.status()
    until(lambda: named(new_lines, "task.failed"))
    assert lines == []


def test_counts_survive_a_reload(running, tmp_path):
    running.built[0].telemetry.scope().count(Count.EVENTS_SETTLED, 5)
    running.next_config = config_in(tmp_path, sink="other")
    running.reload()
    assert running.status()["settled_events"] == 5


def test_a_successful_reload_clears_the_problem_of_a_failed_one(running, tmp_path):
    running.next_config = ConfigError(["wrong"])
    running.reload()
    running.next_config = config_in(tmp_path, sink="other")
    running.reload()
    status = running.status()
    assert status["problems"] == []
    assert status["reload"]["successful"] is True


def test_status_is_answered_during_a_reload(running, tmp_path):
    over = threading.Event()
    running.built[0].while_stopping = lambda: over.wait(30)
    running.next_config = config_in(tmp_path, sink="other")
    running.signals.reload()
    until(lambda: "stop archive" in running.done)
    assert running.status()["reload"]["under_way"] is True
    over.set()
    until(lambda: not running.status()["reload"]["under_way"])


def test_two_concurrent_reload_requests_are_both_answered(running, tmp_path):
    over = threading.Event()
    running.built[0].while_stopping = lambda: over.wait(30)
    running.next_config = config_in(tmp_path, sink="other")
    answers = []
    path = socket_path(running.config.journal.path)
    asking = [
        threading.Thread(target=lambda: answers.append(ask(path, {"command": "reload"}, timeout_secs=30)))
        for _ in range(2)
    ]
    for one in asking:
        one.start()
    until(lambda: "stop archive" in running.done)
    over.set()
    for one in asking:
        one.join()
    assert sorted(answer["changed"] for answer in answers) in ([False, True], [True, True])
