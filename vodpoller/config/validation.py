"""Validate single tables, each by its model; errors of pydantic become problems in plain words."""

import re
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from vodpoller.config.callbacks import CallbackSource
from vodpoller.config.draft import Draft, Location
from vodpoller.config.sink_types import UnusableSinkError, config_of, load_sink_class
from vodpoller.config.tables import TABLES, AnySource, Source
from vodpoller.config.wording import (
    NAME_MAX_LENGTH,
    NAME_PATTERN,
    NAME_RULE,
    in_words,
    kind_of,
    quoted,
    quoted_all,
    suggestion,
    unknown_key,
)
from vodpoller.sinks.contract import Sink, SinkConfig
from vodpoller.sinks.registry import available_sinks

_Model = TypeVar("_Model", bound=BaseModel)


class Validation:
    """Validates the tables of one configuration.

    Args:
        draft: The tables, and the problems.
    """

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._problems = draft.problems

    def check_tables(self) -> None:
        """Add a problem for each table that does not exist."""
        for key in self._draft.data:
            if key not in TABLES:
                self._problems.add((key,), unknown_key(key, TABLES, TABLES))

    def table(
        self, name: str, model: type[_Model], prepare: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    ) -> _Model | None:
        """Validate a table that is not in a list.

        Args:
            name: Its name.
            model: Its model.
            prepare: Changes the table before it is validated.

        Returns:
            None if it is not valid.
        """
        table = self._draft.data.get(name, {})
        if isinstance(table, dict):
            return self.validated(model, prepare(table), (name,))
        self._problems.add((name,), f"must be a table, but is {kind_of(table)} (write [{name}] on a line of its own)")
        return None

    def sources(self) -> list[AnySource]:
        """Validate the tables of the sources, each by the model of its type; returns those that are valid."""
        return self.items("sources", _model_of_source, '[[sources]] with name = "main"')

    def items(self, name: str, model_of: Callable[[Mapping[str, Any]], type[_Model]], example: str) -> list[_Model]:
        """Validate the tables of a list; returns those that are valid.

        Args:
            name: The name of the list.
            model_of: Gives the model of a table.
            example: What to write, for the message about a missing table.
        """
        items = self._draft.data.get(name)
        if not items and isinstance(items, list | None):
            self._problems.add((name,), f"there is none (add at least one: {example})")
        elif not isinstance(items, list):
            self._problems.add((name,), f"must be a list of tables, but is {kind_of(items)} (write [[{name}]])")
        valid: list[_Model] = []
        for at, item in enumerate(items if isinstance(items, list) else []):
            if not isinstance(item, dict):
                self._problems.add((name, at), f"must be a table, but is {kind_of(item)} (write [[{name}]])")
            elif (found := self.validated(model_of(item), item, (name, at))) is not None:
                valid.append(found)
        return valid

    def validated(self, model: type[_Model], table: Mapping[str, Any], where: Location) -> _Model | None:
        """Validate one table.

        Args:
            model: Its model.
            table: Its keys and values.
            where: Its place.

        Returns:
            None if it is not valid.
        """
        try:
            return model.model_validate(table, context=self._draft.context)
        except ValidationError as error:
            # Messages never hold the input: it may be a secret.
            for detail in error.errors(include_url=False):
                self._add(detail, model, where)
        return None

    def sinks(self) -> tuple[dict[str, SinkConfig], dict[str, type[Sink[Any]]]]:
        """Validate the tables of the sinks. Returns the valid ones and the classes that can be used, both by name."""
        configs: dict[str, SinkConfig] = {}
        classes: dict[str, type[Sink[Any]]] = {}
        tables = self._draft.data.get("sinks", {})
        if not isinstance(tables, dict):
            self._problems.add(("sinks",), f"must hold tables, but is {kind_of(tables)} (write [sinks.archive])")
        elif not tables:
            self._problems.add(("sinks",), 'there is none (add at least one: [sinks.archive] with type = "file")')
        else:
            available = available_sinks()
            for name, table in tables.items():
                if (sink_class := self._sink_class(name, table, available)) is not None:
                    classes[name] = sink_class
                    if (config := self.validated(config_of(sink_class), table, ("sinks", name))) is not None:
                        configs[name] = config
        return configs, classes

    def _sink_class(self, name: str, table: Any, available: Mapping[str, EntryPoint]) -> type[Sink[Any]] | None:
        where = ("sinks", name)
        if not isinstance(table, dict):
            self._problems.add(
                where, f"must be a table, but is {kind_of(table)} (write [sinks.archive], then its keys)"
            )
            return None
        if not re.fullmatch(NAME_PATTERN, name) or len(name) > NAME_MAX_LENGTH:
            self._problems.add(where, f"is not a valid name for a sink ({NAME_RULE})")
        type_name = table.get("type")
        place = (*where, "type")
        if "type" not in table:
            self._problems.add(place, f"is missing (one of {quoted_all(sorted(available))})")
        elif not isinstance(type_name, str):
            self._problems.add(
                place, f"must be text in quotes, but is {kind_of(type_name)} (one of {quoted_all(sorted(available))})"
            )
        elif type_name in available:
            try:
                return load_sink_class(available[type_name])
            except UnusableSinkError as error:
                self._problems.add(place, str(error))
        elif not self._problems.any_at(place):
            self._problems.add(
                place,
                f"no sink type {quoted(type_name)} is installed ({suggestion(type_name, available)}"
                f"installed: {quoted_all(sorted(available))})",
            )
        return None

    def _add(self, detail: ErrorDetails, model: type[BaseModel], where: Location) -> None:
        place = detail["loc"]
        context = detail.get("ctx", {})
        if context.get("key"):
            place = (*place[:-1], context["key"])
        if detail["type"] != "default_factory_not_called" and not self._problems.any_at((*where, *place)):
            self._problems.add(
                (*where, *place), in_words(detail, model, tables=_OTHER_TABLES.get(str(where[0]), TABLES))
            )


_OTHER_TABLES: Final[Mapping[str, Mapping[str, type[BaseModel]]]] = {
    "sinks": {},
    "sources": {
        **{name: model for name, model in TABLES.items() if name != "sources"},
        '[[sources]] with type = "pull"': Source,
        '[[sources]] with type = "callback"': CallbackSource,
    },
}
"""For each table, by its name: the tables to which an unknown key of it may belong. For other tables: all."""


def _model_of_source(table: Mapping[str, Any]) -> type[AnySource]:
    return CallbackSource if table.get("type") == "callback" else Source
