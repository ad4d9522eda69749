"""Claims: a pending event that is claimed is given to no other claimant until the claim ends.

Claims are in memory only: the lock beside the file makes this process the only claimant.
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
        read: Runs a query and returns its rows. Raises `StorageError`.
        unwritten: Pairs that were accepted, but may still be stored in the file.
    """

    def __init__(self, read: Callable[[str, Sequence[Any]], list[Any]], unwritten: Unwritten) -> None:
        self._read = read
        self._unwritten = unwritten
        self._claiming = threading.Lock()
        self._lock = threading.Lock()
        self._claims: dict[Pair, ClaimedEvent] = {}

    def claim_due(self, sink: str, limit: int, *, now: float) -> tuple[list[ClaimedEvent], list[tuple[int]]]:
        """Claim pending events that are due; see `journal.contract.Journal.claim_due`.

        Args:
            sink: The sink's name.
            limit: Maximum number.
            now: The time, in seconds since 1970.

        Returns:
            The claimed events; and the numbers of rows whose pair is in the ledger, which can be deleted.

        Raises:
            StorageError: It cannot be read; nothing is claimed.
        """
        with self._claiming:
            # Memory is read before the file: a pair that leaves memory after this is already in the file, so the query
            # finds it. Claims are read before unwritten pairs: an accepted pair is in the latter before its claim ends.
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
        """Events that are due and not held; and the numbers of rows whose pair is in the ledger."""
        if limit <= 0 or not self._read(LETTERS_BYTES, ())[0][0]:
            return [], []
        due: list[Any] = []
        # A due time beyond the longest delay was set by a wrong clock: it counts as due, too. Two queries, one for each
        # range of the index: one query for both would read all pending rows.
        for condition, moment in (("<=", now), (">", now + DUE_HORIZON_SECS + 60)):
            due += self._read(
                "SELECT id, key, attempts, stored_at, source, sub_app_id, event_type, body, EXISTS ("
                " SELECT 1 FROM ledger WHERE ledger.key = letters.key AND ledger.sink = letters.sink"
                " AND (confirmed_at IS NULL OR confirmed_at >= ?))"
                f" FROM letters WHERE state = 'pending' AND sink = ? AND due_at {condition} ?"
                # In the SQL text: there may be more of them than a statement can have parameters.
                f" AND id NOT IN ({','.join(map(str, held.values()))}) ORDER BY due_at, id LIMIT ?",
                (now - CONFIRMED_KEPT_SECS, sink, moment, limit + len(unwritten) - len(due)),
            )
        not_to_give = held.keys() | unwritten  # a held pair may have been stored again since then, in another row
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
