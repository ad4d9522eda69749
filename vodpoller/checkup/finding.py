"""What came of a check."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What came of one check.

    Args:
        what: What was looked at.
        good: Whether the daemon can work with it.
        text: What was found; if it is not good, what to do.
    """

    what: str
    good: bool
    text: str
