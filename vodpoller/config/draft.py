"""A configuration that is being read: its data, its context, and the problems found so far."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vodpoller.config.wording import LISTS, NAME_PATTERN
from vodpoller.secret import ConfigContext

Location = tuple[str | int, ...]
"""A place in the file: the keys and numbers that lead to it."""


@dataclass(slots=True)
class Problems:
    """The problems found, each with its place in the file, in the order in which they were found."""

    found: list[tuple[Location, str]] = field(default_factory=list)

    def add(self, where: Location, what: str) -> None:
        """Add a problem.

        Args:
            where: Its place.
            what: The problem and, in brackets, what would be right.
        """
        self.found.append((where, what))

    def any_at(self, where: Location) -> bool:
        """Whether there is a problem at this place or inside it."""
        return any(place[: len(where)] == where for place, _ in self.found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A configuration that is not yet known to be valid.

    Checks across tables (names, coverage) look at the data and not at the models. So a mistake in one table neither
    hides a mistake in another table nor causes a false one.

    Args:
        data: The tables, with their variables replaced.
        env: The environment.
        context: The folders of secret files with a relative name.
        problems: The configuration cannot be used because of these.
        warnings: The configuration can be used in spite of these.
    """

    data: Mapping[str, Any]
    env: Mapping[str, str]
    context: ConfigContext
    problems: Problems
    warnings: Problems = field(default_factory=Problems)

    def lines(self, problems: Problems) -> list[str]:
        """One line for each problem, with its key, without repetitions."""
        return list(dict.fromkeys(f"{self.key(where)}: {what}" for where, what in problems.found))

    def items(self, name: str) -> list[tuple[int, Mapping[str, Any]]]:
        """The tables of a list, each with its position; an item that is not a table is left out."""
        items = self.data.get(name)
        return [
            (at, item) for at, item in enumerate(items if isinstance(items, list) else []) if isinstance(item, dict)
        ]

    def names(self, name: str) -> dict[str, int]:
        """The names of the tables of a list, each with its first position."""
        names: dict[str, int] = {}
        for at, item in self.items(name):
            if isinstance(item.get("name"), str):
                names.setdefault(item["name"], at)
        return names

    def key(self, where: Location) -> str:
        """The place as a person names it: `sources.main.interval_secs`, or `sources[0]` if the table has no name."""
        key = ""
        for depth, part in enumerate(where):
            if isinstance(part, str):
                key += f".{part}" if key else part
                continue
            item = self.data[str(where[0])][part] if depth == 1 and where[0] in LISTS else None
            name = item.get("name") if isinstance(item, dict) else None
            named = isinstance(name, str) and re.fullmatch(NAME_PATTERN, name)
            key += f".{name}" if named else f"[{part}]"
        return key


def texts_in(value: Any) -> dict[int, str]:
    """The texts in a value that should be a list of texts, by position; a single text counts as a list of one."""
    value = [value] if isinstance(value, str) else value
    return {at: item for at, item in enumerate(value if isinstance(value, list) else []) if isinstance(item, str)}
