"""What becomes of the requests of one daemon: they are read, processed as batches, and answered.

A request that finds the receiver idle is a batch of its own. Under load those that wait are seen through together: one
look into the journal, one commit, one word to the server's thread for all of them. The newest come first: VOD waits 5 s
only, so that after a stall the oldest would all be answered too late, and each be tried again. What is old is seen
through when there is time: it may have been the last try.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http import HTTPStatus
from socket import socket
from typing import Final, Protocol

from vodpoller.batch import Batch
from vodpoller.batch import Source as BatchSource
from vodpoller.callback import reading
from vodpoller.callback.connection import Head
from vodpoller.callback.reading import Callback, is_allowed, read_callback
from vodpoller.callback.refusal import METHOD, NOT_ALLOWED, PATH, Refusal, RefusedError
from vodpoller.callback.server import ANSWER_SECS, Request, Server
from vodpoller.delivery.in_flight import DeliveryWait
from vodpoller.events.event import Lease, Malformed
from vodpoller.liveness import Liveness
from vodpoller.pipeline import Pipeline
from vodpoller.settlement import CallbackResult, ConfirmResult
from vodpoller.status import SourceStatus
from vodpoller.telemetry import Count, Telemetry
from vodpoller.vod.confirmation import Confirmation

LEASE_SECS: Final = 4.0  # VOD waits 5 s for an answer
RESERVE_SECS: Final = 0.5
EVENTS_MAX: Final = 64  # of a batch
BATCHES_AT_ONCE: Final = 2  # of a source; further ones wait this long for more events:
LINGER_SECS: Final = 0.02
SPAN_SECS: Final = 1.0  # between the first and the last request of a batch: two tries of VOD's are never in one
WAITING_MAX: Final = 4096  # beyond them the oldest is not seen through: VOD has given up waiting for it
WAITING_MAX_BYTES: Final = 64 * 1024 * 1024
STORING_THREADS: Final = 64  # besides those that wait for sinks
_LINE_CHARS: Final = 200  # of what a stranger has sent

_GONE: Final = Confirmation(result=ConfirmResult.NO_ANSWER, why="the connection was gone before it could be answered")
_ANSWERED: Final = Confirmation(result=ConfirmResult.CONFIRMED)


class Source(reading.CallbackSource, BatchSource, Protocol):
    """What receiving callbacks needs of a configured source; see the table of keys."""

    @property
    def listen(self) -> str:
        """As in the configuration."""

    @property
    def path(self) -> str:
        """As in the configuration."""

    @property
    def max_events_in_flight(self) -> int:
        """As in the configuration."""

    @property
    def max_connections(self) -> int:
        """As in the configuration."""


class Answers:
    """Confirms callbacks: the confirm is the answer. A handle is the number of a connection.

    Attributes:
        answer: Answers requests; see `Server.answer_all`.
    """

    def __init__(self) -> None:
        self.answer: Callable[[Sequence[int], HTTPStatus], Sequence[bool]] = lambda numbers, _: [False] * len(numbers)

    def confirm(
        self,
        _source: str,
        _sub_app_id: int | None,
        handles: Sequence[str],
        _lease: Lease,
        /,
        *,
        on_acknowledged: Callable[[Sequence[str]], None],
    ) -> Mapping[str, Confirmation]:
        """See `batch.Confirms`: what was written to the socket is acknowledged. Too late, its connection is gone."""
        answered = self.answer([int(handle) for handle in handles], HTTPStatus.OK)
        written = [handle for handle, is_written in zip(handles, answered, strict=True) if is_written]
        if written:
            on_acknowledged(written)
        return {handle: _ANSWERED if handle in written else _GONE for handle in handles}


class _Received:
    """What is known of one source; its lock is the receiver's."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.waiting: deque[Request] = deque()
        self.waiting_bytes = 0
        self.is_taken_up = False  # a thread is on its way to those that wait
        self.batches = 0
        self.tried = 0
        self.untried = 0
        self.last_at = 0.0

    @property
    def in_flight(self) -> int:
        """Number of callbacks that have come and are not seen through."""
        return len(self.waiting) + self.tried + self.untried

    def add(self, request: Request) -> int:
        """One more waits. Returns the number of those that do not any more, as there are too many."""
        self.waiting.append(request)
        self.waiting_bytes += len(request.body)
        dropped = 0
        while len(self.waiting) > WAITING_MAX or self.waiting_bytes > WAITING_MAX_BYTES:
            self.waiting_bytes -= len(self.waiting.popleft().body)
            dropped += 1
        return dropped

    def take(self) -> tuple[list[Request], bool]:
        """The newest of those that wait, as far as they are one batch, and whether it goes past the sinks."""
        room = self.source.max_events_in_flight - self.tried
        most = min(room, EVENTS_MAX) if room > 0 else EVENTS_MAX
        begins_at = self.waiting[-1].whole_at - SPAN_SECS
        taken: list[Request] = []
        while self.waiting and len(taken) < most and self.waiting[-1].whole_at > begins_at:
            taken.append(self.waiting.pop())
        taken.reverse()
        self.waiting_bytes -= sum(len(request.body) for request in taken)
        self.count(len(taken), is_untried=room <= 0)
        self.batches += 1
        return taken, room <= 0

    def count(self, number: int, *, is_untried: bool) -> None:
        """Count that number of further callbacks as taken."""
        if is_untried:
            self.untried += number
        else:
            self.tried += number


