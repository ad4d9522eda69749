"""Which event an arrival is, if its content does not say so.

The content of most events names the task that ended, or the file that was uploaded: equal content is the same event.
Other types have no id of their own ("Event overview", 266/33948: `FileDeleted`, `MediaCastStatusChanged`,
`RestoreMediaComplete`, `PersistenceComplete`, `ProcessImageAsyncComplete`), and unknown ones may have none. Of these
each arrival is a new *occurrence* with a key of its own, unless VOD may be bringing an old one back. It may if

- no confirm of the old one was acknowledged,
- the old one's lease, counted from the sending of the pull that last brought it, was over when this answer came, and
- no empty answer has proved meanwhile that VOD does not have it any more.

An empty answer proves that if its pull was sent when the lease had certainly ended, and if it came before the pull
was sent that brings this arrival: of two pulls that were outstanding together either may have got the event. It proves
nothing within a lease of the start, or of an answer that was lost: VOD may have handed the event out unseen, also
after the connection broke, for as long as it holds a pull. A lease later what it proves is for good: a pull that was
outstanding when it came has been answered or lost by then, and what that one brought is leased anew.

Of a source that receives callbacks there are no empty answers: VOD tries three times, each for 5 s, so that one minute
after its last try began VOD does not bring an occurrence any more.
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
_EMPTY_KEPT: Final = 256  # the last empty answers; they come at most once a second from one puller, for a lease
_HELD_SECS: Final = 5.0  # how long VOD holds a pull while its queue is empty ("PullEvents", product/266/34183)
_CLOCK_SLACK_SECS: Final = 2.0  # by which the wall clock may be behind after a restart


def has_own_id(content: Mapping[str, Any]) -> bool:
    """Whether equal content is the same event: it names its task, or the file that was uploaded.

    Args:
        content: Of an event, without its handle.
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
        key: Its identity.
        content_key: What it has in common with all events of equal content.
        source: The name of the source that last brought it.
        lease_ends_at: Monotonic time, in seconds, from which VOD may bring it again.
        leased_until: Monotonic time until which it may be leased, in seconds; minus infinity if it was brought before
            the start.
    """

    key: bytes
    content_key: bytes
    source: str
    lease_ends_at: float
    leased_until: float

    def was_over_at(self, time: float) -> bool:
        """Whether its lease had certainly ended.

        Args:
            time: Monotonic time, in seconds, after one lease of the start; minus infinity is before all.
        """
        return self.leased_until <= time > -inf


@dataclass(frozen=True, slots=True, kw_only=True)
class _Empty:
    """A pull that brought nothing.

    Args:
        sent_at: Monotonic time, in seconds.
        answered_at: Monotonic time, in seconds.
        unseen_at: When VOD may last have handed out events unseen before that: the start, or a lost answer.
    """

    sent_at: float
    answered_at: float
    unseen_at: float


class _Pulls:
    """What the pulls of one source have shown.

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
        # What was asked for meanwhile may have been empty since the lost answer held the event.
        before = [empty for empty in self._empty if empty.answered_at <= sent_at]
        self._empty = deque(before, maxlen=_EMPTY_KEPT)

    def gone_before(self, sent_at: float, lease_secs: float) -> float:
        """Of which occurrences VOD certainly had none any more when a pull was sent.

        Returns:
            Those that were not leased at this monotonic time any more, in seconds; minus infinity for none.
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
        draw: Gives random bytes.
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
        """Take one over from before the start, the oldest first."""
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
        """Say which occurrences an answer brings, and renew their leases.

        Args:
            content_keys: Of the events without an id of their own.
            source: The name of the source that brings them.
            sent_at: Monotonic time at which the pull was sent, in seconds.
            answered_at: Monotonic time at which its answer came, in seconds.
            lease_secs: How long a lease lasts.
            tries_secs: For a callback: VOD does not bring an occurrence again this long after its last try began. None
                if empty answers tell what it does not have any more.

        Returns:
            The occurrences, in the order of the events, each once; and those among them that are new.
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
                        # Of equal ones it does not matter which is which, but one that is not taken may be proved gone
                        # before its event comes: so the one of which that would happen first.
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
        # A lease from before the start is known by the wall clock, which may have been set back. To take an occurrence
        # too early does no harm: no thread holds its handle any more, and what comes later is a new one then.
        ends_at = occurrence.lease_ends_at - _CLOCK_SLACK_SECS
        return ends_at if ends_at <= self._started_at + lease_secs else -inf

    def _began_at(self, occurrence: Occurrence, lease_secs: float) -> float:
        """When the callback began that brought it last; before the start, whatever the wall clock says of it."""
        began_at = occurrence.lease_ends_at - lease_secs
        return began_at if occurrence.leased_until > -inf else min(began_at, self._started_at)

    def forget(self, keys: Iterable[bytes]) -> list[bytes]:
        """VOD will not bring these again, or they were never delivered.

        Returns:
            Those that were in the table.
        """
        with self._lock:
            return [key for key in keys if self._remove(key)]

    def answered_empty(self, source: str, *, sent_at: float, answered_at: float, lease_secs: float) -> list[bytes]:
        """A pull brought nothing.

        Args:
            source: The source's name.
            sent_at: Monotonic time at which it was sent, in seconds.
            answered_at: Monotonic time at which its answer came, in seconds.
            lease_secs: How long a lease lasts.

        Returns:
            The keys of occurrences that are forgotten now, since VOD certainly does not have them any more.
        """
        with self._lock:
            pulls = self._pulls_of(source)
            pulls.empty(sent_at, answered_at)
            if not self._by_key:
                return []
            # A pull that was outstanding beside an empty answer of a lease ago has been answered or lost since then.
            gone_before = pulls.gone_before(answered_at - lease_secs, lease_secs)
            if gone_before == -inf:
                return []
            gone = [it.key for it in self._by_key.values() if it.source == source and it.was_over_at(gone_before)]
            return [key for key in gone if self._remove(key)]

    def answer_lost(self, source: str, *, sent_at: float, lost_at: float) -> None:
        """Events may have been handed out in an answer that did not arrive whole.

        Args:
            source: The source's name.
            sent_at: Monotonic time at which the pull was sent, or earlier, in seconds.
            lost_at: Monotonic time at which it was given up, in seconds.
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
