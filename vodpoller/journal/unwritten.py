"""What sinks accepted and the journal could not write: kept in memory until it can, with the marks that must wait."""

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from vodpoller.journal.contract import Position

Pair = tuple[bytes, str]
Times = tuple[float, float | None]  # accepted, confirmed: in seconds since 1970


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is unwritten at one moment.

    Args:
        pairs: The (key, sink) pairs, and when each was accepted and confirmed.
        positions: The marks that wait, by sink.
    """

    pairs: Mapping[Pair, Times]
    positions: Mapping[str, Position]


class Unwritten:
    """Accepted (key, sink) pairs that are in no file, and marks of sinks' files that must not pass them.

    As a collection it is that of the pairs. Reading it needs no lock: a pair leaves only after it was written.
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
        """Keep what could not be written.

        Args:
            sink: The sink's name.
            keys: Of the events that it has.
            accepted_at: Since when, in seconds since 1970.
            position: Where its file ends now; None if it is not a file.
        """
        with self._lock:
            self._pairs |= dict.fromkeys([(key, sink) for key in keys], (accepted_at, None))
            if position is not None:
                self._positions[sink] = position

    def confirm(self, keys: Collection[bytes], at: float) -> set[bytes]:
        """VOD has forgotten these events, at a time in seconds since 1970.

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
        """What is unwritten now."""
        with self._lock:
            return Snapshot(dict(self._pairs), dict(self._positions))

    def remove(self, written: Snapshot) -> None:
        """What a snapshot holds was written. What was changed since then stays: it is written next."""
        with self._lock:
            for pair, times in written.pairs.items():
                if self._pairs.get(pair) == times:
                    del self._pairs[pair]
            for sink, position in written.positions.items():
                if self._positions.get(sink) is position:
                    del self._positions[sink]
