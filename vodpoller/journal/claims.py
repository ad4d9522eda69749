"""Claims: which pending events are given to a claimant, so that no other delivers them meanwhile.

They are in memory: the lock beside the file makes this process the only claimant.
"""

import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from vodpoller.events.event import restore_event
from vodpoller.journal.contract import CONFIRMED_KEPT_SECS, DUE_HORIZON_SECS, ClaimedEvent
from vodpoller.journal.statements import KEYS_PER_QUERY, LETTERS_BYTES
from vodpoller.journal.unwritten import Pair, Unwritten


class Claims:
    """The claims on the pending events of one journal.

    Args:
        read: Runs a query, whose rows it returns. Raises `StorageError`.
        unwritten: Pairs that were accepted and are stored in the file nevertheless.
    """

    def __init__(self, read: Callable[[str, Sequence[Any]], list[Any]], unwritten: Unwritten) -> None:
        self._read = read
        self._unwritten = unwritten
        self._claiming = threading.Lock()
        self._lock = threading.Lock()
        self._claims: dict[Pair, ClaimedEvent] = {}

    def claim_due(self, sink: str, limit: int, *, now: float) -> tuple[list[ClaimedEvent], list[tuple[int]]]:
        """Claim pending events that are due, as `journal.contract.Journal.claim_due` says.

        Args:
            sink: The sink's name.
            limit: Maximum number.
            now: The time, in seconds since 1970.

        Returns:
            What is claimed; and the rows of pending events that the ledger has, which can be deleted.

        Raises:
            StorageError: It cannot be read; nothing is claimed.
        """
        with self._claiming:
            # Memory before the file: what leaves memory after this was written before, and what is read sees that.
            # Claims before what is unwritten: a pair that is accepted meanwhile is there before its claim ends.
            with self._lock:
                held = {key for key, of in self._claims if of == sink}
            held |= self._unwritten.keys_of(sink)
            free = self._due_rows(sink, now, limit, held)
            found, accepted = self._read_due(sink, now, free)
            with self._lock:
                self._claims |= {(stored.event.key, sink): stored for stored in found}
        return found, accepted

    def _due_rows(self, sink: str, now: float, limit: int, held: Collection[bytes]) -> list[int]:
        """The numbers of what is due and not held; their bodies are read later, those of what is held never."""
        if limit <= 0 or not self._read(LETTERS_BYTES, ())[0][0]:
            return []
        due = self._read(
            # A due time beyond any delay was set by a clock that was wrong: it has come as well.
            "SELECT id, key FROM letters WHERE state = 'pending' AND sink = ? AND (due_at <= ? OR due_at > ?)"
            " ORDER BY due_at, id LIMIT ?",
            (sink, now, now + DUE_HORIZON_SECS + 60, limit + len(held)),
        )
        return [row for row, key in due if key not in held][:limit]

    def _read_due(self, sink: str, now: float, rows: Sequence[int]) -> tuple[list[ClaimedEvent], list[tuple[int]]]:
        """The stored events of these numbers, and the numbers of those that the ledger has."""
        found: list[ClaimedEvent] = []
        accepted: list[tuple[int]] = []
        for first in range(0, len(rows), KEYS_PER_QUERY):
            portion = rows[first : first + KEYS_PER_QUERY]
            marks = ",".join("?" * len(portion))
            read = self._read(
                "SELECT id, key, attempts, stored_at, source, sub_app_id, event_type, body, EXISTS ("
                " SELECT 1 FROM ledger WHERE ledger.key = letters.key AND ledger.sink = letters.sink"
                " AND (confirmed_at IS NULL OR confirmed_at >= ?))"
                f" FROM letters WHERE id IN ({marks}) AND state = 'pending' AND sink = ? ORDER BY due_at, id",
                (now - CONFIRMED_KEPT_SECS, *portion, sink),
            )
            for row, key, attempts, stored_at, source, sub_app_id, event_type, body, is_accepted in read:
                if is_accepted:
                    accepted.append((row,))
                    continue
                event = restore_event(body=body, key=key, event_type=event_type, source=source, sub_app_id=sub_app_id)
                age_secs = max(now - stored_at, 0.0)
                found.append(ClaimedEvent(row=row, event=event, sink=sink, attempts=attempts, age_secs=age_secs))
        return found, accepted

    def release(self, claimed: Iterable[ClaimedEvent]) -> None:
        """End claims; one that has ended is ignored."""
        with self._lock:
            for stored in claimed:
                pair = (stored.event.key, stored.sink)
                if self._claims.get(pair) is stored:
                    del self._claims[pair]

    def end(self, pairs: Iterable[tuple[bytes, str]]) -> None:
        """End the claims on these pairs, if there are any."""
        if self._claims:
            with self._lock:
                for pair in pairs:
                    self._claims.pop(pair, None)
