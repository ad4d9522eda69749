"""Getting events to sinks: what a sink promises, what came of an event, and the worker around each sink."""

import heapq
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import count
from typing import Any, Literal, Protocol

import tenacity

from vodpoller.errors import PartialFailureError, RejectedError, TransientError, VodpollerError
from vodpoller.events import Event
from vodpoller.logs import Logger, Repeats
from vodpoller.systemd import Liveness


class Outcome(Enum):
    """What came of one event at one sink."""

    DELIVERED = auto()
    REJECTED = auto()
    ERRORED = auto()
    UNSETTLED = auto()


class Settlement(Enum):
    """What is done with one event's handle."""

    CONFIRM = auto()
    STORE = auto()
    LEAVE = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """How far a sink's file is known to be in the ledger: all before `offset_bytes` is.

    Args:
        inode: Of the file; it follows a rename.
        offset_bytes: End of the last line that was written and synced.
    """

    inode: int
    offset_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Portion:
    """A part of what a sink's file holds beyond its mark.

    Args:
        keys: Of the events of its lines, in their order.
        position: Where it ends: when its keys are in the ledger, all before is.
        read: How much of all that is to be read has been read then, 0 to 1.
    """

    keys: Sequence[bytes]
    position: Position
    read: float


class Sink(ABC):
    """Where events go. A sink knows nothing of leases, handles, retries or the ledger: its worker does.

    A new sink is one module with a subclass and its `Config`, and one line under the entry points
    "vodpoller.sinks". The class is called with the name of the sink and the validated `Config`; what it needs is
    opened there: a `ConfigError` says what somebody must mend, a `TransientError` what may pass (a full disk).

    Attributes:
        concurrency: How many threads call `deliver` at once.
        batch_events: How many events one call takes at most.
        timeout_secs: What `deliver` gets as its time limit.
    """

    concurrency: int = 1
    batch_events: int = 1
    timeout_secs: float = 10.0

    @classmethod
    def probe(cls, name: str, config: Any) -> str:  # noqa: ARG003 - what most sinks need to look
        """Look whether events could get there, without a sink being made: the daemon may be running.

        It delivers nothing, writes nothing and makes no file or folder.

        Args:
            name: Of the sink.
            config: Its settings, validated.

        Returns:
            One line that says what is there.

        Raises:
            ConfigError: It cannot be reached; says what is wrong and what to do, as at construction.
        """
        return "nothing to reach"

    @abstractmethod
    def deliver(self, events: Sequence[Event], timeout_secs: float) -> None:
        """Take events. Returning means: all of them are accepted, and would survive a loss of power.

        Args:
            events: One to `batch_events` events.
            timeout_secs: How long the call may take; it is the sink's duty to keep to it.

        Raises:
            RejectedError: No event was accepted and none ever will be.
            TransientError: No event was accepted; a later call may succeed. Any unknown exception means the same.
            PartialFailureError: Some events were not accepted, each with an error of these kinds.
        """

    def reopen(self) -> None:  # noqa: B027 - most sinks have nothing to reopen
        """SIGHUP: open files again, read secrets again. Called from another thread than `deliver`."""

    def close(self) -> None:  # noqa: B027 - most sinks have nothing to close
        """The last call."""

    def position(self) -> Position | None:
        """Where the sink's file ends after the last accepted call; None for a sink that is no file."""
        return None

    def recover(self, mark: Position | None, sub_app_ids: Collection[int | None]) -> Iterable[Portion]:  # noqa: ARG002
        """Called once before the first `deliver`: what was accepted beyond the mark and never reached the ledger.

        Args:
            mark: The position that the ledger knows; None where it knows none.
            sub_app_ids: The SubAppIds whose events may be in the file: a key depends on it, a line does not hold it.

        Returns:
            What lies beyond the mark, in portions that can each be written down before the next is taken: a process
            that ends in between goes on from the position of the last one. After them, `position` says where the file
            ends. A torn line is cut off. Nothing for a sink that is no file.
        """
        return ()


