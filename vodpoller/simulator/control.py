"""The control endpoints: what happened so far, more events, other options; for tests and for people with curl."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

import orjson

from vodpoller.simulator.bodies import lines_of
from vodpoller.simulator.queue import LedgerRow
from vodpoller.simulator.server import DIGITS, Connection, Request


class Controlled(Protocol):
    """What the endpoints ask. `service.Simulator` has the same methods for use from Python, and documents them."""

    def feed(self, bodies: Iterable[bytes]) -> int:
        """Events are born."""

    def control(self, changes: Mapping[str, Any]) -> None:
        """Change options."""

    def stats(self) -> dict[str, Any]:
        """What has happened so far."""

    def ledger(self, *, start: int, count: int | None, bodies: bool, lost: bool) -> list[LedgerRow]:
        """What became of each event."""


def answer_control(controlled: Controlled, request: Request, connection: Connection) -> None:
    """Answer a request to a control endpoint.

    Args:
        controlled: What is asked.
        request: Any but one to the API.
        connection: The one that it came on.
    """
    try:
        target = urlsplit(request.target)
        answer = _answer_of(controlled, request.method, target.path, parse_qs(target.query), request.body)
    except ValueError as error:
        connection.send(orjson.dumps({"error": str(error)}), status=400)
        return
    if answer is None:
        known = "POST / (the API), GET /_stats, GET /_ledger, POST /_feed, POST /_control"
        connection.send(orjson.dumps({"error": f"there is only {known}"}), status=404)
        return
    connection.send(orjson.dumps(answer))


def _answer_of(controlled: Controlled, method: str, path: str, query: Mapping[str, list[str]], body: bytes) -> Any:
    """What the endpoint says; None if there is none."""
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
                raise ValueError("the body must be an object of options")  # noqa: TRY004 - answered as other bad values
            controlled.control(changes)
            return {"changed": sorted(changes)}
        case _:
            return None


def _whole(text: str) -> int:
    if not DIGITS.fullmatch(text):
        raise ValueError(f"{text!r} is not a whole number of 0 or more")
    return int(text)
