"""The identity of a received event whose content has no id of its own.

The content of most events names the task that ended, or the file that was uploaded: equal content is the same event.
Other types have no id of their own ("Event overview", 266/33948: `FileDeleted`, `MediaCastStatusChanged`,
`RestoreMediaComplete`, `PersistenceComplete`, `ProcessImageAsyncComplete`), and unknown types may have none. An event
of such a type is a new *occurrence* with a key of its own each time that it is received, unless VOD may be sending an
old occurrence again. VOD may do that if

- no confirm of the old occurrence was acknowledged,
- the old occurrence's lease, counted from the sending of the pull that last brought it, was over when this answer came,
  and
- no empty answer has proved in the meantime that VOD no longer has the old occurrence.

An empty answer proves this if its pull was sent when the lease had certainly ended, and if the empty answer came before
the pull that brings this event was sent: if two pulls were outstanding at the same time, either may have received the
event. An empty answer proves nothing within one lease after the start, or within one lease after an answer was lost:
VOD may have sent the event in an answer that did not arrive, even after the connection broke, for as long as VOD holds
a pull. One lease after the empty answer, the proof is final: each pull that was outstanding when the empty answer came
has been answered or lost by then, and an event that it brought has a new lease.

A source that receives callbacks has no empty answers. VOD tries a callback three times, each for 5 s, so VOD does not
send an occurrence again later than one minute after its last try began.
"""

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from operator import attrgetter
from typing import Any, Final

_SALT_BYTES: Final = 16
# The number of last empty answers that are kept. A puller receives at most one per second, and those of one lease are
# needed.
_EMPTY_KEPT: Final = 256
_HELD_SECS: Final = 5.0  # how long VOD holds a pull while its queue is empty ("PullEvents", product/266/34183)
_CLOCK_SLACK_SECS: Final = 2.0  # the wall clock may be behind by this much after a restart


def has_own_id(content: Mapping[str, Any]) -> bool:
    """Whether equal content is the same event, because it names its task or the file that was uploaded.

    Args:
        content: The content of an event, without its handle.
    """
    payloads = [value for value in content.values() if isinstance(value, dict)]
    if any(_is_id(place.get("TaskId")) for place in (content, *payloads)):
        return True
    uploaded = content.get("FileUploadEvent")
    return isinstance(uploaded, dict) and _is_id(uploaded.get("FileId"))


def _is_id(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool) and value not in ("", 0)


@dataclass(slots=True, kw_only=True, eq=False)
class Occurrence:
    """An event without an id of its own, of which no confirm was acknowledged.

    Args:
        key: Its key.
        content_key: The content key, which all events of equal content share.
        source: The name of the source that last received it.
        lease_ends_at: Monotonic time, in seconds, from which VOD may send it again: the earliest end of its lease.
        leased_until: Monotonic time, in seconds, of the latest end of its lease; minus infinity if it was last received
            before the start.
    """

    key: bytes
    content_key: bytes
    source: str
    lease_ends_at: float
    leased_until: float

    def was_over_at(self, time: float) -> bool:
        """Whether its lease had certainly ended at a time.

        Args:
            time: Monotonic time in seconds, later than one lease after the start; minus infinity: before all leases.
        """
        return self.leased_until <= time > -inf


@dataclass(frozen=True, slots=True, kw_only=True)
class _Empty:
    """A pull whose answer was empty.

    Args:
        sent_at: Monotonic time of the request, in seconds.
        answered_at: Monotonic time of the answer, in seconds.
        unseen_at: Monotonic time, in seconds, at which VOD may last have sent events in an answer that was not
            received: after the start, or after a lost answer.
    """

    sent_at: float
    answered_at: float
    unseen_at: float


class _Pulls:
    """The empty and lost answers of one source, and what they prove.

    Args:
        started_at: Monotonic time of the start, in seconds.
    """

    def __init__(self, started_at: float) -> None:
        self._unseen_at = started_at + _HELD_SECS
        self._empty: deque[_Empty] = deque(maxlen=_EMPTY_KEPT)

    def empty(self, sent_at: float, answered_at: float) -> None:
        self._empty.append(_Empty(sent_at=sent_at, answered_at=answered_at, unseen_at=self._unseen_at))

    def lost(self, sent_at: float, lost_at: float) -> None:
        self._unseen_at = max(lost_at, sent_at + _HELD_SECS)
        # Pulls at the same time may have been empty because the lost answer held the event.
        before = [empty for empty in self._empty if empty.answered_at <= sent_at]
        self._empty = deque(before, maxlen=_EMPTY_KEPT)

    def gone_before(self, sent_at: float, lease_secs: float) -> float:
        """The time of the last proof that was complete when a pull was sent.

        Returns:
            Monotonic time in seconds: VOD certainly no longer had occurrences whose lease was over at this time. Minus
            infinity without proof.
        """
        proofs = (
            empty.sent_at
            for empty in self._empty
            if empty.answered_at <= sent_at and empty.sent_at >= empty.unseen_at + lease_secs
        )
        return max(proofs, default=-inf)


