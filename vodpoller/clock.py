"""A clock for stored timestamps: Unix time that does not jump; and timestamps as text."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

STEP_SECS: Final = 2.0


class SteadyClock:
    """Seconds since 1970. It runs evenly, also if the wall clock is set, until `adopt` is called.

    The caller of `adopt` shifts stored timestamps by the step that it returns, so that no age changes by the jump.

    Args:
        wall: The clock that may be set.
        monotonic: The clock that cannot be set.
    """

    def __init__(
        self, *, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._offset_secs = wall() - monotonic()

    def __call__(self) -> float:
        """The time, in seconds since 1970."""
        return self._monotonic() + self._offset_secs

    def adopt(self) -> float:
        """Read the wall clock again, and follow it from now on.

        Returns:
            The step by which it was set since the last call, in seconds; 0 for small corrections of NTP.
        """
        offset_secs = self._wall() - self._monotonic()
        step_secs, self._offset_secs = offset_secs - self._offset_secs, offset_secs
        return step_secs if abs(step_secs) >= STEP_SECS else 0.0


def timestamp(at: float) -> str:
    """A time in seconds since 1970 as text for a person: UTC, to the second."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
