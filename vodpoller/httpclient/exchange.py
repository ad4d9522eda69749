"""One request and its answer, on a connection of a pool.

The adapter of requests and `urlopen` of urllib3 do more than that. The additional work is not wanted here, and takes
more CPU time than the exchange itself.
"""

import http.client
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from requests import PreparedRequest
from urllib3 import HTTPResponse
from urllib3.exceptions import HTTPError

from vodpoller.httpclient.connection import PIECE_BYTES, BoundedConnection
from vodpoller.httpclient.deadline import Deadline
from vodpoller.httpclient.pool import Pool

_FIRST_LINE: Final = re.compile(r"[A-Z]+ [!-~]+ HTTP/1\.1")
# RFC 9110, section 5.5: no end of line, and no other control character except the tab.
_FIELD: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+: [\t -~\x80-\xff]*")


class Exchanged(HTTPResponse):
    """An answer whose body is not read yet. Reading it to its end gives its connection back to the pool.

    Attributes:
        is_repeated: Whether the request was sent twice.
    """

    is_repeated = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """How requests to a URL are sent.

    Args:
        pool: The pool of connections to the URL's host, or to a proxy.
        tunnels: Whether the proxy must make a tunnel to the host.
        target: The request target in the first line of a request.
        headers: Headers for each request that does not have its own of the same name.
    """

    pool: Pool
    tunnels: bool
    target: str
    headers: Mapping[str, str]


def exchange(route: Route, request: PreparedRequest, connect: Deadline, total: Deadline) -> Exchanged:
    """Send a request and read the head of its answer.

    If a connection that was idle breaks before a byte of the answer arrives, the request is sent again on a new one.

    Args:
        route: The route of the request's URL.
        request: A request whose body, if it has one, is bytes.
        connect: The deadline for the part until the request is sent.
        total: The deadline for the whole exchange, including reading the body.

    Raises:
        ValueError: The request holds a character that cannot be sent.
        urllib3.exceptions.HTTPError: No answer was received.
        http.client.HTTPException: The same.
        OSError: The same.
    """
    pieces = _pieces(route, request)
    connection = route.pool.take()
    was_idle = not connection.is_closed
    try:
        return _attempt(route, connection, request.method, pieces, connect, total)
    except (HTTPError, http.client.HTTPException, OSError):
        if not was_idle or connection.has_answer_begun or not connection.has_time:
            raise
    answer = _attempt(route, route.pool.take(is_new=True), request.method, pieces, connect.restarted(total), total)
    answer.is_repeated = True
    return answer


def _attempt(
    route: Route,
    connection: BoundedConnection,
    method: str | None,
    pieces: tuple[bytes, ...],
    connect: Deadline,
    total: Deadline,
) -> Exchanged:
    try:
        connection.timeout = connect
        if connection.is_closed:
            route.pool.open(connection, tunnels=route.tunnels)
        else:
            connection.reuse()
        with suppress(BrokenPipeError, ConnectionResetError):  # the peer may have sent a refusal before
            for piece in pieces:
                connection.send(piece)
        connection.timeout = total
        answer = connection.read_head(method)
        return Exchanged(
            body=answer,
            headers=answer.headers,
            status=answer.status,
            version=answer.version,
            reason=answer.reason,
            preload_content=False,
            decode_content=False,
            original_response=answer,
            pool=route.pool,
            connection=connection,
            request_method=method,
        )
    except BaseException:
        connection.close()
        raise


def _pieces(route: Route, request: PreparedRequest) -> tuple[bytes, ...]:
    """Head and body, as one piece if they fit into it."""
    body = request.body or b""
    if not isinstance(body, bytes):
        raise TypeError(f"the body of a request must be bytes, not {type(body).__name__}")
    head = _head(request, route.target, {**route.headers, "Content-Length": str(len(body))} if body else route.headers)
    return (head + body,) if len(head) + len(body) <= PIECE_BYTES else (head, body)


def _head(request: PreparedRequest, target: str, defaults: Mapping[str, str]) -> bytes:
    given = request.headers
    first_line = f"{request.method} {target} HTTP/1.1"
    fields = [f"{name}: {value}" for name, value in defaults.items() if name not in given]
    fields += [f"{name}: {value}" for name, value in given.items()]
    if not _FIRST_LINE.fullmatch(first_line) or not all(map(_FIELD.fullmatch, fields)):
        raise ValueError("the request holds a character that cannot be sent in its head")
    return "\r\n".join((first_line, *fields, "", "")).encode("latin-1")
