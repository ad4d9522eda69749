"""The callback server: one thread that accepts, reads and answers, and never waits for a client, a disk or a sink.

How a request changes threads:

    the server's thread                          a thread of the receiver
    -------------------                          ------------------------
    accepts, reads: the request is complete
    requests.arrived(request) ---------------->  reads the body, processes the batch
                                                 answer(number, status): waits
    writes the answer, shuts down the sending,
    sets the future  ------------------------->  continues: it was written, or the connection is closed
    closes when the client has closed

A request without an answer keeps its connection until `ANSWER_SECS` after it was complete: VOD ignores the status, and
tries an event again only if no answer came. Only the server's thread uses connections and their data; other threads
pass their answers through `_to_answer`.
"""

import heapq
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from itertools import count
from typing import Any, Final, Protocol

from vodpoller.callback.connection import Connection, Head
from vodpoller.callback.refusal import CUT_OFF, NOTHING, TOO_LARGE, TOO_SLOW, Refusal, RefusedError
from vodpoller.telemetry import Telemetry

REQUEST_SECS: Final = 5.0  # VOD gives up after 5 s
ANSWER_SECS: Final = 6.0
LINGER_SECS: Final = 2.0  # maximum time for a client to close the connection after its answer
HELD_MAX_BYTES: Final = 64 * 1024 * 1024  # maximum size of all incomplete bodies together
SMALL_BYTES: Final = 64 * 1024  # a body up to this size is read even if that maximum is exceeded
RETRY_SECS: Final = 0.2  # the wait after a failure for lack of system resources
_CHUNK_BYTES: Final = 64 * 1024
_ACCEPTED_AT_ONCE: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A complete request.

    Args:
        number: The number of its connection.
        address: The listening address that received it, as in the configuration.
        peer: The address of the client.
        head: The head of the request.
        body: The received body.
        began_at: Monotonic time at which its connection was accepted, in seconds.
        completed_at: Monotonic time at which its last byte was received, in seconds.
    """

    number: int
    address: str
    peer: str
    head: Head
    body: bytes
    began_at: float
    completed_at: float


class Requests(Protocol):
    """Processes requests. The server's thread calls the methods, so they must not wait."""

    def check(self, address: str, peer: str, head: Head) -> None:
        """Check the head of a request before its body is read; raises RefusedError to refuse it."""

    def arrived(self, request: Request) -> None:
        """Process a complete request. `Server.answer` answers it, or nothing does."""

    def refused(self, address: str, peer: str, path: str, refusal: Refusal) -> None:
        """Record that a request was refused."""


class _Client:
    """A connection: its socket, the received data, and the time at which it must end."""

    def __init__(self, number: int, sock: socket.socket, peer: str, address: str, began_at: float) -> None:
        self.number = number
        self.sock = sock
        self.peer = peer
        self.address = address
        self.began_at = began_at
        self.ends_at = began_at + REQUEST_SECS
        self.http: Connection
        self.counted_bytes = 0
        self.is_answered = False

    @property
    def is_over(self) -> bool:
        """Whether its request is complete or refused: further data belongs to no request."""
        return self.is_answered or self.http.is_complete


