"""When a sink may be called: its receiver asked to wait (`Retry-After`), or accepts a limited number per minute."""

import time
from collections import deque
from collections.abc import Callable
from typing import Final

_WINDOW_SECS: Final = 60.0
_SOON_SECS: Final = 2.0


class Spacing:
    """Spaces calls evenly, so that a receiver gets at most `max_per_minute` of them in any interval of 60 s.

    A request reaches the receiver at some moment of its call. So a call counts from its beginning until 60 s after its
    end. The calls of the previous process are not known: this one begins as if the previous one had made as many calls
    as the limit allows until now, and each had reached the receiver as late as possible. Not thread-safe: the worker's
    lock guards it.

    Args:
        max_per_minute: Maximum number of calls in 60 s.
        call_secs: The time limit of a call, in seconds.
        monotonic: The clock, in seconds.

    Attributes:
        interval_secs: Minimum time between the beginnings of two calls.
    """

    def __init__(
        self, *, max_per_minute: int, call_secs: float, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self.interval_secs = _WINDOW_SECS / max_per_minute
        self._max_calls = max_per_minute
        self._monotonic = monotonic
        last_arrival = monotonic() + call_secs
        self._ends = deque(last_arrival - ahead * self.interval_secs for ahead in reversed(range(max_per_minute)))
        self._running = 0
        self._begun_at = last_arrival

    def free_at(self) -> float:
        """Monotonic time from which the next call may begin; it may become later while calls are running."""
        evenly_at = self._begun_at + self.interval_secs
        if self._running + len(self._ends) < self._max_calls:
            return evenly_at
        oldest_end = self._ends[0] if self._ends else self._monotonic()
        return max(evenly_at, oldest_end + _WINDOW_SECS)

    def begin(self) -> None:
        """A call begins."""
        self._begun_at = self._monotonic()
        self._running += 1
        while self._ends and self._ends[0] + _WINDOW_SECS <= self._begun_at:
            self._ends.popleft()

    def end(self) -> None:
        """A call has ended."""
        self._running -= 1
        self._ends.append(self._monotonic())


class Pause:
    """What keeps a worker from calling its sink now. Not thread-safe: the worker's lock guards it.

    Args:
        max_per_minute: See `Sink.max_per_minute`.
        call_secs: The time limit of a call, in seconds.
        monotonic: The clock, in seconds.

    Attributes:
        asked_until: Monotonic time until which the receiver asked to wait; 0.0 if it never asked.
    """

    def __init__(self, *, max_per_minute: int | None, call_secs: float, monotonic: Callable[[], float]) -> None:
        self.asked_until = 0.0
        self._monotonic = monotonic
        self._max_per_minute = max_per_minute
        self._spacing: Spacing | None = None
        if max_per_minute is not None:
            self._spacing = Spacing(max_per_minute=max_per_minute, call_secs=call_secs, monotonic=monotonic)

    def ask(self, secs: float) -> None:
        """The receiver asks to wait this number of seconds from now."""
        self.asked_until = max(self.asked_until, self._monotonic() + secs)

    @property
    def is_spaced(self) -> bool:
        """Whether calls are counted: then `begin` and `end` must be called for each."""
        return self._spacing is not None

    @property
    def is_asked(self) -> bool:
        """Whether the time for which the receiver asked to wait is not over."""
        return self.asked_until > self._monotonic()

    @property
    def holds(self) -> bool:
        """Whether no call may begin now."""
        return self.free_at() > self._monotonic()

    def free_at(self, ahead: int = 0) -> float:
        """Monotonic time before which a call does not begin.

        Args:
            ahead: Number of calls that come before it.
        """
        if self._spacing is None:
            return self.asked_until
        return max(self.asked_until, self._spacing.free_at()) + ahead * self._spacing.interval_secs

    def outlasts(self, deadline: float | None, ahead: int) -> bool:
        """Whether the pause lasts longer than an event can wait.

        Args:
            deadline: Monotonic time until which the event can wait. None for a stored event: it does not wait while the
                receiver asks to wait, but it waits for `max_per_minute`.
            ahead: Number of events that come before it.
        """
        if deadline is None:
            return self.is_asked
        free_at = self.free_at(ahead)
        return free_at > self._monotonic() and free_at >= deadline

    def why(self, error: str, until: str) -> str:
        """Why an event is not sent now, for a person.

        Args:
            error: The receiver's error that asked to wait.
            until: The time from which the event may be sent.
        """
        if self._spacing is None or self.asked_until >= self._spacing.free_at():
            return f"the receiver asked to wait until {until}: {error}"
        return f"it may be sent at {until} (max_per_minute = {self._max_per_minute}), when its lease has ended"

    def room(self, stored: int) -> int | None:
        """Number of further stored events that may be queued; None if the pause sets no limit.

        The limit keeps new events from waiting behind all that is stored.

        Args:
            stored: Number of stored events that are queued.
        """
        if self.is_asked:
            return 0
        if self._spacing is None:
            return None
        return max(int(_SOON_SECS / self._spacing.interval_secs), 1) - stored

    def begin(self) -> None:
        """A call begins."""
        if self._spacing is not None:
            self._spacing.begin()

    def end(self) -> None:
        """A call has ended."""
        if self._spacing is not None:
            self._spacing.end()
