"""A receiver of callbacks on a free port, with a journal and sinks in memory, and a client that pushes to it."""

import http.client
import json
import socket
from contextlib import closing
from dataclasses import dataclass, field

from tests.helpers import MemorySink
from vodpoller.callback.receiver import RESERVE_SECS, Answers, Receiver
from vodpoller.delivery.in_flight import InFlight
from vodpoller.delivery.worker import Worker
from vodpoller.journal.sqlite import SqliteJournal
from vodpoller.liveness import Liveness
from vodpoller.pipeline import Pipeline
from vodpoller.router import Router
from vodpoller.secret import Secret
from vodpoller.telemetry import Count, Telemetry

PATH = "/vod"
OK = (200, b"")


def body(number=0, *, event_type="NewFileUpload", **more):
    return {"EventType": event_type, "FileUploadEvent": {"FileId": str(number)}, **more}


@dataclass(frozen=True)
class Source:
    listen: str
    name: str = "pushed"
    path: str = PATH
    sub_app_id: int | None = None
    on_failure: str = "store"
    unrouted: str | None = "dead_letter"
    sign_key: Secret | None = None
    allow_from: tuple | None = None
    forwarded_from: tuple | None = None
    max_events_in_flight: int = 4
    max_connections: int = 64


@dataclass(frozen=True)
class Route:
    sinks: tuple
    name: str = "r"
    event_types: tuple | None = ("NewFileUpload", "FileDeleted")
    sources: tuple | None = None
    where: str | None = None


@dataclass
class Receiving:
    """A receiver and all that it needs. Socket, journal and workers run from the start; `start` adds the receiver."""

    folder: object
    log: object
    sinks: dict = field(default_factory=lambda: {"archive": MemorySink(batch_events=16)})
    route: Route = Route(sinks=("archive",))
    queue_max_events: int = 100
    breaker_failures: int = 100
    journal_max_bytes: int = 10**7

    def __post_init__(self):
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.listening.settimeout(0.0)
        self.port = self.listening.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.telemetry = Telemetry(self.log)
        self.liveness = Liveness()
        self.in_flight = InFlight()
        self.journal = SqliteJournal(
            self.folder / "journal.db", max_bytes=self.journal_max_bytes, ledger_days=14, telemetry=self.telemetry
        )
        self.workers = {name: self._worker(name, sink) for name, sink in self.sinks.items()}
        self.receiver = None

    def _worker(self, name, sink):
        worker = Worker(
            name=name,
            sink=sink,
            ledger=self.journal,
            in_flight=self.in_flight,
            queue_max_events=self.queue_max_events,
            breaker_failures=self.breaker_failures,
            telemetry=self.telemetry,
            liveness=self.liveness,
        )
        worker.start()
        return worker

    def start(self, *sources, **changes):
        answers = Answers()
        self.sources = sources or (Source(self.address, **changes),)
        self.receiver = Receiver(
            self.sources,
            {self.address: self.listening},
            pipeline=Pipeline(
                router=Router([self.route]),
                workers=self.workers,
                in_flight=self.in_flight,
                journal=self.journal,
                confirmer=answers,
                confirm_reserve_secs=RESERVE_SECS,
                requests_per_sec=100.0,
                telemetry=self.telemetry,
            ),
            answers=answers,
            telemetry=self.telemetry,
            liveness=self.liveness,
        )
        self.receiver.start()
        return self

    @property
    def sink(self):
        return self.sinks["archive"]

    def push(self, content, *, path=PATH, method="POST", timeout=20, **headers):
        """Send one request; returns the status and the body of the answer, or None without an answer."""
        data = content if isinstance(content, bytes | str) else json.dumps(content)
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)) as connection:
            connection.request(method, path, data, {name.replace("_", "-"): it for name, it in headers.items()})
            try:
                answer = connection.getresponse()
            except (http.client.RemoteDisconnected, ConnectionResetError):
                return None
            return answer.status, answer.read()

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def counted(self, result):
        return self.telemetry.total(Count.CALLBACKS, result=result)

    def close(self):
        for sink in self.sinks.values():
            sink.gate.set()
        if self.receiver is not None:
            self.receiver.close()
            self.receiver.join(20)
        for worker in self.workers.values():
            worker.stop()
            worker.join(20)
        self.journal.close()
        self.listening.close()


def request(content, *, method="POST", path=PATH, headers=""):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n{headers}\r\n".encode() + data


def said(sock):
    """All bytes that arrive until the other side closes the connection."""
    found = b""
    while part := sock.recv(65536):
        found += part
    return found
