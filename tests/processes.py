"""Whole processes for tests: the simulator and the daemon, started as a user starts them, and their logs and files."""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
import requests

from tests import warm
from tests.polling import until

ROOT = Path(__file__).resolve().parent.parent
SECRET_ID = "AKIDwholedaemon"
SECRET_KEY = "the-key-of-the-whole-daemon-tests"


def cannot_run(reason):
    """End a test that this machine cannot run: skip it on a laptop; in CI, which must run all tests, fail."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must be able to run this: {reason}")
    pytest.skip(reason)


def needs(program):
    """Call `cannot_run` if a program is not installed."""
    if shutil.which(program) is None:
        cannot_run(f"{program} is not installed")


def environment(**changes):
    """The environment of this process with changes, without the variables that affect vodpoller."""
    dropped = ("TENCENTCLOUD_", "NOTIFY_SOCKET", "JOURNAL_STREAM", "CREDENTIALS_DIRECTORY", "WATCHDOG_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {**kept, "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1", **changes}


def canonical(text):
    """A text that is the same for equal JSON documents. It uses the standard library, no code of vodpoller."""
    return json.dumps(json.loads(text, strict=False), sort_keys=True)


def run_command(*args, module="vodpoller", answer="", timeout_secs=30, closed=(), **env):
    """One command of vodpoller, from its start to its end.

    Args:
        args: Its arguments.
        module: The module that `python -m` runs.
        answer: The content of its standard input.
        timeout_secs: Maximum run time.
        closed: The descriptors (0 to 2) that are closed when it starts.
        env: Changes to its environment.
    """
    with ExitStack() as open_files:
        stdin, stdout, stderr = (open_files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(3))
        stdin.write(answer)
        stdin.seek(0)
        streams = [warm.CLOSED if fd in closed else stream for fd, stream in enumerate((stdin, stdout, stderr))]
        process = warm.start(
            module, args, env=environment(**env), stdin=streams[0], stdout=streams[1], stderr=streams[2]
        )
        try:
            code = process.wait(timeout_secs)
        finally:
            process.kill()
        stdout.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess(args, code, stdout.read(), stderr.read())


class SimulatorProcess:
    """`vodpoller simulate` with the given options, and its control endpoints."""

    def __init__(self, errors_path, *, wait=True, **options):
        args = []
        for name, value in options.items():
            args.append(f"--{name.replace('_', '-')}")
            if value is not True:
                args.append(str(value))
        with errors_path.open("ab") as errors:
            reading, writing = os.pipe()
            self._output = open(reading)  # noqa: PTH123, SIM115 - a descriptor; `stop` closes it
            with open(writing, "wb") as output:  # noqa: PTH123 - as above
                self.process = warm.start(
                    "vodpoller", ["simulate", *args], stdout=output, stderr=errors, env=environment()
                )
        self.url = self._output.readline().strip()
        assert self.url.startswith("http://"), errors_path.read_text()
        self._session = requests.Session()
        self._session.trust_env = False

    def stats(self):
        return self._session.get(f"{self.url}/_stats", timeout=10).json()

    def ledger(self, *, bodies=False, first=0, count=None):
        part = f"&from={first}" + ("" if count is None else f"&n={count}")
        return self._session.get(f"{self.url}/_ledger?bodies={int(bodies)}{part}", timeout=30).json()

    def feed(self, *bodies):
        lines = b"\n".join(body.encode() if isinstance(body, str) else body for body in bodies)
        return self._post("/_feed", lines)["fed"]

    def control(self, **changes):
        self._post("/_control", json.dumps(changes).encode())

    def _post(self, path, data):
        response = self._session.post(self.url + path, data=data, timeout=30)
        assert response.status_code == 200, response.text
        return response.json()

    @property
    def requests(self):
        return sum(self.stats()["requests"].values())

    def all_confirmed(self):
        stats = self.stats()
        return not stats["feeding"] and stats["confirmed"] == stats["fed"]

    def stop(self):
        self._session.close()
        self.process.kill()
        self.process.wait()
        self._output.close()


class DaemonProcess:
    """`vodpoller run` with its stderr in a file.

    Args:
        config_path: Its configuration.
        log_path: The file.
        failpoint: The step at which it kills itself, in the form of `tests.failpoints`; None for no failpoint.
        env: Changes to its environment.
    """

    def __init__(self, config_path, log_path, *, failpoint=None, **env):
        self.log_path = log_path
        module = "tests.failpoints" if failpoint else "vodpoller"
        with log_path.open("ab") as log:
            self.process = warm.start(
                module, ["run", "-c", config_path], stderr=log, env=environment(FAILPOINT=failpoint or "", **env)
            )

    def log(self, event=None):
        """The complete lines of the log, parsed; only those of `event` if it is given."""
        text = self.log_path.read_bytes()
        lines = map(json.loads, text[: text.rfind(b"\n") + 1].splitlines())
        return [line for line in lines if event is None or line["event"] == event]

    def problems(self):
        return [line for line in self.log() if line["level"] in ("warning", "error", "critical")]

    def await_log(self, event, *, secs=15.0, number=1, where=lambda line: True):
        """Wait until the log has `number` lines of an event for which `where` is true; returns these lines."""

        def found():
            assert self.process.poll() is None or event == "daemon.stopped", f"it ended: {self.tail()}"
            lines = [line for line in self.log(event) if where(line)]
            return lines if len(lines) >= number else None

        return until(found, secs=secs, what=lambda: f"no {event} in the log: {self.tail()}")

    def tail(self):
        return self.log_path.read_text()[-3000:]

    def signal(self, number):
        self.process.send_signal(number)

    def terminate(self, *, secs=30.0):
        """Send SIGTERM and wait for the end.

        Returns:
            The exit code, and the seconds until the end.
        """
        began = time.monotonic()
        self.signal(signal.SIGTERM)
        return self.process.wait(secs), time.monotonic() - began

    def kill(self):
        self.process.kill()
        self.process.wait()

    def await_failpoint(self, *, secs=30.0):
        """Wait until its failpoint has killed it."""
        until(lambda: self.process.poll() is not None, secs=secs, what=self.tail)
        assert self.process.returncode == -signal.SIGKILL, self.tail()


class System:
    """The processes of one test and their files; a context manager that leaves no process behind."""

    def __init__(self, folder):
        self.folder = folder
        self.archive = folder / "events.jsonl"
        self.journal = folder / "journal.db"
        self.config_path = folder / "config.toml"
        self.key_path = folder / "secret_key"
        self._running = []
        self._logs = 0

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        for process in reversed(self._running):
            process.stop() if isinstance(process, SimulatorProcess) else process.kill()

    def kill_at_end(self, process):
        """Register a process that a test has started itself: it is killed when the test ends."""
        self._running.append(process)

    def simulator(self, **options):
        defaults = {"poll_secs": 0.5, "visibility_secs": 3, "requests_per_sec": 0, "keep_bodies": True}
        simulator = SimulatorProcess(self.folder / "simulator.err", **(defaults | options))
        self.kill_at_end(simulator)
        return simulator

    def configure(
        self,
        url,
        *,
        lease_secs=3.0,
        api="requests_per_sec = 1000",
        source='unrouted = "dead_letter"',
        sinks=None,
        routes=None,
        secret_key=SECRET_KEY,
        credentials=None,
        more="",
    ):
        """Write the configuration. By default all events go to a file.

        Args:
            url: The endpoint.
            lease_secs: Must equal the simulator's `visibility_secs`.
            api: Further lines of [api].
            source: Further lines of [[sources]].
            sinks: The tables of the sinks; None for one file sink, named archive.
            routes: The tables of the routes; None for one route to all sinks.
            secret_key: The content of the key's file.
            credentials: The lines of [credentials]; None for the key above.
            more: Further tables.
        """
        sinks = self.archive_sink if sinks is None else sinks
        names = [line.split(".", 1)[1].rstrip("]") for line in sinks.splitlines() if line.startswith("[sinks.")]
        names = [name for name in names if "." not in name]
        routes = f'[[routes]]\nname = "all"\nsinks = {json.dumps(names)}\n' if routes is None else routes
        self.key_path.write_text(secret_key + "\n")
        given_key = f'secret_id = "{SECRET_ID}"\nsecret_key_file = "{self.key_path}"\n'
        self.config_path.write_text(
            f'[api]\nendpoint = "{url}"\nlease_secs = {lease_secs}\n{api}\n'
            f"[credentials]\n{given_key if credentials is None else credentials}\n"
            f'[[sources]]\nname = "main"\n{source}\n{routes}\n{sinks}\n'
            f'[journal]\npath = "{self.journal}"\n{more}\n'
        )
        return self.config_path

    @property
    def archive_sink(self):
        return f'[sinks.archive]\ntype = "file"\npath = "{self.archive}"\n'

    def daemon(self, *, started=True, log_name=None, **env):
        """Start the daemon with the written configuration; `started` waits for its `daemon.started` line."""
        self._logs += 1
        daemon = DaemonProcess(self.config_path, self.folder / (log_name or f"daemon{self._logs}.log"), **env)
        self.kill_at_end(daemon)
        if started:
            daemon.await_log("daemon.started")
        return daemon

    def has_delivered_all(self, simulator):
        """Whether VOD's queue is empty and no event waits in the journal, as it does if a puller was needed sooner."""
        if not simulator.all_confirmed():
            return False
        with closing(sqlite3.connect(f"file:{self.journal}?mode=ro", uri=True)) as journal:
            return journal.execute("SELECT count(*) FROM letters WHERE state = 'pending'").fetchone() == (0,)

    def await_archived(self, simulator, *, secs=30):
        """Wait until VOD's queue is empty and the archive has all events, whatever other sinks still lack."""
        until(simulator.all_confirmed, secs=secs, what=lambda: str(simulator.stats()))
        fed = simulator.stats()["fed"]
        until(lambda: len(self.lines_of_all_files()) >= fed, secs=secs, what=lambda: f"not {fed} lines")

    def lines(self, path=None):
        """The complete lines of a file, by default of the archive."""
        path = path or self.archive
        data = path.read_bytes() if path.exists() else b""
        return data[: data.rfind(b"\n") + 1].split(b"\n")[:-1]

    def lines_of_all_files(self):
        """The lines of the archive and of its rotated files."""
        return [
            line
            for path in sorted(self.folder.glob("events.jsonl*"))
            if path.suffix != ".lock"
            for line in path.read_bytes().split(b"\n")[:-1]
        ]


