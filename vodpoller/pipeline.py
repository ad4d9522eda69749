"""The steps of one batch: route, identify, deliver, settle, store, confirm, finish. Start reading the code here."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from vodpoller.batch import Batch, Confirms, Source
from vodpoller.delivery.in_flight import Claim, Delivery, DeliveryWait, InFlight, State, WaitEnd
from vodpoller.delivery.worker import Worker
from vodpoller.errors import JournalFullError, StorageError
from vodpoller.events.event import Event, Malformed, PulledEvent
from vodpoller.events.identity import has_own_id
from vodpoller.events.snapshots import event_fields, has_failed_snapshots, snapshots_of
from vodpoller.events.types import documented_or_other
from vodpoller.journal.contract import Journal, Known, Letter
from vodpoller.router import Router
from vodpoller.settlement import (
    ALREADY_DELIVERED,
    ALREADY_STORED,
    UNTRIED,
    ConfirmResult,
    Outcome,
    Reason,
    Settlement,
    SinkResult,
    Verdict,
    settle,
    settle_malformed,
    settle_unrouted,
)
from vodpoller.telemetry import NO_SINK, Count, Duration, Labels, Telemetry
from vodpoller.vod.confirm_queue import HANDLES_PER_CALL
from vodpoller.vod.confirmation import UNKNOWN, Confirmation

STORED_RETRY_SECS = 5.0
LEFT_SHARE = 0.1
_UNDECIDED: Final = Verdict.leave(Reason.OUT_OF_TIME)


@dataclass(slots=True, kw_only=True)
class _Item:
    """One event of a batch on its way through the pipeline."""

    handle: str
    event: Event
    malformed: Malformed | None = None
    verdict: Verdict = _UNDECIDED
    routes: Sequence[str] = ()
    wanted: Sequence[str] = ()
    results: dict[str, SinkResult] = field(default_factory=dict)
    letters: list[Letter] = field(default_factory=list)
    redelivered: bool = False
    confirmation: Confirmation | None = None

    @property
    def dead_letters(self) -> list[Letter]:
        """The dead letters that were stored for this event."""
        is_stored = self.verdict.settlement is Settlement.STORE
        return [letter for letter in self.letters if letter.dead] if is_stored else []

    @property
    def is_acknowledged(self) -> bool:
        """Whether VOD has forgotten it: confirmed, or probably so by a request whose answer was lost."""
        return self.confirmation is not None and self.confirmation.result.is_acknowledged

    @property
    def is_confirmed(self) -> bool:
        return self.confirmation is not None and self.confirmation.result is ConfirmResult.CONFIRMED


class _LeftEvents:
    """Measures the share of the quota that is used by events that are left and come again after each lease.

    Args:
        requests_per_sec: The quota of pulls.
        monotonic: The clock, in seconds.
    """

    _WINDOW_SECS = 60.0

    def __init__(self, requests_per_sec: float, monotonic: Callable[[], float]) -> None:
        self._quota_events = requests_per_sec * HANDLES_PER_CALL * self._WINDOW_SECS
        self._monotonic = monotonic
        self._since = monotonic()
        self._number = 0
        self._share = 0.0

    def share_of_quota(self) -> float:
        """Count one event and return the share, 0 to 1, in the last complete minute."""
        now = self._monotonic()
        if now - self._since >= self._WINDOW_SECS:
            self._share = self._number / self._quota_events * self._WINDOW_SECS / (now - self._since)
            self._since, self._number = now, 0
        self._number += 1
        return self._share


class Pipeline:
    """Takes batches through all steps, in any number of threads.

    Args:
        router: Decides which sinks get an event.
        workers: By the sink's name.
        in_flight: The table that all workers share.
        journal: Holds the ledger and the stored events.
        confirmer: Confirms handles.
        confirm_reserve_secs: Seconds at the end of a lease that are kept for confirming.
        requests_per_sec: The quota of pulls; used to warn if events that are left take too much of it.
        telemetry: Destination of log lines and counts.
        monotonic: The clock of leases, in seconds.
        wall: The clock of `last_confirm_at`, in seconds since 1970.

    Attributes:
        unconfirmed_events: Number of events that VOD delivers again: left, or not confirmed.
        last_confirm_at: Time of the last confirm that VOD acknowledged; 0 if there was none.
    """

    def __init__(
        self,
        *,
        router: Router,
        workers: Mapping[str, Worker],
        in_flight: InFlight,
        journal: Journal,
        confirmer: Confirms,
        confirm_reserve_secs: float,
        requests_per_sec: float,
        telemetry: Telemetry,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._router = router
        self._workers = workers
        self._in_flight = in_flight
        self._journal = journal
        self._confirmer = confirmer
        self._reserve_secs = confirm_reserve_secs
        self._telemetry = telemetry.scope()
        self._monotonic = monotonic
        self._wall = wall
        self._left = _LeftEvents(requests_per_sec, monotonic)
        self._counting = threading.Lock()
        self.unconfirmed_events = 0
        self.last_confirm_at = 0.0

    def process(self, batch: Batch, wait: DeliveryWait) -> int:
        """Take a batch through all steps. Each of its events gets its `event.settled` line, also if a step raises.

        Args:
            batch: What was pulled or received.
            wait: This thread's wait for the sinks, which other threads can interrupt.

        Returns:
            The number of its events that VOD has forgotten.
        """
        items: list[_Item] = []
        try:
            items += self._route(batch)
            self._identify(items, batch)
            self._deliver(items, batch, wait)
            self._settle(items, batch.source)
            self._store(items)
            self._keep_shared_handles(items)
            self._confirm(items, batch)
        finally:
            self._finish(items, batch)
        return sum(item.is_acknowledged for item in items)

    # --- route ------------------------------------------------------------------------------------------------------

    def _route(self, batch: Batch) -> Iterator[_Item]:
        for pulled in batch.events:
            yield self._routed(batch.source, pulled)
        for broken in batch.malformed:
            if broken.handle is not None:
                letter = Letter(event=broken.event, sink="", dead=True, reason=Reason.MALFORMED, error=broken.why)
                verdict = settle_malformed(on_failure=batch.source.on_failure)
                yield _Item(
                    handle=broken.handle, event=broken.event, malformed=broken, letters=[letter], verdict=verdict
                )
            else:
                self._log_malformed(batch, broken, broken.event)

    def _routed(self, source: Source, pulled: PulledEvent) -> _Item:
        item = _Item(handle=pulled.handle, event=pulled.event)
        routed = self._router.route(pulled.event)
        item.routes, item.wanted = routed.routes, routed.sinks
        for sink, error in routed.failed.items():
            item.results[sink] = SinkResult(outcome=Outcome.REJECTED, reason=Reason.REJECTED, why=str(error))
        if routed.is_unrouted:
            item.verdict = settle_unrouted(source.unrouted)
            if item.verdict.settlement is Settlement.STORE:
                why = f"no route takes event type {item.event.type or '(none)'} of source {source.name}"
                item.letters.append(Letter(event=item.event, sink="", dead=True, reason=Reason.NO_ROUTE, error=why))
            elif item.verdict.settlement is Settlement.LEAVE:
                self._log_left(source, item.event.type)
            else:
                self._warn_if_misspelt(source, item.event.type)
        return item

    def _warn_if_misspelt(self, source: Source, event_type: str) -> None:
        """Warn, once per type, if a route takes a similar type: a misspelt route drops events that are wanted."""
        similar = self._router.similar_routed(source.name, event_type)
        if similar is not None:
            self._telemetry.repeated(
                "warning",
                "config.warning",
                cause=f"similar {source.name} {event_type}",
                message=f"events of type {event_type} are confirmed and dropped, since no route takes them; a route"
                f" takes {similar!r}: is that a misspelling?",
                source=source.name,
                event_type=event_type,
            )

    def _log_left(self, source: Source, event_type: str) -> None:
        fields = {"source": source.name, "event_type": event_type}
        self._telemetry.repeated("warning", "event.left", cause=f"{source.name} {event_type}", **fields)
        share = self._left.share_of_quota()
        if share >= LEFT_SHARE:
            hint = "events that are left take this share of all pulls: route them, or set unrouted to another value"
            self._telemetry.repeated(
                "error", "event.left", cause="quota", quota_share=round(share, 2), hint=hint, **fields
            )

    def _log_malformed(self, batch: Batch, broken: Malformed, event: Event) -> None:
        self._telemetry.repeated(
            # An event without a handle cannot be confirmed, so it stays with VOD; maybe the answer was cut off.
            "warning" if broken.handle is None else "error",
            "event.malformed",
            cause=f"malformed {broken.event.key.hex()}",
            source=batch.source.name,
            event_type=event.type,
            key=event.key.hex(),
            error_message=broken.why,
            request_id=batch.request_id,
            has_handle=broken.handle is not None,
            excerpt=broken.event.body[:200].decode(errors="replace"),
        )

    # --- identify ---------------------------------------------------------------------------------------------------

    def _identify(self, items: Sequence[_Item], batch: Batch) -> None:
        """Give each event that has no id of its own the key of its occurrence, if any sink or the journal gets it."""
        without_id = [
            item
            for item in items
            if (item.wanted or item.results or item.letters) and not has_own_id(item.event.content)
        ]
        if without_id:
            try:
                keys = self._journal.identify([item.event.key for item in without_id], batch.pulled(self._monotonic()))
            except StorageError:  # the journal has logged it
                for item in without_id:
                    item.wanted, item.verdict = (), Verdict.leave(Reason.JOURNAL_FAILED)
                    item.results.clear()
            else:
                for item, key in zip(without_id, keys, strict=True):
                    item.event = replace(item.event, key=key)
                    item.letters = [replace(letter, event=item.event) for letter in item.letters]
        for item in items:
            if item.malformed is not None:
                self._log_malformed(batch, item.malformed, item.event)

    # --- deliver ----------------------------------------------------------------------------------------------------

    def _deliver(self, items: Sequence[_Item], batch: Batch, wait: DeliveryWait) -> None:
        """Deliver each event to its sinks, and wait for the results until the confirm reserve of the lease begins."""
        deadline = batch.lease.ends_at - self._reserve_secs
        wanted = [(item, sink) for item in items for sink in item.wanted]
        if not wanted:
            return
        if batch.is_untried:
            self._leave_untried(wanted)
            return
        deliveries = [Delivery(item.event, sink, deadline=deadline) for item, sink in wanted]
        with self._in_flight.claim(deliveries, wait) as claims:
            known = self._submit_unknown([claim.delivery for claim in claims if not claim.joined])
            ended = wait.wait(deadline - self._monotonic())
        for (item, sink), claim in zip(wanted, claims, strict=True):
            item.results[sink] = _result_of(claim, ended)
            item.redelivered |= (item.event.key, sink) in known or (claim.joined and claim.delivery not in deliveries)

    def _leave_untried(self, wanted: Sequence[tuple[_Item, str]]) -> None:
        """Attempt nothing: what the journal does not know of gets UNTRIED, so that it is stored."""
        try:
            known = self._journal.known((item.event.key, sink) for item, sink in wanted)
        except StorageError as error:
            for item, sink in wanted:
                item.results[sink] = _unknown(error)
            return
        for item, sink in wanted:
            found = known.get((item.event.key, sink))
            item.results[sink] = UNTRIED if found is None else _KNOWN_ALREADY[found]
            item.redelivered |= found is not None

    def _submit_unknown(self, fresh: Sequence[Delivery]) -> Collection[tuple[bytes, str]]:
        """Submit the deliveries that the journal does not know; complete the others with what the journal knows.

        Returns:
            The pairs that the journal knows.
        """
        try:
            known = self._journal.known((delivery.event.key, delivery.sink) for delivery in fresh)
        except StorageError as error:
            # Which of them were delivered before is unknown: the events stay with VOD, unless they can be stored.
            self._in_flight.complete(fresh, _unknown(error))
            return ()
        by_sink: dict[str, list[Delivery]] = {}
        for delivery in fresh:
            found = known.get((delivery.event.key, delivery.sink))
            if found is None:
                by_sink.setdefault(delivery.sink, []).append(delivery)
            else:
                self._in_flight.complete((delivery,), _KNOWN_ALREADY[found])
        for sink, deliveries in by_sink.items():
            self._workers[sink].submit(deliveries)
        return known.keys()

    # --- settle, store ----------------------------------------------------------------------------------------------

    def _settle(self, items: Iterable[_Item], source: Source) -> None:
        for item in items:
            if item.results:
                item.verdict = settle(item.results.values(), on_failure=source.on_failure)
                item.letters = [_letter(item.event, sink, it) for sink, it in item.results.items() if it.needs_storing]

    def _store(self, items: Sequence[_Item]) -> None:
        """Store the events that are to be confirmed although not every sink has accepted them."""
        to_store = [item for item in items if item.verdict.settlement is Settlement.STORE]
        if not any(item.letters for item in to_store):
            return
        try:
            self._journal.store([letter for item in to_store for letter in item.letters])
        except JournalFullError as error:  # the journal has logged it, and has stored the others
            for item in to_store:
                if item.event.key in error.refused:
                    item.verdict = Verdict.leave(Reason.JOURNAL_FULL)
        except StorageError:  # the journal has logged it
            for item in to_store:
                item.verdict = Verdict.leave(Reason.JOURNAL_FAILED)
        for item in to_store:
            for letter in item.dead_letters:
                self._log_dead(letter)

    def _log_dead(self, letter: Letter) -> None:
        self._telemetry.repeated(
            "error",
            "event.dead",
            cause=f"{letter.sink} {letter.reason} {letter.event.type} {letter.error}",
            sink=letter.sink,
            reason=letter.reason,
            error_message=letter.error,
            **event_fields(letter.event),
        )

    # --- confirm, finish ----------------------------------------------------------------------------------------------

    def _keep_shared_handles(self, items: Sequence[_Item]) -> None:
        """Confirm a handle only if all its events may be confirmed, since VOD then forgets all of them."""
        kept = {item.handle for item in items if not item.verdict.may_confirm}
        for item in items:
            if item.handle in kept and item.verdict.may_confirm:
                item.verdict = Verdict.leave(Reason.SHARED_HANDLE)

    def _confirm(self, items: Iterable[_Item], batch: Batch) -> None:
        safe = [item for item in items if item.verdict.may_confirm]
        if not safe:
            return
        keys: dict[str, list[bytes]] = {}
        for item in safe:
            keys.setdefault(item.handle, []).append(item.event.key)
        source = batch.source
        confirmations = self._confirmer.confirm(
            source.name,
            source.sub_app_id,
            list(keys),
            batch.lease,
            on_acknowledged=lambda handles: self._journal.confirmed([key for it in handles for key in keys[it]]),
        )
        for item in safe:
            item.confirmation = confirmations.get(item.handle, UNKNOWN)
        if any(item.is_confirmed for item in safe):
            self.last_confirm_at = self._wall()

    def _finish(self, items: Sequence[_Item], batch: Batch) -> None:
        """Write the events' lines and count the events; nothing else does so."""
        now = self._monotonic()
        with self._counting:
            self.unconfirmed_events += sum(not item.is_acknowledged for item in items)
        of_source = ("source", batch.source.name)
        self._telemetry.add(_numbers(items, of_source, is_over=now >= batch.lease.ends_at))
        self._telemetry.measure(Duration.EVENT_SETTLE, (of_source,), now - batch.received_at, len(items))
        of_batch = {
            "pull_request_id": batch.request_id,
            "duration_secs": round(now - batch.received_at, 4),
            "lease_left_secs": round(batch.lease.ends_at - now, 3),
        }
        lines = [_settled_fields(item, of_batch) for item in items]
        self._telemetry.settled(lines)
        self._telemetry.remember(self._wall(), lines)


