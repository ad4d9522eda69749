"""What differs between databases, as text."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from vodpoller.examples import EXAMPLES

TABLE: Final = "vodpoller_events"
INBOX: Final = "vodpoller_inbox"
COLUMNS: Final = ("key", "source", "event_type", "file_id", "task_id", "received_at", "body")
PRUNED_AT_ONCE: Final = 1000

_SECTION: Final = re.compile(r"^-- \[(\w+)\].*?\n(.*?)(?=^-- \[|\Z)", re.MULTILINE | re.DOTALL)
_COMMENT: Final = re.compile(r"^--.*\n", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How a database is spoken to.

    Args:
        name: The type of its sink, and its part of `vodpoller example sql`.
        quote: What stands around a name.
        place: Makes the placeholder of a value's name.
        moment: Makes of a time, in UTC, what the column `received_at` takes.
        prune: Deletes up to `PRUNED_AT_ONCE` rows of the inbox that are older than `days`.
    """

    name: str
    quote: str
    place: Callable[[str], str]
    moment: Callable[[datetime], object]
    prune: str

    def quoted(self, name: str) -> str:
        """A table's or column's name, as it is."""
        return ".".join(f"{self.quote}{part}{self.quote}" for part in name.split("."))

    def insert(self, table: str, columns: Sequence[str]) -> str:
        """The statement for a row.

        Args:
            table: Its name.
            columns: The columns, which are the names of the values, too.
        """
        names = ", ".join(map(self.quoted, columns))
        return f"INSERT INTO {self.quoted(table)} ({names}) VALUES ({', '.join(map(self.place, columns))})"

    def known(self, table: str, number: int, *, of_sink: bool) -> str:
        """The query for those of a number of keys, `key0` and so on, that a table has.

        Args:
            table: Its name.
            number: At least 1.
            of_sink: Whether only rows count that are of the sink `sink`.
        """
        keys = ", ".join(self.place(f"key{at}") for at in range(number))
        condition = f" AND sink = {self.place('sink')}" if of_sink else ""
        key = self.quoted("key")
        return f"SELECT {key} FROM {self.quoted(table)} WHERE {key} IN ({keys}){condition}"

    def look(self, table: str, columns: Sequence[str]) -> str:
        """A query that brings nothing, and fails if the table lacks a column.

        Args:
            table: Its name.
            columns: The columns.
        """
        return f"SELECT {', '.join(map(self.quoted, columns))} FROM {self.quoted(table)} WHERE 1 = 0"

    def ddl(self, table: str) -> list[str]:
        """The statements that make a table and its indexes, unless it exists.

        Args:
            table: `INBOX`, or the name that the table of events has.
        """
        sections = dict(_SECTION.findall(EXAMPLES["sql"].read().decode()))
        wanted = INBOX if table == INBOX else TABLE
        statements = [text.strip() for text in _COMMENT.sub("", sections[self.name]).split(";")]
        return [text.replace(TABLE, self.quoted(table)) for text in statements if wanted in text]
