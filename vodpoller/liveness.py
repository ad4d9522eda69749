"""What each thread is doing and by when it should be done: what the watchdog asks."""

import threading
import time
from collections.abc import Callable


class Liveness:
    """Knows what each thread is doing and by when it should be done: so the watchdog tells a hang from a wait.

    Args:
        monotonic: The clock, in seconds.
    """

    def __init__(self, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._steps: dict[int, tuple[str, float]] = {}

    def begin(self, step: str, within_secs: float) -> None:
        """This thread begins something that should end within that time, in seconds."""
        self._steps[threading.get_ident()] = (step, self._monotonic() + within_secs)

    def end(self) -> None:
        """This thread is done with it, and may now wait for as long as it likes."""
        self._steps.pop(threading.get_ident(), None)

    def overdue(self, grace_secs: float) -> dict[str, float]:
        """The steps that are further past their deadline than the grace, with the time since then, in seconds."""
        now = self._monotonic()
        late: dict[str, float] = {}
        for step, deadline in list(self._steps.values()):  # threads share names: the latest of them counts
            if now - deadline > grace_secs:
                late[step] = max(now - deadline, late.get(step, 0.0))
        return late
