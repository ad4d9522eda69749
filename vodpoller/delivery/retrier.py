"""Stored events on their way to sinks that could not take them: retried until accepted, rejected or given up."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import assert_never

from vodpoller.backoff import Backoff
from vodpoller.delivery.in_flight import Delivery, InFlight, State
from vodpoller.delivery.worker import Worker
from vodpoller.errors import StorageError
from vodpoller.events.snapshots import event_fields
from vodpoller.journal.contract import ClaimedEvent, Journal, Known
from vodpoller.settlement import Outcome, Reason, SinkResult
from vodpoller.telemetry import Count, Telemetry

RETRY_BACKOFF = Backoff(first_secs=10.0, most_secs=900.0)
BATCH_ROWS = 256


class Retrier:
    """Hands due rows to the workers that serve fresh events too, and writes down what came of them.

    Args:
        journal: Holds the rows.
        workers: By the sink's name.
        in_flight: The table that all workers share.
        give_up_after_secs: By the sink's name: the age at which a row becomes a dead letter.
        telemetry: Destination of log lines and counts.
        monotonic: The clock by which a row ages once it is claimed, in seconds.

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
    ) -> None:
        self._journal = journal
        self._workers = workers
        self._in_flight = in_flight
        self._give_up_after_secs = give_up_after_secs
        self._telemetry = telemetry.scope()
        self._monotonic = monotonic
        self.delivered = 0

    def submit_due(self) -> int:
        """Submit what is due, as far as the workers have room for it; returns without waiting for them.

        Returns:
            The number of rows that were submitted.
        """
        return sum(self._submit_due(worker) for worker in self._workers.values())

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
        what it has taken ends with the delivery.

        Yields:
            The deliveries that are not under way already.
        """
        not_taken = rows = self._due(worker)
        try:
            claimed_at = self._monotonic()
            deliveries = [self._delivery(row, claimed_at) for row in rows]
            with self._in_flight.claim(deliveries, None) as claims:
                try:
                    yield [claim.delivery for claim in claims if not claim.joined]
                finally:
                    pairs = zip(rows, deliveries, strict=True)
                    not_taken = [row for row, delivery in pairs if delivery.state is State.CLAIMED]
        finally:
            self._journal.release(not_taken)

    def _due(self, worker: Worker) -> Sequence[ClaimedEvent]:
        room = min(worker.room(), BATCH_ROWS)
        try:
            return self._journal.claim_due(worker.name, room) if room else ()
        except StorageError:  # the journal has said so
            return ()

    def _known(self, deliveries: Sequence[Delivery]) -> Mapping[tuple[bytes, str], Known]:
        try:
            return self._journal.known((delivery.event.key, delivery.sink) for delivery in deliveries)
        except StorageError:  # then it cannot be told what is still to be delivered
            return {}

    def _delivery(self, row: ClaimedEvent, claimed_at: float) -> Delivery:
        return Delivery(
            row.event,
            row.sink,
            deadline=None,
            on_complete=lambda delivery, result: self._completed(row, claimed_at, delivery, result),
        )

    def _completed(self, row: ClaimedEvent, claimed_at: float, delivery: Delivery, result: SinkResult) -> None:
        try:
            age_secs = row.age_secs + self._monotonic() - claimed_at
            self._write_down(row, age_secs, delivery, result)
        except BaseException:
            self._journal.release([row])
            raise

    def _write_down(self, row: ClaimedEvent, age_secs: float, delivery: Delivery, result: SinkResult) -> None:
        """What came of a claimed row; each way ends the claim: that of an accepted one has ended when it was."""
        match result.outcome:
            case Outcome.DELIVERED:
                self.delivered += 1
                self._telemetry.log.info(
                    "pending.delivered",
                    sink=row.sink,
                    attempts=row.attempts + delivery.attempts + 1,
                    age_secs=round(age_secs, 1),
                    **event_fields(row.event),
                )
            case Outcome.REJECTED:
                self._bury(row, delivery, Reason.REJECTED, result.why)
            case Outcome.FAILED:
                self._failed(row, age_secs, delivery, result)
            case Outcome.NOT_ATTEMPTED:
                # The breaker is open, the queue full or the sink paused. Another row gets the next turn.
                wait_secs = max(1.0, result.retry_after_secs or 0.0)
                self._journal.reschedule(row, attempts=row.attempts, due_in_secs=wait_secs, error=None)
            case _:
                assert_never(result.outcome)

    def _failed(self, row: ClaimedEvent, age_secs: float, delivery: Delivery, result: SinkResult) -> None:
        if age_secs >= self._give_up_after_secs[row.sink]:
            self._bury(row, delivery, Reason.GAVE_UP, result.why)
            return
        attempts = row.attempts + delivery.attempts
        wait_secs = max(RETRY_BACKOFF.secs(attempts), result.retry_after_secs or 0.0)
        self._journal.reschedule(row, attempts=attempts, due_in_secs=wait_secs, error=result.why)

    def _bury(self, row: ClaimedEvent, delivery: Delivery, reason: Reason, error: str) -> None:
        try:
            self._journal.bury(row, attempts=row.attempts + delivery.attempts, reason=reason, error=error)
        except StorageError:  # the journal has said so; it stays pending, and comes to this again
            return
        self._telemetry.count(Count.DEAD_LETTERS_CREATED, sink=row.sink, reason=reason.value)
        self._telemetry.repeated(
            "error",
            "event.dead",
            cause=f"{row.sink} {reason} {error}",
            sink=row.sink,
            reason=reason,
            error_message=error,
            **event_fields(row.event),
        )
