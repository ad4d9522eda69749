"""Waiting for what another thread or process is about to do."""

import time

FIRST_SECS = 0.002
MOST_SECS = 0.05


def until(condition, *, secs=15.0, every_secs=None, what="it did not come true in time"):
    """Ask again and again for something that is about to come true.

    Args:
        condition: What is asked.
        secs: Maximum time to wait.
        every_secs: Pause between two questions; if left out it grows, so that little time and little work is lost.
        what: Says what is missing if it does not come true, or a function that says it then.

    Returns:
        What the condition said, which is true.
    """
    ends_at = time.monotonic() + secs
    pause_secs = every_secs or FIRST_SECS
    while not (value := condition()):
        assert time.monotonic() < ends_at, what() if callable(what) else what
        time.sleep(pause_secs)
        if every_secs is None:
            pause_secs = min(pause_secs * 1.5, MOST_SECS)
    return value
