"""Keeps to the quota of an API action by a wait before each request."""

import threading
import time
from collections.abc import Callable
from math import inf


class RateLimiter:
    """Evenly spaced slots for one API action, for all threads of the process.

    The slots are some percent further apart than the quota requires, and a thread that is late may use at most two past
    slots. So late wake-ups lose no capacity, and no period of one second, at any start time, holds more slots than the
    quota. The spare share leaves room for requests that reach the server closer together than they were sent.

    Args:
        requests_per_sec: The quota.
        spare: The share of the quota that is left unused.
        monotonic: The monotonic clock, in seconds.
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
            timeout_secs: The maximum time to wait; None: no maximum.

        Returns:
            False, without waiting and without using a slot, if no slot comes within the time.
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
        """Halve the rate after the server refused a request. It then recovers by 15% of the quota per second.

        All refusals within one second count as one, even if several threads report them.
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
