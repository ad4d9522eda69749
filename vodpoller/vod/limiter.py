"""The quota of an API action, kept to by waiting before a request is sent."""

import threading
import time
from collections.abc import Callable
from math import inf


class RateLimiter:
    """Evenly spaced slots for one API action, for all threads of the process.

    The slots lie some percent further apart than the quota asks for, and a thread that comes late may use slots of the
    recent past: at most two. So no capacity is lost to late wake-ups, and no second, wherever it begins, holds more
    slots than the quota, with room for requests that come closer together at the server than they were sent.

    Args:
        requests_per_sec: The quota.
        spare: The share of the quota that is left unused.
        monotonic: The clock, in seconds.
        sleep: Waits that number of seconds.
    """

    _LATE_SLOTS = 1.9
    _RECOVERY_PER_SEC = 0.15
    _FLOOR_PER_SEC = 1.0

    def __init__(
        self,
        requests_per_sec: float,
        *,
        spare: float = 0.03,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._quota = requests_per_sec
        self._aim = 1 - spare
        self._late_slots = min(self._LATE_SLOTS, spare * 2 / 3 * requests_per_sec)
        self._monotonic = monotonic
        self._sleep = sleep
        self._lock = threading.Lock()
        self._rate = requests_per_sec
        self._rate_at = monotonic()
        self._halved_at = -inf
        self._next_at = -inf

    def acquire(self, timeout_secs: float | None = None) -> bool:
        """Wait for a slot.

        Args:
            timeout_secs: None waits as long as it takes.

        Returns:
            False, at once and without using up a slot, if none comes within the time.
        """
        with self._lock:
            now = self._monotonic()
            gap_secs = 1 / (self._aim * self._recovered(now))
            slot_at = max(self._next_at, now - self._late_slots * gap_secs)
            wait_secs = slot_at - now
            if timeout_secs is not None and wait_secs > timeout_secs:
                return False
            self._next_at = slot_at + gap_secs
        if wait_secs > 0:
            self._sleep(wait_secs)
        return True

    def throttled(self) -> None:
        """The server says that it was too much: halve the rate, which then recovers by 15% of the quota per second.

        The refusals of one second count as one, however many threads report them.
        """
        with self._lock:
            now = self._monotonic()
            if now - self._halved_at < 1:
                return
            self._halved_at = now
            self._rate = max(self._recovered(now) / 2, min(self._FLOOR_PER_SEC, self._quota))

    def _recovered(self, now: float) -> float:
        gained = self._RECOVERY_PER_SEC * self._quota * (now - self._rate_at)
        self._rate_at = now
        self._rate = min(self._quota, self._rate + gained)
        return self._rate