def differences(fed, arrived):
    """Compare two multisets of JSON documents.

    Returns:
        What was fed and did not arrive; what arrived and was not fed, or arrived too often.
    """
    wanted, got = Counter(map(canonical, fed)), Counter(map(canonical, arrived))
    return list((wanted - got).elements()), list((got - wanted).elements())


def bodies_of(ledger):
    """The bodies of all events that were fed, from a simulator's ledger with bodies."""
    return [row["body"] for row in ledger]


class HeldPort:
    """A reserved port on which no process listens; a process that sets SO_REUSEADDR can listen on it."""

    def __init__(self):
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.number = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.number}"

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        self._socket.close()


class ServiceManager:
    """The other end of systemd's notify socket."""

    def __init__(self, path):
        self.path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.settimeout(0.1)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._listen)
        self.received = []

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_exception):
        self._stopped.set()
        self._thread.join()
        self._socket.close()

    def _listen(self):
        while not self._stopped.is_set():
            try:
                message = self._socket.recv(65536).decode()
            except TimeoutError:
                continue
            self.received.append((time.monotonic(), message))

    def messages(self, start):
        return [message for _, message in self.received if message.startswith(start)]


@contextmanager
def running_system(folder):
    """A System whose processes end with the context."""
    with System(folder) as system:
        yield system
