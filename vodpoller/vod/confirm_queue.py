"""The handles of one source that wait to be confirmed, and the pullers that wait with them.

It knows who is to send what, and when; it sends nothing itself and never waits. What the words mean is said in
`confirmer`, which does both.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from math import ceil, inf
from typing import Final

from vodpoller.events.event import Lease
from vodpoller.vod.confirmation import Confirmation, lease_ended, not_confirmed

HANDLES_A_CALL: Final = 16
CLOCK_SECS: Final = 0.001  # so that what is waited for has come when a wait ends


class ConfirmPuller:
    """A thread with handles to confirm. All of it is guarded by its queue's lock."""

    __slots__ = ("is_caller", "missing", "on_acknowledged", "woken")

    def __init__(self, lock: threading.Lock, on_acknowledged: Callable[[Sequence[str]], None]) -> None:
        self.woken = threading.Condition(lock)
        self.on_acknowledged = on_acknowledged
        self.missing = 0
        self.is_caller = False


class Entry:
    """One handle in a queue.

    Args:
        handle: The handle.
        lease: The lease it is under.
        owner: The thread that waits for its result.
    """

    __slots__ = ("confirmation", "handle", "lease", "owner", "part_number")

    def __init__(self, handle: str, lease: Lease, owner: ConfirmPuller) -> None:
        self.handle = handle
        self.lease = lease
        self.owner = owner
        self.confirmation: Confirmation | None = None
        self.part_number: int | None = None  # of the part of a refused set that it must stay in


class ConfirmQueue:
    """The handles of one source that wait to be confirmed, the oldest lease first.

    Args:
        source: The source's name, for the log.
        sub_app_id: The source's SubAppId.
        reserve_secs: Handles of several pulls share a call only while more than this is left of their leases.
        monotonic: The clock, in seconds.
    """

    def __init__(
        self, source: str, sub_app_id: int | None, *, reserve_secs: float, monotonic: Callable[[], float]
    ) -> None:
        self.source = source
        self.sub_app_id = sub_app_id
        self.lock = threading.Lock()
        self.refused_in_a_row = 0
        self.last_refusal: Confirmation | None = None  # while VOD takes none of the source's handles
        self.next_ask_at = 0.0
        self.is_stopping = False
        self._reserve_secs = reserve_secs
        self._monotonic = monotonic
        self._waiting: list[Entry] = []
        self._parked: dict[ConfirmPuller, None] = {}
        self._callers = 0
        self._part_numbers = count()

    # --- all of this holds the lock -----------------------------------------------------------------------------------

    def enter(self, entries: Iterable[Entry], *, together: bool = False) -> None:
        """They wait from now on.

        Args:
            entries: Without a result.
            together: They stay in one set, and are not mixed with others.
        """
        number = next(self._part_numbers) if together else None
        for entry in entries:
            entry.part_number = number
            self._waiting.append(entry)
        self._waiting.sort(key=lambda entry: entry.lease.ends_at)

    def park(self, puller: ConfirmPuller) -> None:
        """The puller waits, and may be made a caller."""
        self._parked[puller] = None

    def unpark(self, puller: ConfirmPuller) -> None:
        """The puller waits no more."""
        self._parked.pop(puller, None)

    def appoint(self) -> None:
        """Make waiting pullers callers, until there are as many as are needed."""
        needed = self._needed()
        while self._callers < needed and self._parked:
            puller = next(iter(self._parked))
            del self._parked[puller]
            puller.is_caller = True
            self._callers += 1
            puller.woken.notify()

    def resign(self, puller: ConfirmPuller) -> None:
        """The puller is not a caller any more: it takes, or gives up."""
        if puller.is_caller:
            puller.is_caller = False
            self._callers -= 1

    def _needed(self) -> int:
        if not self._waiting:
            return 0
        if self.last_refusal is not None:
            return 1
        sizes: dict[object, int] = {}
        now = self._monotonic()
        for entry in self._waiting:
            if entry.lease.ends_at <= now:  # no call takes it: its puller is about to end it
                continue
            group = self._group(entry, now)
            sizes[group] = sizes.get(group, 0) + 1
        return sum(ceil(size / HANDLES_A_CALL) for size in sizes.values())

    def _group(self, entry: Entry, now: float) -> object:
        """What may be mixed in one call: the members of one group."""
        if entry.part_number is not None:
            return entry.part_number
        return None if entry.lease.ends_at - now > self._reserve_secs else entry.lease

    def take(self) -> list[Entry]:
        """What one call gets: the oldest handle and what may be mixed with it. One alone while VOD refuses all."""
        if not self._waiting:
            return []
        most = HANDLES_A_CALL if self.last_refusal is None else 1
        now = self._monotonic()
        group = self._group(self._waiting[0], now)
        taken = [entry for entry in self._waiting if self._group(entry, now) == group][:most]
        self._remove(taken)
        return taken

    def leave(self, entries: Iterable[Entry], confirmation: Confirmation) -> None:
        """Whatever has no result gets this one, and waits no more."""
        self._remove(entries)
        self.complete(entries, confirmation)

    def _remove(self, entries: Iterable[Entry]) -> None:
        gone = set(map(id, entries))
        self._waiting = [entry for entry in self._waiting if id(entry) not in gone]

    def complete(self, entries: Iterable[Entry], confirmation: Confirmation) -> None:
        """Their result is known, and their owners are told."""
        for entry in entries:
            if entry.confirmation is None:
                entry.confirmation = confirmation
                entry.owner.missing -= 1
                if entry.owner.missing == 0:
                    entry.owner.woken.notify()

    def end_call(self, entries: Iterable[Entry], confirmation: Confirmation) -> None:
        """A call is over: what it neither decided nor put back gets this result."""
        waiting = set(map(id, self._waiting))
        self.complete([entry for entry in entries if id(entry) not in waiting], confirmation)

    def end_waiting(self, error: Exception, *, until: float = inf) -> list[Entry]:
        """End the waiting of all handles whose lease ends by then, with this error; returns them."""
        entries = [entry for entry in self._waiting if entry.lease.ends_at <= until]
        self.leave(entries, not_confirmed(error))
        return entries

    def expire(self) -> list[Entry]:
        """End the waiting of handles whose lease is over; returns them."""
        now = self._monotonic()
        over = [entry for entry in self._waiting if entry.lease.ends_at <= now]
        if over:
            self.leave(over, self.last_refusal or not_confirmed(lease_ended()))
        return over

    @property
    def has_waiting(self) -> bool:
        """Whether any handle waits."""
        return bool(self._waiting)

    def last_lease_ends_at(self) -> float:
        """When the last lease of what waits ends; 0 if nothing waits."""
        return self._waiting[-1].lease.ends_at if self._waiting else 0.0

    def wait_secs(self, entries: Iterable[Entry]) -> float | None:
        """How long a puller waits at most for these; None if all of them are in calls, which end."""
        waiting = set(map(id, self._waiting))
        ends = [entry.lease.ends_at for entry in entries if id(entry) in waiting]
        return max(min(ends) - self._monotonic(), 0.0) + CLOCK_SECS if ends else None
