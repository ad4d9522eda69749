"""Deliveries in flight: no (key, sink) is delivered twice at the same time.

How an event changes threads:

    a puller (pipeline)               the table (InFlight)             a thread of the sink (worker)
    -------------------               --------------------             -----------------------------
    with claim(wanted, wait): ----->  CLAIMED
      worker.submit(claimed) ------>  QUEUED  ---------------------->  takes a batch: start()
                                      RUNNING                          sink.deliver(events)
      wait.wait(deadline)                                              ledger.accept(keys)
      (woken)  <--------------------  DONE, with its result  <-------  complete()
    reads the results
    leaves the `with` ------------->  what does not run and has no other waiter is released: DONE, without a result

A second puller that wants a pair which is in the table joins the delivery that is there, and waits for it with its own
deadline. The retrier claims without waiting: from `submit` on its deliveries belong to the worker. `on_complete`, which
is called in the sink's thread, hands each of them back with its result. It then stays in the table, where others may
wait for it, until the retrier has written the result and calls `forget()`.

Every field of a `Delivery` that changes has one writer: `state`, `result` and `waits` are written here, under the
table's lock; `attempts`, `error`, `alone`, `is_entered` and `holder` by the thread of the sink that has taken the
delivery, and before that, if the sink skips or rejects it unsent, by the thread that submits it.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto

from vodpoller.events.event import Event
from vodpoller.settlement import SinkResult


class State(Enum):
    """The state of a delivery."""

    CLAIMED = auto()
    QUEUED = auto()
    RUNNING = auto()
    DONE = auto()


class WaitEnd(Enum):
    """Why a wait for deliveries ended."""

    COMPLETE = auto()
    OUT_OF_TIME = auto()
    NEEDED = auto()
    STOPPING = auto()


class DeliveryWait:
    """Lets one thread wait until a number of deliveries are done, or until it is needed for another pull.

    Args:
        min_wait_secs: Minimum time that it waits, unless all is done or the daemon stops.
        should_yield: Called once `min_wait_secs` have passed. True ends the wait so that this thread can pull again.

    Attributes:
        min_wait_secs: As above, for the next wait.
    """

    def __init__(self, *, min_wait_secs: float = 0.25, should_yield: Callable[[], bool] = lambda: False) -> None:
        self._condition = threading.Condition()
        self.min_wait_secs = min_wait_secs
        self._should_yield = should_yield
        self._missing = 0
        self._min_wait_ends_at = 0.0
        self._interrupted: WaitEnd | None = None

    def add(self, number: int) -> None:
        """Wait for this number of further deliveries."""
        with self._condition:
            self._missing += number

    def count_down(self, number: int = 1) -> None:
        """Note that this number of deliveries are done."""
        with self._condition:
            self._missing -= number
            if self._missing <= 0:
                self._condition.notify_all()

    @property
    def is_waiting(self) -> bool:
        """Whether a thread has begun to wait, and not everything is done."""
        return self._min_wait_ends_at > 0 and self._missing > 0

    @property
    def has_waited_enough(self) -> bool:
        """Whether a thread waits, and its minimum wait is over."""
        return 0 < self._min_wait_ends_at <= time.monotonic()

    def interrupt(self, *, stopping: bool = False) -> bool:
        """End the wait early.

        Args:
            stopping: The daemon stops: end it also if the minimum wait is not over, or the wait has not begun.

        Returns:
            Whether this ended it, or will end it if it has not begun (at a stop). False if nothing is missing, or the
            minimum wait is not over.
        """
        with self._condition:
            if self._interrupted or (self._missing <= 0 and not stopping):
                return False
            if not stopping and not self.has_waited_enough:
                return False
            self._interrupted = WaitEnd.STOPPING if stopping else WaitEnd.NEEDED
            self._condition.notify_all()
            return True

    def wait(self, timeout_secs: float) -> WaitEnd:
        """Wait for at most this number of seconds.

        Returns:
            Why the wait ended.
        """
        with self._condition:
            min_wait_secs = max(min(timeout_secs, self.min_wait_secs), 0)
            self._min_wait_ends_at = time.monotonic() + min_wait_secs
            try:
                if not self._condition.wait_for(self._is_over, min_wait_secs):
                    if self._should_yield():
                        return WaitEnd.NEEDED
                    self._condition.wait_for(self._is_over, max(timeout_secs - min_wait_secs, 0))
            finally:
                self._min_wait_ends_at = 0.0  # from now on an interruption would have no effect
            if self._missing <= 0:
                return WaitEnd.COMPLETE
            return self._interrupted or WaitEnd.OUT_OF_TIME

    def _is_over(self) -> bool:
        return self._missing <= 0 or self._interrupted is not None


class Delivery:
    """One event on its way to one sink: shared by the worker and by all threads that wait for it.

    Args:
        event: The event.
        sink: The sink's name.
        deadline: Monotonic time until which a failed attempt is repeated; None for one attempt only.
        on_complete: Called in the worker's thread with the result. The pair cannot be claimed anew before
            `InFlight.forget`. If it is given, the worker keeps the delivery once it is submitted, also if no thread
            waits for it.

    Attributes:
        state: See `State`.
        result: None until it is known; stays None if the delivery was released before that.
        waits: The waits that are counted down when it is done.
        attempts: Number of attempts that failed.
        error: The error of the last attempt that failed.
        alone: It goes to the sink in a call of its own.
        is_entered: Its acceptance is in the ledger.
        holder: The thread of the sink that has taken it; None if none has.
    """

    __slots__ = (
        "alone",
        "attempts",
        "deadline",
        "error",
        "event",
        "holder",
        "is_entered",
        "on_complete",
        "result",
        "sink",
        "state",
        "waits",
    )

    def __init__(
        self,
        event: Event,
        sink: str,
        *,
        deadline: float | None,
        on_complete: Callable[["Delivery", SinkResult], None] | None = None,
    ) -> None:
        self.event = event
        self.sink = sink
        self.deadline = deadline
        self.on_complete = on_complete
        self.state = State.CLAIMED
        self.result: SinkResult | None = None
        self.waits: tuple[DeliveryWait, ...] = ()
        self.attempts = 0
        self.error: Exception | None = None
        self.alone = False
        self.is_entered = False
        self.holder: int | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """A caller's claim on one wanted delivery.

    Args:
        delivery: The delivery in the table.
        joined: It was in the table already; else it is the caller's own.
    """

    delivery: Delivery
    joined: bool


class InFlight:
    """The deliveries that are not done, by (key, sink)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._deliveries: dict[tuple[bytes, str], Delivery] = {}

    def __len__(self) -> int:
        return len(self._deliveries)

    @contextmanager
    def claim(self, wanted: Iterable[Delivery], wait: DeliveryWait | None) -> Iterator[list[Claim]]:
        """Register deliveries, or join those that are already in flight, for as long as the `with` lasts.

        At its end, also after an exception, these deliveries are released: those that this caller claimed and did not
        submit; and those that are queued without `on_complete` and for which no thread waits any more.

        Args:
            wanted: Deliveries that are not submitted yet.
            wait: It is counted down when each of them is done; None if no thread waits for them.

        Yields:
            The claims on the wanted deliveries, in their order.
        """
        claims: list[Claim] = []
        try:
            with self._lock:
                for delivery in wanted:
                    pair = (delivery.event.key, delivery.sink)
                    found = self._deliveries.get(pair)
                    claims.append(Claim(delivery if found is None else found, found is not None))
                    if found is None:
                        self._deliveries[pair] = delivery
                if wait is not None:
                    for claim in claims:
                        claim.delivery.waits += (wait,)
                    wait.add(len(claims))
            yield claims
        finally:
            self._release(claims, wait)

    def _release(self, claims: Sequence[Claim], wait: DeliveryWait | None) -> None:
        others: list[DeliveryWait] = []
        with self._lock:
            for claim in claims:
                delivery = claim.delivery
                if delivery.state is State.DONE:
                    continue
                if wait is not None:
                    delivery.waits = tuple(other for other in delivery.waits if other is not wait)
                is_never_submitted = delivery.state is State.CLAIMED and not claim.joined
                is_left = delivery.state is State.QUEUED and delivery.on_complete is None and not delivery.waits
                if is_never_submitted or is_left:
                    delivery.state = State.DONE
                    self._remove(delivery)
                    others += delivery.waits  # they joined a delivery that will never be submitted
        for other in others:
            other.count_down()

    def _remove(self, delivery: Delivery) -> None:
        pair = (delivery.event.key, delivery.sink)
        if self._deliveries.get(pair) is delivery:
            del self._deliveries[pair]

    def queued(self, deliveries: Iterable[Delivery]) -> None:
        """Mark deliveries as queued: just submitted, or queued again after an attempt that failed."""
        with self._lock:
            for delivery in deliveries:
                if delivery.state is not State.DONE:
                    delivery.state = State.QUEUED

    def start(self, deliveries: Iterable[Delivery]) -> list[Delivery]:
        """Mark deliveries as running.

        Returns:
            The deliveries that run now; the others were released while they waited.
        """
        with self._lock:
            started = [delivery for delivery in deliveries if delivery.state is not State.DONE]
            for delivery in started:
                delivery.state = State.RUNNING
        return started

    def complete(self, deliveries: Sequence[Delivery], result: SinkResult) -> None:
        """Give deliveries their result and wake each waiting thread once. The first result of a delivery counts.

        For a delivery with `on_complete`, this is called instead, and the delivery stays in the table.

        Raises:
            Exception: What an `on_complete` raised; all others were called, and its delivery is removed.
        """
        with self._lock:
            done = [delivery for delivery in deliveries if delivery.state is not State.DONE]
            for delivery in done:
                delivery.state, delivery.result = State.DONE, result
        failure: Exception | None = None
        left: list[Delivery] = []
        for delivery in done:
            try:
                if delivery.on_complete is None:
                    left.append(delivery)
                else:
                    delivery.on_complete(delivery, result)
            except Exception as error:  # noqa: BLE001 - one must not keep the others from being called
                left.append(delivery)
                failure = error
        self.forget(left)
        if failure is not None:
            raise failure

    def forget(self, done: Sequence[Delivery]) -> None:
        """Remove deliveries whose results are written: their pairs can be claimed anew. Waiting threads are woken."""
        waiting: dict[DeliveryWait, int] = {}
        with self._lock:
            for delivery in done:
                self._remove(delivery)
                for wait in delivery.waits:
                    waiting[wait] = waiting.get(wait, 0) + 1
        for wait, number in waiting.items():
            wait.count_down(number)
