"""The queue behind the API: leases, handles, redelivery."""

import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush
from math import isnan, nan
from random import Random
from typing import Any, Final, TypedDict

from vodpoller.errors import VodpollerError
from vodpoller.simulator.bodies import EventGenerator, with_members

_LATENCIES_KEPT: Final = 20_000


class StaleHandlesError(VodpollerError):
    """A confirm named handles whose lease is over, that are confirmed already, or that never existed.

    Args:
        handles: These handles.
    """

    def __init__(self, handles: Sequence[str]) -> None:
        super().__init__(f"{len(handles)} handles are stale or unknown")
        self.handles = tuple(handles)


class ForgottenHandlesError(VodpollerError):
    """A confirm named handles that the simulator refuses (`forget_confirms`), and no stale ones.

    Args:
        handles: These handles.
    """

    def __init__(self, handles: Sequence[str]) -> None:
        super().__init__(f"{len(handles)} handles are refused")
        self.handles = tuple(handles)


class LedgerRow(TypedDict):
    """The state of one event.

    `times_delivered` counts pulls and pushes. `confirmed` is also true if a push was answered. `stranded` means that
    the event was pulled, its lease has ended, and it has not been pulled again. `lost` means that no push was answered,
    and no push will follow. `born` is the time when it was added to the queue. Times are Unix times in seconds. `body`
    is None if it was not requested, or not kept.
    """

    number: int
    times_delivered: int
    confirmed: bool
    leased: bool
    stranded: bool
    lost: bool
    born: float
    confirmed_at: float | None
    body: str | None


