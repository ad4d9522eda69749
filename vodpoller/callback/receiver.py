"""The callbacks of one daemon: requests are read, processed in batches, and answered.

If the receiver is idle, a request is a batch of its own. Under load, waiting requests are processed together: one read
of the journal, one commit, and one message to the server's thread for all of them. The newest are processed first: VOD
waits only 5 s, so after a stall the oldest requests would all be answered too late, and VOD would try each again. Old
requests are processed when there is time, because each may have been VOD's last try.
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
EVENTS_MAX: Final = 64  # maximum number of events of a batch
BATCHES_AT_ONCE: Final = 2  # per source; beside so many, the next batch waits for LINGER_SECS for more events
LINGER_SECS: Final = 0.02
SPAN_SECS: Final = 1.0  # from the first to the last request of a batch: it never holds two tries of one event
WAITING_MAX: Final = 4096  # if there are more, the oldest is dropped: VOD no longer waits for its answer
WAITING_MAX_BYTES: Final = 64 * 1024 * 1024
STORING_THREADS: Final = 64  # in addition to those that wait for sinks
_LINE_CHARS: Final = 200  # maximum length of an unknown client's text in a log line

_GONE: Final = Confirmation(result=ConfirmResult.NO_ANSWER, why="the connection was closed before the answer")
_ANSWERED: Final = Confirmation(result=ConfirmResult.CONFIRMED)


class Source(reading.CallbackSource, BatchSource, Protocol):
    """The settings of a source that are needed to receive its callbacks; see the table of keys."""

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
    """Confirms callbacks: the HTTP answer is the confirm, and a handle is the number of a connection.

    Attributes:
        answer: Answers requests; see `Server.answer_all`. The receiver sets it.
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
        """See `batch.Confirms`: an answer that was written to the socket counts as acknowledged."""
        answered = self.answer([int(handle) for handle in handles], HTTPStatus.OK)
        written = [handle for handle, is_written in zip(handles, answered, strict=True) if is_written]
        if written:
            on_acknowledged(written)
        return {handle: _ANSWERED if handle in written else _GONE for handle in handles}


