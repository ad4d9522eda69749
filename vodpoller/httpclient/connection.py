"""Connections on which every step keeps to a deadline, and that know whether they can be used again.

An answer must not be taken for the answer to another request: a connection is used again only if it has received
nothing but complete answers whose end was certain (RFC 9112, sections 6.3 and 9.3).
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

# Sent in one call of `sendall`: at most one TLS record, since Python restarts the timeout with each record.
PIECE_BYTES: Final = 1 << 14
# Shorter than the time after which firewalls and load balancers drop an idle connection: 60 s to 350 s in the large
# clouds.
IDLE_MAX_SECS: Final = 30.0
# On a connection that was idle: the share of the time to connect within which the peer must acknowledge the request.
_ACKNOWLEDGEMENT_SHARE: Final = 1 / 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectPolicy:
    """How all connections of one client are made; the fields are those of `transport.DeadlineAdapter`."""

    resolve: Callable[..., list[Any]]
    permits: Callable[[str], bool]
    monotonic: Callable[[], float]


class BoundedConnection(HTTPConnection):
    """A connection on which every step keeps to the deadline of the current call, which is its `timeout`.

    Attributes:
        idle_since: Monotonic time at which the last call ended; None before the end of the first call.
    """

    def __init__(self, policy: ConnectPolicy, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._policy = policy
        self._answer: HttpAnswer | None = None
        self.idle_since: float | None = None

    def left_secs(self) -> float:
        """The time that the call has left, as `Deadline.left_secs`."""
        return cast("Deadline", self.timeout).left_secs()

    def connect(self) -> None:
        """As in urllib3."""
        self.idle_since = None
        self._answer = None
        super().connect()

    @property
    def has_answer_begun(self) -> bool:
        """Whether a byte of the answer to the last request has been received."""
        return self._answer is not None and self._answer.incoming.has_begun

    def end_use(self) -> None:
        """End the use by a call. The connection is closed if another call cannot use it safely."""
        self.idle_since = self._policy.monotonic()
        answer = self._answer
        is_clean = answer is not None and answer.isclosed() and not answer.will_close and not answer.incoming.left_over
        if not is_clean or self._has_more_tls_data():
            self.close()

    def _has_more_tls_data(self) -> bool:
        """Whether the TLS layer has read more than the answer.

        The pool itself notices bytes that the socket still holds, and the end of the connection.
        """
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
        """Whether it has been idle for so long that a firewall or load balancer may have dropped it."""
        return self.idle_since is not None and self._policy.monotonic() - self.idle_since > IDLE_MAX_SECS

    @property
    def has_time(self) -> bool:
        """Whether the call has any time left."""
        try:
            return self.left_secs() > 0
        except TimeoutError:
            return False

    def reuse(self) -> None:
        """Begin another call on an idle connection.

        The kernel gives up early if nothing is acknowledged: a firewall may discard all packets of an idle connection.
        """
        self._answer = None
        option = getattr(socket, "TCP_USER_TIMEOUT", None)  # tcp(7): milliseconds, Linux only
        if option is not None and isinstance(self.sock, socket.socket):
            self.sock.setsockopt(socket.IPPROTO_TCP, option, int(self.left_secs() * _ACKNOWLEDGEMENT_SHARE * 1000) + 1)

    def send(self, data: Any) -> None:
        """As in http.client, piece by piece."""
        unsent = memoryview(data)
        while unsent:
            self.sock.settimeout(self.left_secs())
            self.sock.sendall(unsent[:PIECE_BYTES])
            unsent = unsent[PIECE_BYTES:]

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
        """Read the head of the answer to the request that was sent. Its body stays unread.

        Args:
            method: The method of the request.
        """
        answer = self.response_class(self.sock, method=method)
        try:
            answer.begin()
        except BaseException:
            answer.close()
            raise
        return answer


class Connection(BoundedConnection):
    """A connection that also looks up names and connects within the deadline."""

    def _new_conn(self) -> socket.socket:
        """A connected socket. Raises the same errors as urllib3's method."""
        try:
            return self._connect_any(self._look_up())
        except socket.gaierror as error:
            raise NameResolutionError(self.host, self, error) from error
        except TimeoutError as error:
            raise ConnectTimeoutError(self, f"{self.host} could not be reached within {self.timeout:g} s") from error
        except (OSError, UnicodeError) as error:
            raise NewConnectionError(self, f"Failed to establish a new connection: {error}") from error

    def _look_up(self) -> list[Any]:
        host = self._dns_host.strip("[]")
        look_up = partial(self._policy.resolve, host, self.port or self.default_port, type=socket.SOCK_STREAM)
        found = look_up() if _is_address(host) else _run_with_timeout(look_up, self.left_secs())
        if self.proxy is not None:
            return found
        permitted = [entry for entry in found if self._policy.permits(entry[4][0])]
        if found and not permitted:
            raise ForbiddenAddressError(found[0][4][0])
        return permitted

    def _connect_any(self, addresses: list[Any]) -> socket.socket:
        failure = OSError(errno.EADDRNOTAVAIL, "it has no address")
        for tried, (family, kind, protocol, _, address) in enumerate(addresses):
            sock = socket.socket(family, kind, protocol)
            try:
                for option in self.socket_options or ():
                    sock.setsockopt(*option)
                # An address that does not answer must leave time for the next one.
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
    """A connection that is also encrypted."""


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _run_with_timeout(work: Callable[[], _T], timeout_secs: float) -> _T:
    """Run a function in a thread and return what it returns, or raise what it raises.

    Raises:
        TimeoutError: The time is over. The function continues in its thread.
    """
    done: Future[_T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except Exception as error:  # noqa: BLE001 - raised again in the waiting thread
            done.set_exception(error)

    threading.Thread(target=run, name="lookup", daemon=True).start()
    return done.result(timeout_secs)
