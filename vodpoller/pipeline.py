"""The straight line of one batch: pull, parse, route, deliver, settle, confirm."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vodpoller.confirmer import HANDLES_A_CALL, Confirmer
from vodpoller.delivery import Delivery, InFlight, Latch, OnFailure, Outcome, Settlement, Worker, settle
from vodpoller.errors import StorageError, TransientError
from vodpoller.events import Event, Lease, Malformed, PulledEvent, event_fields, has_failed_snapshots, snapshots_of
from vodpoller.journal import Journal, Known, Letter
from vodpoller.logs import Logger, Repeats
from vodpoller.router import Routed, Router
from vodpoller.vod import Pull, VodClient

STORED_RETRY_SECS = 5.0
LEFT_SHARE = 0.1


class Source(Protocol):
    """What a cycle reads of a configured source; see the table of keys."""

    @property
    def name(self) -> str: ...  # noqa: D102 - as in the configuration
    @property
    def sub_app_id(self) -> int | None: ...  # noqa: D102 - as in the configuration
    @property
    def on_failure(self) -> OnFailure: ...  # noqa: D102 - as in the configuration
    @property
    def unrouted(self) -> str | None: ...  # noqa: D102 - as in the configuration


@dataclass(slots=True, kw_only=True)
class _Item:
    """One pulled event on its way through the cycle."""

    handle: str
    event: Event
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    deliveries: dict[str, Delivery] = field(default_factory=dict)
    letters: list[Letter] = field(default_factory=list)
    settlement: Settlement | None = None
    redelivered: bool = False
    confirmed: bool = False


class _LeftEvents:
    """How much of the quota goes to events that are left and come again each lease.

    Args:
        requests_per_sec: The quota of pulls.
        monotonic: The clock, in seconds.
    """

    _WINDOW_SECS = 60.0

    def __init__(self, requests_per_sec: float, monotonic: Callable[[], float]) -> None:
        self._quota_events = requests_per_sec * HANDLES_A_CALL * self._WINDOW_SECS
        self._monotonic = monotonic
        self._since = monotonic()
        self._number = 0
        self._share = 0.0

    def share_of_quota(self) -> float:
        """Count one event; returns the share, 0 to 1, in the last whole minute."""
        now = self._monotonic()
        if now - self._since >= self._WINDOW_SECS:
            self._share = self._number / self._quota_events * self._WINDOW_SECS / (now - self._since)
            self._since, self._number = now, 0
        self._number += 1
        return self._share


class Pipeline:
    """Runs cycles, from any number of lanes.

    Args:
        vod: The client.
        router: Says which sinks get an event.
        workers: By the sink's name.
        in_flight: The table that all workers share.
        journal: Holds the ledger, pending and dead.
        confirmer: Confirms handles.
        confirm_reserve_secs: The end of a lease that is kept for confirming.
        requests_per_sec: The quota of pulls, of which events that are left again and again take their part.
        log: Where to.
        monotonic: The clock, in seconds.
        wall: The clock of `last_pull_at` and `last_confirm_at`, in seconds since 1970.

    Attributes:
        settled_events: How many pulled events were settled so far.
        unsettled_events: How many of them VOD brings again: left, or not confirmed.
        last_pull_at: When VOD last answered a pull; 0 for never.
        last_confirm_at: When VOD last confirmed something; 0 for never.
    """

    def __init__(
        self,
        *,
        vod: VodClient,
        router: Router,
        workers: Mapping[str, Worker],
        in_flight: InFlight,
        journal: Journal,
        confirmer: Confirmer,
        confirm_reserve_secs: float,
        requests_per_sec: float,
        log: Logger,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._vod = vod
        self._router = router
        self._workers = workers
        self._in_flight = in_flight
        self._journal = journal
        self._confirmer = confirmer
        self._reserve_secs = confirm_reserve_secs
        self._log = log
        self._repeats = Repeats(log, monotonic=monotonic)
        self._monotonic = monotonic
        self._wall = wall
        self._left = _LeftEvents(requests_per_sec, monotonic)
        self._counting = threading.Lock()
        self.settled_events = 0
        self.unsettled_events = 0
        self.last_pull_at = 0.0
        self.last_confirm_at = 0.0

    def cycle(self, source: Source, *, on_answer: Callable[[Pull], None], latch: Latch) -> None:
        """Take one batch from VOD and see it through.

        Args:
            source: Where to pull.
            on_answer: Told of the answer before its events are delivered: the moment to let another lane pull.
            latch: What this cycle waits on while sinks are at work, so that others can hurry it.

        Raises:
            TransientError: The pull failed; there is no batch.
            OperatorError: The pull failed until a person acts; there is no batch.
        """
        pull = self._vod.pull(source.name, source.sub_app_id)
        answered_at = self._monotonic()
        self.last_pull_at = self._wall()
        on_answer(pull)
        if not (pull.events or pull.malformed):
            return
        items = [self._route(source, pulled) for pulled in pull.events]
        items += [item for broken in pull.malformed if (item := self._condemn(source, broken, pull.request_id))]
        self._deliver(items, pull.lease, latch)
        self._settle(source, items)
        self._confirm(source, items, pull.lease)
        self._report(items, pull.lease, answered_at)

    # --- route ------------------------------------------------------------------------------------------------------

    def _route(self, source: Source, pulled: PulledEvent) -> _Item:
        item = _Item(handle=pulled.handle, event=pulled.event)
        routed = self._router.route(pulled.event)
        if routed.is_unrouted:
            self._dispose_unrouted(source, item)
        else:
            self._plan(item, routed)
        return item

    def _plan(self, item: _Item, routed: Routed) -> None:
        for sink in routed.sinks:
            item.outcomes[sink] = Outcome.UNSETTLED
        for sink, error in routed.failed.items():
            item.outcomes[sink] = Outcome.REJECTED
            item.letters.append(Letter(event=item.event, sink=sink, dead=True, reason="rejected", error=str(error)))

    def _dispose_unrouted(self, source: Source, item: _Item) -> None:
        match source.unrouted:
            case "confirm":
                item.settlement = Settlement.CONFIRM
            case "leave":
                item.settlement = Settlement.LEAVE
                self._say_left(source, item.event.type)
            case _:
                item.settlement = Settlement.STORE
                error = f"no route takes event type {item.event.type or '(none)'} of source {source.name}"
                item.letters.append(Letter(event=item.event, sink="", dead=True, reason="unrouted", error=error))

    def _say_left(self, source: Source, event_type: str) -> None:
        fields = {"source": source.name, "event_type": event_type}
        self._repeats.say("warning", "event.left", cause=f"{source.name} {event_type}", **fields)
        share = self._left.share_of_quota()
        if share >= LEFT_SHARE:
            hint = "events that are left take this share of all pulls: route them, or set unrouted to another value"
            self._repeats.say("error", "event.left", cause="quota", quota_share=round(share, 2), hint=hint, **fields)

    def _condemn(self, source: Source, broken: Malformed, request_id: str) -> _Item | None:
        key = broken.event.key.hex()
        self._repeats.say(
            # What has no handle stays with VOD: it was cut off on its way, or nobody can do anything about it.
            "warning" if broken.handle is None else "error",
            "event.malformed",
            cause=f"malformed {key}",
            source=source.name,
            event_type=broken.event.type,
            key=key,
            error_message=broken.why,
            request_id=request_id,
            has_handle=broken.handle is not None,
            excerpt=broken.event.body[:200].decode(errors="replace"),
        )
        if broken.handle is None:
            return None
        letter = Letter(event=broken.event, sink="", dead=True, reason="malformed", error=broken.why)
        settlement = Settlement.LEAVE if source.on_failure == "leave" else Settlement.STORE
        return _Item(handle=broken.handle, event=broken.event, letters=[letter], settlement=settlement)

    # --- deliver ----------------------------------------------------------------------------------------------------

    def _deliver(self, items: Sequence[_Item], lease: Lease, latch: Latch) -> None:
        """Get each event to each of its sinks, as far as they take it before the reserve of the lease begins."""
        deadline = lease.ends_at - self._reserve_secs
        wanted = [
            Delivery(item.event, sink, deadline=deadline)
            for item in items
            for sink, outcome in item.outcomes.items()
            if outcome is Outcome.UNSETTLED
        ]
        if not wanted:
            return
        standing, fresh = self._in_flight.claim(wanted, latch)
        remaining = iter(standing)
        for item in items:
            item.deliveries = {
                sink: next(remaining) for sink, outcome in item.outcomes.items() if outcome is Outcome.UNSETTLED
            }
        is_over = False
        try:
            known = self._submit_unknown(fresh)
            is_over = latch.wait(deadline - self._monotonic())
        finally:
            if not is_over:  # an error nobody foresaw as well must not leave pairs on their way for ever
                self._in_flight.abandon(standing, latch)
        joined = set(map(id, standing)) - set(map(id, fresh))
        for item in items:
            for sink, delivery in item.deliveries.items():
                item.outcomes[sink] = delivery.outcome or Outcome.UNSETTLED
                item.redelivered |= (item.event.key, sink) in known or id(delivery) in joined

    def _submit_unknown(self, fresh: Sequence[Delivery]) -> Mapping[tuple[bytes, str], Known]:
        """Hand over what no sink has and the journal does not hold; the rest is settled by what the journal knows."""
        try:
            known = self._journal.known((delivery.event.key, delivery.sink) for delivery in fresh)
        except StorageError as error:
            for delivery in fresh:  # nobody can tell what was delivered already: the events stay with VOD
                self._in_flight.settle(delivery, Outcome.UNSETTLED, error)
            return {}
        by_sink: dict[str, list[Delivery]] = {}
        for delivery in fresh:
            match known.get((delivery.event.key, delivery.sink)):
                case None:
                    by_sink.setdefault(delivery.sink, []).append(delivery)
                case Known.ACCEPTED:
                    self._in_flight.settle(delivery, Outcome.DELIVERED)
                case Known.PENDING:
                    delivery.held = True
                    self._in_flight.settle(delivery, Outcome.UNSETTLED)
                case Known.DEAD:
                    delivery.held = True
                    self._in_flight.settle(delivery, Outcome.REJECTED)
        for sink, deliveries in by_sink.items():
            self._workers[sink].submit(deliveries)
        return known

    # --- settle -----------------------------------------------------------------------------------------------------

    def _settle(self, source: Source, items: Sequence[_Item]) -> None:
        """Decide, and write down what VOD is to forget although not every sink has it."""
        for item in items:
            if item.settlement is None:
                item.settlement = settle(item.outcomes.values(), on_failure=source.on_failure)
        to_store = [item for item in items if item.settlement is Settlement.STORE]
        if not to_store:
            return
        try:
            self._journal.store([letter for item in to_store for letter in self._letters(item)])
        except StorageError as error:
            for item in to_store:
                item.settlement = Settlement.LEAVE
            self._repeats.say("error", "journal.failed", cause=str(error), **error.fields())
        else:
            for item in to_store:
                for letter in item.letters:
                    if letter.dead:
                        self._say_dead(letter)

    def _letters(self, item: _Item) -> Iterable[Letter]:
        for sink, delivery in item.deliveries.items():
            outcome = item.outcomes[sink]
            if outcome is Outcome.DELIVERED or delivery.held:
                continue
            delivery.stored = True  # before the row is written: a late success deletes it
            if delivery.outcome is Outcome.DELIVERED:  # so late that it did not know of the row
                continue
            dead = outcome is Outcome.REJECTED
            asked_secs = delivery.error.retry_after_secs if isinstance(delivery.error, TransientError) else None
            item.letters.append(
                Letter(
                    event=item.event,
                    sink=sink,
                    dead=dead,
                    reason=outcome.name.lower(),
                    error=str(delivery.error or ""),
                    attempts=delivery.attempts,
                    due_in_secs=max(STORED_RETRY_SECS, asked_secs or 0.0),
                )
            )
        return item.letters

    def _say_dead(self, letter: Letter) -> None:
        self._repeats.say(
            "error",
            "event.dead",
            cause=f"{letter.sink} {letter.reason} {letter.event.type} {letter.error}",
            sink=letter.sink,
            reason=letter.reason,
            error_message=letter.error,
            **event_fields(letter.event),
        )

    # --- confirm ----------------------------------------------------------------------------------------------------

    def _confirm(self, source: Source, items: Sequence[_Item], lease: Lease) -> None:
        safe = [item for item in items if item.settlement is not Settlement.LEAVE]
        if not safe:
            return
        handles = list(dict.fromkeys(item.handle for item in safe))
        confirmed = self._confirmer.confirm(source.name, source.sub_app_id, handles, lease)
        for item in safe:
            item.confirmed = item.handle in confirmed
        if confirmed:
            self.last_confirm_at = self._wall()
            self._journal.confirmed([item.event.key for item in safe if item.confirmed])

    def _report(self, items: Sequence[_Item], lease: Lease, answered_at: float) -> None:
        now = self._monotonic()
        duration_secs = round(now - answered_at, 4)
        lease_left_secs = round(lease.ends_at - now, 3)
        settled, unsettled = len(items), sum(not item.confirmed for item in items)
        with self._counting:
            self.settled_events += settled
            self.unsettled_events += unsettled
        for item in items:
            fields = {"failed_snapshots": _failed_snapshots(item.event)} if has_failed_snapshots(item.event) else {}
            self._log.info(
                "event.settled",
                **event_fields(item.event),
                sinks={sink: outcome.name.lower() for sink, outcome in item.outcomes.items()},
                settlement=item.settlement.name.lower() if item.settlement else None,
                confirmed=item.confirmed,
                duration_secs=duration_secs,
                lease_left_secs=lease_left_secs,
                redelivered=item.redelivered,
                **fields,
            )


def _failed_snapshots(event: Event) -> list[dict[str, int | str | None]]:
    taken = snapshots_of(event)
    return [
        {"time_offset_ms": snapshot.time_offset_ms, "err_code": snapshot.err_code}
        for snapshot in (taken.failed if taken else ())
    ]
