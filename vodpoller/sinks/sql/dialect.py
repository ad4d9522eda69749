"""The SQL in which databases differ."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from vodpoller.examples import EXAMPLES

TABLE: Final = "vodpoller_events"
INBOX: Final = "vodpoller_inbox"
COLUMNS: Final = ("key", "source", "event_type", "file_id", "task_id", "received_at", "body")
PRUNE_MAX_ROWS: Final = 1000

_SECTION: Final = re.compile(r"^-- \[(\w+)\].*?\n(.*?)(?=^-- \[|\Z)", re.MULTILINE | re.DOTALL)
_COMMENT: Final = re.compile(r"^--.*\n", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """The SQL of one database.

    Args:
        name: The type of its sink, and the name of its section in `vodpoller example sql`.
        quote: The character before and after a quoted name.
        placeholder: Makes the placeholder for a value from its name.
        time_value: Converts a time in UTC into a value for the column `received_at`.
        prune: Statement that deletes up to `PRUNE_MAX_ROWS` rows of the inbox that are older than `days`.
    """

    name: str
    quote: str
    placeholder: Callable[[str], str]
    time_value: Callable[[datetime], object]
    prune: str

    def quoted(self, name: str) -> str:
        """The name of a table or column, quoted."""
        return ".".join(f"{self.quote}{part}{self.quote}" for part in name.split("."))

    def insert(self, table: str, columns: Sequence[str]) -> str:
        """The statement that inserts a row.

        Args:
            table: Name of the table.
            columns: Names of the columns, which are also the names of the values.
        """
        names = ", ".join(map(self.quoted, columns))
        return f"INSERT INTO {self.quoted(table)} ({names}) VALUES ({', '.join(map(self.placeholder, columns))})"

    def select_known(self, table: str, number: int, *, of_sink: bool) -> str:
        """The query that returns which of the keys `key0`, `key1` and so on are in a table.

        Args:
            table: Name of the table.
            number: Number of keys, at least 1.
            of_sink: Whether only rows with the column `sink` equal to the value `sink` count.
        """
        keys = ", ".join(self.placeholder(f"key{at}") for at in range(number))
        condition = f" AND sink = {self.placeholder('sink')}" if of_sink else ""
        key = self.quoted("key")
        return f"SELECT {key} FROM {self.quoted(table)} WHERE {key} IN ({keys}){condition}"

    def check_columns(self, table: str, columns: Sequence[str]) -> str:
        """A query that returns no rows, and fails if the table or a column does not exist.

        Args:
            table: Name of the table.
            columns: Names of the columns.
        """
        return f"SELECT {', '.join(map(self.quoted, columns))} FROM {self.quoted(table)} WHERE 1 = 0"

    def ddl(self, table: str) -> list[str]:
        """The statements that create a table and its indexes, unless they exist.

        Args:
            table: `INBOX`, or the name of the table of events.
        """
        sections = dict(_SECTION.findall(EXAMPLES["sql"].read().decode()))
        wanted = INBOX if table == INBOX else TABLE
        statements = [text.strip() for text in _COMMENT.sub("", sections[self.name]).split(";")]
        return [text.replace(TABLE, self.quoted(table)) for text in statements if wanted in text]
