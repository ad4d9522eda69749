"""An answer: read within the time of its call, and trusted as far as its end is certain (RFC 9112, section 6.3)."""

import http.client
import io
import re
import socket
from http import HTTPStatus
from typing import Any, Final, cast

from vodpoller.httpclient.deadline import Deadline
from vodpoller.httpclient.words import UnforeseenAnswerError

_INTERIM_MAX: Final = 20


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
        self._holder = sock.makefile("rb", buffering=0)  # the socket is open until this is closed, too
        self._ended = False
        self.at_end = False
        self.has_begun = False
        self.left_over = False

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
        self._sock.settimeout(self._deadline.left_secs())
        number = self._sock.recv_into(buffer)
        self.has_begun = self.has_begun or number > 0
        self.at_end = number == 0
        return number

    def end(self, reader: io.BufferedReader) -> None:
        """Bring in no more; what the reader still holds is left over."""
        self._ended = True
        self.left_over = bool(reader.peek(1))

    def close(self) -> None:
        """As in io."""
        self._holder.close()
        super().close()


class _Reader(io.BufferedReader):
    """http.client closes it when the answer is read to its end."""

    def close(self) -> None:
        if not self.closed:
            cast("Incoming", self.raw).end(self)
        super().close()


class HttpAnswer(http.client.HTTPResponse):
    """An answer as http.client reads it, but behind any interim one, and only trusted as far as its end is certain."""

    def _read_status(self) -> tuple[str, int, str]:
        """RFC 9110, section 15.2: any number of interim answers (1xx) may come first; http.client knows 100 only."""
        for _ in range(1 + _INTERIM_MAX):
            version, status, reason = super()._read_status()  # type: ignore[misc] # missing in the stubs
            if status >= HTTPStatus.OK:
                return version, status, reason
            if status == HTTPStatus.SWITCHING_PROTOCOLS:
                raise UnforeseenAnswerError("wants to switch to another protocol (101), which was not asked for")
            http.client.parse_headers(self.fp)
        raise UnforeseenAnswerError(f"sent more than {_INTERIM_MAX} interim answers (1xx)")

    def begin(self) -> None:
        """Read the head."""
        super().begin()
        if cast("Incoming", self.fp.raw).at_end:  # http.client takes that for the head's end
            raise http.client.IncompleteRead(b"")
        self.will_close = self.will_close or not self._ends_for_certain()

    def _ends_for_certain(self) -> bool:
        """RFC 9112, section 6.3: what does not say in one clear way where it ends must be the connection's last."""
        lengths = self.headers.get_all("Content-Length", [])
        is_coded = "Transfer-Encoding" in self.headers
        if self.headers.defects or self.headers.get_payload():  # lines that are no headers
            return False
        if is_coded:
            return self.chunked and not lengths and self.status != HTTPStatus.NO_CONTENT
        if self.status == HTTPStatus.NO_CONTENT:
            return all(length.strip() == "0" for length in lengths)
        return len(lengths) <= 1 and all(re.fullmatch("[0-9]+", length.strip()) for length in lengths)

    def _read_next_chunk_size(self) -> int:
        size: int = super()._read_next_chunk_size()  # type: ignore[misc] # missing in the stubs
        if size < 0:
            raise UnforeseenAnswerError(f"sent a chunk of {size} bytes")
        return size
