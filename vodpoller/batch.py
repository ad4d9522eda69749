"""A batch: what one pull or callback brought, with its lease. The pipeline processes it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, Self

from vodpoller.events.event import Lease, Malformed, PulledEvent
from vodpoller.journal.contract import Pulled
from vodpoller.settlement import OnFailure, Unrouted
from vodpoller.vod.answers import Pull
from vodpoller.vod.confirmation import Confirmation

TRIES_SECS: Final = 60.0  # VOD tries a callback three times, for 5 s each, as far as is known


class Source(Protocol):
    """What processing a batch needs of a configured source; see the table of keys."""

    @property
    def name(self) -> str:
        """As in the configuration."""

    @property
    def sub_app_id(self) -> int | None:
        """As in the configuration."""

    @property
    def on_failure(self) -> OnFailure:
        """As in the configuration."""

    @property
    def unrouted(self) -> Unrouted | None:
        """As in the configuration."""


class Confirms(Protocol):
    """Confirms events: `vod.confirmer.Confirmer` for pulls, `callback.receiver.Answers` for callbacks."""

    def confirm(
        self,
        source: str,
        sub_app_id: int | None,
        handles: Sequence[str],
        lease: Lease,
        /,
        *,
        on_acknowledged: Callable[[Sequence[str]], None],
    ) -> Mapping[str, Confirmation]:
        """Confirm handles and return the result of each.

        Calls `on_acknowledged` with the handles whose events VOD does not deliver again.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one pull or callback brought, on its way to being confirmed.

    Args:
        source: The source that it came from.
        events: 0 to 16 events.
        malformed: Items in the place of an event that cannot be read.
        lease: The time in which the handles can be confirmed.
        received_at: Monotonic time at which the answer was there, in seconds.
        request_id: Tencent's RequestId of the pull, empty if the answer has none.
        began_at: Of a callback, the monotonic time at which VOD's try began, in seconds; None for a pull.
        is_untried: No sink is tried: its events are stored at once.
    """

    source: Source
    events: Sequence[PulledEvent]
    malformed: Sequence[Malformed]
    lease: Lease
    received_at: float
    request_id: str
    began_at: float | None = None
    is_untried: bool = False

    @classmethod
    def of(cls, source: Source, pull: Pull, received_at: float) -> Self:
        """The batch of a pull's answer."""
        return cls(
            source=source,
            events=pull.events,
            malformed=pull.malformed,
            lease=pull.lease,
            received_at=received_at,
            request_id=pull.request_id,
        )

    def pulled(self, now: float) -> Pulled:
        """The times of its request and its answer, in the form that the journal needs.

        Args:
            now: Monotonic time, in seconds.
        """
        return Pulled(
            source=self.source.name,
            sent_ago_secs=now - (self.lease.starts_at if self.began_at is None else self.began_at),
            answered_ago_secs=now - self.received_at,
            lease_secs=self.lease.secs,
            tries_secs=None if self.began_at is None else TRIES_SECS,
        )
