"""What each thread is doing, and its deadline: the watchdog reads this."""

import threading
import time
from collections.abc import Callable


class Liveness:
    """Records what each thread is doing, and its deadline, so that the watchdog can tell a hang from a wait.

    Args:
        monotonic: The clock, in seconds.
    """

    def __init__(self, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._steps: dict[int, tuple[str, float]] = {}

    def begin(self, step: str, within_secs: float) -> None:
        """This thread begins a step that should end within this number of seconds."""
        self._steps[threading.get_ident()] = (step, self._monotonic() + within_secs)

    def end(self) -> None:
        """This thread has ended its step, and may now wait without a deadline."""
        self._steps.pop(threading.get_ident(), None)

    def overdue(self, grace_secs: float) -> dict[str, float]:
        """The steps whose deadline passed more than `grace_secs` ago, with the time since the deadline, in seconds."""
        now = self._monotonic()
        late: dict[str, float] = {}
        for step, deadline in list(self._steps.values()):  # threads share names: the longest time counts
            if now - deadline > grace_secs:
                late[step] = max(now - deadline, late.get(step, 0.0))
        return late