class EventQueue:
    """The queue behind the API: leases, handles, redelivery. Not thread-safe; it uses no network and never waits.

    At each instant, every event is in exactly one of these states: confirmed, leased, pushed, visible or lost.

    Args:
        visibility_secs: Duration of a lease.
        generator: Makes the bodies of generated events when they are needed.
        random: Source of the handles.
        forget_confirms: Number of handles that are refused until their lease is over: the first ones to be confirmed
            among those of events under their first lease.
        keep_bodies: Whether the bodies of confirmed events are kept for the ledger.
        monotonic: The clock, in seconds.
        wall_offset_secs: Unix time minus the time of the clock.
    """

    def __init__(
        self,
        *,
        visibility_secs: float,
        generator: EventGenerator,
        random: Random,
        forget_confirms: int = 0,
        keep_bodies: bool = False,
        monotonic: Callable[[], float] = time.monotonic,
        wall_offset_secs: float = 0.0,
    ) -> None:
        self._visibility_secs = visibility_secs
        self._generator = generator
        self._random = random
        self._refusals_left = forget_confirms
        self._keep_bodies = keep_bodies
        self._monotonic = monotonic
        self._wall_offset_secs = wall_offset_secs
        # One entry per event, by its number. Arrays, since benchmarks need a million events in little memory.
        self._born = array("d")
        self._confirmed_at = array("d")
        self._deliveries = array("I")
        self._generated = bytearray()
        self._bodies: dict[int, bytes] = {}
        self._next_new = 0
        self._returned: list[int] = []
        self._leased: dict[str, int] = {}
        self._leases: deque[tuple[float, list[str]]] = deque()
        self._refused: set[str] = set()  # a part of the leased handles
        self._pushed: set[int] = set()
        self._lost: set[int] = set()
        self._pull_latencies: deque[float] = deque(maxlen=_LATENCIES_KEPT)
        self._confirm_latencies: deque[float] = deque(maxlen=_LATENCIES_KEPT)
        self.confirmed = 0
        self.redeliveries = 0
        self.forgotten = 0

    @property
    def fed(self) -> int:
        """Number of events that were ever added."""
        return len(self._born)

    @property
    def leased(self) -> int:
        """Number of events that are leased, as of the last `expire`, or being pushed."""
        return len(self._leased) + len(self._pushed)

    @property
    def visible(self) -> int:
        """Number of events that can be pulled, as of the last `expire`."""
        return len(self._returned) + self.fed - self._next_new

    @property
    def next_expiry(self) -> float | None:
        """Time of the clock at which the next lease ends; None if nothing is leased."""
        return self._leases[0][0] if self._leases else None

    def feed(self, bodies: Iterable[bytes]) -> int:
        """Add events to the queue.

        Args:
            bodies: Callback bodies, one per event; they are not parsed.

        Returns:
            Their number.
        """
        before = self.fed
        for number, body in enumerate(bodies, before):
            self._add(generated=False)
            self._bodies[number] = body
        return self.fed - before

    def generate(self, count: int) -> None:
        """Add a number of generated events."""
        for _ in range(count):
            self._add(generated=True)

    def _add(self, *, generated: bool) -> None:
        self._born.append(self._monotonic())
        self._confirmed_at.append(nan)
        self._deliveries.append(0)
        self._generated.append(generated)

    def take(self, limit: int) -> list[bytes]:
        """Lease events, the oldest first.

        Args:
            limit: Maximum number of events.

        Returns:
            Elements for `EventSet`, each with its new handle.
        """
        self.expire()
        now = self._monotonic()
        elements: list[bytes] = []
        handles: list[str] = []
        while len(elements) < limit and (number := self._pop()) is not None:
            handle = format(self._random.getrandbits(128), "032x")
            handles.append(handle)
            self._leased[handle] = number
            elements.append(with_members(self.body(number), b'"EventHandle":"%b"' % handle.encode()))
            if not self._deliveries[number]:
                self._pull_latencies.append(now - self._born[number])
            self.count_delivery(number)
        if handles:
            self._leases.append((now + self._visibility_secs, handles))
        return elements

    def _pop(self) -> int | None:
        # Every event that was pulled before is older than those that were never pulled.
        if self._returned:
            return heappop(self._returned)
        if self._next_new < self.fed:
            self._next_new += 1
            return self._next_new - 1
        return None

    def take_to_push(self) -> int | None:
        """Take the oldest visible event, which then counts as pushed until `mark_answered` or `mark_lost`.

        Returns:
            The number of the event; None if none is visible.
        """
        self.expire()
        number = self._pop()
        if number is not None:
            self._pushed.add(number)
        return number

    def count_delivery(self, number: int) -> None:
        """Count a push or pull of the event."""
        self.redeliveries += self._deliveries[number] > 0
        self._deliveries[number] += 1

    def mark_answered(self, number: int) -> None:
        """A push of the event was answered: remove it from the queue."""
        self._pushed.remove(number)
        self._remove(number)

    def mark_lost(self, number: int) -> None:
        """No push of the event was answered: it is lost."""
        self._pushed.remove(number)
        self._lost.add(number)

    def body(self, number: int) -> bytes:
        """The body of an event that is in the queue, or whose body is kept."""
        if self._generated[number]:
            return self._generator.body(number, self._born[number] + self._wall_offset_secs)
        return self._bodies[number]

    def confirm(self, handles: Sequence[str], *, atomic: bool) -> None:
        """Confirm events: remove them from the queue.

        Args:
            handles: Handles of their last pull. The second of two equal handles is stale.
            atomic: Whether nothing is confirmed if one handle is stale or refused.

        Raises:
            StaleHandlesError: Some handles are stale.
            ForgottenHandlesError: Some handles are refused because of `forget_confirms`.
        """
        self.expire()
        leased = [handle for handle in dict.fromkeys(handles) if handle in self._leased]
        stale = list((Counter(handles) - Counter(leased)).elements())
        refused = [handle for handle in leased if self._is_refused(handle)]
        if not (atomic and (stale or refused)):
            for handle in leased:
                if handle not in self._refused:
                    self._confirm(handle)
        if stale:
            raise StaleHandlesError(stale)
        if refused:
            raise ForgottenHandlesError(refused)

    def _is_refused(self, handle: str) -> bool:
        """Whether a handle is refused until its lease is over. Decided at its first confirm."""
        if self._refusals_left and handle not in self._refused and self._deliveries[self._leased[handle]] == 1:
            self._refusals_left -= 1
            self.forgotten += 1
            self._refused.add(handle)
        return handle in self._refused

    def _confirm(self, handle: str) -> None:
        self._remove(self._leased.pop(handle))

    def _remove(self, number: int) -> None:
        now = self._monotonic()
        self._confirmed_at[number] = now
        self._confirm_latencies.append(now - self._born[number])
        self.confirmed += 1
        if not self._keep_bodies:
            self._bodies.pop(number, None)

    def expire(self) -> None:
        """Make the events visible again whose lease has ended."""
        now = self._monotonic()
        while self._leases and self._leases[0][0] <= now:
            for handle in self._leases.popleft()[1]:
                number = self._leased.pop(handle, None)
                if number is not None:
                    self._refused.discard(handle)
                    heappush(self._returned, number)

    def ledger(
        self, *, start: int = 0, count: int | None = None, bodies: bool = False, lost: bool = False
    ) -> list[LedgerRow]:
        """The states of the events, in the order in which they were added.

        Args:
            start: Number of events to skip at the beginning.
            count: Maximum number of events; None: all.
            bodies: Whether the rows have the bodies.
            lost: Whether only lost events are included.
        """
        self.expire()
        numbers: Sequence[int] = sorted(self._lost) if lost else range(self.fed)
        leased = set(self._leased.values())
        end = None if count is None else start + count
        return [self._row(number, leased=number in leased, with_body=bodies) for number in numbers[start:end]]

    def _row(self, number: int, *, leased: bool, with_body: bool) -> LedgerRow:
        confirmed = not isnan(self._confirmed_at[number])
        lost = number in self._lost
        is_at_vod = not (confirmed or leased or lost or number in self._pushed)
        has_body = with_body and (self._generated[number] or number in self._bodies)
        return LedgerRow(
            number=number,
            times_delivered=self._deliveries[number],
            confirmed=confirmed,
            leased=leased,
            stranded=self._deliveries[number] > 0 and is_at_vod,
            lost=lost,
            born=self._born[number] + self._wall_offset_secs,
            confirmed_at=self._confirmed_at[number] + self._wall_offset_secs if confirmed else None,
            body=self.body(number).decode(errors="replace") if has_body else None,
        )

    def stats(self) -> dict[str, Any]:
        """Counts, and the times in seconds from adding to the first pull and to the confirm (latest 20,000 events)."""
        self.expire()
        return {
            "fed": self.fed,
            "confirmed": self.confirmed,
            "outstanding": self.leased,
            "visible": self.visible,
            "lost": len(self._lost),
            "redeliveries": self.redeliveries,
            "confirms_forgotten": self.forgotten,
            "birth_to_first_pull_secs": _percentiles(self._pull_latencies),
            "birth_to_confirm_secs": _percentiles(self._confirm_latencies),
        }


def _percentiles(values: Iterable[float]) -> dict[str, float]:
    ordered = sorted(values)
    if not ordered:
        return {}
    last = len(ordered) - 1
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: round(ordered[round(last * share)], 6) for name, share in shares.items()}
