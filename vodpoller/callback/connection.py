"""One connection of the callback server: bytes in, a request or a refusal out, and the bytes of the answer.

h11 reads and writes the protocol. A connection carries one request: the answer says `Connection: close`, so that no
request comes on a connection that is about to end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

import h11

from vodpoller.callback.refusal import NOT_HTTP, TLS, TOO_LARGE, RefusedError

HEAD_MAX_BYTES: Final = 16 * 1024
BODY_MAX_BYTES: Final = 1024 * 1024  # events of VOD's have some KiB
_TLS_HANDSHAKE: Final = 0x16  # the first byte of a TLS connection


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What stands before the body of a request.

    Args:
        method: As it was sent.
        path: Of the target, without its query.
        forwarded_for: What the headers `X-Forwarded-For` say, joined with commas.
    """

    method: str
    path: str
    forwarded_for: str


class Connection:
    """Reads one request, and writes one answer.

    Args:
        check: Looks at the head; raises RefusedError.
    """

    def __init__(self, check: Callable[[Head], None]) -> None:
        self._check = check
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_MAX_BYTES)
        self._body = bytearray()
        self._has_data = False
        self.head: Head | None = None
        self.is_whole = False

    @property
    def body(self) -> bytes:
        """What has come of the body."""
        return bytes(self._body)

    @property
    def held_bytes(self) -> int:
        """How much of the body is in memory."""
        return len(self._body)

    @property
    def has_data(self) -> bool:
        """Whether anything has come."""
        return self._has_data

    def received(self, data: bytes) -> bytes:
        """Take in what has come; `is_whole` tells whether the request is there.

        Args:
            data: Not empty.

        Returns:
            What is to be sent at once; nearly always nothing.

        Raises:
            RefusedError: It is not what a callback can be.
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
        while not self.is_whole:
            match self._http.next_event():
                case h11.Request() as request:
                    self._begin(request)
                case h11.Data(data=data):
                    if len(self._body) + len(data) > BODY_MAX_BYTES:
                        raise RefusedError(TOO_LARGE)
                    self._body += data
                case h11.EndOfMessage():
                    self.is_whole = True
                case _:  # more must come
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
        """Let go of the body: another has it now."""
        self._body = bytearray()

    def answer(self, status: HTTPStatus) -> bytes:
        """The bytes of an answer without a body; nothing if HTTP has none to what came."""
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return b""
        headers = [("Content-Length", "0"), ("Connection", "close")]
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers.append(("Allow", "POST"))
        response = h11.Response(status_code=status, headers=headers, reason=status.phrase.encode())
        return (self._http.send(response) or b"") + (self._http.send(h11.EndOfMessage()) or b"")
