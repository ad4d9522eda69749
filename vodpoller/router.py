"""The router: decides which sinks get an event."""

import fnmatch
import json
import re
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Final, Protocol

from vodpoller.errors import RejectedError
from vodpoller.events.event import Event
from vodpoller.events.types import meant_for
from vodpoller.expressions import EvaluationError, Expression, is_true

_REMEMBERED_TYPES: Final = 1000
_REMEMBERED_CHARS: Final = 256  # of a type; VOD's have 44 at most


class Route(Protocol):
    """What the router reads of a configured route; see the table of keys."""

    @property
    def name(self) -> str:
        """As in the configuration."""

    @property
    def event_types(self) -> Sequence[str] | None:
        """As in the configuration."""

    @property
    def sources(self) -> Sequence[str] | None:
        """As in the configuration."""

    @property
    def where(self) -> str | None:
        """As in the configuration."""

    @property
    def sinks(self) -> Sequence[str]:
        """As in the configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """The routes and sinks of an event.

    Args:
        routes: The names of the routes that take it.
        sinks: The sinks that get it, each once.
        failed: The sinks that lack it because a route's `where` cannot be evaluated on it, each with the error.
    """

    routes: tuple[str, ...]
    sinks: tuple[str, ...]
    failed: dict[str, RejectedError]

    @property
    def is_unrouted(self) -> bool:
        """Whether no route names a sink for it."""
        return not (self.sinks or self.failed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """Whether one route takes an event.

    Args:
        route: Its name.
        sinks: The sinks that it names.
        why_not: Why it does not take the event, for a person; empty if it takes it.
    """

    route: str
    sinks: tuple[str, ...]
    why_not: str

    @property
    def takes(self) -> bool:
        """Whether the event goes to its sinks."""
        return not self.why_not


class _Compiled:
    def __init__(self, route: Route) -> None:
        self.name = route.name
        self.sinks = tuple(route.sinks)
        self.where = Expression(route.where) if route.where else None
        self.globs = tuple(route.event_types or ())
        self._sources = None if route.sources is None else frozenset(route.sources)
        patterns = None if route.event_types is None else [fnmatch.translate(glob) for glob in route.event_types]
        self._types = None if patterns is None else re.compile("|".join(patterns))

    def is_of(self, source: str) -> bool:
        return self._sources is None or source in self._sources

    def covers(self, source: str, event_type: str) -> bool:
        return self.is_of(source) and (self._types is None or self._types.match(event_type) is not None)

    def wants(self, event: Event) -> bool:
        """Whether `where` holds."""
        return self.where is None or is_true(self._found_in(self.where, event))

    def _found_in(self, where: Expression, event: Event) -> Any:
        """The result of `where`."""
        try:
            return where.search(event.content)
        except EvaluationError as error:
            raise RejectedError(f"route {self.name}: `where` cannot be evaluated on this event: {error}") from error

    def why_not(self, event: Event) -> str:
        """Why the route does not take an event; empty if it does."""
        if not self.is_of(event.source):
            return f"it takes events of other sources only: {', '.join(sorted(self._sources or ()))}"
        if not self.covers(event.source, event.type):
            return f"its event_types do not match: {', '.join(self.globs)}"
        try:
            if self.where is None or is_true(found := self._found_in(self.where, event)):
                return ""
            return f"its `where` does not hold: {self.where.text} is {json.dumps(found)}"
        except RejectedError as error:
            return f"{str(error).removeprefix(f'route {self.name}: ')}, so that its sinks reject it"


class Router:
    """Applies every route that matches. An event goes to a sink once, also if several routes name the sink.

    Args:
        routes: In the configuration's order. Their expressions are compiled here.
    """

    def __init__(self, routes: Sequence[Route]) -> None:
        self._routes = [_Compiled(route) for route in routes]
        # Types are an open set, but a small one of short names. The limits are for a queue with nonsense in it.
        self._candidates: dict[tuple[str, str], tuple[list[_Compiled], Routed | None]] = {}
        self._similar: dict[tuple[str, str], str | None] = {}

    def route(self, event: Event) -> Routed:
        """The routes and sinks of the event."""
        candidates, constant = self._candidates.get((event.source, event.type)) or self._find(event.source, event.type)
        return constant if constant is not None else _evaluate(candidates, event)

    def judge(self, event: Event) -> Iterator[Judgement]:
        """Whether each route takes the event, and why not, for a person; `route` decides the same."""
        for route in self._routes:
            yield Judgement(route=route.name, sinks=route.sinks, why_not=route.why_not(event))

    def routes_for(self, source: str, event_type: str) -> list[str]:
        """The names of the routes that take events of a type, if their `where` holds.

        Args:
            source: Name of the source that such events come from.
            event_type: The type.
        """
        return [route.name for route in self._routes if route.covers(source, event_type)]

    def similar_routed(self, source: str, event_type: str) -> str | None:
        """The pattern that was probably meant to take a type that no route takes: a misspelt or outdated one.

        Args:
            source: Name of the source that the event came from.
            event_type: A type that no route takes.

        Returns:
            The pattern; None if no pattern is similar to the type, or if 1,000 types were examined already.
        """
        place = (source, event_type)
        if place not in self._similar and self._may_remember(self._similar, event_type):
            globs = [glob for route in self._routes if route.is_of(source) for glob in route.globs]
            self._similar[place] = meant_for(event_type, globs)
        return self._similar.get(place)

    @staticmethod
    def _may_remember(table: Sized, event_type: str) -> bool:
        return len(table) < _REMEMBERED_TYPES and len(event_type) <= _REMEMBERED_CHARS

    def _find(self, source: str, event_type: str) -> tuple[list[_Compiled], Routed | None]:
        candidates = [route for route in self._routes if route.covers(source, event_type)]
        constant = None
        if all(route.where is None for route in candidates):
            constant = _routed(candidates, failed={})
        if self._may_remember(self._candidates, event_type):
            self._candidates[source, event_type] = (candidates, constant)
        return candidates, constant


def _evaluate(candidates: Sequence[_Compiled], event: Event) -> Routed:
    chosen: list[_Compiled] = []
    failed: dict[str, RejectedError] = {}
    for route in candidates:
        try:
            if route.wants(event):
                chosen.append(route)
        except RejectedError as error:
            failed |= dict.fromkeys(route.sinks, error)
    return _routed(chosen, failed)


def _routed(chosen: Sequence[_Compiled], failed: dict[str, RejectedError]) -> Routed:
    sinks = tuple(dict.fromkeys(sink for route in chosen for sink in route.sinks))
    return Routed(
        routes=tuple(route.name for route in chosen),
        sinks=sinks,
        failed={sink: error for sink, error in failed.items() if sink not in sinks},
    )