def _numbers(items: Iterable[_Item], of_source: tuple[str, str], *, is_over: bool) -> Counter[tuple[Count, Labels]]:
    """What a batch adds to the counters.

    Args:
        items: Its events.
        of_source: The label.
        is_over: Whether the batch's lease is over.
    """
    numbers: Counter[tuple[Count, Labels]] = Counter()
    for item in items:
        verdict = item.verdict
        numbers[Count.EVENTS_RECEIVED, (("event_type", documented_or_other(item.event.type)), of_source)] += 1
        if is_over and verdict.may_confirm and not item.is_acknowledged:
            numbers[Count.LEASES_EXPIRED, (of_source,)] += 1
        if item.redelivered:
            numbers[Count.EVENTS_REDELIVERED, (of_source,)] += 1
        settled = (("reason", verdict.reason.value), ("settlement", verdict.settlement.value), of_source)
        numbers[Count.EVENTS_SETTLED, settled] += 1
        for sink, result in item.results.items():
            numbers[Count.SINK_DELIVERIES, (("outcome", _delivery_outcome(result, verdict)), ("sink", sink))] += 1
        for letter in item.dead_letters:
            numbers[Count.DEAD_LETTERS_CREATED, (("reason", letter.reason), ("sink", letter.sink or NO_SINK))] += 1
    return numbers


