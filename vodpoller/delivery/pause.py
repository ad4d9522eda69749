"""When a sink may be called: its receiver asked to be left alone for a while, or takes a limited number per minute."""

import time
from collections import deque
from collections.abc import Callable
from typing import Final

_WINDOW_SECS: Final = 60.0
_SOON_SECS: Final = 2.0


class Spacing:
    """Spaces calls evenly, so that a receiver gets at most a number of them in any 60 s, whichever 60 s it looks at.

    A request reaches the receiver at some moment of its call. So a call counts from its beginning until 60 s after its
    end. What the process before this one sent is not known: this one begins as if the other had sent as much as it may
    until now, and each of its calls had reached the receiver as late as it can. Not safe for threads: its worker
    guards it.

    Args:
        max_per_minute: The limit.
        call_secs: The time limit of a call, in seconds.
        monotonic: The clock, in seconds.

    Attributes:
        interval_secs: The time between the beginnings of two calls, at least.
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
        """Monotonic time from which the next call may begin; later if those that run last long."""
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
    """What keeps a worker from calling its sink now. Not safe for threads: the worker guards it.

    Args:
        max_per_minute: See `Sink.max_per_minute`.
        call_secs: The time limit of a call, in seconds.
        monotonic: The clock, in seconds.

    Attributes:
        asked_until: Monotonic time until which the receiver asked to be left alone.
    """

    def __init__(self, *, max_per_minute: int | None, call_secs: float, monotonic: Callable[[], float]) -> None:
        self.asked_until = 0.0
        self._monotonic = monotonic
        self._max_per_minute = max_per_minute
        self._spacing: Spacing | None = None
        if max_per_minute is not None:
            self._spacing = Spacing(max_per_minute=max_per_minute, call_secs=call_secs, monotonic=monotonic)

    def ask(self, secs: float) -> None:
        """The receiver asks to be left alone that long from now, in seconds."""
        self.asked_until = max(self.asked_until, self._monotonic() + secs)

    @property
    def is_spaced(self) -> bool:
        """Whether calls are counted: each is to have its `begin` and `end`."""
        return self._spacing is not None

    @property
    def is_asked(self) -> bool:
        """Whether the receiver wants to be left alone now."""
        return self.asked_until > self._monotonic()

    @property
    def holds(self) -> bool:
        """Whether no call may begin now."""
        return self.turn_at() > self._monotonic()

    def turn_at(self, ahead: int = 0) -> float:
        """Monotonic time before which a call does not begin.

        Args:
            ahead: Number of calls that have their turn before it.
        """
        if self._spacing is None:
            return self.asked_until
        return max(self.asked_until, self._spacing.free_at()) + ahead * self._spacing.interval_secs

    def outlasts(self, deadline: float | None, ahead: int) -> bool:
        """Whether an event cannot wait for its turn.

        Args:
            deadline: Monotonic time until which it can wait; None for a stored one, which is not to wait for what the
                receiver asked for, and waits for its turn else.
            ahead: Number of events that have their turn before it.
        """
        if deadline is None:
            return self.is_asked
        turn_at = self.turn_at(ahead)
        return turn_at > self._monotonic() and turn_at >= deadline

    def why(self, said: str, until: str) -> str:
        """Why an event is kept back, for a person.

        Args:
            said: What the receiver said when it asked to be left alone.
            until: The time of the event's turn.
        """
        if self.is_asked:
            return f"the receiver asked to be left alone until {until}: {said}"
        return f"its turn comes at {until} (max_per_minute = {self._max_per_minute}), when its lease has ended"

    def room(self, stored: int) -> int | None:
        """Number of stored events that may be queued besides those that are; None if there is no limit of this kind.

        Fresh events are not to wait behind everything that is stored.

        Args:
            stored: Number of those that are queued.
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
