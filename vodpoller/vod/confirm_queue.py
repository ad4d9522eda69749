"""The handles of one source that wait to be confirmed, and the pullers that wait for their results.

The queue decides which puller sends which handles. It does not send and does not wait: `confirmer` does both, and
explains the terms.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from math import ceil, inf
from typing import Final

from vodpoller.events.event import Lease
from vodpoller.vod.confirmation import Confirmation, lease_ended, not_confirmed

HANDLES_PER_CALL: Final = 16
CLOCK_SECS: Final = 0.001  # added to a wait, so that its time has certainly come when the wait ends


class ConfirmPuller:
    """A thread with handles to confirm. Its queue's lock protects all fields."""

    __slots__ = ("changed", "is_caller", "missing", "on_acknowledged")

    def __init__(self, lock: threading.Lock, on_acknowledged: Callable[[Sequence[str]], None]) -> None:
        self.changed = threading.Condition(lock)
        self.on_acknowledged = on_acknowledged
        self.missing = 0
        self.is_caller = False


class Entry:
    """One handle in a queue.

    Args:
        handle: The handle.
        lease: The lease of the handle.
        owner: The puller that waits for the handle's result.
    """

    __slots__ = ("confirmation", "handle", "lease", "owner", "part_number")

    def __init__(self, handle: str, lease: Lease, owner: ConfirmPuller) -> None:
        self.handle = handle
        self.lease = lease
        self.owner = owner
        self.confirmation: Confirmation | None = None
        self.part_number: int | None = None  # of the part of a refused set in which the handle must stay


class ConfirmQueue:
    """The handles of one source that wait to be confirmed, the oldest lease first.

    Args:
        source: The source's name, for the log.
        sub_app_id: The source's SubAppId.
        reserve_secs: Handles of several pulls share a call only while more than this is left of their leases.
        monotonic: The monotonic clock, in seconds.
    """

    def __init__(
        self, source: str, sub_app_id: int | None, *, reserve_secs: float, monotonic: Callable[[], float]
    ) -> None:
        self.source = source
        self.sub_app_id = sub_app_id
        self.lock = threading.Lock()
        self.refused_in_a_row = 0
        self.last_refusal: Confirmation | None = None  # set while VOD refuses all handles of the source
        self.next_trial_at = 0.0
        self.is_stopping = False
        self._reserve_secs = reserve_secs
        self._monotonic = monotonic
        self._waiting: list[Entry] = []
        self._waiting_pullers: dict[ConfirmPuller, None] = {}
        self._callers = 0
        self._part_numbers = count()

    # --- the caller of these methods holds the lock -------------------------------------------------------------------

    def add(self, entries: Iterable[Entry], *, together: bool = False) -> None:
        """Add handles to those that wait.

        Args:
            entries: Entries without a result.
            together: Keep them in one set that is not mixed with other handles.
        """
        number = next(self._part_numbers) if together else None
        for entry in entries:
            entry.part_number = number
            self._waiting.append(entry)
        self._waiting.sort(key=lambda entry: entry.lease.ends_at)

    def add_puller(self, puller: ConfirmPuller) -> None:
        """Add a puller that waits and may become a caller."""
        self._waiting_pullers[puller] = None

    def remove_puller(self, puller: ConfirmPuller) -> None:
        """Remove a puller that no longer waits."""
        self._waiting_pullers.pop(puller, None)

    def make_callers(self) -> None:
        """Make waiting pullers callers, until there are as many callers as are needed."""
        needed = self._needed()
        while self._callers < needed and self._waiting_pullers:
            puller = next(iter(self._waiting_pullers))
            del self._waiting_pullers[puller]
            puller.is_caller = True
            self._callers += 1
            puller.changed.notify()

    def end_caller(self, puller: ConfirmPuller) -> None:
        """End the puller's role as a caller, because it takes handles or gives up."""
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
            if entry.lease.ends_at <= now:  # no call takes it: its puller ends its wait soon
                continue
            group = self._group(entry, now)
            sizes[group] = sizes.get(group, 0) + 1
        return sum(ceil(size / HANDLES_PER_CALL) for size in sizes.values())

    def _group(self, entry: Entry, now: float) -> object:
        """The group of a handle: only handles of the same group may share a call."""
        if entry.part_number is not None:
            return entry.part_number
        return None if entry.lease.ends_at - now > self._reserve_secs else entry.lease

    def take(self) -> list[Entry]:
        """Remove and return the handles for one call: the oldest one, and those that may share its call.

        While VOD refuses all handles of the source, it is the oldest one alone.
        """
        if not self._waiting:
            return []
        maximum = HANDLES_PER_CALL if self.last_refusal is None else 1
        now = self._monotonic()
        group = self._group(self._waiting[0], now)
        taken = [entry for entry in self._waiting if self._group(entry, now) == group][:maximum]
        self._remove(taken)
        return taken

    def end_entries(self, entries: Iterable[Entry], confirmation: Confirmation) -> None:
        """End the wait of these handles; those without a result get this one."""
        self._remove(entries)
        self.complete(entries, confirmation)

    def _remove(self, entries: Iterable[Entry]) -> None:
        removed = set(map(id, entries))
        self._waiting = [entry for entry in self._waiting if id(entry) not in removed]

    def complete(self, entries: Iterable[Entry], confirmation: Confirmation) -> None:
        """Set the result of handles that have none, and wake each puller whose last result this is."""
        for entry in entries:
            if entry.confirmation is None:
                entry.confirmation = confirmation
                entry.owner.missing -= 1
                if entry.owner.missing == 0:
                    entry.owner.changed.notify()

    def end_call(self, entries: Iterable[Entry], confirmation: Confirmation) -> None:
        """End a call: handles that have no result and were not put back into the queue get this result."""
        waiting = set(map(id, self._waiting))
        self.complete([entry for entry in entries if id(entry) not in waiting], confirmation)

    def end_waiting(self, error: Exception, *, until: float = inf) -> list[Entry]:
        """End the wait of all handles whose lease ends by then, with this error; returns them."""
        entries = [entry for entry in self._waiting if entry.lease.ends_at <= until]
        self.end_entries(entries, not_confirmed(error))
        return entries

    def expire(self) -> list[Entry]:
        """End the wait of handles whose lease is over; returns them."""
        now = self._monotonic()
        over = [entry for entry in self._waiting if entry.lease.ends_at <= now]
        if over:
            self.end_entries(over, self.last_refusal or not_confirmed(lease_ended()))
        return over

    @property
    def has_waiting(self) -> bool:
        """Whether any handle waits."""
        return bool(self._waiting)

    def last_lease_ends_at(self) -> float:
        """Monotonic time at which the last lease of the waiting handles ends; 0 if no handle waits."""
        return self._waiting[-1].lease.ends_at if self._waiting else 0.0

    def wait_secs(self, entries: Iterable[Entry]) -> float | None:
        """The maximum time that a puller waits for these handles; None if all of them are in calls, which end."""
        waiting = set(map(id, self._waiting))
        ends = [entry.lease.ends_at for entry in entries if id(entry) in waiting]
        return max(min(ends) - self._monotonic(), 0.0) + CLOCK_SECS if ends else None
