"""Time for stamps that are compared later: the wall clock's, but without its jumps."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

STEP_SECS: Final = 2.0


class SteadyClock:
    """Seconds since 1970, going on evenly until `adopt` is called.

    The caller moves the stamps that exist along with it; until then no reader sees an hour pass in a moment.

    Args:
        wall: The clock that may be set.
        monotonic: The one that cannot.
    """

    def __init__(
        self, *, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._offset_secs = wall() - monotonic()

    def __call__(self) -> float:
        """The time."""
        return self._monotonic() + self._offset_secs

    def adopt(self) -> float:
        """Follow the wall clock.

        Returns:
            By how much it was set since the last call, in seconds; 0 for the small corrections of NTP.
        """
        offset_secs = self._wall() - self._monotonic()
        step_secs, self._offset_secs = offset_secs - self._offset_secs, offset_secs
        return step_secs if abs(step_secs) >= STEP_SECS else 0.0


def timestamp(at: float) -> str:
    """A time in seconds since 1970 as a person reads it: UTC, to the second."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
