"""An HTTP answer, read within the time limit of its call.

A plain head is parsed here: http.client uses the parser for e-mail, which takes as much CPU time as all other parts of
a call. A head that is not plain is left to http.client, from its first byte on. Two parsers may not agree on where such
an answer ends (RFC 9112, section 6.3), so no other answer is read from its connection.
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
# The lines of a plain head that have been received, and the empty line at its end if it has been received too. At most
# 100 header lines with the empty one, the same bound as in http.client.
_LINES: Final = re.compile(
    rb"HTTP/1\.(?P<minor>[01]) (?P<status>[1-5][0-9]{2})(?: (?P<reason>[\t -~]*))?\r\n"
    rb"(?P<fields>(?:" + _NAME.encode() + rb":[\t -~]*\r\n){0,99})"
    rb"(?P<end>\r\n)?"
)
_LENGTH: Final = re.compile(r"[0-9]{1,18}")
_WITHOUT_BODY: Final = frozenset({HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED})


class Incoming(io.RawIOBase):
    """The bytes that a socket receives before the deadline. http.client gets it in place of the socket.

    Attributes:
        has_begun: Whether any byte has been received.
        at_end: Whether the other side has closed the connection.
        left_over: Whether there are bytes after the answer; known when the answer is closed.
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
        """Wait for the head of the final answer and skip interim answers before it. The head stays unread.

        RFC 9110, section 15.2: any number of interim answers (1xx) may come first; http.client knows 100 only.

        Returns:
            The head; None, as soon as that is certain, if it is not plain.

        Raises:
            UnforeseenAnswerError: An interim answer must not be skipped, or there are too many of them.
        """
        for _ in range(1 + _INTERIM_MAX):
            head = self._next_head()
            if head is None or head["status"] >= b"200":
                return head
            if head["status"] == b"101":
                raise UnforeseenAnswerError("wants to switch to another protocol (101), which was not requested")
            self.skip(head.end())
        raise UnforeseenAnswerError(f"sent more than {_INTERIM_MAX} interim answers (1xx)")

    def _next_head(self) -> re.Match[bytes] | None:
        piece = self._unread or self._receive()
        while piece:
            if b"\n" in piece:  # else the whole head would be parsed for each byte if they arrive one by one
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
        self._record(len(piece))
        self._unread += piece
        return piece

    def _record(self, number: int) -> None:
        self.has_begun = self.has_begun or number > 0
        self.at_end = number == 0

    def skip(self, number: int) -> None:
        """Mark a number of received bytes as read."""
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
        self._record(number)
        return number

    def end(self, reader: io.BufferedReader) -> None:
        """Read no more from the socket; bytes that are unread, here or in the reader, are left over."""
        self._ended = True
        self.left_over = bool(self._unread or reader.peek(1))


class _Reader(io.BufferedReader):
    """The file that http.client reads; http.client closes it when the answer has been read to its end."""

    def close(self) -> None:
        if not self.closed:
            cast("Incoming", self.raw).end(self)
        super().close()


class HttpAnswer(http.client.HTTPResponse):
    """An answer with the interface of http.client.

    Attributes:
        will_close: Whether the connection must not be used again after this answer.
    """

    headers: HTTPHeaderDict  # type: ignore[assignment] # it has all methods that http.client calls after parsing

    def __init__(self, incoming: Incoming, method: str | None) -> None:
        super().__init__(cast("socket.socket", incoming), method=method)
        self.incoming = incoming

    def begin(self) -> None:
        """Read the head."""
        head = self.incoming.final_head()
        if head is not None and self._accepts(head):
            self.incoming.skip(head.end())
            return
        super().begin()
        if self.incoming.at_end:  # http.client takes the connection's end for the end of the head
            raise http.client.IncompleteRead(b"")
        self.headers = HTTPHeaderDict((name, _unfolded(value)) for name, value in self.headers.items())
        self.will_close = True

    def flush(self) -> None:
        """Do nothing: an answer is only read. http.client would flush its file, which may already be freed."""

    def _accepts(self, head: re.Match[bytes]) -> bool:
        """Use a plain head, if it states clearly where the answer ends; else return False."""
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
        options = headers.get("Connection", "").lower()
        has_end = self.chunked or self.length is not None
        self.will_close = not has_end or "close" in options or not (is_current or "keep-alive" in options)
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
    """Join a value that spans several lines with blanks (RFC 9112, section 5.2)."""
    return " ".join(map(str.strip, value.splitlines())) if "\n" in value or "\r" in value else value
