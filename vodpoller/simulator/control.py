"""The control endpoints, for tests and for a person with curl: statistics, ledger, new events, changed options."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

import orjson

from vodpoller.simulator.bodies import lines_of
from vodpoller.simulator.queue import LedgerRow
from vodpoller.simulator.server import DIGITS, Connection, Request


class Controlled(Protocol):
    """The methods behind the endpoints. `service.Simulator` has the same methods for Python, and documents them."""

    def feed(self, bodies: Iterable[bytes]) -> int:
        """Add events to the queue."""

    def control(self, changes: Mapping[str, Any]) -> None:
        """Change options."""

    def stats(self) -> dict[str, Any]:
        """The statistics so far."""

    def ledger(self, *, start: int, count: int | None, bodies: bool, lost: bool) -> list[LedgerRow]:
        """The state of each event."""


def answer_control(controlled: Controlled, request: Request, connection: Connection) -> None:
    """Answer a request to a control endpoint.

    Args:
        controlled: Provides the answers.
        request: Any request but one to the API.
        connection: The connection of the request.
    """
    try:
        target = urlsplit(request.target)
        answer = _answer_of(controlled, request.method, target.path, parse_qs(target.query), request.body)
    except ValueError as error:
        connection.send(orjson.dumps({"error": str(error)}), status=400)
        return
    if answer is None:
        known = "POST / (the API), GET /_stats, GET /_ledger, POST /_feed, POST /_control"
        connection.send(orjson.dumps({"error": f"unknown endpoint; there are {known}"}), status=404)
        return
    connection.send(orjson.dumps(answer))


def _answer_of(controlled: Controlled, method: str, path: str, query: Mapping[str, list[str]], body: bytes) -> Any:
    """The answer of the endpoint; None if the endpoint does not exist."""
    match method, path:
        case "GET", "/_stats":
            return controlled.stats()
        case "GET", "/_ledger":
            start, count = (_whole(query[name][0]) if name in query else None for name in ("from", "n"))
            bodies, lost = (query.get(name) == ["1"] for name in ("bodies", "lost"))
            return controlled.ledger(start=start or 0, count=count, bodies=bodies, lost=lost)
        case "POST", "/_feed":
            return {"fed": controlled.feed(lines_of(body))}
        case "POST", "/_control":
            changes = orjson.loads(body)
            if not isinstance(changes, dict):
                raise ValueError("the body must be an object of options")  # noqa: TRY004 - answered like other invalid values
            controlled.control(changes)
            return {"changed": sorted(changes)}
        case _:
            return None


def _whole(text: str) -> int:
    if not DIGITS.fullmatch(text):
        raise ValueError(f"{text!r} is not a whole number of 0 or more")
    return int(text)
