"""Stored events on their way to sinks that could not take them: retried until accepted, rejected or given up."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import assert_never

from vodpoller.delivery import Backoff, Worker
from vodpoller.errors import StorageError
from vodpoller.events import event_fields
from vodpoller.in_flight import Delivery, InFlight
from vodpoller.journal import Journal, Known, Pending
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
        wall: The clock that stamped the rows, in seconds since 1970.

    Attributes:
        delivered: How many rows sinks accepted so far.
    """

    def __init__(
        self,
        *,
        journal: Journal,
        workers: Mapping[str, Worker],
        in_flight: InFlight,
        give_up_after_secs: Mapping[str, float],
        telemetry: Telemetry,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._journal = journal
        self._workers = workers
        self._in_flight = in_flight
        self._give_up_after_secs = give_up_after_secs
        self._telemetry = telemetry.scope()
        self._wall = wall
        self.delivered = 0

    def submit_due(self) -> int:
        """Submit what is due, as far as the workers have room for it; returns without waiting for them.

        Returns:
            How many were submitted.
        """
        self._journal.flush()  # what was written of the rows of the last call, so that they are not due any more
        try:
            has_letters = self._journal.has_letters
        except StorageError:
            return 0
        return sum(self._submit_due(worker) for worker in self._workers.values()) if has_letters else 0

    def _submit_due(self, worker: Worker) -> int:
        room = min(worker.room(), BATCH_ROWS)
        rows = self._journal.due(worker.name, room) if room else []
        if not rows:
            return 0
        with self._in_flight.claim([self._delivery(row) for row in rows], None) as claims:
            # What was accepted meanwhile, or deleted by a command, is not submitted, and so released at the end.
            fresh = [claim.delivery for claim in claims if not claim.joined]
            known = self._known(fresh)
            to_submit = [it for it in fresh if known.get((it.event.key, it.sink)) is Known.PENDING]
            self._journal.forget([row.row for row in rows if known.get((row.event.key, row.sink)) is Known.ACCEPTED])
            worker.submit(to_submit)
        return len(to_submit)

    def _known(self, deliveries: Sequence[Delivery]) -> Mapping[tuple[bytes, str], Known]:
        try:
            return self._journal.known((delivery.event.key, delivery.sink) for delivery in deliveries)
        except StorageError:  # then it cannot be told what is still to be delivered
            return {}

    def _delivery(self, row: Pending) -> Delivery:
        return Delivery(
            row.event,
            row.sink,
            deadline=None,
            on_complete=lambda delivery, result: self._completed(row, delivery, result),
        )

    def _completed(self, row: Pending, delivery: Delivery, result: SinkResult) -> None:
        match result.outcome:
            case Outcome.DELIVERED:
                self.delivered += 1
                self._telemetry.log.info(
                    "pending.delivered",
                    sink=row.sink,
                    attempts=row.attempts + delivery.attempts + 1,
                    age_secs=round(self._wall() - row.stored_at, 1),
                    **event_fields(row.event),
                )
            case Outcome.REJECTED:
                self._bury(row, delivery, Reason.REJECTED, result.why)
            case Outcome.FAILED:
                self._failed(row, delivery, result)
            case Outcome.NOT_ATTEMPTED:
                # The breaker is open, the queue full or the sink paused. Another row gets the next turn.
                wait_secs = max(1.0, result.retry_after_secs or 0.0)
                self._journal.reschedule(row.row, attempts=row.attempts, due_in_secs=wait_secs, error=None)
            case _:
                assert_never(result.outcome)

    def _failed(self, row: Pending, delivery: Delivery, result: SinkResult) -> None:
        if self._wall() - row.stored_at >= self._give_up_after_secs[row.sink]:
            self._bury(row, delivery, Reason.GAVE_UP, result.why)
            return
        attempts = row.attempts + delivery.attempts
        wait_secs = max(RETRY_BACKOFF.secs(attempts), result.retry_after_secs or 0.0)
        self._journal.reschedule(row.row, attempts=attempts, due_in_secs=wait_secs, error=result.why)

    def _bury(self, row: Pending, delivery: Delivery, reason: Reason, error: str) -> None:
        if not self._journal.bury(row.row, attempts=row.attempts + delivery.attempts, reason=reason, error=error):
            return  # it stays pending, and comes to this again
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