_KNOWN_ALREADY: Final[Mapping[Known, SinkResult]] = {
    Known.ACCEPTED: ALREADY_DELIVERED,
    Known.PENDING: ALREADY_STORED,
    Known.DEAD: ALREADY_STORED,
}


def _unknown(error: StorageError) -> SinkResult:
    return SinkResult(outcome=Outcome.NOT_ATTEMPTED, reason=Reason.JOURNAL_FAILED, why=str(error))


def _delivery_outcome(result: SinkResult, verdict: Verdict) -> str:
    """The label of a delivery, final for this arrival of the event."""
    if result.reason in (Reason.ALREADY_DELIVERED, Reason.ALREADY_STORED):
        return "known"
    if result.outcome is Outcome.DELIVERED:
        return "delivered"
    if verdict.settlement is not Settlement.STORE:
        return "left"
    return "rejected" if result.outcome is Outcome.REJECTED else "stored"


def _result_of(claim: Claim, ended: WaitEnd) -> SinkResult:
    """The result of a delivery; if it is not complete, the result follows from the reason why the wait ended."""
    delivery = claim.delivery
    if delivery.result is not None:
        return delivery.result
    if delivery.error is not None:
        why = str(delivery.error) or repr(delivery.error)
        return SinkResult(outcome=Outcome.FAILED, reason=Reason.SINK_FAILED, why=why, attempts=delivery.attempts)
    is_running = delivery.state is State.RUNNING
    place = "the sink had not answered" if is_running else "it waited in the sink's queue"
    match ended:
        case WaitEnd.NEEDED:
            why = f"{place} when this puller was needed for the next pull"
        case WaitEnd.STOPPING:
            why = f"{place} when the daemon's time to stop was over"
        case _:
            why = f"{place} when its lease neared its end"
    return SinkResult(
        outcome=Outcome.FAILED if is_running else Outcome.NOT_ATTEMPTED,
        reason=Reason.STOPPING if ended is WaitEnd.STOPPING else Reason.OUT_OF_TIME,
        why=why,
    )