OnFailure = Literal["store", "leave"]


def settle(outcomes: Collection[Outcome], *, on_failure: OnFailure) -> Settlement:
    """What to do with an event, given what came of it at each of its sinks.

    Args:
        outcomes: One for each sink that the event was routed to.
        on_failure: What the source wants for an event that not every sink accepted.

    Raises:
        ValueError: There is no outcome: nobody has the event, so nothing may settle it.
    """
    if not outcomes:
        raise ValueError("an event without any outcome cannot be settled")
    if all(outcome is Outcome.DELIVERED for outcome in outcomes):
        return Settlement.CONFIRM
    return Settlement.LEAVE if on_failure == "leave" else Settlement.STORE


class Backoff:
    """Exponentially growing waits, half of each drawn at random, so that many who fail together spread out.

    Args:
        first_secs: The first wait is between half of this and this.
        most_secs: No wait is longer.
    """

    def __init__(self, *, first_secs: float, most_secs: float) -> None:
        half, most = first_secs / 2, most_secs / 2
        self._wait = tenacity.wait_exponential(multiplier=half, max=most) + tenacity.wait_random_exponential(
            multiplier=half, max=most
        )

    def secs(self, attempt: int) -> float:
        """How long to wait after the attempt of this number, the first being 1."""
        state = tenacity.RetryCallState(None, None, (), {})  # type: ignore[arg-type]  # waits read only the number
        state.attempt_number = attempt
        return self._wait(state)


class Ledger(Protocol):
    """Where the worker writes down what its sink accepted."""

    def accept(self, sink: str, accepted: Sequence["Delivery"], position: Position | None) -> None:
        """Remember the pairs. Must not raise: what cannot be written now stays in memory and is retried."""


class Latch:
    """Lets one thread wait until a number of deliveries are settled, or until it is needed elsewhere.

    Args:
        patience_secs: So long it waits whatever else there is to do.
        is_needed: Asked after that: whether the thread had better do something else.
    """

    def __init__(self, *, patience_secs: float = 0.25, is_needed: Callable[[], bool] = lambda: False) -> None:
        self._condition = threading.Condition()
        self._patience_secs = patience_secs
        self._is_needed = is_needed
        self._open = 0
        self._patient_until = 0.0
        self._hurried = False

    def add(self, number: int) -> None:
        """So many more must be settled."""
        with self._condition:
            self._open += number

    def settled(self, number: int = 1) -> None:
        """So many more are."""
        with self._condition:
            self._open -= number
            if self._open <= 0:
                self._condition.notify_all()

    def hurry(self, *, patiently: bool = True) -> bool:
        """End the waiting, if there is any.

        Args:
            patiently: Only where its patience is over.

        Returns:
            Whether this ended it.
        """
        with self._condition:
            if self._hurried or self._open <= 0:
                return False
            if patiently and not 0 < self._patient_until <= time.monotonic():
                return False
            self._hurried = True
            self._condition.notify_all()
            return True

    def wait(self, timeout_secs: float) -> bool:
        """Wait.

        Returns:
            Whether everything is settled; False when the time is over or the thread is needed elsewhere.
        """
        with self._condition:
            patience_secs = max(min(timeout_secs, self._patience_secs), 0)
            self._patient_until = time.monotonic() + patience_secs
            if self._condition.wait_for(self._is_over, patience_secs) or self._is_needed():
                return self._open <= 0
            self._condition.wait_for(self._is_over, max(timeout_secs - patience_secs, 0))
            return self._open <= 0

    def _is_over(self) -> bool:
        return self._open <= 0 or self._hurried


