"""Stored events on their way to sinks that could not take them: retried until accepted, rejected or given up."""

import time
from collections.abc import Callable, Mapping

from vodpoller.delivery import Backoff, Delivery, InFlight, Outcome, Worker
from vodpoller.errors import StorageError, TransientError
from vodpoller.events import event_fields
from vodpoller.journal import Journal, Known, Pending
from vodpoller.logs import Logger, Repeats

RETRY_BACKOFF = Backoff(first_secs=10.0, most_secs=900.0)
BATCH_ROWS = 256


class Retrier:
    """Hands due rows to the workers that serve fresh events too, and writes down what came of them.

    Args:
        journal: Holds the rows.
        workers: By the sink's name.
        in_flight: The table that all workers share.
        give_up_after_secs: By the sink's name: the age at which a row becomes a dead letter.
        log: Where to.
        wall: The clock that stamped the rows, in seconds since 1970.

    Attributes:
        delivered: How many rows sinks accepted so far.
        failed: How many attempts failed.
    """

    def __init__(
        self,
        *,
        journal: Journal,
        workers: Mapping[str, Worker],
        in_flight: InFlight,
        give_up_after_secs: Mapping[str, float],
        log: Logger,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._journal = journal
        self._workers = workers
        self._in_flight = in_flight
        self._give_up_after_secs = give_up_after_secs
        self._log = log
        self._repeats = Repeats(log)
        self._wall = wall
        self.delivered = 0
        self.failed = 0

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
        _, fresh = self._in_flight.claim([self._delivery(row) for row in rows], None)
        try:
            known = self._journal.known((delivery.event.key, delivery.sink) for delivery in fresh)
        except StorageError:
            known = {}
        submitted = []
        for delivery in fresh:
            if known.get((delivery.event.key, delivery.sink)) is Known.PENDING:
                submitted.append(delivery)
            else:  # accepted meanwhile, deleted by a command, or unknown because the journal cannot be read
                self._in_flight.settle(delivery, Outcome.UNSETTLED)
        self._journal.forget(
            [row.row for row in rows if known.get((row.event.key, row.sink)) is Known.ACCEPTED],
        )
        worker.submit(submitted)
        return len(submitted)

    def _delivery(self, row: Pending) -> Delivery:
        return Delivery(
            row.event, row.sink, deadline=None, held=True, on_settled=lambda delivery: self._settled(row, delivery)
        )

    def _settled(self, row: Pending, delivery: Delivery) -> None:
        match delivery.outcome:
            case Outcome.DELIVERED:
                self.delivered += 1
                self._log.info(
                    "pending.delivered",
                    sink=row.sink,
                    attempts=row.attempts + delivery.attempts + 1,
                    age_secs=round(self._wall() - row.stored_at, 1),
                    **event_fields(row.event),
                )
            case Outcome.REJECTED:
                self.failed += 1
                self._bury(row, delivery, "rejected")
            case Outcome.ERRORED:
                self.failed += 1
                self._errored(row, delivery)
            case _:
                # Not tried: the breaker is open or the queue full. Another row gets the next turn.
                self._journal.reschedule(row.row, attempts=row.attempts, due_in_secs=1.0, error=None)

    def _errored(self, row: Pending, delivery: Delivery) -> None:
        if self._wall() - row.stored_at >= self._give_up_after_secs[row.sink]:
            self._bury(row, delivery, "gave_up")
            return
        attempts = row.attempts + delivery.attempts
        wait_secs = RETRY_BACKOFF.secs(attempts)
        if isinstance(delivery.error, TransientError) and delivery.error.retry_after_secs is not None:
            wait_secs = max(wait_secs, delivery.error.retry_after_secs)
        self._journal.reschedule(row.row, attempts=attempts, due_in_secs=wait_secs, error=str(delivery.error))

    def _bury(self, row: Pending, delivery: Delivery, reason: str) -> None:
        error = str(delivery.error)
        self._journal.bury(row.row, attempts=row.attempts + delivery.attempts, reason=reason, error=error)
        self._repeats.say(
            "error",
            "event.dead",
            cause=f"{row.sink} {reason} {error}",
            sink=row.sink,
            reason=reason,
            error_message=error,
            **event_fields(row.event),
        )
