"""Waiting for a condition that another thread or process makes true."""

import time

FIRST_SECS = 0.002
MAX_SECS = 0.05


def until(condition, *, secs=15.0, every_secs=None, what="the condition did not become true in time"):
    """Call a condition repeatedly until it returns a true value.

    Args:
        condition: A function without arguments.
        secs: Maximum time to wait.
        every_secs: Pause between two calls. By default it grows from 2 to 50 ms: short waits end early, and long ones
            need few calls.
        what: The error message if the condition stays false, or a function that returns it.

    Returns:
        The true value that the condition returned.

    Raises:
        AssertionError: The time is over.
    """
    ends_at = time.monotonic() + secs
    pause_secs = every_secs or FIRST_SECS
    while not (value := condition()):
        assert time.monotonic() < ends_at, what() if callable(what) else what
        time.sleep(pause_secs)
        if every_secs is None:
            pause_secs = min(pause_secs * 1.5, MAX_SECS)
    return value