class _SourceState:
    """The waiting requests and the counts of one source. The receiver's lock protects it."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.waiting: deque[Request] = deque()
        self.waiting_bytes = 0
        self.is_scheduled = False  # a thread will take the waiting requests
        self.batches = 0
        self.tried = 0
        self.untried = 0
        self.last_at = 0.0

    @property
    def in_flight(self) -> int:
        """Number of callbacks that have been received and not yet processed."""
        return len(self.waiting) + self.tried + self.untried

    def add(self, request: Request) -> int:
        """Add a waiting request. Returns the number of old requests that were dropped because too many wait."""
        self.waiting.append(request)
        self.waiting_bytes += len(request.body)
        dropped = 0
        while len(self.waiting) > WAITING_MAX or self.waiting_bytes > WAITING_MAX_BYTES:
            self.waiting_bytes -= len(self.waiting.popleft().body)
            dropped += 1
        return dropped

    def take(self) -> tuple[list[Request], bool]:
        """Remove the newest waiting requests that fit into one batch.

        Returns:
            The requests, and whether their events are stored without trying the sinks.
        """
        room = self.source.max_events_in_flight - self.tried
        maximum = min(room, EVENTS_MAX) if room > 0 else EVENTS_MAX
        begins_at = self.waiting[-1].completed_at - SPAN_SECS
        taken: list[Request] = []
        while self.waiting and len(taken) < maximum and self.waiting[-1].completed_at > begins_at:
            taken.append(self.waiting.pop())
        taken.reverse()
        self.waiting_bytes -= sum(len(request.body) for request in taken)
        self.count(len(taken), is_untried=room <= 0)
        self.batches += 1
        return taken, room <= 0

    def count(self, number: int, *, is_untried: bool) -> None:
        """Add a number to the count of callbacks that are processed; negative when they have been processed."""
        if is_untried:
            self.untried += number
        else:
            self.tried += number


class Receiver:
    """Receives the callbacks of all callback sources, from `start` until `join`.

    Args:
        sources: The callback sources, at least one.
        sockets: The listening sockets, by the addresses of the sources.
        pipeline: Processes batches; it confirms through `answers`.
        answers: The confirms of the pipeline; the receiver sets its `answer`.
        telemetry: Destination of log lines and counts.
        liveness: Records the work of each thread and its time limit, for the watchdog.
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
        self._states = {source.name: _SourceState(source) for source in sources}
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
        """The current status of each source."""
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
                for it in self._states.values()
            ]

    def stop(self) -> None:
        """Accept no further connection; requests on open connections are still processed."""
        self._server.stop()

    def end_waits(self) -> None:
        """End all waits of callbacks for sinks: events that are not accepted yet are stored."""
        with self._lock:
            self._waits_ended = True
            for wait in self._waits:
                wait.interrupt(stopping=True)

    def join(self, timeout_secs: float) -> bool:
        """Wait until all connections have ended and all callbacks have been processed.

        Returns:
            Whether this happened within the time.
        """
        ends_at = self._monotonic() + timeout_secs
        have_ended = self._server.join(timeout_secs)
        with self._lock:
            return self._lock.wait_for(self._is_idle, max(ends_at - self._monotonic(), 0.0)) and have_ended

    def close(self) -> None:
        """End the remaining connections. Callbacks that are being processed are not awaited: see `join`."""
        self._server.close()
        self._threads.shutdown(wait=False)

    def _is_idle(self) -> bool:
        return not any(it.in_flight for it in self._states.values())

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
        state = self._states[source.name]
        with self._lock:
            dropped = state.add(request)
            is_scheduled, state.is_scheduled = state.is_scheduled, True
        if dropped:
            unanswered = CallbackResult.UNANSWERED.value
            self._telemetry.count(Count.CALLBACKS, dropped, source=source.name, result=unanswered)
        if not is_scheduled:
            try:
                self._threads.submit(self._run_batch, state)
            except RuntimeError:  # no thread can be started: the next request tries again
                with self._lock:
                    state.is_scheduled = False
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

    # --- in threads of the receiver -----------------------------------------------------------------------------------

    def _run_batch(self, state: _SourceState) -> None:
        """Take a batch of the waiting requests and process it.

        If enough batches are running, wait before that until one has ended or `LINGER_SECS` are over.
        """
        with self._lock:
            self._lock.wait_for(lambda: state.batches < BATCHES_AT_ONCE or self._waits_ended, LINGER_SECS)
            if not state.waiting:
                state.is_scheduled = False
                return
            requests, is_untried = state.take()
            are_more_waiting = state.is_scheduled = bool(state.waiting)
        if are_more_waiting:
            with suppress(RuntimeError):  # closed: VOD tries requests without an answer again
                self._threads.submit(self._run_batch, state)
        self._liveness.begin(f"callback {state.source.name}", ANSWER_SECS)
        try:
            self._process(state.source, requests, is_untried=is_untried)
        except Exception:
            self._telemetry.log.exception("callback.failed", source=state.source.name)
        finally:
            self._liveness.end()
            with self._lock:
                state.count(-len(requests), is_untried=is_untried)
                state.batches -= 1
                self._lock.notify_all()

    def _process(self, source: Source, requests: Sequence[Request], *, is_untried: bool) -> None:
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
                    self._states[source.name].last_at = self._wall()
            result = CallbackResult.STORED_UNTRIED if is_untried else CallbackResult.ACCEPTED
            unanswered = len(callbacks) - acknowledged
            for what, number in ((result, acknowledged), (CallbackResult.UNANSWERED, unanswered)):
                if number:
                    self._telemetry.count(Count.CALLBACKS, number, source=source.name, result=what.value)

    def _callback(self, source: Source, request: Request) -> Callback | None:
        """Read a request; None if it is refused, and therefore already answered, or if reading it failed."""
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
                hint="its signature is correct, and it is processed like any other: is this machine's clock right?",
            )
        return callback


def _batch(source: Source, callbacks: Sequence[tuple[Request, Callback]], *, is_untried: bool) -> Batch:
    """Make a batch with the times of its first request, so that in doubt an event is new and its lease ends early."""
    first = callbacks[0][0]
    events = [callback.event for _, callback in callbacks]
    return Batch(
        source=source,
        events=tuple(it for it in events if not isinstance(it, Malformed)),
        malformed=tuple(it for it in events if isinstance(it, Malformed)),
        lease=Lease(starts_at=first.completed_at, secs=LEASE_SECS),
        received_at=first.completed_at,
        request_id="",
        began_at=min(request.began_at for request, _ in callbacks),
        is_untried=is_untried,
    )
