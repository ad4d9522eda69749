"""The time limit of a call."""

from collections.abc import Callable
from typing import Self


class Deadline(float):
    """A timeout that knows when it ends: urllib3 takes it for the number that it is."""

    __slots__ = ("_ends_at", "_monotonic")

    _ends_at: float
    _monotonic: Callable[[], float]

    def __new__(cls, secs: float, monotonic: Callable[[], float]) -> Self:
        """It begins now."""
        made = super().__new__(cls, secs)
        made._ends_at = monotonic() + secs
        made._monotonic = monotonic
        return made

    def left_secs(self) -> float:
        """How long it may still take.

        Raises:
            TimeoutError: No time is left.
        """
        left_secs = self._ends_at - self._monotonic()
        if left_secs <= 0:
            raise TimeoutError("the time of the call is over")
        return left_secs

    def anew(self, whole: "Deadline") -> "Deadline":
        """As long again from now on, but no longer than another one lasts.

        Raises:
            TimeoutError: That one is over.
        """
        return Deadline(min(self, whole.left_secs()), self._monotonic)
