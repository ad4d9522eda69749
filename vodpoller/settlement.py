"""How an event ends: its outcome at each sink, its settlement, the result of its confirm, and the reasons.

All functions are pure. `Reason` and `ConfirmResult` are closed vocabularies, the same in log lines, stored rows,
`vodpoller status` and the README.
"""

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Self, assert_never

OnFailure = Literal["store", "leave"]
Unrouted = Literal["dead_letter", "confirm", "leave"]


class Outcome(StrEnum):
    """The outcome of one event at one sink."""

    DELIVERED = "delivered"
    REJECTED = "rejected"
    FAILED = "failed"
    NOT_ATTEMPTED = "not_attempted"


class Settlement(StrEnum):
    """What is done with one event's handle.

    CONFIRM: every sink has the event. STORE: the event is stored for the sinks that lack it, then the handle is
    confirmed. LEAVE: the handle is not confirmed, and VOD delivers the event again.
    """

    CONFIRM = "confirm"
    STORE = "store"
    LEAVE = "leave"


class Reason(StrEnum):
    """The reason of an outcome or of a settlement.

    The order matters: the reason of an event is the first in this order among the reasons of its sinks. The last two
    are reasons of stored events only.
    """

    JOURNAL_FULL = "journal_full"
    JOURNAL_FAILED = "journal_failed"
    SHARED_HANDLE = "shared_handle"
    LEFT_BY_CONFIGURATION = "left_by_configuration"
    MALFORMED = "malformed"
    NO_ROUTE = "no_route"
    REJECTED = "rejected"
    SINK_FAILED = "sink_failed"
    SINK_DOWN = "sink_down"
    SINK_PAUSED = "sink_paused"
    QUEUE_FULL = "queue_full"
    OUT_OF_TIME = "out_of_time"
    STOPPING = "stopping"
    ALREADY_STORED = "already_stored"
    SKIPPED = "skipped"
    DELIVERED = "delivered"
    ALREADY_DELIVERED = "already_delivered"
    GAVE_UP = "gave_up"
    SINK_REMOVED = "sink_removed"


_RANK = {reason: rank for rank, reason in enumerate(Reason)}


class ConfirmResult(StrEnum):
    """The result of the confirm of one handle.

    CONFIRMED: VOD answered OK. REFUSED: VOD refused the handle. REFUSED_AFTER_LOST: VOD refused it after a request
    whose answer was lost, which probably confirmed it. NO_ANSWER: no answer came until the lease ended. THROTTLED: the
    quota left no room for a request until the lease ended. LEASE_ENDED: the lease ended before a request could be sent.
    NOT_ALLOWED: VOD forbids the call until a person acts. STOPPING: the daemon's time to stop was over.
    """

    CONFIRMED = "confirmed"
    REFUSED = "refused"
    REFUSED_AFTER_LOST = "refused_after_lost"
    NO_ANSWER = "no_answer"
    THROTTLED = "throttled"
    LEASE_ENDED = "lease_ended"
    NOT_ALLOWED = "not_allowed"
    STOPPING = "stopping"

    @property
    def is_acknowledged(self) -> bool:
        """Whether VOD has forgotten the event, or probably so."""
        return self in (ConfirmResult.CONFIRMED, ConfirmResult.REFUSED_AFTER_LOST)


