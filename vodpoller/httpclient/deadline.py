"""The time limit of a call."""

from collections.abc import Callable
from typing import Self


class Deadline(float):
    """A timeout in seconds that knows when it ends. urllib3 uses it as an ordinary number."""

    __slots__ = ("_ends_at", "_monotonic")

    _ends_at: float
    _monotonic: Callable[[], float]

    def __new__(cls, secs: float, monotonic: Callable[[], float]) -> Self:
        """Start the time now."""
        made = super().__new__(cls, secs)
        made._ends_at = monotonic() + secs
        made._monotonic = monotonic
        return made

    def left_secs(self) -> float:
        """The number of seconds that are left.

        Raises:
            TimeoutError: No time is left.
        """
        left_secs = self._ends_at - self._monotonic()
        if left_secs <= 0:
            raise TimeoutError("the time limit of the call is over")
        return left_secs

    def restarted(self, total: "Deadline") -> "Deadline":
        """A deadline of the same length that starts now and ends no later than another one.

        Args:
            total: The other deadline.

        Raises:
            TimeoutError: The other deadline is over.
        """
        return Deadline(min(self, total.left_secs()), self._monotonic)
