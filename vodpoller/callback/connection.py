"""One connection of the callback server: turns received bytes into a request or a refusal, and makes the answer.

h11 reads and writes the protocol. A connection carries one request: the answer has `Connection: close`, so that no
request is sent on a connection that is about to end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

import h11

from vodpoller.callback.refusal import NOT_HTTP, TLS, TOO_LARGE, RefusedError

HEAD_MAX_BYTES: Final = 16 * 1024
BODY_MAX_BYTES: Final = 1024 * 1024  # events of VOD have some KiB
_TLS_HANDSHAKE: Final = 0x16  # the first byte of a TLS connection


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The head of a request: what precedes the body.

    Args:
        method: The method as it was sent.
        path: The path of the request target, without the query.
        forwarded_for: The values of the headers `X-Forwarded-For`, joined with commas.
    """

    method: str
    path: str
    forwarded_for: str


class Connection:
    """Reads one request, and writes one answer.

    Args:
        check: Called with the head before the body is read; raises RefusedError to refuse the request.

    Attributes:
        head: The head of the request; None until it has been received.
        is_complete: Whether the whole request has been received.
    """

    def __init__(self, check: Callable[[Head], None]) -> None:
        self._check = check
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_MAX_BYTES)
        self._body = bytearray()
        self._has_data = False
        self.head: Head | None = None
        self.is_complete = False

    @property
    def body(self) -> bytes:
        """The received part of the body."""
        return bytes(self._body)

    @property
    def held_bytes(self) -> int:
        """The number of bytes of the body that are in memory."""
        return len(self._body)

    @property
    def has_data(self) -> bool:
        """Whether any byte has been received."""
        return self._has_data

    def received(self, data: bytes) -> bytes:
        """Process received bytes. Afterwards `is_complete` shows whether the request is complete.

        Args:
            data: The bytes; not empty.

        Returns:
            The bytes that must be sent at once; nearly always empty.

        Raises:
            RefusedError: It cannot be a callback.
        """
        is_first, self._has_data = not self._has_data, True
        if is_first and data[0] == _TLS_HANDSHAKE:
            raise RefusedError(TLS)
        try:
            self._http.receive_data(data)
            return self._read()
        except h11.RemoteProtocolError as error:
            is_too_large = error.error_status_hint == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            raise RefusedError(TOO_LARGE if is_too_large else NOT_HTTP) from error

    def _read(self) -> bytes:
        while not self.is_complete:
            match self._http.next_event():
                case h11.Request() as request:
                    self._begin(request)
                case h11.Data(data=data):
                    if len(self._body) + len(data) > BODY_MAX_BYTES:
                        raise RefusedError(TOO_LARGE)
                    self._body += data
                case h11.EndOfMessage():
                    self.is_complete = True
                case _:  # more data is needed
                    break
        if self._http.they_are_waiting_for_100_continue:
            return self._http.send(h11.InformationalResponse(status_code=HTTPStatus.CONTINUE, headers=[])) or b""
        return b""

    def _begin(self, request: h11.Request) -> None:
        headers = [(name, value.decode("latin-1")) for name, value in request.headers]
        self.head = Head(
            method=request.method.decode("latin-1"),
            path=request.target.decode("latin-1").partition("?")[0],
            forwarded_for=",".join(value for name, value in headers if name == b"x-forwarded-for"),
        )
        self._check(self.head)
        announced = next((int(value) for name, value in headers if name == b"content-length"), 0)
        if announced > BODY_MAX_BYTES:
            raise RefusedError(TOO_LARGE)

    def drop_body(self) -> None:
        """Release the memory of the body, which is no longer needed here."""
        self._body = bytearray()

    def answer(self, status: HTTPStatus) -> bytes:
        """The bytes of an answer without a body; empty if HTTP permits no answer in the current state."""
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return b""
        headers = [("Content-Length", "0"), ("Connection", "close")]
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers.append(("Allow", "POST"))
        response = h11.Response(status_code=status, headers=headers, reason=status.phrase.encode())
        return (self._http.send(response) or b"") + (self._http.send(h11.EndOfMessage()) or b"")
