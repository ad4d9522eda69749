"""Stored events on their way to sinks that could not take them: retried until accepted, rejected or given up.

They go in portions. One thread at a time claims what is due, as far as the workers have room, and writes down what came
of it, which the sinks' threads hand back:

    the retrier's thread, run()                   the threads of the sinks (worker)
    --------------------------                     ---------------------------------
    submit_due(): claim a portion, submit it --->  call the sink, one after the other
    write_results(): wait for a first result <---  hand back each that has one
      let others come, for `GATHER_SECS`
      write down all there are, together
      only then: forget them, log them
    and so on, until nothing is under way

A result that a crash keeps from being written leaves its event as it was: pending.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, assert_never

from vodpoller.backoff import Backoff
from vodpoller.delivery.in_flight import Delivery, InFlight, State
from vodpoller.delivery.worker import Worker
from vodpoller.errors import StorageError
from vodpoller.events.snapshots import event_fields
from vodpoller.journal.contract import Burial, ClaimedEvent, Journal, Known
from vodpoller.settlement import Outcome, Reason, SinkResult
from vodpoller.telemetry import Count, Telemetry

RETRY_BACKOFF = Backoff(first_secs=10.0, max_secs=900.0)
BATCH_ROWS: Final = 256
GATHER_SECS: Final = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class _Claimed:
    """A row and when it was claimed, by the monotonic clock, in seconds."""

    row: ClaimedEvent
    claimed_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ended:
    """What came of a claimed row; its age is that at which it is written down."""

    row: ClaimedEvent
    age_secs: float
    delivery: Delivery
    result: SinkResult

    @property
    def attempts(self) -> int:
        """Number of attempts that failed, since it was stored."""
        return self.row.attempts + self.delivery.attempts


class Retrier:
    """Hands due rows to the workers that serve fresh events too, and writes down what came of them.

    Args:
        journal: Holds the rows.
        workers: By the sink's name.
        in_flight: The table that all workers share.
        give_up_after_secs: By the sink's name: the age at which a row becomes a dead letter.
        telemetry: Destination of log lines and counts.
        monotonic: The clock by which a row ages once it is claimed, in seconds.
        gather_secs: How long a first result waits for others that are written with it.

    Attributes:
        delivered: Number of rows that sinks accepted so far.
    """

    def __init__(
        self,
        *,
        journal: Journal,
        workers: Mapping[str, Worker],
        in_flight: InFlight,
        give_up_after_secs: Mapping[str, float],
        telemetry: Telemetry,
        monotonic: Callable[[], float] = time.monotonic,
        gather_secs: float = GATHER_SECS,
    ) -> None:
        self._journal = journal
        self._workers = workers
        self._in_flight = in_flight
        self._give_up_after_secs = give_up_after_secs
        self._telemetry = telemetry.scope()
        self._monotonic = monotonic
        self._gather_secs = gather_secs
        self._lap = threading.Lock()
        self._condition = threading.Condition()
        self._under_way: dict[Delivery, _Claimed] = {}
        self._results: list[tuple[Delivery, SinkResult]] = []
        self._claims = True
        self._stopped = False
        self.delivered = 0

    def run(self, secs: float) -> bool:
        """Deliver what is due, portion after portion, and write down what comes of it.

        Args:
            secs: When to return although some are under way.

        Returns:
            Whether some are, so that it should be called again at once.
        """
        ends_at = time.monotonic() + secs
        with self._lap:
            self._submit_if_written()
            while self._goes_on() and (left_secs := ends_at - time.monotonic()) > 0:
                self.write_results(left_secs)
                self._submit_if_written()
            return self._goes_on()

    def _submit_if_written(self) -> None:
        # Else what is delivered would be known in memory only, and what cannot be buried be delivered again at once.
        if self._journal.is_writable:
            self.submit_due()

    def _goes_on(self) -> bool:
        return bool(self._under_way) and not self._stopped

    def stop_claiming(self) -> None:
        """Submit nothing any more; what is under way goes on."""
        self._claims = False

    def end(self) -> None:
        """The workers have stopped: `run` waits for nothing more of theirs."""
        self._claims = False
        with self._condition:
            self._stopped = True
            self._condition.notify_all()

    def stop(self) -> None:
        """Write down what the workers have handed back, which have stopped; what they have not is pending."""
        self.end()
        with self._lap:
            self.write_results(0)

    # --- claiming -----------------------------------------------------------------------------------------------------

    def submit_due(self) -> int:
        """Submit what is due, as far as the workers have room for it; returns without waiting for them.

        Returns:
            The number of rows that were submitted.
        """
        return sum(self._submit_due(worker) for worker in self._workers.values() if self._claims)

    def _submit_due(self, worker: Worker) -> int:
        with self._claimed(worker) as deliveries:
            known = self._known(deliveries)
            # What was accepted meanwhile, or deleted by a command, is not submitted, and so released at the end.
            to_submit = [it for it in deliveries if known.get((it.event.key, it.sink)) is Known.PENDING]
            worker.submit(to_submit)
        return len(to_submit)

    @contextmanager
    def _claimed(self, worker: Worker) -> Iterator[list[Delivery]]:
        """Claim what is due, in the journal and among the deliveries under way, for as long as the `with` lasts.

        At its end, whatever ended it, what the worker has not taken is released in both. A claim in the journal on
        what it has taken ends when its result is written down.

        Yields:
            The deliveries that are not under way already.
        """
        not_taken = rows = self._due(worker)
        try:
            now = self._monotonic()
            claimed = {self._delivery(row): _Claimed(row=row, claimed_at=now) for row in rows}
            with self._in_flight.claim(claimed, None) as claims:
                try:
                    with self._condition:
                        self._under_way |= claimed
                    yield [claim.delivery for claim in claims if not claim.joined]
                finally:
                    not_taken = self._take_back(claimed)
        finally:
            self._journal.release(not_taken)

    def _take_back(self, claimed: Mapping[Delivery, _Claimed]) -> list[ClaimedEvent]:
        """The rows of those that the worker has not taken."""
        not_taken = [delivery for delivery in claimed if delivery.state is State.CLAIMED]
        with self._condition:
            for delivery in not_taken:
                self._under_way.pop(delivery, None)
        return [claimed[delivery].row for delivery in not_taken]

    def _delivery(self, row: ClaimedEvent) -> Delivery:
        return Delivery(row.event, row.sink, deadline=None, on_complete=self._hand_back)

    def _due(self, worker: Worker) -> Sequence[ClaimedEvent]:
        room = min(worker.room(), BATCH_ROWS)
        with self._condition:
            waiting = sum(it.sink == worker.name and it.state is State.QUEUED for it in self._under_way)
        # A query for each place that becomes free would cost more than a portion. A probe is one event, at its time.
        if not room or (room < min(waiting, BATCH_ROWS) and not worker.is_open):
            return ()
        try:
            return self._journal.claim_due(worker.name, room)
        except StorageError:  # the journal has said so
            return ()

    def _known(self, deliveries: Sequence[Delivery]) -> Mapping[tuple[bytes, str], Known]:
        try:
            return self._journal.known((delivery.event.key, delivery.sink) for delivery in deliveries)
        except StorageError:  # then it cannot be told what is still to be delivered
            return {}

    # --- results ------------------------------------------------------------------------------------------------------

    def _hand_back(self, delivery: Delivery, result: SinkResult) -> None:
        """In a thread of the sink: what came of it is known."""
        with self._condition:
            self._results.append((delivery, result))
            # To wake the retrier for each would cost the sinks' threads the interpreter's lock.
            if len(self._results) == 1 or self._is_complete():
                self._condition.notify_all()

    def _is_complete(self) -> bool:
        return self._stopped or len(self._results) >= len(self._under_way)

    @property
    def results(self) -> int:
        """Number of results that are not written down yet."""
        return len(self._results)

    def write_results(self, within_secs: float) -> None:
        """Wait for a result, gather what else comes soon, and write all of it down.

        Args:
            within_secs: When to return if there is none.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._results or self._stopped, within_secs)
            if self._results:
                self._condition.wait_for(self._is_complete, self._gather_secs)
            results, self._results = self._results, []
            claimed = [self._under_way.pop(delivery) for delivery, _ in results]
        if not results:
            return
        try:
            self._enter([delivery for delivery, result in results if result.outcome is Outcome.DELIVERED])
            now = self._monotonic()
            self._write_down(
                [
                    _Ended(row=it.row, age_secs=it.row.age_secs + now - it.claimed_at, delivery=delivery, result=result)
                    for it, (delivery, result) in zip(claimed, results, strict=True)
                ]
            )
        except BaseException:
            self._journal.release(it.row for it in claimed)
            raise
        finally:
            self._in_flight.forget([delivery for delivery, _ in results])

    def _enter(self, delivered: Sequence[Delivery]) -> None:
        """Enter in the ledger what is not there yet; it ends the claims. One transaction for a sink."""
        keys: dict[str, list[bytes]] = {}
        for delivery in delivered:
            if not delivery.is_entered:
                keys.setdefault(delivery.sink, []).append(delivery.event.key)
        for sink, of_sink in keys.items():
            self._journal.accept(sink, of_sink, None)
        self.delivered += len(delivered)

    def _write_down(self, portion: Sequence[_Ended]) -> None:
        """What else came of claimed rows, which ends their claims, and a line for each that was delivered."""
        burials: list[tuple[_Ended, Reason]] = []
        for it in portion:
            match it.result.outcome:
                case Outcome.DELIVERED:
                    pass  # it is entered
                case Outcome.REJECTED:
                    burials.append((it, Reason.REJECTED))
                case Outcome.FAILED if it.age_secs >= self._give_up_after_secs[it.row.sink]:
                    burials.append((it, Reason.GAVE_UP))
                case Outcome.FAILED:
                    wait_secs = max(RETRY_BACKOFF.secs(it.attempts), it.result.retry_after_secs or 0.0)
                    self._journal.reschedule(it.row, attempts=it.attempts, due_in_secs=wait_secs, error=it.result.why)
                case Outcome.NOT_ATTEMPTED:
                    # The breaker is open, the queue full or the sink paused. Another row gets the next turn.
                    wait_secs = max(1.0, it.result.retry_after_secs or 0.0)
                    self._journal.reschedule(it.row, attempts=it.row.attempts, due_in_secs=wait_secs, error=None)
                case _:
                    assert_never(it.result.outcome)
        self._bury(burials)
        delivered = [it for it in portion if it.result.outcome is Outcome.DELIVERED]
        self._telemetry.delivered_at_last([_delivered_fields(it) for it in delivered])

    def _bury(self, burials: Sequence[tuple[_Ended, Reason]]) -> None:
        if not burials:
            return
        try:
            self._journal.bury(
                [
                    Burial(claimed=it.row, attempts=it.attempts, reason=reason, error=it.result.why)
                    for it, reason in burials
                ]
            )
        except StorageError:  # the journal has said so; they stay pending, and come to this again
            return
        for it, reason in burials:
            self._say_dead(it, reason)

    def _say_dead(self, it: _Ended, reason: Reason) -> None:
        self._telemetry.count(Count.DEAD_LETTERS_CREATED, sink=it.row.sink, reason=reason.value)
        self._telemetry.repeated(
            "error",
            "event.dead",
            cause=f"{it.row.sink} {reason} {it.result.why}",
            sink=it.row.sink,
            reason=reason,
            error_message=it.result.why,
            **event_fields(it.row.event),
        )


def _delivered_fields(it: _Ended) -> dict[str, Any]:
    return {
        "sink": it.row.sink,
        "reason": it.result.reason,
        "attempts": it.attempts + 1,
        "age_secs": round(it.age_secs, 1),
        **event_fields(it.row.event),
    }
