"""Back-off: exponential waits between attempts, half of each of them random."""

import random
from typing import Final

_DOUBLINGS_MAX: Final = 64  # every wait has its maximum long before; without a limit a float would overflow


class Backoff:
    """Exponentially growing waits. Half of each is random, so that callers that fail together do not retry together.

    Args:
        first_secs: The first wait is between half of this and this.
        max_secs: No wait is longer.
    """

    def __init__(self, *, first_secs: float, max_secs: float) -> None:
        self._first_secs = first_secs
        self._max_secs = max_secs

    def secs(self, attempt: int) -> float:
        """Seconds to wait after an attempt.

        Args:
            attempt: Number of the attempt; the first is 1.
        """
        full_secs = min(self._first_secs * 2.0 ** min(attempt - 1, _DOUBLINGS_MAX), self._max_secs)
        return full_secs / 2 + random.uniform(0, full_secs / 2)  # noqa: S311 - no secret
