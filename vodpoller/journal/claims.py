"""Claims: which pending events are given to a claimant, so that no other delivers them meanwhile.

They are in memory: the lock beside the file makes this process the only claimant.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vodpoller.events.event import restore_event
from vodpoller.journal.contract import CONFIRMED_KEPT_SECS, DUE_HORIZON_SECS, ClaimedEvent
from vodpoller.journal.statements import LETTERS_BYTES
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
                held = {key: stored.row for (key, of), stored in self._claims.items() if of == sink}
            unwritten = self._unwritten.keys_of(sink)
            found, accepted = self._read_due(sink, now, limit, held, unwritten)
            with self._lock:
                self._claims |= {(stored.event.key, sink): stored for stored in found}
        return found, accepted

    def _read_due(
        self, sink: str, now: float, limit: int, held: Mapping[bytes, int], unwritten: set[bytes]
    ) -> tuple[list[ClaimedEvent], list[tuple[int]]]:
        """What is due and not held; and the numbers of those that the ledger has."""
        if limit <= 0 or not self._read(LETTERS_BYTES, ())[0][0]:
            return [], []
        due: list[Any] = []
        # A due time beyond any delay was set by a clock that was wrong: it has come as well. Two ranges of the index:
        # to ask for both at once would be to look at all that is pending.
        for condition, moment in (("<=", now), (">", now + DUE_HORIZON_SECS + 60)):
            due += self._read(
                "SELECT id, key, attempts, stored_at, source, sub_app_id, event_type, body, EXISTS ("
                " SELECT 1 FROM ledger WHERE ledger.key = letters.key AND ledger.sink = letters.sink"
                " AND (confirmed_at IS NULL OR confirmed_at >= ?))"
                f" FROM letters WHERE state = 'pending' AND sink = ? AND due_at {condition} ?"
                # In the text: there may be more of them than a statement can have parameters.
                f" AND id NOT IN ({','.join(map(str, held.values()))}) ORDER BY due_at, id LIMIT ?",
                (now - CONFIRMED_KEPT_SECS, sink, moment, limit + len(unwritten) - len(due)),
            )
        not_to_give = held.keys() | unwritten  # what is held may be stored anew since then, as another row
        found: list[ClaimedEvent] = []
        accepted: list[tuple[int]] = []
        for row, key, attempts, stored_at, source, sub_app_id, event_type, body, is_accepted in due:
            if is_accepted:
                accepted.append((row,))
            elif key not in not_to_give and len(found) < limit:
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
