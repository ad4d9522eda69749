"""What a journal promises: the one interface through which all others see it, and the values that cross it.

A journal holds two things. The *ledger* is the set of (key, sink) pairs that sinks have accepted. A *stored event* is
an (event, sink) that vodpoller has taken over from VOD: *pending*, which is tried again, or a *dead letter*, which
waits for the operator. A pair is in one of them at most: `accept` deletes what is stored, `store` leaves out what was
accepted, in whichever order they come. It also knows the *occurrences* of events without an id of their own (see
`vodpoller.events.identity`), so that such an event has its key again when VOD brings it again, also after a restart.

No method takes or returns a time, only ages and delays in seconds: the journal has the one clock. `StorageError` is the
only error. All methods may be called from any thread.
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
    """What the journal knows of an event at a sink."""

    ACCEPTED = auto()
    PENDING = auto()
    DEAD = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """How far a sink's file is known to be in the ledger: all before `offset_bytes` is.

    Args:
        inode: Of the file; it follows a rename.
        offset_bytes: End of the last line that was written and synced.
    """

    inode: int
    offset_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """When an answer was asked for and came.

    Args:
        source: The name of the source that brought it.
        sent_ago_secs: How long ago its pull was sent, after any wait for the limiter.
        answered_ago_secs: How long ago it came.
        lease_secs: How long the lease lasts that began when the pull was sent.
        tries_secs: For a callback: VOD does not bring an event again this long after its last try began. None if empty
            answers tell what it does not have any more.
    """

    source: str
    sent_ago_secs: float
    answered_ago_secs: float
    lease_secs: float
    tries_secs: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Portion:
    """A part of what a sink's file holds beyond its mark.

    Args:
        keys: Of the lines that say which event they are of.
        content_keys: Of each other line, in their order, the content keys that its event may have.
        position: Where it ends: when its keys are in the ledger, all before is.
        read: How much of all that is to be read has been read then, 0 to 1.
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
        error: What the last attempt said.
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
    """A pending event that its claimant, and no other, may deliver now.

    Args:
        row: The journal's number for it, never used twice.
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
    """A claimed event that is to be a dead letter.

    Args:
        claimed: As `claim_due` gave it.
        attempts: Number of attempts so far.
        reason: One word for filters; see `vodpoller.settlement.Reason`.
        error: What the last attempt said.
    """

    claimed: ClaimedEvent
    attempts: int
    reason: str
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCount:
    """How much is stored for one sink in one state.

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
        """Say which occurrences the events without an id of their own are that an answer brings.

        When this returns, a later identification will find them again, also after a loss of power, until `confirmed`
        is told of them.

        Args:
            content_keys: Of the events.
            pulled: The answer that brings them.

        Returns:
            Their keys, in the order of the events. Equal content does not get the same key twice.

        Raises:
            StorageError: A new one cannot be written: none of the events may be delivered or stored.
        """

    def answered_empty(self, pulled: Pulled) -> None:
        """A pull brought nothing, which can prove that VOD does not have an occurrence any more; never raises.

        Args:
            pulled: The answer.
        """

    def answer_lost(self, source: str, *, sent_ago_secs: float) -> None:
        """A pull failed just now, or its answer was cut off: VOD may have handed out events unseen; never raises.

        Args:
            source: The source's name.
            sent_ago_secs: How long ago it was sent, or longer.
        """

    # --- the ledger ---------------------------------------------------------------------------------------------------

    def known(self, pairs: Iterable[tuple[bytes, str]]) -> Mapping[tuple[bytes, str], Known]:
        """What is known of (key, sink) pairs; a pair of which nothing is known is left out.

        An accepted pair is known until `CONFIRMED_KEPT_SECS` after its event was confirmed: identical content that
        comes later is a new event.

        Raises:
            StorageError: It cannot be read, so that nothing can be said of any pair.
        """

    def accept(self, sink: str, keys: Sequence[bytes], position: Position | None) -> None:
        """Remember that a sink has events; never raises. What is stored for these pairs is deleted, their claims end.

        If it cannot be written the pairs are known all the same, and are written by a later `flush`; until then
        `is_writable` is False, and a process that ends forgets them.

        Args:
            sink: The sink's name.
            keys: Of the events that it has.
            position: Where its file ends now; None if it is not a file. The mark never passes a pair that is not
                written.
        """

    def confirmed(self, keys: Sequence[bytes]) -> None:
        """VOD will not deliver these events again; never raises.

        An occurrence is not found again from now on. The rest is written by the next `flush` at the latest.
        """

    def position(self, sink: str) -> Position | None:
        """The mark of a sink's file: all below it is in the ledger. None if there is not one.

        Raises:
            StorageError: It cannot be read.
        """

    def recover(self, sink: str, portion: Portion) -> None:
        """Enter a part of what a sink's file holds beyond its mark, as `accept` does, and move the mark to its end.

        When this returns it would survive a loss of power. A pair that is in the ledger stays as it is. A line that
        does not say which event it is of gets the oldest occurrence of its content that may come again and is not in
        the sink's ledger; if there is none, it is of an event that will not come again, or it is written twice.

        Raises:
            StorageError: Nothing of the portion was written, and the mark is where it was.
        """

    # --- stored events ------------------------------------------------------------------------------------------------

    def store(self, letters: Sequence[Letter]) -> None:
        """Take events over from VOD. When this returns they would survive a loss of power.

        A pair that is stored stays as it is, one that was accepted is left out; neither needs room. Dead letters take
        at most half of the room, so that they never keep pending events out.

        Raises:
            JournalFullError: There was no room for some, which VOD must keep: `refused` has their events' keys. All
                others are stored.
            StorageError: None is stored: VOD must keep them all.
        """

    def claim_due(self, sink: str, limit: int) -> Sequence[ClaimedEvent]:
        """Claim pending events of a sink whose delay is over, the longest overdue first.

        What is claimed is not given again, here or to another claimant, until the claim ends: by `release`,
        `reschedule`, `mark_dead`, an `accept` of the pair, or the end of the process. A pair that was accepted is never
        given. The operator may delete or move a claimed event meanwhile: `known` tells.

        Args:
            sink: The sink's name.
            limit: Maximum number.

        Raises:
            StorageError: It cannot be read, or what is delivered now could not be remembered. Nothing is claimed.
        """

    def release(self, claimed: Iterable[ClaimedEvent]) -> None:
        """End claims and change nothing else: the events are due. Never raises; a claim that has ended is ignored."""

    def reschedule(self, claimed: ClaimedEvent, *, attempts: int, due_in_secs: float, error: str | None) -> None:
        """Have a claimed event tried again later; never raises. Written by the next `flush` at the latest.

        The claim ends when this is written, so that it is not given before its delay is over; or, as if released, when
        it never will be.

        Args:
            claimed: As `claim_due` gave it; one that the operator deleted or moved is left alone.
            attempts: Number of attempts so far.
            due_in_secs: Delay from now on, at most `DUE_HORIZON_SECS`.
            error: What the last attempt said; None to keep what was said before.
        """

    def mark_dead(self, dead: Sequence[NewDeadLetter]) -> None:
        """Make claimed events dead letters, even beyond the room of dead letters; their claims end in any case.

        When this returns they would survive a loss of power. What the operator deleted or moved is left alone.

        Raises:
            StorageError: All of them are pending and due, as if released.
        """

    def mark_removed(self, sinks: Collection[str]) -> None:
        """Give pending events of sinks that were removed the reason `sink_removed`; they stay pending.

        An event whose sink is back loses the reason.

        Args:
            sinks: The names of the sinks that there are.

        Raises:
            StorageError: It cannot be written.
        """

    def counts(self) -> Mapping[tuple[str, str], int]:
        """Number of stored events by (sink, "pending" or "dead").

        Raises:
            StorageError: It cannot be read.
        """

    def stored(self) -> Sequence[StoredCount]:
        """What is stored, by sink and state, with its age.

        Raises:
            StorageError: It cannot be read.
        """

    def dead_letters(self) -> Mapping[tuple[str, str], int]:
        """Number of dead letters by (sink, reason).

        Raises:
            StorageError: It cannot be read.
        """

    def stored_bytes(self) -> int:
        """What stored events take, of the room that they may take.

        Raises:
            StorageError: It cannot be read.
        """

    @property
    def trouble(self) -> str:
        """Why it cannot be written, as far as that is known without writing; empty if nothing speaks against it."""

    def status(self) -> JournalStatus:
        """How the journal is. It is written to: a disk that became full is noticed now, not at the next event."""

    # --- upkeep -------------------------------------------------------------------------------------------------------

    @property
    def is_writable(self) -> bool:
        """Whether all that was accepted is written and more can be: if not, no new pull should start."""

    def flush(self) -> None:
        """Write what waits in memory; never raises. To be called every second: a failure is said once."""

    def prune(self, share: float = 1.0) -> None:
        """Delete what the ledger no longer needs; never raises. What is stored is never deleted.

        That are pairs whose event was confirmed `CONFIRMED_KEPT_SECS` ago, and those that were accepted longer ago
        than the configured number of days. An occurrence goes together with its pairs, `CONFIRMED_KEPT_SECS` after it
        was confirmed, or the configured number of days after its last lease.

        Args:
            share: How much of the ledger to look at, 0 to 1; the next call goes on behind it.
        """

    def mark(self, name: str, ago_secs: float = 0.0) -> None:
        """Remember when something last happened, for `vodpoller status`; never raises.

        Args:
            name: What happened.
            ago_secs: How long ago.
        """

    def shift(self, secs: float) -> None:
        """The clock of this machine was set forward by this number of seconds: ages and delays stay what they are.

        Never raises; if it cannot be written, ages and delays jump.
        """

    def close(self) -> None:
        """Write what waits in memory and let another process have the journal. The last call."""
