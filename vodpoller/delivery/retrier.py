"""The retrier: delivers stored events again until a sink accepts or rejects them, or until they are given up.

It works in portions. One thread at a time claims what is due, as far as the workers have room, and writes the results,
which the sinks' threads hand back:

    the retrier's thread, run()                   the threads of the sinks (worker)
    --------------------------                     ---------------------------------
    submit_due(): claim a portion, submit it --->  call the sink
    write_results(): wait for a first result <---  hand back each delivery that has its result
      wait for further ones, for `GATHER_SECS`
      write all of them together
      only then: forget them, log them
    and so on, until nothing is under way

If a crash comes before a result is written, its event stays pending.
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
from vodpoller.journal.contract import ClaimedEvent, Journal, Known, NewDeadLetter
from vodpoller.settlement import Outcome, Reason, SinkResult
from vodpoller.telemetry import Count, Telemetry

RETRY_BACKOFF = Backoff(first_secs=10.0, max_secs=900.0)
BATCH_ROWS: Final = 256
GATHER_SECS: Final = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class _Claimed:
    """A row, and the monotonic time at which it was claimed, in seconds."""

    row: ClaimedEvent
    claimed_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ended:
    """The result of a claimed row; `age_secs` is its age when the result is written."""

    row: ClaimedEvent
    age_secs: float
    delivery: Delivery
    result: SinkResult

    @property
    def attempts(self) -> int:
        """Number of attempts that failed, since it was stored."""
        return self.row.attempts + self.delivery.attempts


class Retrier:
    """Hands due rows to the workers, which also deliver new events, and writes the results.

    Args:
        journal: Holds the rows.
        workers: By the sink's name.
        in_flight: The table that all workers share.
        give_up_after_secs: By the sink's name: the age at which a row becomes a dead letter.
        telemetry: Destination of log lines and counts.
        monotonic: The clock for the age of a claimed row, in seconds.
        gather_secs: Time for which the first result waits for others that are written together with it.

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
        self._run_lock = threading.Lock()
        self._condition = threading.Condition()
        self._under_way: dict[Delivery, _Claimed] = {}
        self._results: list[tuple[Delivery, SinkResult]] = []
        self._claims = True
        self._stopped = False
        self.delivered = 0

    def run(self, secs: float) -> bool:
        """Deliver what is due, portion after portion, and write the results.

        Args:
            secs: Time after which it returns although deliveries are under way.

        Returns:
            Whether deliveries are under way, so that it should be called again at once.
        """
        ends_at = time.monotonic() + secs
        with self._run_lock:
            self._submit_if_written()
            while self._goes_on() and (left_secs := ends_at - time.monotonic()) > 0:
                self.write_results(left_secs)
                self._submit_if_written()
            return self._goes_on()

    def _submit_if_written(self) -> None:
        # Otherwise a delivery would be known in memory only, and an event that cannot be made a dead letter would be
        # delivered again at once.
        if self._journal.is_writable:
            self.submit_due()

    def _goes_on(self) -> bool:
        return bool(self._under_way) and not self._stopped

    def stop_claiming(self) -> None:
        """Submit nothing from now on; deliveries that are under way go on."""
        self._claims = False

    def end(self) -> None:
        """Note that the workers have stopped, so that `run` waits for no more results."""
        self._claims = False
        with self._condition:
            self._stopped = True
            self._condition.notify_all()

    def stop(self) -> None:
        """Write the results that the stopped workers have handed back; all other claimed events stay pending."""
        self.end()
        with self._run_lock:
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
            # A row that was accepted or deleted by a command meanwhile is not submitted, so it is released at the end.
            to_submit = [it for it in deliveries if known.get((it.event.key, it.sink)) is Known.PENDING]
            worker.submit(to_submit)
        return len(to_submit)

    @contextmanager
    def _claimed(self, worker: Worker) -> Iterator[list[Delivery]]:
        """Claim what is due, in the journal and among the deliveries under way, for as long as the `with` lasts.

        At its end, also after an exception, what the worker has not taken is released in both. For what it has taken,
        the claim in the journal ends when the result is written.

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
        """Remove the deliveries that the worker has not taken; returns their rows."""
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
        # Many queries for one free place each would take longer than one for a portion. But a probe is one event.
        if not room or (room < min(waiting, BATCH_ROWS) and not worker.is_open):
            return ()
        try:
            return self._journal.claim_due(worker.name, room)
        except StorageError:  # the journal has logged it
            return ()

    def _known(self, deliveries: Sequence[Delivery]) -> Mapping[tuple[bytes, str], Known]:
        try:
            return self._journal.known((delivery.event.key, delivery.sink) for delivery in deliveries)
        except StorageError:  # then it is not known what is still to be delivered
            return {}

    # --- results ------------------------------------------------------------------------------------------------------

    def _hand_back(self, delivery: Delivery, result: SinkResult) -> None:
        """Take a delivery back with its result; called in a thread of the sink."""
        with self._condition:
            self._results.append((delivery, result))
            # If each result woke the retrier, the sinks' threads would have to wait for the interpreter's lock.
            if len(self._results) == 1 or self._is_complete():
                self._condition.notify_all()

    def _is_complete(self) -> bool:
        return self._stopped or len(self._results) >= len(self._under_way)

    @property
    def results(self) -> int:
        """Number of results that are not written yet."""
        return len(self._results)

    def write_results(self, within_secs: float) -> None:
        """Wait for a result, gather others for `gather_secs`, and write all of them.

        Args:
            within_secs: Time after which it returns without a result.
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
        """Enter in the ledger what is not there yet, which ends the claims: one transaction for each sink."""
        keys: dict[str, list[bytes]] = {}
        for delivery in delivered:
            if not delivery.is_entered:
                keys.setdefault(delivery.sink, []).append(delivery.event.key)
        for sink, of_sink in keys.items():
            self._journal.accept(sink, of_sink, None)
        self.delivered += len(delivered)

    def _write_down(self, portion: Sequence[_Ended]) -> None:
        """Write the results of rows that were not delivered, which ends their claims; log those that were."""
        dead: list[tuple[_Ended, Reason]] = []
        for it in portion:
            match it.result.outcome:
                case Outcome.DELIVERED:
                    pass  # it is entered
                case Outcome.REJECTED:
                    dead.append((it, Reason.REJECTED))
                case Outcome.FAILED if it.age_secs >= self._give_up_after_secs[it.row.sink]:
                    dead.append((it, Reason.GAVE_UP))
                case Outcome.FAILED:
                    wait_secs = max(RETRY_BACKOFF.secs(it.attempts), it.result.retry_after_secs or 0.0)
                    self._journal.reschedule(it.row, attempts=it.attempts, due_in_secs=wait_secs, error=it.result.why)
                case Outcome.NOT_ATTEMPTED:
                    # The breaker is open, the queue is full or the sink is paused. Other rows are tried first.
                    wait_secs = max(1.0, it.result.retry_after_secs or 0.0)
                    self._journal.reschedule(it.row, attempts=it.row.attempts, due_in_secs=wait_secs, error=None)
                case _:
                    assert_never(it.result.outcome)
        self._mark_dead(dead)
        delivered = [it for it in portion if it.result.outcome is Outcome.DELIVERED]
        self._telemetry.stored_delivered([_delivered_fields(it) for it in delivered])

    def _mark_dead(self, dead: Sequence[tuple[_Ended, Reason]]) -> None:
        if not dead:
            return
        try:
            self._journal.mark_dead(
                [
                    NewDeadLetter(claimed=it.row, attempts=it.attempts, reason=reason, error=it.result.why)
                    for it, reason in dead
                ]
            )
        except StorageError:  # the journal has logged it; the events stay pending, and this is tried again
            return
        for it, reason in dead:
            self._log_dead(it, reason)

    def _log_dead(self, it: _Ended, reason: Reason) -> None:
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