class Delivery:
    """One event on its way to one sink: shared by the worker and by all who wait for it.

    Args:
        event: The event.
        sink: The sink's name.
        deadline: Monotonic time until which a failed attempt is repeated; None for one attempt only.
        on_settled: Called in the worker's thread when the outcome is known; for deliveries nobody waits for.
        held: The pair is known to be in the journal, pending or dead.

    Attributes:
        outcome: None until it is settled.
        error: Of the last attempt that failed.
        attempts: How many failed.
        running: A thread is at it.
        alone: It goes to the sink in a call of its own.
        stored: Somebody is about to store the pair, or has: a late success must delete the row.
    """

    __slots__ = (
        "alone",
        "attempts",
        "deadline",
        "error",
        "event",
        "held",
        "latches",
        "on_settled",
        "outcome",
        "running",
        "sink",
        "stored",
    )

    def __init__(
        self,
        event: Event,
        sink: str,
        *,
        deadline: float | None,
        on_settled: Callable[["Delivery"], None] | None = None,
        held: bool = False,
    ) -> None:
        self.event = event
        self.sink = sink
        self.deadline = deadline
        self.on_settled = on_settled
        self.held = held
        self.stored = held
        self.outcome: Outcome | None = None
        self.error: Exception | None = None
        self.attempts = 0
        self.running = False
        self.alone = False
        self.latches: tuple[Latch, ...] = ()