def _letter(event: Event, sink: str, result: SinkResult) -> Letter:
    return Letter(
        event=event,
        sink=sink,
        dead=result.outcome is Outcome.REJECTED,
        reason=result.reason,
        error=result.why,
        attempts=result.attempts,
        due_in_secs=max(STORED_RETRY_SECS, result.retry_after_secs or 0.0),
    )


def _settled_fields(item: _Item, of_batch: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an event's `event.settled` line."""
    return {
        **event_fields(item.event),
        "routes": item.routes,
        "sinks": {sink: {"outcome": it.outcome.value, "reason": it.reason.value} for sink, it in item.results.items()},
        "settlement": item.verdict.settlement.value,
        "reason": item.verdict.reason.value,
        "confirmed": item.is_confirmed,
        **_confirm_fields(item),
        **of_batch,
        "redelivered": item.redelivered,
        **_failed_snapshots(item.event),
    }


def _confirm_fields(item: _Item) -> dict[str, str]:
    confirmation = item.confirmation or (UNKNOWN if item.verdict.may_confirm else None)
    if confirmation is None:
        return {}
    fields = {
        "confirm_result": str(confirmation.result),
        "confirm_error_code": confirmation.error_code,
        "confirm_request_id": confirmation.request_id,
    }
    return {name: value for name, value in fields.items() if value}


def _failed_snapshots(event: Event) -> dict[str, list[dict[str, int | str | None]]]:
    taken = snapshots_of(event) if has_failed_snapshots(event) else None
    if taken is None:
        return {}
    failed = [{"time_offset_ms": snapshot.time_offset_ms, "err_code": snapshot.err_code} for snapshot in taken.failed]
    return {"failed_snapshots": failed}
