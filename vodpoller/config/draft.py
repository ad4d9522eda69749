"""A configuration that is being read: its data, where it was found, and what is wrong with it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vodpoller.config.wording import LISTS, NAME_PATTERN
from vodpoller.secret import Surroundings

Location = tuple[str | int, ...]
"""A place in the file: the keys and numbers that lead to it."""


@dataclass(slots=True)
class Problems:
    """What is wrong, with its place in the file, in the order in which it was found."""

    found: list[tuple[Location, str]] = field(default_factory=list)

    def add(self, where: Location, what: str) -> None:
        """Note a problem.

        Args:
            where: Its place.
            what: What is wrong, and in brackets what would be right.
        """
        self.found.append((where, what))

    def concern(self, where: Location) -> bool:
        """Whether something is wrong at the place itself or in it."""
        return any(place[: len(where)] == where for place, _ in self.found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What is known of a configuration before it is known to be valid.

    What crosses tables (names, coverage) is looked up in the data as it came and not in the models, so that a mistake
    in one table hides none in another and makes none up.

    Args:
        data: The tables, with their variables replaced.
        env: The environment.
        surroundings: Where secret files of relative name lie.
        problems: What keeps the configuration from being used.
        warnings: What does not.
    """

    data: Mapping[str, Any]
    env: Mapping[str, str]
    surroundings: Surroundings
    problems: Problems
    warnings: Problems = field(default_factory=Problems)

    def lines(self, problems: Problems) -> list[str]:
        """One line for each of the problems, with the key that it is about, and each once."""
        return list(dict.fromkeys(f"{self.key(where)}: {what}" for where, what in problems.found))

    def items(self, name: str) -> list[tuple[int, Mapping[str, Any]]]:
        """The tables of a list, each with its place in it; what is not a table is left out."""
        items = self.data.get(name)
        return [
            (at, item) for at, item in enumerate(items if isinstance(items, list) else []) if isinstance(item, dict)
        ]

    def names(self, name: str) -> dict[str, int]:
        """The names of a list's tables with the first place of each."""
        names: dict[str, int] = {}
        for at, item in self.items(name):
            if isinstance(item.get("name"), str):
                names.setdefault(item["name"], at)
        return names

    def key(self, where: Location) -> str:
        """The place as a person would name it: `sources.main.interval_secs`, or `sources[0]` where it has no name."""
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
    """The texts in what should be a list of texts; a text in its place is meant as the only one."""
    value = [value] if isinstance(value, str) else value
    return {at: item for at, item in enumerate(value if isinstance(value, list) else []) if isinstance(item, str)}
