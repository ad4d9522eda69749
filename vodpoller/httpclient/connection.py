"""Connections whose every step keeps to a deadline, and that know whether they can be used again.

Request and answer belong together: a connection is used again only if nothing came on it but whole answers whose end
was certain (RFC 9112, sections 6.3 and 9.3).
"""

import errno
import http.client
import io
import ipaddress
import re
import socket
import ssl
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, Final, Self, TypeVar, cast

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError
from urllib3.response import HTTPResponse

from vodpoller.httpclient.words import ForbiddenAddressError, UnforeseenAnswerError

_T = TypeVar("_T")

# What is sent at once: no more than one record of TLS, since Python starts the timeout anew with each of them.
_PIECE_BYTES: Final = 1 << 14
# Less than what firewalls and load balancers forget connections after: those of the large clouds after 60 s to 350 s.
IDLE_MAX_SECS: Final = 30.0
# What a peer that does not even acknowledge a request on a connection that was idle gets of the time to connect.
_SILENCE_SHARE: Final = 1 / 3
_INTERIM_MAX: Final = 20


class Deadline(float):
    """A timeout that knows when it ends: requests and urllib3 hand it on to the connection as the number that it is."""

    __slots__ = ("_ends_at", "_monotonic")

    _ends_at: float
    _monotonic: Callable[[], float]

    def __new__(cls, secs: float, monotonic: Callable[[], float]) -> Self:
        """It begins now."""
        made = super().__new__(cls, secs)
        made._ends_at = monotonic() + secs
        made._monotonic = monotonic
        return made

    def left_secs(self) -> float:
        """How long it may still take.

        Raises:
            TimeoutError: No time is left.
        """
        left_secs = self._ends_at - self._monotonic()
        if left_secs <= 0:
            raise TimeoutError("the time of the call is over")
        return left_secs


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """What connections of one client have in common; see `transport.DeadlineAdapter`."""

    resolve: Callable[..., list[Any]]
    permits: Callable[[str], bool]
    monotonic: Callable[[], float]


