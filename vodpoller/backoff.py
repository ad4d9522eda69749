"""Waits between attempts."""

import tenacity


class Backoff:
    """Exponentially growing waits, half of each drawn at random, so that many who fail together spread out.

    Args:
        first_secs: The first wait is between half of this and this.
        most_secs: No wait is longer.
    """

    def __init__(self, *, first_secs: float, most_secs: float) -> None:
        half, most = first_secs / 2, most_secs / 2
        self._wait = tenacity.wait_exponential(multiplier=half, max=most) + tenacity.wait_random_exponential(
            multiplier=half, max=most
        )

    def secs(self, attempt: int) -> float:
        """How long to wait after the attempt of this number, the first being 1."""
        state = tenacity.RetryCallState(None, None, (), {})  # type: ignore[arg-type]  # waits read only the number
        state.attempt_number = attempt
        return self._wait(state)
