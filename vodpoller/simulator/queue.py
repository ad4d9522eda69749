"""The queue behind the API: leases, handles, redelivery. It knows no network and does not wait."""

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
    """A confirm named handles whose lease is over, that were confirmed before, or that never were.

    Args:
        handles: Which.
    """

    def __init__(self, handles: Sequence[str]) -> None:
        super().__init__(f"{len(handles)} handles are stale or unknown")
        self.handles = tuple(handles)


class ForgottenHandlesError(VodpollerError):
    """A confirm named handles that are refused on purpose (`forget_confirms`), and no stale ones.

    Args:
        handles: Which.
    """

    def __init__(self, handles: Sequence[str]) -> None:
        super().__init__(f"{len(handles)} handles are refused")
        self.handles = tuple(handles)


class LedgerRow(TypedDict):
    """What became of one event.

    `times_delivered` counts pulls and pushes. `confirmed` is true, too, if a push was answered. `stranded` says that it
    was pulled, that its lease ran out, and that it has not been pulled since; `lost`, that no push was answered, and
    none will come. Times are in Unix seconds. `body` is None if it was not asked for, or not kept.
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
    """The queue behind the API: leases, handles, redelivery. Not thread-safe; without network and without waiting.

    The events that were fed are at each instant divided into the confirmed, the leased, the pushed, the visible and the
    lost.

    Args:
        visibility_secs: How long a lease lasts.
        generator: Makes the bodies of generated events whenever they are needed.
        random: Where handles come from.
        forget_confirms: The number of handles that are refused until their lease is over: the first that are asked to
            be confirmed, of events that are under their first lease.
        keep_bodies: Whether the bodies of confirmed events stay for the ledger.
        monotonic: The clock, in seconds.
        wall_offset_secs: What makes Unix time of the clock's.
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
        self._to_refuse = forget_confirms
        self._keep_bodies = keep_bodies
        self._monotonic = monotonic
        self._wall_offset_secs = wall_offset_secs
        # One entry for each event, by its number: arrays, since a million of them must fit beside what is measured.
        self._born = array("d")
        self._confirmed_at = array("d")
        self._times = array("I")
        self._generated = bytearray()
        self._bodies: dict[int, bytes] = {}
        self._never_pulled = 0
        self._again: list[int] = []
        self._leased: dict[str, int] = {}
        self._leases: deque[tuple[float, list[str]]] = deque()
        self._refused: set[str] = set()  # of the leased
        self._pushed: set[int] = set()
        self._lost: set[int] = set()
        self._pull_latencies: deque[float] = deque(maxlen=_LATENCIES_KEPT)
        self._confirm_latencies: deque[float] = deque(maxlen=_LATENCIES_KEPT)
        self.confirmed = 0
        self.redeliveries = 0
        self.forgotten = 0

    @property
    def fed(self) -> int:
        """The number of events that there ever were."""
        return len(self._born)

    @property
    def leased(self) -> int:
        """The number of events that are leased, as of the last `expire`, or pushed."""
        return len(self._leased) + len(self._pushed)

    @property
    def visible(self) -> int:
        """The number of events that the next pulls can have, as of the last `expire`."""
        return len(self._again) + self.fed - self._never_pulled

    @property
    def next_expiry(self) -> float | None:
        """When `expire` has something to do next, on the clock; None if nothing is leased."""
        return self._leases[0][0] if self._leases else None

    def feed(self, bodies: Iterable[bytes]) -> int:
        """Events are born.

        Args:
            bodies: Callback bodies, one an event; they are not read.

        Returns:
            Their number.
        """
        before = self.fed
        for number, body in enumerate(bodies, before):
            self._bear(generated=False)
            self._bodies[number] = body
        return self.fed - before

    def generate(self, count: int) -> None:
        """That number of generated events are born."""
        for _ in range(count):
            self._bear(generated=True)

    def _bear(self, *, generated: bool) -> None:
        self._born.append(self._monotonic())
        self._confirmed_at.append(nan)
        self._times.append(0)
        self._generated.append(generated)

    def take(self, limit: int) -> list[bytes]:
        """Lease events, the oldest first.

        Args:
            limit: Their maximum number.

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
            if not self._times[number]:
                self._pull_latencies.append(now - self._born[number])
            self.count_delivery(number)
        if handles:
            self._leases.append((now + self._visibility_secs, handles))
        return elements

    def _pop(self) -> int | None:
        # What was pulled before is older than all that never was.
        if self._again:
            return heappop(self._again)
        if self._never_pulled < self.fed:
            self._never_pulled += 1
            return self._never_pulled - 1
        return None

    def take_to_push(self) -> int | None:
        """The number of the oldest event that is visible; None if none is.

        It is pushed from now on, until `answered` or `lose`.
        """
        self.expire()
        number = self._pop()
        if number is not None:
            self._pushed.add(number)
        return number

    def count_delivery(self, number: int) -> None:
        """The event is sent, or pulled, once more."""
        self.redeliveries += self._times[number] > 0
        self._times[number] += 1

    def answered(self, number: int) -> None:
        """A push of the event was answered: VOD forgets it."""
        self._pushed.remove(number)
        self._forget(number)

    def lose(self, number: int) -> None:
        """No push of the event was answered: VOD gives it up."""
        self._pushed.remove(number)
        self._lost.add(number)

    def body(self, number: int) -> bytes:
        """That of an event which VOD has not forgotten, or keeps."""
        if self._generated[number]:
            return self._generator.body(number, self._born[number] + self._wall_offset_secs)
        return self._bodies[number]

    def confirm(self, handles: Sequence[str], *, atomic: bool) -> None:
        """Let VOD forget events.

        Args:
            handles: Of their last pull. The second of two equal ones is stale.
            atomic: One handle that is stale or refused keeps the others from being confirmed.

        Raises:
            StaleHandlesError: Some handles are stale.
            ForgottenHandlesError: Some handles are refused on purpose.
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
        """Whether it is refused until its lease is over: decided when it is first asked for."""
        if self._to_refuse and handle not in self._refused and self._times[self._leased[handle]] == 1:
            self._to_refuse -= 1
            self.forgotten += 1
            self._refused.add(handle)
        return handle in self._refused

    def _confirm(self, handle: str) -> None:
        self._forget(self._leased.pop(handle))

    def _forget(self, number: int) -> None:
        now = self._monotonic()
        self._confirmed_at[number] = now
        self._confirm_latencies.append(now - self._born[number])
        self.confirmed += 1
        if not self._keep_bodies:
            self._bodies.pop(number, None)

    def expire(self) -> None:
        """Make visible again what was leased for too long."""
        now = self._monotonic()
        while self._leases and self._leases[0][0] <= now:
            for handle in self._leases.popleft()[1]:
                number = self._leased.pop(handle, None)
                if number is not None:
                    self._refused.discard(handle)
                    heappush(self._again, number)

    def ledger(
        self, *, start: int = 0, count: int | None = None, bodies: bool = False, lost: bool = False
    ) -> list[LedgerRow]:
        """What became of the events, in the order of their birth.

        Args:
            start: The number of events to leave out at the beginning.
            count: The number to tell of; None for all.
            bodies: Tell their bodies, too.
            lost: Tell only of those that are lost.
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
            times_delivered=self._times[number],
            confirmed=confirmed,
            leased=leased,
            stranded=self._times[number] > 0 and is_at_vod,
            lost=lost,
            born=self._born[number] + self._wall_offset_secs,
            confirmed_at=self._confirmed_at[number] + self._wall_offset_secs if confirmed else None,
            body=self.body(number).decode(errors="replace") if has_body else None,
        )

    def stats(self) -> dict[str, Any]:
        """Counts, and how long after their birth the latest 20,000 events were pulled and confirmed, in seconds."""
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
