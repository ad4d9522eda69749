"""Waits between attempts: exponential, half of each drawn at random."""

import random
from typing import Final

_DOUBLINGS_MAX: Final = 64  # beyond that every wait is the longest one, and a float would overflow some day


class Backoff:
    """Exponentially growing waits, half of each drawn at random, so that many that fail together spread out.

    Args:
        first_secs: The first wait is between half of this and this.
        most_secs: No wait is longer.
    """

    def __init__(self, *, first_secs: float, most_secs: float) -> None:
        self._first_secs = first_secs
        self._most_secs = most_secs

    def secs(self, attempt: int) -> float:
        """How long to wait after the attempt of this number, the first being 1."""
        full_secs = min(self._first_secs * 2.0 ** min(attempt - 1, _DOUBLINGS_MAX), self._most_secs)
        return full_secs / 2 + random.uniform(0, full_secs / 2)  # noqa: S311 - no secret
