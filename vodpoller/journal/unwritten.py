"""Accepted pairs that the journal could not write: kept in memory until it can, with the marks that wait for them."""

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from vodpoller.journal.contract import Position

Pair = tuple[bytes, str]
Times = tuple[float, float | None]  # accepted, confirmed: in seconds since 1970


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The unwritten pairs and marks at one moment.

    Args:
        pairs: The (key, sink) pairs, and when each was accepted and confirmed.
        positions: The positions to which the marks will move, by sink.
    """

    pairs: Mapping[Pair, Times]
    positions: Mapping[str, Position]


class Unwritten:
    """Accepted (key, sink) pairs that are not in the file, and marks that must not move beyond them.

    `len` and `in` refer to the pairs. They need no lock: a pair is removed only after it was written.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pairs: dict[Pair, Times] = {}
        self._positions: dict[str, Position] = {}

    def __contains__(self, pair: Pair) -> bool:
        return pair in self._pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def keys_of(self, sink: str) -> set[bytes]:
        """The keys that a sink has accepted."""
        with self._lock:
            return {key for key, of in self._pairs if of == sink}

    def add(self, sink: str, keys: Sequence[bytes], *, accepted_at: float, position: Position | None) -> None:
        """Keep pairs that could not be written.

        Args:
            sink: The sink's name.
            keys: The keys of the events that it has.
            accepted_at: When it accepted them, in seconds since 1970.
            position: The present end of its file; None if it is not a file.
        """
        with self._lock:
            self._pairs |= dict.fromkeys([(key, sink) for key in keys], (accepted_at, None))
            if position is not None:
                self._positions[sink] = position

    def confirm(self, keys: Collection[bytes], at: float) -> set[bytes]:
        """Note that these events were confirmed at a time in seconds since 1970.

        Returns:
            The keys of those that are unwritten.
        """
        if not self._pairs:
            return set()
        with self._lock:
            done = set(keys)
            waiting = {
                pair: (accepted_at, confirmed_at or at)
                for pair, (accepted_at, confirmed_at) in self._pairs.items()
                if pair[0] in done
            }
            self._pairs |= waiting
        return {key for key, _ in waiting}

    def snapshot(self) -> Snapshot:
        """The pairs and marks that are unwritten now."""
        with self._lock:
            return Snapshot(dict(self._pairs), dict(self._positions))

    def remove(self, written: Snapshot) -> None:
        """Remove what a snapshot holds, since it was written. What has changed since the snapshot stays."""
        with self._lock:
            for pair, times in written.pairs.items():
                if self._pairs.get(pair) == times:
                    del self._pairs[pair]
            for sink, position in written.positions.items():
                if self._positions.get(sink) is position:
                    del self._positions[sink]
