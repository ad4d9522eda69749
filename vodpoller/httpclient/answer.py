"""An answer: read within the time of its call, and trusted as far as its end is certain (RFC 9112, section 6.3).

A plain head is read here, since http.client takes each for an e-mail, which costs as much as all the rest of a call. A
head that is not plain is left to http.client, from its first byte on; as two readers may not agree on where such an
answer ends, no other answer is read from its connection.
"""

import http.client
import io
import re
import socket
from http import HTTPStatus
from typing import Any, Final, cast

from urllib3 import HTTPHeaderDict

from vodpoller.httpclient.deadline import Deadline
from vodpoller.httpclient.words import UnforeseenAnswerError

_INTERIM_MAX: Final = 20
_HEAD_MAX_BYTES: Final = 1 << 16

_NAME: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_FIELD: Final = re.compile(rf"({_NAME}):[\t ]*([\t -~]*)\r\n")
# The lines of a plain head so far, and the empty one at its end if that has come. With it, they are 100 at most, of
# which the last is empty: http.client's own bound.
_LINES: Final = re.compile(
    rb"HTTP/1\.(?P<minor>[01]) (?P<status>[1-5][0-9]{2})(?: (?P<reason>[\t -~]*))?\r\n"
    rb"(?P<fields>(?:" + _NAME.encode() + rb":[\t -~]*\r\n){0,99})"
    rb"(?P<end>\r\n)?"
)
_LENGTH: Final = re.compile(r"[0-9]{1,18}")
_WITHOUT_BODY: Final = frozenset({HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED})


class Incoming(io.RawIOBase):
    """What a socket brings in while there is time. Stands in the socket's place for http.client.

    Attributes:
        has_begun: Whether any byte came.
        at_end: Whether the other side has closed the connection.
        left_over: Whether bytes came that are not of the answer; known when it is closed.
    """

    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        super().__init__()
        self._sock = sock
        self._deadline = deadline
        self._unread = b""
        self._ended = False
        self.at_end = False
        self.has_begun = False
        self.left_over = False

    def final_head(self) -> re.Match[bytes] | None:
        """Wait for the answer's head, skip interim answers before it, and leave it unread.

        RFC 9110, section 15.2: any number of interim answers (1xx) may come first; http.client knows 100 only.

        Returns:
            None, as soon as that is certain, if it is not plain.

        Raises:
            UnforeseenAnswerError: An interim answer is not one that may be skipped.
        """
        for _ in range(1 + _INTERIM_MAX):
            head = self._next_head()
            if head is None or head["status"] >= b"200":
                return head
            if head["status"] == b"101":
                raise UnforeseenAnswerError("wants to switch to another protocol (101), which was not asked for")
            self.skip(head.end())
        raise UnforeseenAnswerError(f"sent more than {_INTERIM_MAX} interim answers (1xx)")

    def _next_head(self) -> re.Match[bytes] | None:
        piece = self._unread or self._receive()
        while piece:
            if b"\n" in piece:  # else one that sends byte by byte has them all looked at for each
                lines = _LINES.match(self._unread)
                if lines is not None and lines["end"]:
                    return lines
                if self._unread.find(b"\n", lines.end() if lines else 0) >= 0:
                    return None
            piece = self._receive()
        return None

    def _receive(self) -> bytes:
        wanted_bytes = _HEAD_MAX_BYTES - len(self._unread)
        if not wanted_bytes:
            return b""
        self._sock.settimeout(self._deadline.left_secs())
        piece = self._sock.recv(wanted_bytes)
        self._note(len(piece))
        self._unread += piece
        return piece

    def _note(self, number: int) -> None:
        self.has_begun = self.has_begun or number > 0
        self.at_end = number == 0

    def skip(self, number: int) -> None:
        """Take a number of bytes, which have come, for read."""
        self._unread = self._unread[number:]

    def makefile(self, _mode: str) -> io.BufferedReader:
        """Called by http.client."""
        return _Reader(self)

    def readable(self) -> bool:
        """As in io."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As in io."""
        if self._ended:
            return 0
        if self._unread:
            piece = self._unread[: len(buffer)]
            buffer[: len(piece)] = piece
            self.skip(len(piece))
            return len(piece)
        self._sock.settimeout(self._deadline.left_secs())
        number = self._sock.recv_into(buffer)
        self._note(number)
        return number

    def end(self, reader: io.BufferedReader) -> None:
        """Bring in no more; what is unread, here or in the reader, is left over."""
        self._ended = True
        self.left_over = bool(self._unread or reader.peek(1))