class Occurrences:
    """The occurrences of which no confirm was acknowledged. In memory; all methods may be called from any thread.

    Args:
        started_at: Monotonic time of the start, in seconds.
        draw: Returns that number of random bytes.
    """

    def __init__(self, started_at: float, draw: Callable[[int], bytes] = os.urandom) -> None:
        self._started_at = started_at
        self._draw = draw
        self._lock = threading.Lock()
        self._by_content: dict[bytes, dict[bytes, Occurrence]] = {}
        self._by_key: dict[bytes, Occurrence] = {}
        self._pulls: dict[str, _Pulls] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def add(self, occurrence: Occurrence) -> None:
        """Add an occurrence from before the start. The caller adds the oldest first."""
        with self._lock:
            self._add(occurrence)

    def identify(
        self,
        content_keys: Sequence[bytes],
        *,
        source: str,
        sent_at: float,
        answered_at: float,
        lease_secs: float,
        tries_secs: float | None = None,
    ) -> tuple[list[Occurrence], list[Occurrence]]:
        """Find or make the occurrences of an answer, and renew their leases.

        Args:
            content_keys: The content keys of the answer's events without an id of their own.
            source: The name of the source that received them.
            sent_at: Monotonic time at which the pull was sent, in seconds.
            answered_at: Monotonic time at which its answer came, in seconds.
            lease_secs: The length of a lease.
            tries_secs: For a callback: VOD does not send an occurrence again later than this after its last try began.
                None for a pull, where empty answers prove what VOD no longer has.

        Returns:
            The occurrences, in the order of the events, all different; and those of them that are new.
        """
        found: list[Occurrence] = []
        new: list[Occurrence] = []
        with self._lock:
            gone_before = -inf if tries_secs is not None else self._pulls_of(source).gone_before(sent_at, lease_secs)
            old = {
                content_key: iter(
                    sorted(
                        (
                            it
                            for it in self._by_content.get(content_key, {}).values()
                            if self._lease_ends_at(it, lease_secs) <= answered_at
                            and not it.was_over_at(gone_before)
                            and (tries_secs is None or answered_at < self._began_at(it, lease_secs) + tries_secs)
                        ),
                        # Any of the occurrences of equal content could be taken. One that is not taken may be removed,
                        # by an empty answer, before its event comes; so the one that would be removed first is taken.
                        key=attrgetter("leased_until"),
                    )
                )
                for content_key in set(content_keys)
            }
            for content_key in content_keys:
                occurrence = next(old[content_key], None)
                if occurrence is None:
                    occurrence = self._make(content_key, source)
                    new.append(occurrence)
                occurrence.source = source
                occurrence.lease_ends_at = sent_at + lease_secs
                occurrence.leased_until = answered_at + lease_secs
                found.append(occurrence)
        return found, new

    def _make(self, content_key: bytes, source: str) -> Occurrence:
        key = hashlib.sha256(content_key + self._draw(_SALT_BYTES)).digest()
        occurrence = Occurrence(key=key, content_key=content_key, source=source, lease_ends_at=0.0, leased_until=-inf)
        self._add(occurrence)
        return occurrence

    def _lease_ends_at(self, occurrence: Occurrence, lease_secs: float) -> float:
        if occurrence.leased_until > -inf:
            return occurrence.lease_ends_at
        # A lease from before the start is known by the wall clock, which may have been set back. If an occurrence is
        # taken too early, this does no harm: no thread holds its handle, and a later event is then a new occurrence.
        ends_at = occurrence.lease_ends_at - _CLOCK_SLACK_SECS
        return ends_at if ends_at <= self._started_at + lease_secs else -inf

    def _began_at(self, occurrence: Occurrence, lease_secs: float) -> float:
        """Monotonic time at which the last callback with it began; never after the start if it was before the start."""
        began_at = occurrence.lease_ends_at - lease_secs
        return began_at if occurrence.leased_until > -inf else min(began_at, self._started_at)

    def forget(self, keys: Iterable[bytes]) -> list[bytes]:
        """Remove occurrences, because VOD will not send them again or they were never delivered.

        Returns:
            The keys of those that were in the table.
        """
        with self._lock:
            return [key for key in keys if self._remove(key)]

    def answered_empty(self, source: str, *, sent_at: float, answered_at: float, lease_secs: float) -> list[bytes]:
        """Record a pull whose answer was empty.

        Args:
            source: The source's name.
            sent_at: Monotonic time at which it was sent, in seconds.
            answered_at: Monotonic time at which its answer came, in seconds.
            lease_secs: The length of a lease.

        Returns:
            The keys of the occurrences that this removed, because VOD certainly no longer has them.
        """
        with self._lock:
            pulls = self._pulls_of(source)
            pulls.empty(sent_at, answered_at)
            if not self._by_key:
                return []
            # Each pull that was outstanding when an empty answer came one lease ago has been answered or lost by now.
            gone_before = pulls.gone_before(answered_at - lease_secs, lease_secs)
            if gone_before == -inf:
                return []
            gone = [it.key for it in self._by_key.values() if it.source == source and it.was_over_at(gone_before)]
            return [key for key in gone if self._remove(key)]

    def answer_lost(self, source: str, *, sent_at: float, lost_at: float) -> None:
        """Record a pull whose answer, possibly with events, was not received completely.

        Args:
            source: The source's name.
            sent_at: Monotonic time at which the pull was sent, or earlier, in seconds.
            lost_at: Monotonic time at which the answer was given up, in seconds.
        """
        with self._lock:
            self._pulls_of(source).lost(sent_at, lost_at)

    def _add(self, occurrence: Occurrence) -> None:
        self._by_content.setdefault(occurrence.content_key, {})[occurrence.key] = occurrence
        self._by_key[occurrence.key] = occurrence

    def _remove(self, key: bytes) -> bool:
        occurrence = self._by_key.pop(key, None)
        if occurrence is None:
            return False
        equal = self._by_content[occurrence.content_key]
        del equal[key]
        if not equal:
            del self._by_content[occurrence.content_key]
        return True

    def _pulls_of(self, source: str) -> _Pulls:
        return self._pulls.setdefault(source, _Pulls(self._started_at))