class Receiver:
    """Receives the callbacks of all sources that have any, from `start` until `join`.

    Args:
        sources: At least one.
        sockets: They listen, by the addresses of the sources.
        pipeline: Processes batches; its confirms are `answers`.
        answers: Gets the way to answer.
        telemetry: Destination of log lines and counts.
        liveness: Told what each thread is at and until when.
        monotonic: The clock of leases, in seconds.
        wall: The clock of signatures and of `status`, in seconds since 1970.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        sockets: Mapping[str, socket],
        *,
        pipeline: Pipeline,
        answers: Answers,
        telemetry: Telemetry,
        liveness: Liveness,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._pipeline = pipeline
        self._telemetry = telemetry.scope()
        self._liveness = liveness
        self._monotonic = monotonic
        self._wall = wall
        self._lock = threading.Condition()
        self._waits: set[DeliveryWait] = set()
        self._waits_ended = False
        self._received = {source.name: _Received(source) for source in sources}
        self._by_path = {(source.listen, source.path): source for source in sources}
        self._threads = ThreadPoolExecutor(
            sum(source.max_events_in_flight for source in sources) + STORING_THREADS, thread_name_prefix="callback"
        )
        limits: dict[str, int] = {}
        for source in sources:
            limits[source.listen] = max(limits.get(source.listen, 0), source.max_connections)
        self._server = Server(
            {address: (sockets[address], limit) for address, limit in limits.items()},
            self,
            telemetry=telemetry,
            monotonic=monotonic,
        )
        answers.answer = self._server.answer_all

    def start(self) -> None:
        """Begin to accept connections."""
        self._server.start()

    def status(self) -> list[SourceStatus]:
        """How each source is."""
        connections = self._server.connections
        with self._lock:
            return [
                SourceStatus(
                    name=it.source.name,
                    type="callback",
                    last_callback_at=it.last_at or None,
                    callbacks_in_flight=it.in_flight,
                    connections=connections[it.source.listen],
                )
                for it in self._received.values()
            ]

    def stop(self) -> None:
        """Accept no connection any more; those that are open are seen through."""
        self._server.stop()

    def end_waits(self) -> None:
        """Let no callback wait for a sink any longer: what was not accepted is stored."""
        with self._lock:
            self._waits_ended = True
            for wait in self._waits:
                wait.interrupt(stopping=True)

    def join(self, timeout_secs: float) -> bool:
        """Wait until all connections have ended, and all callbacks were processed.

        Returns:
            Whether they have.
        """
        ends_at = self._monotonic() + timeout_secs
        have_ended = self._server.join(timeout_secs)
        with self._lock:
            return self._lock.wait_for(self._is_idle, max(ends_at - self._monotonic(), 0.0)) and have_ended

    def close(self) -> None:
        """End the connections that are left. What is being processed is not waited for: see `join`."""
        self._server.close()
        self._threads.shutdown(wait=False)

    def _is_idle(self) -> bool:
        return not any(it.in_flight for it in self._received.values())

    # --- in the server's thread ---------------------------------------------------------------------------------------

    def check(self, address: str, peer: str, head: Head) -> None:
        """See `server.Requests`."""
        source = self._by_path.get((address, head.path))
        if source is None:
            raise RefusedError(PATH)
        if not is_allowed(source, peer, head.forwarded_for):
            raise RefusedError(NOT_ALLOWED)
        if head.method != "POST":
            raise RefusedError(METHOD)

    def arrived(self, request: Request) -> None:
        """See `server.Requests`."""
        source = self._by_path[request.address, request.head.path]
        received = self._received[source.name]
        with self._lock:
            dropped = received.add(request)
            is_taken_up, received.is_taken_up = received.is_taken_up, True
        if dropped:
            unanswered = CallbackResult.UNANSWERED.value
            self._telemetry.count(Count.CALLBACKS, dropped, source=source.name, result=unanswered)
        if not is_taken_up:
            try:
                self._threads.submit(self._take_up, received)
            except RuntimeError:  # the system has no more threads: the next request tries again
                with self._lock:
                    received.is_taken_up = False
                raise

    def refused(self, address: str, peer: str, path: str, refusal: Refusal) -> None:
        """See `server.Requests`."""
        source = self._by_path.get((address, path)) or next(
            it for (listen, _), it in self._by_path.items() if listen == address
        )
        self._refuse(source, peer, path, refusal)

    def _refuse(self, source: Source, peer: str, path: str, refusal: Refusal) -> None:
        self._telemetry.count(Count.CALLBACKS, source=source.name, result=refusal.result.value)
        if refusal.hint:
            self._telemetry.repeated(
                "warning",
                "callback.refused",
                cause=f"{source.name} {refusal.cause}",
                source=source.name,
                refused_for=refusal.cause,
                peer=peer,
                path=path[:_LINE_CHARS],
                hint=refusal.hint,
            )

    # --- in a thread of its own ---------------------------------------------------------------------------------------

    def _take_up(self, received: _Received) -> None:
        """See a batch through of what waits, once another one has ended or it has waited for more."""
        with self._lock:
            self._lock.wait_for(lambda: received.batches < BATCHES_AT_ONCE or self._waits_ended, LINGER_SECS)
            if not received.waiting:
                received.is_taken_up = False
                return
            requests, is_untried = received.take()
            are_more_waiting = received.is_taken_up = bool(received.waiting)
        if are_more_waiting:
            with suppress(RuntimeError):  # closed: VOD tries again what is not answered
                self._threads.submit(self._take_up, received)
        self._liveness.begin(f"callback {received.source.name}", ANSWER_SECS)
        try:
            self._see_through(received.source, requests, is_untried=is_untried)
        except Exception:
            self._telemetry.log.exception("callback.failed", source=received.source.name)
        finally:
            self._liveness.end()
            with self._lock:
                received.count(-len(requests), is_untried=is_untried)
                received.batches -= 1
                self._lock.notify_all()

    def _see_through(self, source: Source, requests: Sequence[Request], *, is_untried: bool) -> None:
        callbacks = [(request, callback) for request in requests if (callback := self._callback(source, request))]
        acknowledged = 0
        wait = DeliveryWait()
        try:
            with self._lock:
                self._waits.add(wait)
                if self._waits_ended:
                    wait.interrupt(stopping=True)
            if callbacks:
                acknowledged = self._pipeline.process(_batch(source, callbacks, is_untried=is_untried), wait)
        finally:
            with self._lock:
                self._waits.discard(wait)
                if callbacks:
                    self._received[source.name].last_at = self._wall()
            result = CallbackResult.STORED_UNTRIED if is_untried else CallbackResult.ACCEPTED
            unanswered = len(callbacks) - acknowledged
            for what, number in ((result, acknowledged), (CallbackResult.UNANSWERED, unanswered)):
                if number:
                    self._telemetry.count(Count.CALLBACKS, number, source=source.name, result=what.value)

    def _callback(self, source: Source, request: Request) -> Callback | None:
        """What a request is; None if it is answered, or can never be."""
        try:
            return self._read(source, request)
        except RefusedError as error:
            self._refuse(source, request.peer, request.head.path, error.refusal)
            self._server.answer(request.number, error.refusal.status)
        except Exception:
            self._telemetry.log.exception("callback.failed", source=source.name)
            self._telemetry.count(Count.CALLBACKS, source=source.name, result=CallbackResult.UNANSWERED.value)
        return None

    def _read(self, source: Source, request: Request) -> Callback:
        callback = read_callback(request.body, str(request.number), source, now=self._wall())
        if callback.expired_secs:
            self._telemetry.repeated(
                "warning",
                "callback.expired",
                cause=f"{source.name} expired",
                source=source.name,
                expired_secs=round(callback.expired_secs),
                hint="its signature is right, and it is processed as any other: is this machine's clock right?",
            )
        return callback


def _batch(source: Source, callbacks: Sequence[tuple[Request, Callback]], *, is_untried: bool) -> Batch:
    """A batch whose times are those of its first request: in doubt an event is a new one, and is not waited for."""
    first = callbacks[0][0]
    events = [callback.event for _, callback in callbacks]
    return Batch(
        source=source,
        events=tuple(it for it in events if not isinstance(it, Malformed)),
        malformed=tuple(it for it in events if isinstance(it, Malformed)),
        lease=Lease(starts_at=first.whole_at, secs=LEASE_SECS),
        received_at=first.whole_at,
        request_id="",
        began_at=min(request.began_at for request, _ in callbacks),
        is_untried=is_untried,
    )
