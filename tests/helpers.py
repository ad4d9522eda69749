"""Test doubles that many tests share: a clock, a sink in memory, a ledger in memory, a log that can be read."""

import resource
import threading
import time
from contextlib import contextmanager

import structlog

from vodpoller.delivery.in_flight import Delivery, DeliveryWait, WaitEnd
from vodpoller.events.event import make_event
from vodpoller.logs import EACH
from vodpoller.sinks.contract import Sink, SinkContext


class FakeClock:
    """A clock that changes only if a test, or a thread that sleeps, advances it."""

    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now

    def advance(self, secs):
        self.now += secs


def log_into(lines, level="debug"):
    """A logger that keeps its lines as dicts."""

    def keep(_logger, method, line):
        lines.extend({**line, **fields, "level": method} for fields in line.pop(EACH, ({},)))
        raise structlog.DropEvent

    return structlog.wrap_logger(
        None, processors=[keep], wrapper_class=structlog.make_filtering_bound_logger(level)
    ).bind()


def named(lines, event):
    return [line for line in lines if line["event"] == event]


def event(number=0, *, event_type="NewFileUpload", source="main", sub_app_id=None, **more):
    content = {"EventType": event_type, "FileUploadEvent": {"FileId": str(number)}, **more}
    return make_event(content, source=source, sub_app_id=sub_app_id)


def sink_context(log=None, **clocks):
    """The context that a sink gets. Without `log`, the sink's log lines are dropped."""
    return SinkContext(log=log_into([]) if log is None else log, **clocks)


class MemorySink(Sink):
    """Keeps events in memory. `deliver` first waits until `gate` is set, then calls `behaviour`, which may raise."""

    def __init__(self, *, concurrency=1, batch_events=1, timeout_secs=1.0, max_per_minute=None):
        self.concurrency = concurrency
        self.batch_events = batch_events
        self.timeout_secs = timeout_secs
        self.max_per_minute = max_per_minute
        self.examined = lambda event: None
        self.behaviour = lambda events: None
        self.gate = threading.Event()
        self.gate.set()
        self.lock = threading.Lock()
        self.calls = []
        self.called_at = []
        self.accepted = []
        self.running = 0
        self.most_running = 0

    def examine(self, event):
        self.examined(event)

    def deliver(self, events, timeout_secs):
        with self.lock:
            self.calls.append([event.key for event in events])
            self.called_at.append(time.monotonic())
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            assert self.gate.wait(20)
            self.behaviour(events)
            with self.lock:
                self.accepted += [event.key for event in events]
        finally:
            with self.lock:
                self.running -= 1

    def fail_with(self, *errors):
        """Each call raises the next of these errors; None accepts. Later calls accept."""
        left = list(errors)

        def behave(events):
            error = left.pop(0) if left else None
            if error is not None:
                raise error

        self.behaviour = behave

    def fail_always(self, error):
        def behave(events):
            raise error

        self.behaviour = behave


class MemoryLedger:
    """Remembers what was accepted; calls `at_accept` before each entry."""

    def __init__(self):
        self.accepted = []
        self.at_accept = lambda: None

    def accept(self, sink, keys, position):
        self.at_accept()
        self.accepted += [(sink, key) for key in keys]


def send(worker, in_flight, events, *, deadline_in_secs=None):
    """Claim and submit deliveries of these events, as a puller does before it waits.

    Returns:
        The deliveries (one that already runs is joined), and a `Sent` that waits for them.
    """
    deadline = None if deadline_in_secs is None else time.monotonic() + deadline_in_secs
    sent = Sent(in_flight, [Delivery(event, worker.name, deadline=deadline) for event in events])
    worker.submit(sent.fresh)
    return sent.deliveries, sent


class Sent:
    """A claim that lasts until `leave` is called."""

    def __init__(self, in_flight, wanted):
        self._wait = DeliveryWait()
        self._claim = in_flight.claim(wanted, self._wait)
        claims = self._claim.__enter__()
        self.deliveries = [claim.delivery for claim in claims]
        self.fresh = [claim.delivery for claim in claims if not claim.joined]

    def wait(self, timeout_secs):
        """True if all deliveries are complete before the timeout."""
        return self._wait.wait(timeout_secs) is WaitEnd.COMPLETE

    def leave(self):
        self._claim.__exit__(None, None, None)


@contextmanager
def full_disk():
    """Writing to files fails, as on a full disk; a transaction without changes succeeds."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