class Server:
    """Accepts connections at listening sockets, until it is stopped. It does not close these sockets.

    Args:
        sockets: The listening sockets by address, each with its maximum number of connections.
        requests: Processes the requests.
        telemetry: Destination of log lines.
        monotonic: The monotonic clock, in seconds.
    """

    def __init__(
        self,
        sockets: Mapping[str, tuple[socket.socket, int]],
        requests: Requests,
        *,
        telemetry: Telemetry,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._listening = {address: _Listening(address, sock, limit) for address, (sock, limit) in sockets.items()}
        self._requests = requests
        self._telemetry = telemetry.scope()
        self._monotonic = monotonic
        self._numbers = count(1)
        self._clients: dict[int, _Client] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._held_bytes = 0
        self._to_answer: deque[tuple[int, HTTPStatus, Future[bool]]] = deque()
        self._to_answer_lock = threading.Lock()
        self._stopping = self._closing = self._has_ended = False
        self._selector = selectors.DefaultSelector()
        self._woken, self._wake = socket.socketpair()
        self._woken.settimeout(0.0)
        self._wake.settimeout(0.0)
        self._selector.register(self._woken, selectors.EVENT_READ, self._drain)
        self._thread = threading.Thread(target=self._run, name="callbacks", daemon=True)

    def start(self) -> None:
        """Start the thread that accepts connections."""
        self._thread.start()

    @property
    def connections(self) -> Mapping[str, int]:
        """Number of open connections, by address."""
        return {address: listening.connections for address, listening in self._listening.items()}

    def answer(self, number: int, status: HTTPStatus) -> bool:
        """Answer one request; see `answer_all`."""
        return self.answer_all((number,), status)[0]

    def answer_all(self, numbers: Sequence[int], status: HTTPStatus) -> list[bool]:
        """Answer requests, from another thread.

        Args:
            numbers: The numbers of the requests.
            status: The status of the answers, which have no body.

        Returns:
            For each request, whether the answer was written; if not, its connection is closed or has an answer already.
        """
        asked: list[tuple[int, HTTPStatus, Future[bool]]] = [(number, status, Future()) for number in numbers]
        with self._to_answer_lock:
            if self._has_ended:
                return [False] * len(numbers)
            self._to_answer.extend(asked)
        self._wake_up()
        return [written.result() for _, _, written in asked]

    def stop(self) -> None:
        """Accept no further connection; open connections continue until they end."""
        self._stopping = True
        self._wake_up()

    def join(self, timeout_secs: float) -> bool:
        """Wait until all connections have ended, which takes at most `REQUEST_SECS` plus `ANSWER_SECS`.

        Returns:
            Whether they have ended within the time.
        """
        if not self._thread.is_alive():
            return True
        self._thread.join(max(timeout_secs, 0.0))
        return not self._thread.is_alive()

    def close(self) -> None:
        """End all connections at once."""
        self._closing = True
        self.stop()
        if self._thread.is_alive():
            self._thread.join()
        self._release()

    def _wake_up(self) -> None:
        with suppress(OSError):  # the buffer is full, so the thread wakes up anyway
            self._wake.send(b"!")

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._is_over():
                if not self._run_step(self._iterate):
                    time.sleep(RETRY_SECS)
        finally:
            for client in list(self._clients.values()):
                self._end(client)
            with self._to_answer_lock:
                self._has_ended = True
            self._send_answers()
            self._release()

    def _release(self) -> None:
        self._selector.close()
        self._woken.close()
        self._wake.close()

    def _iterate(self) -> None:
        self._accept_or_wait()
        for key, _ in self._selector.select(self._wait_secs()):
            self._run_step(key.data)
        self._send_answers()
        self._expire()

    def _run_step(self, step: Callable[[], None]) -> bool:
        """Run one step, and log its error so that it affects no other connection. Returns whether it succeeded."""
        try:
            step()
        except Exception:
            self._telemetry.log.exception("callback.failed")
            return False
        return True

    def _is_over(self) -> bool:
        return self._closing or (self._stopping and not self._clients)

    def _wait_secs(self) -> float | None:
        if self._to_answer:
            return 0.0
        waits = [self._deadlines[0][0]] if self._deadlines else []
        waits += [it.not_before for it in self._listening.values() if it.not_before]
        return max(min(waits) - self._monotonic(), 0.0) if waits else None

    def _drain(self) -> None:
        with suppress(BlockingIOError):
            while self._woken.recv(4096):
                pass

    # --- accepting ----------------------------------------------------------------------------------------------------

    def _accept_or_wait(self) -> None:
        """Accept only at addresses that have room for another connection."""
        now = self._monotonic()
        for listening in self._listening.values():
            if listening.not_before <= now:
                listening.not_before = 0.0
            wanted = not self._stopping and listening.has_room and not listening.not_before
            if wanted and not listening.is_registered:
                self._selector.register(listening.sock, selectors.EVENT_READ, _Step(self._accept, listening))
            elif listening.is_registered and not wanted:
                self._selector.unregister(listening.sock)
            listening.is_registered = wanted

    def _accept(self, listening: "_Listening") -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            if not listening.has_room:
                return
            try:
                sock, peer = listening.sock.accept()
            except BlockingIOError:
                return
            except ConnectionError:
                continue
            except OSError:  # no descriptor is left
                listening.not_before = self._monotonic() + RETRY_SECS
                return
            self._add_client(listening, sock, str(peer[0]))

    def _add_client(self, listening: "_Listening", sock: socket.socket, peer: str) -> None:
        sock.settimeout(0.0)
        client = _Client(next(self._numbers), sock, peer, listening.address, self._monotonic())
        client.http = Connection(lambda head: self._requests.check(client.address, client.peer, head))
        listening.connections += 1
        self._clients[client.number] = client
        self._ends_at(client, client.ends_at)
        self._selector.register(sock, selectors.EVENT_READ, _Step(self._read, client))

    # --- reading ------------------------------------------------------------------------------------------------------

    def _read(self, client: _Client) -> None:
        try:
            data = client.sock.recv(_CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._end(client)
        elif not client.is_over:  # else the data belongs to no request
            self._receive(client, data)

    def _receive(self, client: _Client, data: bytes) -> None:
        try:
            at_once = client.http.received(data)
        except RefusedError as error:
            self._refuse(client, error.refusal)
            return
        self._count_held(client)
        if self._held_bytes > HELD_MAX_BYTES and client.http.held_bytes > SMALL_BYTES:
            self._refuse(client, TOO_LARGE)
            return
        if at_once:
            with suppress(OSError):
                client.sock.send(at_once)
        if client.http.is_complete and client.http.head is not None:
            self._hand_over(client, client.http.head)

    def _hand_over(self, client: _Client, head: Head) -> None:
        now = self._monotonic()
        self._ends_at(client, now + ANSWER_SECS)
        body = client.http.body
        self._drop_body(client)
        self._requests.arrived(
            Request(
                number=client.number,
                address=client.address,
                peer=client.peer,
                head=head,
                body=body,
                began_at=client.began_at,
                completed_at=now,
            )
        )

    def _refuse(self, client: _Client, refusal: Refusal) -> None:
        path = client.http.head.path if client.http.head else ""
        self._requests.refused(client.address, client.peer, path, refusal)
        self._write(client, refusal.status)

    # --- answering ----------------------------------------------------------------------------------------------------

    def _send_answers(self) -> None:
        while self._to_answer:
            number, status, written = self._to_answer.popleft()
            client = self._clients.get(number)
            is_written = False
            try:
                is_written = client is not None and not client.is_answered and self._write(client, status)
            finally:
                written.set_result(is_written)

    def _write(self, client: _Client, status: HTTPStatus) -> bool:
        """Send an answer and shut down the sending; returns whether the system has accepted the whole answer."""
        client.is_answered = True
        self._drop_body(client)
        answer = client.http.answer(status)
        try:
            is_written = client.sock.send(answer) == len(answer)
            client.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._end(client)
            return False
        # If it were closed at once while bytes of the client are unread, the client could lose the answer.
        self._ends_at(client, self._monotonic() + LINGER_SECS)
        return is_written

    # --- ending -------------------------------------------------------------------------------------------------------

    def _ends_at(self, client: _Client, at: float) -> None:
        client.ends_at = at
        heapq.heappush(self._deadlines, (at, client.number))

    def _expire(self) -> None:
        now = self._monotonic()
        while self._deadlines and self._deadlines[0][0] <= now:
            client = self._clients.get(heapq.heappop(self._deadlines)[1])
            if client is None or client.ends_at > now:
                continue
            if client.is_over or not client.http.has_data:
                self._end(client)
            else:
                self._refuse(client, TOO_SLOW)

    def _drop_body(self, client: _Client) -> None:
        client.http.drop_body()
        self._count_held(client)

    def _count_held(self, client: _Client) -> None:
        self._held_bytes += client.http.held_bytes - client.counted_bytes
        client.counted_bytes = client.http.held_bytes

    def _end(self, client: _Client) -> None:
        if self._clients.pop(client.number, None) is None:
            return
        if not client.is_over:
            self._requests.refused(client.address, client.peer, "", CUT_OFF if client.http.has_data else NOTHING)
        self._drop_body(client)
        self._listening[client.address].connections -= 1
        self._selector.unregister(client.sock)
        client.sock.close()


class _Listening:
    """A listening socket and the number of its connections."""

    def __init__(self, address: str, sock: socket.socket, max_connections: int) -> None:
        self.address = address
        self.sock = sock
        self.max_connections = max_connections
        self.connections = 0
        self.is_registered = False
        self.not_before = 0.0

    @property
    def has_room(self) -> bool:
        return self.connections < self.max_connections


class _Step:
    """A function with its argument, as the data of a selector's key."""

    __slots__ = ("_argument", "_call")

    def __init__(self, call: Callable[[Any], None], argument: Any) -> None:
        self._call, self._argument = call, argument

    def __call__(self) -> None:
        self._call(self._argument)
