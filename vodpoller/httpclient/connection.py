"""Connections whose every step keeps to a deadline, and that know whether they can be used again.

Request and answer belong together: a connection is used again only if nothing came on it but whole answers whose end
was certain (RFC 9112, sections 6.3 and 9.3).
"""

import errno
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar, cast

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError

from vodpoller.httpclient.answer import HttpAnswer, Incoming
from vodpoller.httpclient.deadline import Deadline
from vodpoller.httpclient.words import ForbiddenAddressError

_T = TypeVar("_T")

# What is sent at once: no more than one record of TLS, since Python starts the timeout anew with each of them.
PIECE_BYTES: Final = 1 << 14
# Less than what firewalls and load balancers forget connections after: those of the large clouds after 60 s to 350 s.
IDLE_MAX_SECS: Final = 30.0
# What a peer that does not even acknowledge a request on a connection that was idle gets of the time to connect.
_SILENCE_SHARE: Final = 1 / 3


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
        self._answer: HttpAnswer | None = None
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
        return self._answer is not None and self._answer.incoming.has_begun

    def rest(self) -> None:
        """No call uses it from now on. It closes if it cannot be trusted with another one."""
        self.idle_since = self._reach.monotonic()
        answer = self._answer
        is_over = answer is not None and answer.isclosed() and not answer.will_close and not answer.incoming.left_over
        if not is_over or self._holds_more():
            self.close()

    def _holds_more(self) -> bool:
        """Whether TLS has read more than the answer. The pool sees what is not read yet, even the connection's end."""
        if not isinstance(self, HTTPSConnection):
            return False
        try:
            self.sock.settimeout(0)
            self.sock.recv(1)
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        except OSError:
            pass
        return True

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
        rest = memoryview(data)
        while rest:
            self.sock.settimeout(self.left_secs())
            self.sock.sendall(rest[:PIECE_BYTES])
            rest = rest[PIECE_BYTES:]

    def _tunnel(self) -> None:
        super()._tunnel()
        self.sock.settimeout(self.left_secs())

    def response_class(  # type: ignore[override] # http.client only calls it
        self, sock: socket.socket, *, method: str | None
    ) -> HttpAnswer:
        """Called by http.client for a proxy's answer to CONNECT."""
        self._answer = HttpAnswer(Incoming(sock, cast("Deadline", self.timeout)), method)
        return self._answer

    def read_head(self, method: str | None) -> HttpAnswer:
        """The answer to the request that was sent, its body not read.

        Args:
            method: Of the request.
        """
        answer = self.response_class(self.sock, method=method)
        try:
            answer.begin()
        except BaseException:
            answer.close()
            raise
        return answer


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
