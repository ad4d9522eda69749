"""A listener on a free port that shows values which a test sets, without a daemon."""

import http.client
import socket
from base64 import b64encode
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from requests.structures import CaseInsensitiveDict

from tests.helpers import log_into
from vodpoller.listener.server import Listener
from vodpoller.listener.view import Access, View
from vodpoller.secret import Secret
from vodpoller.status import JournalStatus, SinkStatus, SourceStatus, Status
from vodpoller.telemetry import Telemetry

NOW = 1_800_000_000.0
WELL = Status(
    pid=7,
    version="1.2.3",
    started_at=NOW - 1000,
    at=NOW,
    settled_events=5,
    sources=[SourceStatus(name="main", last_pull_at=NOW - 3, pulls_in_flight=1)],
    sinks=[SinkStatus(name="hook", queued=2, queue_max_events=1024, last_success_at=NOW - 1)],
    stored=[],
    journal=JournalStatus(path="/j.db", writable=True, limit_bytes=2**30),
)


@dataclass
class Shown:
    """The values that the listener shows; tests change them."""

    lines: list = field(default_factory=list)
    status: Status = WELL
    hosts: tuple = ("127.0.0.1", "localhost")
    password: str = ""
    is_ready: bool = True
    overdue: dict = field(default_factory=dict)
    journal_path: Path = Path("/nonexistent/journal.db")
    clock_offset_secs: float | None = None
    secret: str = "a secret of the configuration"

    def __post_init__(self):
        self.telemetry = Telemetry(log_into(self.lines))
        self.report = self.status_json

    def status_json(self):
        return self.status.as_json()

    def change(self, **changes):
        self.status = replace(self.status, **changes)

    def view(self):
        return View(
            access=Access(hosts=frozenset(self.hosts), password=Secret(value=self.password) if self.password else None),
            telemetry=self.telemetry,
            journal_path=self.journal_path,
            is_ready=lambda: self.is_ready,
            overdue=lambda: self.overdue,
            known=lambda: self.status,
            report=lambda *_: self.report(),
            cleared=self._cleared,
            clock_offset_secs=lambda: self.clock_offset_secs,
        )

    def _cleared(self, value):
        match value:
            case str():
                return value.replace(self.secret, "[secret]")
            case dict():
                return {name: self._cleared(inner) for name, inner in value.items()}
            case list() | tuple():
                return [self._cleared(inner) for inner in value]
            case _:
                return value


@dataclass(frozen=True)
class Answer:
    status: int
    headers: CaseInsensitiveDict
    body: bytes

    @property
    def text(self):
        return self.body.decode()


class Client:
    """A client of a listener."""

    def __init__(self, port):
        self.port = port

    def get(self, path="/", *, method="GET", host=None, password=None, timeout=20, **headers):
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)) as connection:
            connection.putrequest(method, path, skip_host=host is not None)
            if host:
                connection.putheader("Host", host)
            if password is not None:
                user_and_password = password if ":" in password else f"vodpoller:{password}"
                connection.putheader("Authorization", f"Basic {b64encode(user_and_password.encode()).decode()}")
            for name, value in headers.items():
                connection.putheader(name.replace("_", "-"), value)
            connection.endheaders()
            answer = connection.getresponse()
            return Answer(answer.status, CaseInsensitiveDict(answer.getheaders()), answer.read())

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)


@contextmanager
def running_listener(shown, *, current=None, **settings):
    """Run a listener that shows the view that `current` returns at each request; yields a client of it."""
    sock = socket.create_server(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    listener = Listener(f"127.0.0.1:{port}", current or shown.view, telemetry=shown.telemetry, sock=sock, **settings)
    try:
        yield Client(port)
    finally:
        listener.close()