class BoundedConnection(HTTPConnection):
    """A connection whose every step keeps to the deadline of the call that it serves, which is its `timeout`.

    Attributes:
        idle_since: Since when no call uses it; None as long as it has served none.
    """

    def __init__(self, reach: Reach, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reach = reach
        self._answer: _Answer | None = None
        self._response: http.client.HTTPResponse | None = None
        self.idle_since: float | None = None

    def left_secs(self) -> float:
        """What the call has left, as `Deadline.left_secs`."""
        return cast("Deadline", self.timeout).left_secs()

    def connect(self) -> None:
        """As in urllib3."""
        self.idle_since = None
        self._answer = None
        super().connect()

    @property
    def has_heard(self) -> bool:
        """Whether a byte of the answer to its last request came."""
        return self._answer is not None and self._answer.has_begun

    def rest(self) -> None:
        """No call uses it from now on. It closes if anything came behind the answer, even the connection's end."""
        self.idle_since = self._reach.monotonic()
        if self._answer is not None and self._answer.left_over:
            self.close()
            return
        try:
            self.sock.settimeout(0)
            self.sock.recv(1)
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        except OSError:
            pass
        self.close()

    def is_stale(self) -> bool:
        """Whether it has been idle for so long that what is in between may have forgotten it."""
        return self.idle_since is not None and self._reach.monotonic() - self.idle_since > IDLE_MAX_SECS

    @property
    def has_time(self) -> bool:
        """Whether anything is left of the time of the call."""
        try:
            return self.left_secs() > 0
        except TimeoutError:
            return False

    def wake(self) -> None:
        """A call uses it again. The kernel gives up soon if nothing is acknowledged: a firewall may swallow it all."""
        self._answer = None
        option = getattr(socket, "TCP_USER_TIMEOUT", None)  # tcp(7): milliseconds, Linux only
        if option is not None and isinstance(self.sock, socket.socket):
            self.sock.setsockopt(socket.IPPROTO_TCP, option, int(self.left_secs() * _SILENCE_SHARE * 1000) + 1)

    def send(self, data: Any) -> None:
        """As in http.client, piece by piece."""
        if self.sock is None:
            self.connect()
        rest = memoryview(data)
        while rest:
            self.sock.settimeout(self.left_secs())
            super().send(rest[:_PIECE_BYTES])
            rest = rest[_PIECE_BYTES:]

    def _tunnel(self) -> None:
        super()._tunnel()
        self.sock.settimeout(self.left_secs())

    def response_class(  # type: ignore[override] # http.client only calls it
        self, sock: socket.socket, *args: Any, **kwargs: Any
    ) -> http.client.HTTPResponse:
        """Called by http.client for each answer, also a proxy's to CONNECT."""
        self._answer = _Answer(sock, cast("Deadline", self.timeout))
        self._response = _HttpAnswer(cast("socket.socket", self._answer), *args, **kwargs)
        return self._response

    def getresponse(self) -> HTTPResponse:  # type: ignore[override] # as in urllib3
        """As in urllib3."""
        try:
            return super().getresponse()
        except BaseException:
            # urllib3 leaves one open whose Content-Length it does not like.
            if self._response is not None:
                self._response.close()
            if self._answer is not None:
                self._answer.close()
            raise


class Connection(BoundedConnection):
    """One that looks up names and connects within the deadline, too."""

    def _new_conn(self) -> socket.socket:
        """A connected socket; errors as urllib3's own method has them."""
        try:
            return self._first_that_answers(self._look_up())
        except socket.gaierror as error:
            raise NameResolutionError(self.host, self, error) from error
        except TimeoutError as error:
            raise ConnectTimeoutError(self, f"{self.host} could not be reached within {self.timeout:g} s") from error
        except (OSError, UnicodeError) as error:
            raise NewConnectionError(self, f"Failed to establish a new connection: {error}") from error

    def _look_up(self) -> list[Any]:
        host = self._dns_host.strip("[]")
        look_up = partial(self._reach.resolve, host, self.port or self.default_port, type=socket.SOCK_STREAM)
        found = look_up() if _is_address(host) else _within(look_up, self.left_secs())
        if self.proxy is not None:
            return found
        permitted = [entry for entry in found if self._reach.permits(entry[4][0])]
        if found and not permitted:
            raise ForbiddenAddressError(found[0][4][0])
        return permitted

    def _first_that_answers(self, addresses: list[Any]) -> socket.socket:
        failure = OSError(errno.EADDRNOTAVAIL, "it has no address")
        for tried, (family, kind, protocol, _, address) in enumerate(addresses):
            sock = socket.socket(family, kind, protocol)
            try:
                for option in self.socket_options or ():
                    sock.setsockopt(*option)
                # An address that swallows packets must leave time for the next one.
                sock.settimeout(self.left_secs() / (len(addresses) - tried))
                sock.connect(address)
                sock.settimeout(self.left_secs())  # for TLS, whose handshake is one operation
            except OSError as error:
                sock.close()
                failure = error
            else:
                return sock
        raise failure


class TlsConnection(Connection, HTTPSConnection):
    """The same, encrypted."""


class _Answer(io.RawIOBase):
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
        return _Reader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
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
        self._holder.close()
        super().close()


class _Reader(io.BufferedReader):
    """http.client closes it when the answer is read to its end."""

    def close(self) -> None:
        if not self.closed:
            cast("_Answer", self.raw).end(self)
        super().close()


class _HttpAnswer(http.client.HTTPResponse):
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
        super().begin()
        if cast("_Answer", self.fp.raw).at_end:  # http.client takes that for the head's end
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


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _within(work: Callable[[], _T], timeout_secs: float) -> _T:
    """What a function returns or raises, or a TimeoutError; it goes on in its thread then."""
    done: Future[_T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            done.set_exception(error)

    threading.Thread(target=run, name="lookup", daemon=True).start()
    return done.result(timeout_secs)