class InFlight:
    """The deliveries that are not settled: no (key, sink) is ever on its way twice at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._deliveries: dict[tuple[bytes, str], Delivery] = {}

    def __len__(self) -> int:
        return len(self._deliveries)

    def claim(self, wanted: Iterable[Delivery], latch: Latch | None) -> tuple[list[Delivery], list[Delivery]]:
        """Register deliveries, or join those that are already on their way.

        Args:
            wanted: Deliveries that are not submitted yet.
            latch: Counts down as each of them is settled; None where nobody waits.

        Returns:
            The deliveries that now stand for the wanted ones, in their order, and those of them that are new.
        """
        standing: list[Delivery] = []
        fresh: list[Delivery] = []
        with self._lock:
            for delivery in wanted:
                pair = (delivery.event.key, delivery.sink)
                found = self._deliveries.setdefault(pair, delivery)
                if found is delivery:
                    fresh.append(delivery)
                standing.append(found)
                if latch is not None:
                    found.latches += (latch,)
            if latch is not None:
                latch.add(len(standing))
        return standing, fresh

    def settle(self, delivery: Delivery, outcome: Outcome, error: Exception | None = None) -> None:
        """Make the outcome known to all who wait. The first outcome counts."""
        self.settle_all((delivery,), outcome, error)

    def settle_all(self, deliveries: Sequence[Delivery], outcome: Outcome, error: Exception | None = None) -> None:
        """The same for many that came to the same: whoever waits for several of them is woken once."""
        with self._lock:
            settled = [delivery for delivery in deliveries if delivery.outcome is None]
            for delivery in settled:
                delivery.outcome, delivery.error = outcome, error or delivery.error
        # Before the pair may be claimed anew: whoever looks then must see what this wrote.
        for delivery in settled:
            if delivery.on_settled is not None:
                delivery.on_settled(delivery)
        waiting: dict[Latch, int] = {}
        with self._lock:
            for delivery in settled:
                del self._deliveries[delivery.event.key, delivery.sink]
                for latch in delivery.latches:
                    waiting[latch] = waiting.get(latch, 0) + 1
        for latch, number in waiting.items():
            latch.settled(number)

    def start(self, deliveries: Iterable[Delivery]) -> list[Delivery]:
        """Mark deliveries as running.

        Returns:
            Those that are; the others were abandoned while they waited.
        """
        with self._lock:
            started = [delivery for delivery in deliveries if delivery.outcome is None]
            for delivery in started:
                delivery.running = True
        return started

    def abandon(self, deliveries: Iterable[Delivery], latch: Latch) -> None:
        """Stop waiting. What nobody else waits for and no thread is at gets its outcome: ERRORED or UNSETTLED.

        What is running goes on: whoever asks for the pair again joins it, and its late success is remembered.
        """
        with self._lock:
            for delivery in deliveries:
                delivery.latches = tuple(other for other in delivery.latches if other is not latch)
                if not delivery.latches and not delivery.running and delivery.outcome is None:
                    delivery.outcome = Outcome.ERRORED if delivery.error else Outcome.UNSETTLED
                    del self._deliveries[delivery.event.key, delivery.sink]


class Breaker:
    """Stops attempts at a sink on which several distinct events in a row failed, and finds out when it is back.

    Rejections count as well: a receiver that was deployed wrongly and refuses everything must not bury everything.
    Not safe for threads: its worker guards it.

    Args:
        failures: So many distinct events open it.
        monotonic: The clock, in seconds.
    """

    _PROBES = Backoff(first_secs=1.0, most_secs=30.0)

    def __init__(self, *, failures: int, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._failures = failures
        self._monotonic = monotonic
        self._failed: set[bytes] = set()
        self._failed_probes = 0
        self._probe_at = 0.0
        self._probing: bytes | None = None
        self._last_probed: bytes | None = None
        self.open = False

    def wants_probe(self) -> bool:
        """Whether it is open and time to try one event."""
        return self.open and self._probing is None and self._monotonic() >= self._probe_at

    def start_probe(self, key: bytes) -> None:
        """This event is tried although the breaker is open."""
        self._probing = self._last_probed = key

    def was_probed_last(self, key: bytes) -> bool:
        """Whether the last probe was this event: another one says more, unless none comes for a while."""
        return key == self._last_probed and self._monotonic() < self._probe_at + 5.0

    def succeeded(self) -> bool:
        """The sink accepted something.

        Returns:
            Whether this closed the breaker.
        """
        self._failed.clear()
        self._failed_probes = 0
        self._probing = None
        was_open, self.open = self.open, False
        return was_open

    def failed(self, key: bytes) -> bool:
        """The sink did not accept this event.

        Returns:
            Whether this opened the breaker.
        """
        if self.open:
            if key == self._probing:
                self._probing = None
                self._failed_probes += 1
                self._probe_at = self._monotonic() + self._PROBES.secs(self._failed_probes)
            return False
        self._failed.add(key)
        if len(self._failed) < self._failures:
            return False
        self._failed.clear()
        self.open = True
        self._failed_probes = 1
        self._probing = None
        self._probe_at = self._monotonic() + self._PROBES.secs(1)
        return True


class Worker:
    """Stands between lanes and one sink: its queue, its threads, its breaker. A slow sink fills only its own queue.

    Args:
        name: The sink's name.
        sink: The sink.
        ledger: Where accepted events are written down, before anyone hears of it.
        in_flight: The table that all workers share.
        queue_max_events: How many deliveries may wait; the next ones are UNSETTLED at once.
        breaker_failures: See Breaker.
        log: Where to.
        liveness: Told what each thread is at and until when.
        monotonic: The clock, in seconds.
    """

    _RETRIES = Backoff(first_secs=0.5, most_secs=8.0)

    def __init__(
        self,
        *,
        name: str,
        sink: Sink,
        ledger: Ledger,
        in_flight: InFlight,
        queue_max_events: int,
        breaker_failures: int,
        log: Logger,
        liveness: Liveness,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.sink = sink
        self._ledger = ledger
        self._in_flight = in_flight
        self._queue_max_events = queue_max_events
        self._log = log
        self._repeats = Repeats(log, monotonic=monotonic)
        self._liveness = liveness
        self._monotonic = monotonic
        self._condition = threading.Condition()
        self._queue: deque[Delivery] = deque()
        self._delayed: list[tuple[float, int, Delivery]] = []
        self._sequence = count()
        self._breaker = Breaker(failures=breaker_failures, monotonic=monotonic)
        self._stopping = False
        self._idle = 0
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start the threads; those of a sink with many come as they are needed."""
        with self._condition:
            self._spawn_if_useful()

    def stop(self) -> None:
        """Take nothing more from the queue. What is in it is held by the journal or by VOD."""
        with self._condition:
            self._stopping = True
            self._condition.notify_all()

    def join(self, timeout_secs: float) -> bool:
        """Wait for the calls that run.

        Returns:
            Whether all threads have ended.
        """
        until = self._monotonic() + timeout_secs
        for thread in self._threads:
            thread.join(max(until - self._monotonic(), 0))
        return not any(thread.is_alive() for thread in self._threads)

    @property
    def is_open(self) -> bool:
        """Whether the breaker keeps events from the sink."""
        return self._breaker.open

    def room(self) -> int:
        """How many stored deliveries may be submitted now: half of the queue is for fresh ones, and a probe is one."""
        with self._condition:
            if self._breaker.open:
                return 1 if self._breaker.wants_probe() else 0
            return max(self._queue_max_events // 2 - len(self._queue) - len(self._delayed), 0)

    def submit(self, deliveries: Sequence[Delivery]) -> None:
        """Take deliveries that this caller has claimed. Each is settled sooner or later, maybe before this returns."""
        refused: list[Delivery] = []
        with self._condition:
            for delivery in deliveries:
                full = len(self._queue) + len(self._delayed) >= self._queue_max_events
                if self._stopping or full or (self._breaker.open and not self._may_probe(delivery)):
                    refused.append(delivery)
                else:
                    self._queue.append(delivery)
            if len(refused) < len(deliveries):
                self._spawn_if_useful()
                self._condition.notify(-(-len(self._queue) // self.sink.batch_events))
        self._in_flight.settle_all(refused, Outcome.UNSETTLED)

    def _may_probe(self, delivery: Delivery) -> bool:
        # While the breaker is open at most one delivery waits in the queue: the next probe.
        return not self._queue and self._breaker.wants_probe() and not self._breaker.was_probed_last(delivery.event.key)

    def _spawn_if_useful(self) -> None:
        missing = min(max(len(self._queue), 1) - self._idle, self.sink.concurrency - len(self._threads))
        for _ in range(missing):
            number = len(self._threads)
            thread = threading.Thread(target=self._run, name=f"sink-{self.name}-{number}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the system has no more threads: those there are go on, the next event tries again
                return
            self._threads.append(thread)
            self._idle += 1

    def _run(self) -> None:
        while (batch := self._take()) is not None:
            try:
                if batch:
                    self._attempt(batch)
            except Exception as error:  # noqa: BLE001 - the worker must outlive whatever a bug brings
                self._log.error("lane.failed", sink=self.name, exc_info=True)
                for delivery in batch:
                    with self._condition:
                        self._breaker.failed(delivery.event.key)
                    self._in_flight.settle(delivery, Outcome.ERRORED, error)
            with self._condition:
                self._idle += 1

    def _take(self) -> list[Delivery] | None:
        """What one call gets; blocks until there is something. None when it is time to end."""
        refused: list[Delivery] = []
        with self._condition:
            while not self._stopping:
                self._requeue_due()
                if self._queue:
                    self._idle -= 1
                    batch = self._next_probe(refused) if self._breaker.open else self._next_batch()
                    break
                self._condition.wait(self._delayed[0][0] - self._monotonic() if self._delayed else None)
            else:
                return None
        self._in_flight.settle_all(refused, Outcome.UNSETTLED)
        return batch

    def _requeue_due(self) -> None:
        now = self._monotonic()
        while self._delayed and self._delayed[0][0] <= now:
            self._queue.append(heapq.heappop(self._delayed)[2])

    def _next_batch(self) -> list[Delivery]:
        batch = [self._queue.popleft()]
        while self._queue and len(batch) < self.sink.batch_events and not (batch[0].alone or self._queue[0].alone):
            batch.append(self._queue.popleft())
        return self._in_flight.start(batch)

    def _next_probe(self, refused: list[Delivery]) -> list[Delivery]:
        probe: list[Delivery] = []
        while self._queue:
            delivery = self._queue.popleft()
            if not probe and self._breaker.wants_probe() and (probe := self._in_flight.start([delivery])):
                self._breaker.start_probe(delivery.event.key)
            elif delivery.outcome is None:
                refused.append(delivery)
        return probe

    def _attempt(self, batch: list[Delivery]) -> None:
        failures = self._call(batch)
        if failures and len(batch) > 1 and len(failures) == len(batch):
            for delivery in batch:
                delivery.alone = True
            if not all(isinstance(error, TransientError) for error in failures.values()):
                # One poison event condemns no other: each is tried by itself, as far as the breaker lets it.
                with self._condition:
                    for delivery in reversed(batch):
                        delivery.running = False
                        self._queue.appendleft(delivery)
                return
        for index, error in failures.items():
            # One failed call is one failure: what counts as distinct events is counted when each was tried by itself.
            self._not_accepted(batch[index], error, counts=len(failures) == len(batch) and index == 0)

    def _call(self, batch: list[Delivery]) -> Mapping[int, Exception]:
        """One call of the sink, the ledger behind it; the errors of what was not accepted, by position."""
        timeout_secs = self.sink.timeout_secs
        self._liveness.begin(f"sink {self.name}", timeout_secs)
        failures: Mapping[int, Exception] = {}
        try:
            self.sink.deliver([delivery.event for delivery in batch], timeout_secs)
        except PartialFailureError as error:
            # One that names no event, or one that is not in the call, tells nothing: then none was accepted.
            is_usable = error.failures and all(0 <= index < len(batch) for index in error.failures)
            failures = error.failures if is_usable else dict.fromkeys(range(len(batch)), error)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - unknown exceptions count as transient
            cause = error if isinstance(error, Exception) else TransientError(f"the sink called sys.exit({error})")
            failures = dict.fromkeys(range(len(batch)), cause)
        finally:
            self._liveness.end()
        accepted = [delivery for index, delivery in enumerate(batch) if index not in failures]
        if accepted:
            self._ledger.accept(self.name, accepted, self.sink.position())
            with self._condition:
                closed = self._breaker.succeeded()
            if closed:
                self._repeats.forget("")
                self._log.info("breaker.closed", sink=self.name)
            self._in_flight.settle_all(accepted, Outcome.DELIVERED)
        return failures

    def _not_accepted(self, delivery: Delivery, error: Exception, *, counts: bool) -> None:
        delivery.attempts += 1
        delivery.error = error
        with self._condition:
            was_open = self._breaker.open
            opened = counts and self._breaker.failed(delivery.event.key)
        self._say_failed(delivery, error)
        if opened:
            self._log.error("breaker.opened", sink=self.name, error_message=str(error))
        if isinstance(error, RejectedError) and not was_open:
            self._in_flight.settle(delivery, Outcome.REJECTED, error)
        elif not self._repeat_later(delivery, error):
            self._in_flight.settle(delivery, Outcome.ERRORED, error)

    def _say_failed(self, delivery: Delivery, error: Exception) -> None:
        fields = error.fields() if isinstance(error, VodpollerError) else {"error_message": repr(error)}
        self._repeats.say(
            "warning",
            "delivery.failed",
            cause=f"{type(error).__name__} {error}",
            sink=self.name,
            key=delivery.event.key.hex(),
            event_type=delivery.event.type,
            attempt=delivery.attempts,
            **fields,
            exc_info=None if isinstance(error, VodpollerError) else error,
        )

    def _repeat_later(self, delivery: Delivery, error: Exception) -> bool:
        """Queue another attempt, if one may succeed before the lease nears its end."""
        if delivery.deadline is None:
            return False
        wait_secs = self._RETRIES.secs(delivery.attempts)
        if isinstance(error, TransientError) and error.retry_after_secs is not None:
            wait_secs = max(wait_secs, error.retry_after_secs)
        due = self._monotonic() + wait_secs
        with self._condition:
            if self._breaker.open or self._stopping or due >= delivery.deadline:
                return False
            delivery.running = False
            heapq.heappush(self._delayed, (due, next(self._sequence), delivery))
            self._condition.notify()
        return True
