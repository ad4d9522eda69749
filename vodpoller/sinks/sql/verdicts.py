"""What an error of a database means for an event. Pure functions.

SQLSTATE: ISO/IEC 9075-2, "SQLSTATE class and subclass codes"; PostgreSQL's manual, appendix A; MySQL's "Server Error
Message Reference"; MariaDB's "Error Codes"; SQLite's "Result and Error Codes". If a database gives no state, or one
that is too general, the session modules translate its error into a more precise state.
"""

from enum import Enum
from typing import Final

FOREIGN_KEY: Final = "23503"
UNIQUE: Final = "23505"
READ_ONLY: Final = "25006"
SERIALIZATION: Final = "40001"
TOO_LONG: Final = "22001"
CHECK: Final = "23514"
NULL: Final = "23502"
LOCKED: Final = "55P03"
CANCELED: Final = "57014"
NO_TABLE: Final = "42P01"
GENERAL: Final = "HY000"
NO_ANSWER: Final = ""
"""Stands for a missing answer: it is not known whether a COMMIT took place."""

_SHUTDOWN: Final = frozenset({"57P01", "57P02", "57P03", "57P05", READ_ONLY})
# Classes about the server, not the event: transaction state, rights, names, deadlock, resources, operator, system.
_SERVER_CLASSES: Final = ("0A", "25", "28", "3D", "3F", "40", "42", "53", "54", "55", "57", "58", "70", "F0", "XX")


class Verdict(Enum):
    """The consequence of an error."""

    REJECT = "reject"
    """The table can never take the event's data."""
    LATER = "later"
    """This event may be accepted later, and other events may be accepted now."""
    ALL_LATER = "all_later"
    """No event can be accepted now."""
    CONNECTION = "connection"
    """This connection cannot be used any more; a new one may lead to another server."""


def verdict(sqlstate: str) -> Verdict:
    """The consequence of an error.

    Args:
        sqlstate: Five characters, or `NO_ANSWER`.
    """
    if sqlstate == NO_ANSWER or sqlstate.startswith("08") or sqlstate in _SHUTDOWN:
        return Verdict.CONNECTION
    if sqlstate == FOREIGN_KEY:  # the parent row may come later
        return Verdict.LATER
    if sqlstate.startswith(("22", "23")):
        return Verdict.REJECT
    if sqlstate.startswith(_SERVER_CLASSES):
        return Verdict.ALL_LATER
    return Verdict.LATER


class DatabaseError(Exception):
    """A database answered with an error, or not at all.

    Args:
        text: The text of the error.
        sqlstate: Its SQLSTATE, or `NO_ANSWER`.
    """

    def __init__(self, text: str, sqlstate: str) -> None:
        super().__init__(" ".join(text.split()))
        self.sqlstate = sqlstate

    @property
    def verdict(self) -> Verdict:
        """The consequence of the error."""
        return verdict(self.sqlstate)