class CallbackResult(StrEnum):
    """The result of one request at a source that receives callbacks.

    ACCEPTED: answered with 200, after its sinks were tried. STORED_UNTRIED: answered with 200, stored without trying
    the sinks. UNANSWERED: the event is left, or its connection was closed before the answer. BAD_SIGNATURE: not signed
    with the source's key. NOT_ALLOWED: not from its networks. NOT_AN_EVENT: not a request of the form that VOD sends.
    """

    ACCEPTED = "accepted"
    STORED_UNTRIED = "stored_untried"
    UNANSWERED = "unanswered"
    BAD_SIGNATURE = "bad_signature"
    NOT_ALLOWED = "not_allowed"
    NOT_AN_EVENT = "not_an_event"


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkResult:
    """The result of one event at one sink, as far as it is known when the event is settled.

    Args:
        outcome: The outcome.
        reason: Its reason.
        why: An explanation for a person; empty if none is needed.
        attempts: Number of attempts that failed.
        retry_after_secs: An earlier attempt makes no sense; None if no such time is known.
    """

    outcome: Outcome
    reason: Reason
    why: str = ""
    attempts: int = 0
    retry_after_secs: float | None = None

    @property
    def needs_storing(self) -> bool:
        """Whether neither the sink nor the journal has the event."""
        return self.outcome is not Outcome.DELIVERED and self.reason is not Reason.ALREADY_STORED


DELIVERED = SinkResult(outcome=Outcome.DELIVERED, reason=Reason.DELIVERED)
SKIPPED = SinkResult(outcome=Outcome.DELIVERED, reason=Reason.SKIPPED)
ALREADY_DELIVERED = SinkResult(outcome=Outcome.DELIVERED, reason=Reason.ALREADY_DELIVERED)
ALREADY_STORED = SinkResult(outcome=Outcome.NOT_ATTEMPTED, reason=Reason.ALREADY_STORED)
UNTRIED = SinkResult(
    outcome=Outcome.NOT_ATTEMPTED,
    reason=Reason.QUEUE_FULL,
    why="the source already had max_events_in_flight events in flight: it was stored without trying the sink",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is done with an event's handle, and why."""

    settlement: Settlement
    reason: Reason

    @classmethod
    def leave(cls, reason: Reason) -> Self:
        """The verdict to leave the event with VOD."""
        return cls(settlement=Settlement.LEAVE, reason=reason)

    @property
    def may_confirm(self) -> bool:
        """Whether VOD may forget the event."""
        return self.settlement is not Settlement.LEAVE


def settle(results: Collection[SinkResult], *, on_failure: OnFailure) -> Verdict:
    """Decide what is done with a routed event, by its results at all its sinks.

    Args:
        results: One for each sink that the event was routed to.
        on_failure: The source's setting for an event that not every sink accepted.

    Raises:
        ValueError: `results` is empty: no sink has the event, so it must not be settled.
    """
    if not results:
        raise ValueError("an event without any outcome cannot be settled")
    reasons = [result.reason for result in results]
    if all(result.outcome is Outcome.DELIVERED for result in results):
        return Verdict(settlement=Settlement.CONFIRM, reason=_worst(reasons))
    if on_failure == "leave" and any(result.needs_storing for result in results):
        return Verdict.leave(_worst([*reasons, Reason.LEFT_BY_CONFIGURATION]))
    return Verdict(settlement=Settlement.STORE, reason=_worst(reasons))


def settle_unrouted(unrouted: Unrouted | None) -> Verdict:
    """Decide what is done with an event that no route takes.

    Args:
        unrouted: The source's setting for such events. None if the configuration excludes them; one that comes
            nevertheless is kept as a dead letter.
    """
    match unrouted:
        case "confirm":
            settlement = Settlement.CONFIRM
        case "leave":
            settlement = Settlement.LEAVE
        case "dead_letter" | None:
            settlement = Settlement.STORE
        case _:
            assert_never(unrouted)
    return Verdict(settlement=settlement, reason=Reason.NO_ROUTE)


def settle_malformed(*, on_failure: OnFailure) -> Verdict:
    """Decide what is done with an item that cannot be read as an event."""
    if on_failure == "leave":
        return Verdict.leave(Reason.LEFT_BY_CONFIGURATION)
    return Verdict(settlement=Settlement.STORE, reason=Reason.MALFORMED)


def _worst(reasons: Collection[Reason]) -> Reason:
    return min(reasons, key=_RANK.__getitem__)
