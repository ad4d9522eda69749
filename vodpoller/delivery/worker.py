"""The worker of each sink: its queue, its threads, its breaker."""

import heapq
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count, islice
from typing import Any, Protocol

from vodpoller.backoff import Backoff
from vodpoller.clock import timestamp
from vodpoller.delivery.breaker import Breaker
from vodpoller.delivery.in_flight import Delivery, InFlight, State
from vodpoller.delivery.pause import Pause
from vodpoller.errors import PartialFailureError, RejectedError, SkippedError, TransientError, VodpollerError
from vodpoller.journal.contract import Position
from vodpoller.liveness import Liveness
from vodpoller.settlement import DELIVERED, SKIPPED, Outcome, Reason, SinkResult
from vodpoller.sinks.contract import Recoverable, Sink
from vodpoller.status import SinkStatus
from vodpoller.telemetry import Count, Duration, Telemetry


class Ledger(Protocol):
    """Records what a sink has accepted."""

    def accept(self, sink: str, keys: Sequence[bytes], position: Position | None) -> None:
        """Record the keys. Must not raise: what cannot be written now stays in memory and is retried."""


class Worker:
    """Delivers to one sink with its own queue, threads and breaker, so that a slow sink fills only its own queue.

    Args:
        name: The sink's name.
        sink: The sink.
        ledger: Records accepted events, before a puller can see their results.
        in_flight: The table that all workers share.
        queue_max_events: Number of deliveries that may wait; the next ones are not attempted, with `queue_full`.
        breaker_failures: See Breaker.
        telemetry: Destination of log lines and counts.
        liveness: Is given the name and the time limit of each call, for the watchdog.
        monotonic: The clock of waits and deadlines, in seconds.
        wall: The clock of the times that a person reads, in seconds since 1970.
    """

    _RETRIES = Backoff(first_secs=0.5, max_secs=8.0)

    def __init__(
        self,
        *,
        name: str,
        sink: Sink[Any],
        ledger: Ledger,
        in_flight: InFlight,
        queue_max_events: int,
        breaker_failures: int,
        telemetry: Telemetry,
        liveness: Liveness,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.name = name
        self.sink = sink
        self._recoverable = sink if isinstance(sink, Recoverable) else None
        self._ledger = ledger
        self._in_flight = in_flight
        self._queue_max_events = queue_max_events
        self._telemetry = telemetry.scope()
        self._labels = (("sink", name),)
        self._liveness = liveness
        self._monotonic = monotonic
        self._wall = wall
        self._condition = threading.Condition()
        self._queue: deque[Delivery] = deque()
        self._delayed: list[tuple[float, int, Delivery]] = []
        self._sequence = count()
        self._breaker = Breaker(failures=breaker_failures, monotonic=monotonic)
        self._pause = Pause(max_per_minute=sink.max_per_minute, call_secs=sink.timeout_secs, monotonic=monotonic)
        self._down_since = 0.0
        self._last_success_at: float | None = None
        self._last_error = ""
        self._stopping = False
        self._busy: set[int] = set()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start the first thread. More start when they are needed, up to the sink's `concurrency`."""
        with self._condition:
            self._spawn_if_useful()

    def stop(self) -> None:
        """Take nothing more from the queue. What is in it is held by the journal or by VOD."""
        with self._condition:
            self._stopping = True
            self._condition.notify_all()

    def join(self, timeout_secs: float) -> bool:
        """Wait until the running calls and the threads have ended, `timeout_secs` at most.

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

    def status(self) -> SinkStatus:
        """The present state of the sink."""
        with self._condition:
            now, wall = self._monotonic(), self._wall()
            paused_secs = self._pause.asked_until - now
            waits_secs = max(paused_secs, self._breaker.probe_at - now if self._breaker.open else 0.0, 0.0)
            is_held = self._breaker.open or paused_secs > 0
            return SinkStatus(
                name=self.name,
                down_since=self._down_since if self._breaker.open else None,
                paused_until=wall + paused_secs if paused_secs > 0 else None,
                next_try_at=wall + waits_secs if is_held else None,
                error=self._last_error if is_held else "",
                queued=len(self._queue) + len(self._delayed),
                queue_max_events=self._queue_max_events,
                last_success_at=self._last_success_at,
            )

    def room(self) -> int:
        """Number of stored events that may be submitted now: half of the queue is kept for events of new batches.

        While the breaker is open, it is 1 if a probe is due, else 0. While the sink is paused, it is 0.
        """
        with self._condition:
            limit = self._pause.room(sum(delivery.deadline is None for delivery in self._queue))
            if limit is not None and limit <= 0:
                return 0
            if self._breaker.open:
                return 1 if self._breaker.wants_probe() else 0
            room = max(self._queue_max_events // 2 - len(self._queue) - len(self._delayed), 0)
            return room if limit is None else min(room, limit)

    def submit(self, deliveries: Sequence[Delivery]) -> None:
        """Take deliveries that the caller has claimed. Each of them gets a result, maybe before this returns."""
        refused: dict[Reason, list[Delivery]] = {}
        taken: list[Delivery] = []
        skipped: list[Delivery] = []
        to_send = [delivery for delivery in deliveries if self._is_to_be_sent(delivery, skipped)]
        with self._condition:
            if self._pause.holds:
                self._drop_released()
            for delivery in to_send:
                reason = self._why_refused(delivery)
                if reason is None:
                    self._queue.append(delivery)
                    taken.append(delivery)
                else:
                    refused.setdefault(reason, []).append(delivery)
            if taken:
                self._in_flight.queued(taken)
                self._spawn_if_useful()
                self._condition.notify(-(-len(self._queue) // self.sink.batch_events))
        self._refuse(refused)
        if skipped:
            self._ledger.accept(self.name, [delivery.event.key for delivery in skipped], None)
            for delivery in skipped:
                delivery.is_entered = True
            self._in_flight.complete(skipped, SKIPPED)

    def _is_to_be_sent(self, delivery: Delivery, skipped: list[Delivery]) -> bool:
        """Let the sink examine an event before it takes a place in the queue.

        Args:
            delivery: If the sink raises an error, this method completes it.
            skipped: If the sink skips the event, this method appends the delivery.
        """
        try:
            self.sink.examine(delivery.event)
        except SkippedError:
            skipped.append(delivery)
        except Exception as error:  # noqa: BLE001 - unknown exceptions count as transient
            self._not_sendable(delivery, error)
        else:
            return True
        return False

    def _not_sendable(self, delivery: Delivery, error: Exception) -> None:
        delivery.attempts += 1
        self._log_failed_attempt(delivery, error)
        result = _failed(str(error) or repr(error), attempts=delivery.attempts)
        if isinstance(error, RejectedError):
            result = replace(result, outcome=Outcome.REJECTED, reason=Reason.REJECTED)
        self._in_flight.complete((delivery,), result)

    def _why_refused(self, delivery: Delivery) -> Reason | None:
        if self._stopping:
            return Reason.STOPPING
        if self._pause.outlasts(delivery.deadline, len(self._queue) + len(self._delayed)):
            return Reason.SINK_PAUSED
        if self._breaker.open and not self._may_probe(delivery):
            return Reason.SINK_DOWN
        if len(self._queue) + len(self._delayed) >= self._queue_max_events:
            return Reason.QUEUE_FULL
        return None

    def _may_probe(self, delivery: Delivery) -> bool:
        # While the breaker is open at most one delivery waits in the queue: the next probe.
        return not self._queue and self._breaker.wants_probe() and not self._breaker.was_probed_last(delivery.event.key)

    def _refuse(self, refused: Mapping[Reason, Sequence[Delivery]]) -> None:
        for reason, deliveries in refused.items():
            self._in_flight.complete(deliveries, self._not_attempted(reason))

    def _not_attempted(self, reason: Reason) -> SinkResult:
        retry_after_secs = None
        match reason:
            case Reason.SINK_DOWN:
                why = f"the sink has been down since {timestamp(self._down_since)}: {self._last_error}"
            case Reason.SINK_PAUSED:
                with self._condition:
                    free_at = self._pause.free_at(len(self._queue) + len(self._delayed))
                    retry_after_secs = max(free_at - self._monotonic(), 0.0)
                    why = self._pause.why(self._last_error, timestamp(self._wall() + retry_after_secs))
            case Reason.QUEUE_FULL:
                why = f"the sink is too slow: {self._queue_max_events} events wait in its queue (queue_max_events)"
            case _:
                why = "the daemon was stopping"
        return SinkResult(outcome=Outcome.NOT_ATTEMPTED, reason=reason, why=why, retry_after_secs=retry_after_secs)

    def _spawn_if_useful(self) -> None:
        idle = len(self._threads) - len(self._busy)
        missing = min(max(len(self._queue), 1) - idle, self.sink.concurrency - len(self._threads))
        for _ in range(missing):
            number = len(self._threads)
            thread = threading.Thread(target=self._run, name=f"sink-{self.name}-{number}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the system allows no more threads: the others go on, and the next event tries again
                return
            self._threads.append(thread)

    # --- a thread of the sink ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        taken: list[Delivery] = []
        while not self._stopping:
            try:
                self._step(taken)
            except Exception:
                with suppress(Exception):
                    self._telemetry.log.exception("worker.failed", sink=self.name)
            finally:
                self._give_back(taken)

    def _step(self, taken: list[Delivery]) -> None:
        """Wait until there is something to do, and do it.

        Args:
            taken: Filled with the deliveries before they leave the queue, so that the caller can complete those that
                are still running after an exception.
        """
        with self._condition:
            while (step := self._take(taken)) is None:
                if self._stopping:
                    return
                self._condition.wait(self._wait_secs())
        batch, refused = step
        try:
            self._refuse(refused)
        finally:
            if batch:
                self._attempt(batch)

    def _give_back(self, taken: list[Delivery]) -> None:
        """End a step, also after an exception: deliveries that it took and left running are completed as failed."""
        here = threading.get_ident()
        with self._condition:  # another thread may have taken by now what was queued again
            left = [it for it in taken if it.holder == here and it.state is State.RUNNING]
            self._busy.discard(here)
        taken.clear()
        why = "an unexpected error; see worker.failed in the log"
        for delivery in left:
            self._count_failure(delivery, why)
        if left:
            self._in_flight.complete(left, _failed(why, attempts=1))

    def _take(self, taken: list[Delivery]) -> tuple[list[Delivery], dict[Reason, list[Delivery]]] | None:
        """Take the events of one call, and those not attempted now, by reason; None: nothing to do, or stopping."""
        if self._stopping:
            return None
        self._requeue_due()
        batch, refused = self._choose()
        taken += batch
        for deliveries in refused.values():
            taken += deliveries
        if not taken:
            return None
        self._hold(taken)
        if refused:
            self._queue = deque(delivery for delivery in self._queue if delivery.state is State.QUEUED)
        else:
            for _ in taken:
                self._queue.popleft()
        started = [delivery for delivery in batch if delivery.state is State.RUNNING]
        if started and self._breaker.open:
            self._breaker.start_probe(started[0].event.key)
        if started:
            self._pause.begin()
        return started, refused

    def _choose(self) -> tuple[list[Delivery], dict[Reason, list[Delivery]]]:
        """Choose the events of one call from the queue's head, and those that are not attempted now, by reason."""
        if self._pause.is_asked:
            self._drop_released()
            queue = enumerate(self._queue)
            paused = [delivery for ahead, delivery in queue if self._pause.outlasts(delivery.deadline, ahead)]
            return [], {Reason.SINK_PAUSED: paused}
        if self._breaker.open:
            self._drop_released()
            first_refused = 1 if self._breaker.wants_probe() else 0
            batch = [] if self._pause.holds else list(islice(self._queue, first_refused))
            return batch, {Reason.SINK_DOWN: list(islice(self._queue, first_refused, None))}
        return [] if self._pause.holds else self._next_batch(), {}

    def _drop_released(self) -> None:
        """Drop what was released while it waited: it would keep the next probe out, or be counted as waiting."""
        self._queue = deque(delivery for delivery in self._queue if delivery.state is not State.DONE)

    def _hold(self, taken: Sequence[Delivery]) -> None:
        """Mark the deliveries as held by this thread."""
        here = threading.get_ident()
        self._busy.add(here)
        self._in_flight.start(taken)
        for delivery in taken:
            delivery.holder = here

    def _wait_secs(self) -> float | None:
        """Seconds until there is something to do even if nothing is submitted; None if there will be nothing."""
        now = self._monotonic()
        waits = [self._delayed[0][0] - now] if self._delayed else []
        if self._queue:  # its events wait for the end of a pause
            waits.append(self._pause.free_at() - now)
        return max(min(waits), 0.001) if waits else None

    def _requeue_due(self) -> None:
        now = self._monotonic()
        while self._delayed and self._delayed[0][0] <= now:
            self._queue.append(self._delayed[0][2])
            heapq.heappop(self._delayed)

    def _next_batch(self) -> list[Delivery]:
        batch: list[Delivery] = []
        for delivery in islice(self._queue, self.sink.batch_events):
            if batch and (batch[0].alone or delivery.alone):
                break
            batch.append(delivery)
        return batch

    def _attempt(self, batch: list[Delivery]) -> None:
        failures = self._call(batch)
        if failures and len(batch) > 1 and len(failures) == len(batch):
            for delivery in batch:
                delivery.alone = True
            if not all(isinstance(error, TransientError) for error in failures.values()):
                # One invalid event must not fail the others: each is tried alone, as far as the breaker permits.
                with self._condition:
                    self._queue.extendleft(reversed(batch))
                    self._queued_again(batch)
                return
        for index, error in failures.items():
            # One failed call is one failure. Distinct events are counted when each of them has been tried alone.
            self._not_accepted(batch[index], error, counts=len(failures) == len(batch) and index == 0)

    def _call(self, batch: list[Delivery]) -> Mapping[int, Exception]:
        """Call the sink once and record what it accepted; returns the errors of the others, by position."""
        timeout_secs = self.sink.timeout_secs
        self._liveness.begin(f"sink {self.name}", timeout_secs)
        failures: Mapping[int, Exception] = {}
        began_at = self._monotonic()
        try:
            self.sink.deliver([delivery.event for delivery in batch], timeout_secs)
        except PartialFailureError as error:
            # An error that names no event, or an event outside this call, is not usable: then none was accepted.
            is_usable = error.failures and all(0 <= index < len(batch) for index in error.failures)
            failures = error.failures if is_usable else dict.fromkeys(range(len(batch)), error)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - unknown exceptions count as transient
            cause = error if isinstance(error, Exception) else TransientError(f"the sink called sys.exit({error})")
            failures = dict.fromkeys(range(len(batch)), cause)
        finally:
            if self._pause.is_spaced:  # otherwise the lock is not needed
                with self._condition:
                    self._pause.end()
            self._liveness.end()
            self._telemetry.measure(Duration.SINK_DELIVERY, self._labels, self._monotonic() - began_at)
        accepted = [delivery for index, delivery in enumerate(batch) if index not in failures]
        if accepted:
            self._enter(accepted)
            with self._condition:
                closed = self._breaker.succeeded()
                self._last_success_at = self._wall()
            if closed:
                self._telemetry.reset()
                self._telemetry.log.info("breaker.closed", sink=self.name)
            self._telemetry.count(Count.SINK_ATTEMPTS, len(accepted), sink=self.name, result="accepted")
            self._in_flight.complete(accepted, DELIVERED)
        return failures

    def _enter(self, accepted: Sequence[Delivery]) -> None:
        """Enter in the ledger what the sink accepted, except what the retrier enters itself, many at once.

        If the sink has a position (a file), all is entered here, in the order of the file, together with the position.
        """
        position = None if self._recoverable is None else self._recoverable.position()
        entered = [delivery for delivery in accepted if delivery.on_complete is None or position is not None]
        if entered:
            self._ledger.accept(self.name, [delivery.event.key for delivery in entered], position)
            for delivery in entered:
                delivery.is_entered = True

    def _not_accepted(self, delivery: Delivery, error: Exception, *, counts: bool) -> None:
        delivery.attempts += 1
        delivery.error = error
        why = str(error) or repr(error)
        result_label = "rejected" if isinstance(error, RejectedError) else "failed"
        self._telemetry.count(Count.SINK_ATTEMPTS, sink=self.name, result=result_label)
        retry_after_secs = error.retry_after_secs if isinstance(error, TransientError) else None
        with self._condition:
            self._last_error = why
            was_open = self._breaker.open
            if retry_after_secs is not None:  # the receiver is overloaded: this concerns all events
                self._pause.ask(retry_after_secs)
        self._log_failed_attempt(delivery, error)
        if counts:
            self._count_failure(delivery, why)
        if isinstance(error, RejectedError) and not was_open:
            result = SinkResult(outcome=Outcome.REJECTED, reason=Reason.REJECTED, why=why, attempts=delivery.attempts)
            self._in_flight.complete((delivery,), result)
        elif not self._repeat_later(delivery):
            self._in_flight.complete(
                (delivery,), _failed(why, attempts=delivery.attempts, retry_after_secs=retry_after_secs)
            )

    def _count_failure(self, delivery: Delivery, why: str) -> None:
        with self._condition:
            opened = self._breaker.failed(delivery.event.key)
            if opened:
                self._down_since, self._last_error = self._wall(), why
        if opened:
            self._telemetry.log.error("breaker.opened", sink=self.name, error_message=why)

    def _log_failed_attempt(self, delivery: Delivery, error: Exception) -> None:
        fields = error.fields() if isinstance(error, VodpollerError) else {"error_message": repr(error)}
        self._telemetry.repeated(
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

    def _repeat_later(self, delivery: Delivery) -> bool:
        """Queue another attempt and return True, if it can begin before the deadline."""
        if delivery.deadline is None:
            return False
        with self._condition:
            due = max(self._monotonic() + self._RETRIES.secs(delivery.attempts), self._pause.asked_until)
            if self._breaker.open or self._stopping or due >= delivery.deadline:
                return False
            heapq.heappush(self._delayed, (due, next(self._sequence), delivery))
            self._queued_again((delivery,))
            self._condition.notify()
        return True

    def _queued_again(self, deliveries: Sequence[Delivery]) -> None:
        """Mark the deliveries as queued again: any thread may take them."""
        for delivery in deliveries:
            delivery.holder = None
        self._in_flight.queued(deliveries)


def _failed(why: str, *, attempts: int, retry_after_secs: float | None = None) -> SinkResult:
    return SinkResult(
        outcome=Outcome.FAILED,
        reason=Reason.SINK_FAILED,
        why=why,
        attempts=attempts,
        retry_after_secs=retry_after_secs,
    )
