"""What becomes of an event: its outcome at each sink, what is done with its handle, what came of the confirm, and why.

All of it is pure: values in, values out. `Reason` and `ConfirmResult` are closed vocabularies, the same in log lines,
stored rows, `vodpoller status` and the README.
"""

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Self, assert_never

OnFailure = Literal["store", "leave"]
Unrouted = Literal["dead_letter", "confirm", "leave"]


class Outcome(StrEnum):
    """What came of one event at one sink."""

    DELIVERED = "delivered"
    REJECTED = "rejected"
    FAILED = "failed"
    NOT_ATTEMPTED = "not_attempted"


class Settlement(StrEnum):
    """What is done with one event's handle.

    CONFIRM: every sink has the event. STORE: what sinks lack is written down, then the handle is confirmed. LEAVE: the
    handle is not confirmed, and VOD delivers the event again.
    """

    CONFIRM = "confirm"
    STORE = "store"
    LEAVE = "leave"


class Reason(StrEnum):
    """Why an event, or an event at a sink, came to what it came to.

    The order counts: the reason of an event is the first in this order among the reasons of its sinks. The last two
    are of stored events only.
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
    """What came of the confirm of one handle.

    CONFIRMED: VOD answered OK. REFUSED: VOD does not take the handle. REFUSED_AFTER_LOST: it does not, after a request
    whose answer was lost, which probably confirmed it. NO_ANSWER: no answer came until the lease ended. THROTTLED: the
    quota left no room until then. LEASE_ENDED: the lease was over before anything could be sent. NOT_ALLOWED: VOD
    forbids the call until a person acts. STOPPING: the daemon's time to stop was over.
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
    """What came of one request at a source that receives callbacks.

    ACCEPTED: answered with 200, after its sinks were tried. STORED_UNTRIED: the same, stored without trying them.
    UNANSWERED: the event is left, or its connection was gone before the answer. BAD_SIGNATURE: not signed with the
    source's key. NOT_ALLOWED: not from its networks. NOT_AN_EVENT: nothing that VOD sends.
    """

    ACCEPTED = "accepted"
    STORED_UNTRIED = "stored_untried"
    UNANSWERED = "unanswered"
    BAD_SIGNATURE = "bad_signature"
    NOT_ALLOWED = "not_allowed"
    NOT_AN_EVENT = "not_an_event"


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkResult:
    """What came of one event at one sink, as far as is known when the event is settled.

    Args:
        outcome: What came of it.
        reason: Why.
        why: For a person, in words; empty if there is nothing to explain.
        attempts: Number of attempts that failed.
        retry_after_secs: No attempt makes sense sooner; None if nothing is known about that.
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
    why="max_events_in_flight of the source were on their way: it was stored without trying the sink",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is done with an event's handle, and why."""

    settlement: Settlement
    reason: Reason

    @classmethod
    def leave(cls, reason: Reason) -> Self:
        """VOD keeps the event."""
        return cls(settlement=Settlement.LEAVE, reason=reason)

    @property
    def may_confirm(self) -> bool:
        """Whether VOD may forget the event."""
        return self.settlement is not Settlement.LEAVE


def settle(results: Collection[SinkResult], *, on_failure: OnFailure) -> Verdict:
    """What to do with a routed event, given what came of it at each of its sinks.

    Args:
        results: One for each sink that the event was routed to.
        on_failure: What the source wants for an event that not every sink accepted.

    Raises:
        ValueError: `results` is empty: no sink has the event, so nothing may settle it.
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
    """What to do with an event that no route takes.

    Args:
        unrouted: What the source wants for such events; None if the configuration made sure that there are none, so
            that one that comes all the same is kept for a person.
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
    """What to do with what cannot be read as an event."""
    if on_failure == "leave":
        return Verdict.leave(Reason.LEFT_BY_CONFIGURATION)
    return Verdict(settlement=Settlement.STORE, reason=Reason.MALFORMED)


def _worst(reasons: Collection[Reason]) -> Reason:
    return min(reasons, key=_RANK.__getitem__)