class _Reader(io.BufferedReader):
    """http.client closes it when the answer is read to its end."""

    def close(self) -> None:
        if not self.closed:
            cast("Incoming", self.raw).end(self)
        super().close()


class HttpAnswer(http.client.HTTPResponse):
    """An answer as http.client has it.

    Attributes:
        will_close: Whether the connection is not to be used again after it.
    """

    headers: HTTPHeaderDict  # type: ignore[assignment] # of what http.client does with them, all but parsing

    def __init__(self, incoming: Incoming, method: str | None) -> None:
        super().__init__(cast("socket.socket", incoming), method=method)
        self.incoming = incoming

    def begin(self) -> None:
        """Read the head."""
        head = self.incoming.final_head()
        if head is not None and self._takes(head):
            self.incoming.skip(head.end())
            return
        super().begin()
        if self.incoming.at_end:  # http.client takes that for the head's end
            raise http.client.IncompleteRead(b"")
        self.headers = HTTPHeaderDict((name, _unfolded(value)) for name, value in self.headers.items())
        self.will_close = True

    def flush(self) -> None:
        """Nothing is written to it. http.client flushes what it reads from, which may be freed before this is."""

    def _takes(self, head: re.Match[bytes]) -> bool:
        """Take a plain head, unless it says in no clear way, or in several, where the answer ends."""
        status = int(head["status"])
        is_current = head["minor"] == b"1"
        headers = HTTPHeaderDict(_FIELD.findall(head["fields"].decode()))
        length, coding = headers.get("Content-Length"), headers.get("Transfer-Encoding")
        if coding is not None:
            is_clear = coding.lower() == "chunked" and length is None and is_current and status not in _WITHOUT_BODY
        else:
            is_clear = length is None or bool(_LENGTH.fullmatch(length))
            is_clear = is_clear and not (status == HTTPStatus.NO_CONTENT and int(length or 0))
        if not is_clear:
            return False
        self.version = 11 if is_current else 10
        self.code = self.status = status
        self.reason = (head["reason"] or b"").decode().strip()
        self.headers = self.msg = headers  # type: ignore[assignment] # as above
        self.chunked, self.chunk_left = coding is not None, None
        self.length = 0 if status in _WITHOUT_BODY else None if length is None else int(length)
        wish = headers.get("Connection", "").lower()
        has_end = self.chunked or self.length is not None
        self.will_close = not has_end or "close" in wish or not (is_current or "keep-alive" in wish)
        return True

    def _read_status(self) -> tuple[str, int, str]:
        """Called by http.client for a head that is not plain, and for a proxy's answer to CONNECT."""
        self.incoming.final_head()
        version, status, reason = super()._read_status()  # type: ignore[misc] # missing in the stubs
        if status < HTTPStatus.OK:
            raise UnforeseenAnswerError("sent an interim answer (1xx) that cannot be read")
        return version, status, reason

    def _read_next_chunk_size(self) -> int:
        size: int = super()._read_next_chunk_size()  # type: ignore[misc] # missing in the stubs
        if size < 0:
            raise UnforeseenAnswerError(f"sent a chunk of {size} bytes")
        return size


def _unfolded(value: str) -> str:
    """RFC 9112, section 5.2: a value over several lines is one with blanks in their place."""
    return " ".join(map(str.strip, value.splitlines())) if "\n" in value or "\r" in value else value
