"""HTTP/1.1 for the simulator: it parses requests, and sends answers completely, in part or not at all.

It is not a server for general use: it can also break connections in the ways that networks do.
"""

import asyncio
import re
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import orjson

_HEAD_MAX_BYTES: Final = 64 * 1024
_BODY_MAX_BYTES: Final = 256 * 1024 * 1024
DIGITS: Final = re.compile(r"[0-9]{1,12}")  # a number in a header or a query
REASONS: Final = {200: b"OK", 400: b"Bad Request", 404: b"Not Found", 500: b"Internal Server Error"} | {
    502: b"Bad Gateway",
    503: b"Service Unavailable",
    504: b"Gateway Timeout",
}
# The bytes with which no request begins: all but printable ASCII and line ends.
_NOT_HTTP: Final = frozenset(range(256)) - frozenset(b"\r\n") - frozenset(range(0x21, 0x7F))
_TLS_HANDSHAKE: Final = 0x16  # RFC 8446, section 5.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One HTTP request.

    Args:
        method: As sent.
        target: Path and query, as sent.
        headers: The values by name in lower case.
        body: The bytes of the body.
    """

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes


class _BadRequestError(Exception):
    """The client has sent something that this server does not support."""


def _not_http_text(data: bytes) -> str:
    if data[0] == _TLS_HANDSHAKE:
        return (
            "a client began with TLS and was disconnected: the simulator has plain HTTP only, use its http:// address"
        )
    return f"a client did not send HTTP and was disconnected: it began with {data!r}"


class Handler(Protocol):
    """Handles the requests of all connections.

    Attributes:
        connections: The open connections.
        bad_requests: Number of requests that were not HTTP/1.1.
    """

    connections: "set[Connection]"
    bad_requests: int

    def date(self) -> bytes:
        """The value of the `Date` header."""

    def warn(self, message: str, /) -> None:
        """Report a client that does not send HTTP."""

    def handle(self, request: Request, connection: "Connection") -> None:
        """Answer a request on its connection, now or later."""


class Connection(asyncio.Protocol):
    """One client's connection: HTTP/1.1 with keep-alive, one request at a time.

    Args:
        handler: Gets each request.
    """

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._busy = False
        self._close_after = False
        self.on_lost: Callable[[], None] | None = None

    @property
    def closed(self) -> bool:
        """Whether the connection has ended, so that no answer can be sent."""
        return self._transport is None or self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As in asyncio."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - for the type checker; always true for TCP
        self._transport = transport
        self._handler.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """As in asyncio."""
        self._transport = None
        self._handler.connections.discard(self)
        if self.on_lost is not None:
            self.on_lost()

    def data_received(self, data: bytes) -> None:
        """As in asyncio."""
        self._buffer += data
        self._next()

    def _next(self) -> None:
        if self._busy or self.closed:
            return
        if self._buffer and self._buffer[0] in _NOT_HTTP:
            # Such a client would not understand an answer.
            self._handler.bad_requests += 1
            self._handler.warn(_not_http_text(bytes(self._buffer[:16])))
            self.drop()
            return
        try:
            request = self._cut_request()
        except _BadRequestError as error:
            self._close_after = True
            self._handler.bad_requests += 1
            self.send(orjson.dumps({"error": str(error)}), status=400)
            return
        if request is not None:
            self._busy = True
            self._close_after = request.headers.get("connection", "").lower() == "close"
            self._handler.handle(request, self)

    def _cut_request(self) -> Request | None:
        end = self._buffer.find(b"\r\n\r\n")
        if end > _HEAD_MAX_BYTES or (end < 0 and len(self._buffer) > _HEAD_MAX_BYTES):
            raise _BadRequestError("the head is longer than 64 KiB")
        if end < 0:
            return None
        first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        parts = first.split(" ")
        if len(parts) != 3 or parts[2] != "HTTP/1.1":  # noqa: PLR2004 - method, target, version
            raise _BadRequestError("the first line is not that of an HTTP/1.1 request")
        headers: dict[str, str] = {}
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon or not name or name != name.strip():
                raise _BadRequestError(f"{line[:80]!r} is not a header")
            headers[name.lower()] = value.strip()
        length = headers.get("content-length", "0")
        if "transfer-encoding" in headers or not DIGITS.fullmatch(length):
            raise _BadRequestError("a body needs its Content-Length")
        if int(length) > _BODY_MAX_BYTES:
            raise _BadRequestError("the body is too long")
        start, stop = end + 4, end + 4 + int(length)
        if len(self._buffer) < stop:
            if headers.get("expect", "").lower() == "100-continue" and len(self._buffer) == start and self._transport:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            return None
        body = bytes(self._buffer[start:stop])
        del self._buffer[:stop]
        return Request(method=parts[0], target=parts[1], headers=headers, body=body)

    def send(
        self, body: bytes, *, status: int = 200, content_type: bytes = b"application/json", cut_at: int | None = None
    ) -> None:
        """Answer the request.

        Args:
            body: The complete body.
            status: The HTTP status.
            content_type: The media type of the body.
            cut_at: Close the connection after this number of bytes of the body; None: send the complete body.
        """
        if self._transport is None or self._transport.is_closing():
            return
        head = b"HTTP/1.1 %d %b\r\nDate: %b\r\nContent-Type: %b\r\nContent-Length: %d\r\nConnection: %b\r\n\r\n" % (
            status,
            REASONS[status],
            self._handler.date(),
            content_type,
            len(body),
            b"close" if self._close_after else b"keep-alive",
        )
        self._transport.write(head + body[:cut_at])
        if self._close_after or cut_at is not None:
            self._transport.close()
            return
        self._busy = False
        if self._buffer:
            asyncio.get_running_loop().call_soon(self._next)

    def drop(self) -> None:
        """End the connection immediately, and discard unsent data."""
        if self._transport is not None:
            self._transport.abort()

    def cut(self) -> None:
        """End the connection without an answer."""
        if self._transport is not None:
            self._transport.close()

    def reset(self) -> None:
        """End the connection with a reset, as a crashed peer or a firewall does."""
        if self._transport is not None:
            reset(self._transport)


def reset(transport: asyncio.WriteTransport) -> None:
    """End a connection so that the peer gets a connection reset."""
    # With a linger time of 0 the kernel sends RST instead of FIN.
    sock = transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
