"""The contract of a journal: the only interface that other modules use, and the values that it takes and returns.

A journal holds two things. The *ledger* is the set of (key, sink) pairs that sinks have accepted. A *stored event* is
an (event, sink) that vodpoller has taken over from VOD: *pending*, which is tried again, or a *dead letter*, which
waits for the operator. A pair is in at most one of them: `accept` deletes what is stored, and `store` leaves out what
was accepted, in whichever order they are called. A journal also knows the *occurrences* of events without an id of
their own (see `vodpoller.events.identity`), so that such an event gets the same key when VOD delivers it again, also
after a restart.

The *mark* of a sink's file is the position up to which its lines are in the ledger.

No method takes or returns a time, only ages and delays in seconds: only the journal reads the clock. `StorageError` is
the only error. All methods may be called from any thread.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, Protocol

from vodpoller.events.event import Event
from vodpoller.status import JournalStatus

CONFIRMED_KEPT_SECS: Final = 600.0
DUE_HORIZON_SECS: Final = 900.0


class Known(Enum):
    """What the journal knows about an event at a sink."""

    ACCEPTED = auto()
    PENDING = auto()
    DEAD = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """A position in a sink's file, for example its mark.

    Args:
        inode: The inode of the file, so that the position stays valid after a rename.
        offset_bytes: End of the last line that was written and synced.
    """

    inode: int
    offset_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """The times of a pull, or of a callback.

    Args:
        source: The name of its source.
        sent_ago_secs: Time since the pull was sent, after any wait for the limiter.
        answered_ago_secs: Time since the answer came.
        lease_secs: Length of the lease that began when the pull was sent.
        tries_secs: For a callback: when this time has passed since its last try began, VOD does not deliver the event
            again. None for a pull: empty answers show what VOD no longer has.
    """

    source: str
    sent_ago_secs: float
    answered_ago_secs: float
    lease_secs: float
    tries_secs: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Portion:
    """A part of the lines of a sink's file beyond its mark.

    Args:
        keys: The keys of the lines that name their event.
        content_keys: For each other line, in the order of the lines, the content keys that its event may have.
        position: The end of the portion: the new mark once its keys are in the ledger.
        read: The share of all lines beyond the mark that is read at its end, 0 to 1.
    """

    keys: Sequence[bytes]
    content_keys: Sequence[Collection[bytes]] = ()
    position: Position
    read: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """An event that is to be stored because a sink lacks it.

    Args:
        event: The event.
        sink: The sink that lacks it; empty if no route names one.
        dead: It waits for the operator, not for another attempt.
        reason: One word for filters, for example "sink_failed"; see `vodpoller.settlement.Reason`.
        error: The error of the last attempt.
        attempts: Number of attempts so far.
        due_in_secs: Delay until a pending one is tried again, at most `DUE_HORIZON_SECS`.
    """

    event: Event
    sink: str
    dead: bool
    reason: str
    error: str = ""
    attempts: int = 0
    due_in_secs: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimedEvent:
    """A pending event that only its claimant may deliver now.

    Args:
        row: The number of its row in the journal; a number is never used twice.
        event: The event.
        sink: The sink that lacks it.
        attempts: Number of attempts so far.
        age_secs: Time since it was stored, or replayed by the operator, at the moment of the claim.
    """

    row: int
    event: Event
    sink: str
    attempts: int
    age_secs: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NewDeadLetter:
    """A claimed event that is to become a dead letter.

    Args:
        claimed: The event as `claim_due` returned it.
        attempts: Number of attempts so far.
        reason: One word for filters; see `vodpoller.settlement.Reason`.
        error: The error of the last attempt.
    """

    claimed: ClaimedEvent
    attempts: int
    reason: str
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCount:
    """The number of stored events of one sink in one state.

    Args:
        sink: The sink's name; empty if no route named one.
        state: "pending" or "dead".
        events: Number of events.
        oldest_secs: Age of the oldest of them.
    """

    sink: str
    state: str
    events: int
    oldest_secs: float


class Journal(Protocol):
    """An open journal."""

    # --- identity -----------------------------------------------------------------------------------------------------

    def identify(self, content_keys: Sequence[bytes], pulled: Pulled) -> Sequence[bytes]:
        """Find or create the occurrences of the events in an answer that have no id of their own.

        When this returns, a later identification will find them again, also after a loss of power, until `confirmed`
        is called with their keys.

        Args:
            content_keys: The content keys of the events.
            pulled: The times of the answer.

        Returns:
            Their keys, in the order of the events. Equal content does not get the same key twice.

        Raises:
            StorageError: A new one cannot be written: none of the events may be delivered or stored.
        """

    def answered_empty(self, pulled: Pulled) -> None:
        """Record that a pull was empty, which can prove that VOD no longer has an occurrence; never raises.

        Args:
            pulled: The times of the pull.
        """

    def answer_lost(self, source: str, *, sent_ago_secs: float) -> None:
        """Record that a pull has just failed or its answer was cut off: it may have contained events; never raises.

        Args:
            source: The source's name.
            sent_ago_secs: Time since the pull was sent, or a longer time.
        """

    # --- the ledger ---------------------------------------------------------------------------------------------------

    def known(self, pairs: Iterable[tuple[bytes, str]]) -> Mapping[tuple[bytes, str], Known]:
        """What is known about (key, sink) pairs; unknown pairs are left out.

        An accepted pair is known until `CONFIRMED_KEPT_SECS` after its event was confirmed: identical content that
        comes later is a new event.

        Raises:
            StorageError: It cannot be read, so nothing is known about any pair.
        """

    def accept(self, sink: str, keys: Sequence[bytes], position: Position | None) -> None:
        """Enter events that a sink has in the ledger; never raises. Stored rows of these pairs are deleted.

        Their claims end. If the journal cannot be written, the pairs are kept in memory and written by a later
        `flush`; until then `is_writable` is False, and the pairs are lost if the process ends.

        Args:
            sink: The sink's name.
            keys: The keys of the events that it has.
            position: The present end of its file; None if it is not a file. The mark never moves beyond a pair that is
                not written.
        """

    def confirmed(self, keys: Sequence[bytes]) -> None:
        """Record that VOD will not deliver these events again; never raises.

        From now on `identify` does not find their occurrences. All else is written by the next `flush` at the latest.
        """

    def position(self, sink: str) -> Position | None:
        """The mark of a sink's file: all lines before it are in the ledger. None if it has no mark.

        Raises:
            StorageError: It cannot be read.
        """

    def recover(self, sink: str, portion: Portion) -> None:
        """Enter a part of the lines of a sink's file beyond its mark, as `accept` does, and move the mark to its end.

        When this returns, it survives a loss of power. A pair that is in the ledger stays as it is. A line that does
        not name its event is taken as the oldest occurrence of its content that may come again and is not in the sink's
        ledger. Without such an occurrence, the line is skipped: either its event will not come again, or it will be
        written twice.

        Raises:
            StorageError: Nothing of the portion was written, and the mark has not moved.
        """

    # --- stored events ------------------------------------------------------------------------------------------------

    def store(self, letters: Sequence[Letter]) -> None:
        """Take events over from VOD. When this returns, they survive a loss of power.

        A pair that is stored already stays as it is, and an accepted pair is left out; neither needs room. Dead letters
        take at most half of the room, so that they never block pending events.

        Raises:
            JournalFullError: There was no room for some events, which VOD must keep: `refused` has their keys. All
                others are stored.
            StorageError: No event is stored: VOD must keep them all.
        """

    def claim_due(self, sink: str, limit: int) -> Sequence[ClaimedEvent]:
        """Claim pending events of a sink whose delay is over, the longest overdue first.

        A claimed event is not returned again, to this or another claimant, until the claim ends: by `release`,
        `reschedule`, `mark_dead`, an `accept` of the pair, or the end of the process. An accepted pair is never
        returned. The operator may delete or move a claimed event meanwhile: `known` shows that.

        Args:
            sink: The sink's name.
            limit: Maximum number.

        Raises:
            StorageError: The journal cannot be read, or it could not record what is delivered. Nothing is claimed.
        """

    def release(self, claimed: Iterable[ClaimedEvent]) -> None:
        """End claims and change nothing else: the events are due. Never raises; a claim that has ended is ignored."""

    def reschedule(self, claimed: ClaimedEvent, *, attempts: int, due_in_secs: float, error: str | None) -> None:
        """Try a claimed event again later; never raises. It is written by the next `flush` at the latest.

        The claim ends when this is written, so that the event is not claimed before its delay is over. If it can never
        be written, the claim ends as by `release`.

        Args:
            claimed: The event as `claim_due` returned it; one that the operator deleted or moved is not changed.
            attempts: Number of attempts so far.
            due_in_secs: Delay from now on, at most `DUE_HORIZON_SECS`.
            error: The error of the last attempt; None to keep the former one.
        """

    def mark_dead(self, dead: Sequence[NewDeadLetter]) -> None:
        """Make claimed events dead letters, even beyond the room for dead letters; their claims end in any case.

        When this returns, it survives a loss of power. Events that the operator deleted or moved are not changed.

        Raises:
            StorageError: All of them are still pending and due, as after `release`.
        """

    def mark_removed(self, sinks: Collection[str]) -> None:
        """Give pending events of sinks that were removed the reason `sink_removed`; they stay pending.

        An event whose sink is back loses the reason.

        Args:
            sinks: The names of the configured sinks.

        Raises:
            StorageError: It cannot be written.
        """

    def counts(self) -> Mapping[tuple[str, str], int]:
        """Number of stored events by (sink, "pending" or "dead").

        Raises:
            StorageError: It cannot be read.
        """

    def stored(self) -> Sequence[StoredCount]:
        """The numbers of stored events by sink and state, with the age of the oldest.

        Raises:
            StorageError: It cannot be read.
        """

    def dead_letters(self) -> Mapping[tuple[str, str], int]:
        """Number of dead letters by (sink, reason).

        Raises:
            StorageError: It cannot be read.
        """

    def stored_bytes(self) -> int:
        """The size of the stored events, which `max_bytes` limits.

        Raises:
            StorageError: It cannot be read.
        """

    @property
    def trouble(self) -> str:
        """Why it cannot be written, as far as that is known without writing; empty if no problem is known."""

    def status(self) -> JournalStatus:
        """The state of the journal. This writes to it, so that a full disk is noticed now, not at the next event."""

    # --- upkeep -------------------------------------------------------------------------------------------------------

    @property
    def is_writable(self) -> bool:
        """Whether all accepted pairs are written and further ones can be; if not, no new pull should start."""

    def flush(self) -> None:
        """Write what waits in memory; never raises. To be called every second; a failure is logged once."""

    def prune(self, share: float = 1.0) -> None:
        """Delete what the ledger no longer needs; never raises. Stored events are never deleted.

        It deletes pairs whose event was confirmed more than `CONFIRMED_KEPT_SECS` ago, and pairs that were accepted
        longer ago than the configured number of days. An occurrence is deleted together with its pairs,
        `CONFIRMED_KEPT_SECS` after it was confirmed, or the configured number of days after its last lease.

        Args:
            share: The share of the ledger to examine, 0 to 1; the next call continues after it.
        """

    def note_time(self, name: str, ago_secs: float = 0.0) -> None:
        """Record when something last happened, for `vodpoller status`; never raises.

        Args:
            name: What happened: "pull" or "confirm".
            ago_secs: Time since then.
        """

    def shift(self, secs: float) -> None:
        """Keep ages and delays as they are after the clock of this machine was set forward by `secs` seconds.

        Never raises; if this cannot be written, ages and delays jump.
        """

    def close(self) -> None:
        """Write what waits in memory, and release the journal for other processes. The last call."""
