"""What a database's refusal means for an event. Pure.

SQLSTATE: ISO/IEC 9075-2, "SQLSTATE class and subclass codes"; PostgreSQL's manual, appendix A; MySQL's "Server Error
Message Reference"; MariaDB's "Error Codes"; SQLite's "Result and Error Codes". If a database gives no state, or one
that is too coarse, the translation of its errors puts a better one in its place.
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
"""In place of a state: nothing was answered, so whether a COMMIT took place is not known."""

_SHUTDOWN: Final = frozenset({"57P01", "57P02", "57P03", "57P05", READ_ONLY})
# Of the server, not of the event: transaction state, rights, names, deadlock, resources, operators, the system.
_OF_THE_SERVER: Final = ("0A", "25", "28", "3D", "3F", "40", "42", "53", "54", "55", "57", "58", "70", "F0", "XX")


class Verdict(Enum):
    """What follows from a refusal."""

    REJECT = "reject"
    """The event's data is not what the table takes: it never will be."""
    LATER = "later"
    """It may be taken later, and others may be taken now."""
    ALL_LATER = "all_later"
    """Nothing is taken now, whichever event it is."""
    CONNECTION = "connection"
    """Nothing is taken over this connection any more: connect anew, maybe to another server."""


def verdict(sqlstate: str) -> Verdict:
    """What a refusal means.

    Args:
        sqlstate: Five characters, or `NO_ANSWER`.
    """
    if sqlstate == NO_ANSWER or sqlstate.startswith("08") or sqlstate in _SHUTDOWN:
        return Verdict.CONNECTION
    if sqlstate == FOREIGN_KEY:  # the parent row may come later
        return Verdict.LATER
    if sqlstate.startswith(("22", "23")):
        return Verdict.REJECT
    if sqlstate.startswith(_OF_THE_SERVER):
        return Verdict.ALL_LATER
    return Verdict.LATER


class DatabaseError(Exception):
    """A database refused, or did not answer.

    Args:
        text: What it said, on one line.
        sqlstate: Its state, or `NO_ANSWER`.
    """

    def __init__(self, text: str, sqlstate: str) -> None:
        super().__init__(" ".join(text.split()))
        self.sqlstate = sqlstate

    @property
    def verdict(self) -> Verdict:
        """What follows from it."""
        return verdict(self.sqlstate)
