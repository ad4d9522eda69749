"""The breaker: when a sink that fails gets no more events, and when it is tried again."""

import time
from collections.abc import Callable

from vodpoller.backoff import Backoff


class Breaker:
    """Stops attempts at a sink after several distinct events in a row have failed, and probes whether it is back.

    Rejections count as failures: a wrongly deployed receiver that rejects every event must not turn all events into
    dead letters. Not thread-safe: the worker's lock guards it.

    Args:
        failures: Number of distinct events in a row whose failure opens it.
        monotonic: The clock, in seconds.

    Attributes:
        open: Whether it keeps events from the sink.
        probe_at: Monotonic time of the next probe, while it is open.
    """

    _PROBES = Backoff(first_secs=1.0, max_secs=30.0)

    def __init__(self, *, failures: int, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._failures = failures
        self._monotonic = monotonic
        self._failed: set[bytes] = set()
        self._failed_probes = 0
        self.probe_at = 0.0
        self._probing: bytes | None = None
        self._last_probed: bytes | None = None
        self.open = False

    def wants_probe(self) -> bool:
        """Whether it is open and a probe is due."""
        return self.open and self._probing is None and self._monotonic() >= self.probe_at

    def start_probe(self, key: bytes) -> None:
        """Note that this event is tried although the breaker is open."""
        self._probing = self._last_probed = key

    def was_probed_last(self, key: bytes) -> bool:
        """Whether the last probe was this event: another event is a better probe, unless none comes within 5 s."""
        return key == self._last_probed and self._monotonic() < self.probe_at + 5.0

    def succeeded(self) -> bool:
        """Note that the sink accepted an event.

        Returns:
            Whether this closed the breaker.
        """
        self._failed.clear()
        self._failed_probes = 0
        self._probing = None
        was_open, self.open = self.open, False
        return was_open

    def failed(self, key: bytes) -> bool:
        """Note that the sink did not accept this event.

        Returns:
            Whether this opened the breaker.
        """
        if self.open:
            if key == self._probing:
                self._probing = None
                self._failed_probes += 1
                self.probe_at = self._monotonic() + self._PROBES.secs(self._failed_probes)
            return False
        self._failed.add(key)
        if len(self._failed) < self._failures:
            return False
        self._failed.clear()
        self.open = True
        self._failed_probes = 1
        self._probing = None
        self.probe_at = self._monotonic() + self._PROBES.secs(1)
        return True
