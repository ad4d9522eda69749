"""Servers on loopback: a webhook's receiver with the answers that a test sets, and servers that misbehave."""

import socket
import threading
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count


@dataclass
class Answer:
    status: int = 204
    headers: dict = field(default_factory=dict)
    body: bytes = b""
    hangs: bool = False
    after_secs: float = 0.0


@dataclass(frozen=True)
class Received:
    method: str
    path: str
    headers: dict
    body: bytes
    peer: tuple


class Receiver(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address=("127.0.0.1", 0)):
        super().__init__(address, _Handler)
        self.answer = Answer()
        self.received = []
        self.accepted = []
        self.released = threading.Event()
        self.connections = []
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/callback"

    def process_request(self, request, client_address):
        self.connections.append(request)
        super().process_request(request, client_address)

    def hang_up(self):
        for connection in self.connections:
            with suppress(OSError):  # it has ended already
                connection.shutdown(socket.SHUT_RDWR)

    def answer_to(self, received):
        return self.answer

    def handle_error(self, request, client_address):
        pass  # some tests have clients that close the connection early


class SlowReceiver(Receiver):
    """Accepts everything; some of its answers are late.

    Args:
        every: One of this number of answers is late.
        after_secs: Delay of a late answer.
    """

    def __init__(self, *, every, after_secs):
        super().__init__()
        self._every = every
        self._late = Answer(after_secs=after_secs)
        self._numbers = count(1)

    def answer_to(self, received):
        return self.answer if next(self._numbers) % self._every else self._late

    def accepted_ids(self):
        """The `webhook-id` of each event that it has accepted."""
        return {one.headers["webhook-id"] for one in list(self.accepted)}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length or 0))
        if (self.command == "POST" and length is None) or len(body) < int(length or 0):
            self.close_connection = True  # incomplete: the client ended in the middle of the request
            return
        received = Received(self.command, self.path, dict(self.headers), body, self.client_address)
        with self.server.lock:
            answer = self.server.answer_to(received)
            self.server.received.append(received)
            if 200 <= answer.status < 300 and not answer.hangs:
                self.server.accepted.append(received)
        if answer.hangs:
            self.server.released.wait(30)
            self.close_connection = True
            return
        self.server.released.wait(answer.after_secs)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.status != 204:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    def do_GET(self):
        self.do_POST()

    def do_PUT(self):
        self.do_POST()

    def do_PATCH(self):
        self.do_POST()

    def log_message(self, *args):
        pass


@contextmanager
def running_receiver(receiver=None):
    receiver = receiver or Receiver()
    thread = threading.Thread(target=receiver.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield receiver
    finally:
        receiver.released.set()
        receiver.shutdown()
        thread.join()
        receiver.hang_up()
        receiver.server_close()


# --- servers that misbehave ---


@contextmanager
def raw_server(serve):
    """A server that handles each connection with `serve`, outside HTTP. It does not wait for clients when it ends."""
    stopping = threading.Event()
    connections = []
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        listening.settimeout(0.05)

        def accept():
            while not stopping.is_set():
                try:
                    connection, _ = listening.accept()
                except TimeoutError:
                    continue
                connections.append(connection)
                with connection:
                    connection.settimeout(5)
                    with suppress(OSError):
                        serve(connection, stopping)

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        finally:
            stopping.set()
            for connection in connections:
                with suppress(OSError):  # it has ended already
                    connection.shutdown(socket.SHUT_RDWR)
            thread.join()


@contextmanager
def black_hole():
    """A port that never accepts a connection: its backlog is full. Yields the port number."""
    with closing(socket.socket()) as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        fillers = []
        try:
            for _ in range(4):
                filler = socket.socket()
                fillers.append(filler)
                filler.settimeout(0)
                filler.connect_ex(listening.getsockname())
            yield listening.getsockname()[1]
        finally:
            for filler in fillers:
                filler.close()


def read_request(connection):
    """Read the next request, or as much as arrives: closing a socket with unread bytes would reset the connection."""
    data = bytearray()
    wanted = None
    while wanted is None or len(data) < wanted:
        more = connection.recv(65_536)
        if not more:
            break
        data += more
        if wanted is None and (end := data.find(b"\r\n\r\n")) >= 0:
            lines = bytes(data[:end]).lower().split(b"\r\n")
            lengths = [int(line[15:]) for line in lines if line.startswith(b"content-length:")]
            wanted = end + 4 + sum(lengths)
    return bytes(data)


def drip(start, piece):
    def serve(connection, stopping):
        connection.recv(65_536)
        connection.sendall(start)
        while not stopping.wait(0.03):
            connection.sendall(piece)

    return serve


def never_reads(connection, stopping):
    stopping.wait(20)


def reads_slowly(connection, stopping):
    while not stopping.wait(0.03):
        connection.recv(65_536)
