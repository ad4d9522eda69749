"""HTTP calls that end in time, whatever the other side does; and the words for what came of them.

requests and urllib3 have timeouts for one operation of a socket: whoever sends a byte now and then is waited for
without end, and none bounds the lookup of a name (urllib3's `total` is the sum of two such operations only). Here each
operation gets what is left of the whole call's time. All else is theirs: pools, TLS, proxies, reading answers;
http.client bounds what an answer's head may hold, to 100 lines of 64 KiB.
"""

import http.client
import io
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, Self, TypeVar, cast
from urllib.parse import SplitResult, urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.utils import select_proxy
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError
from urllib3.exceptions import TimeoutError as Urllib3TimeoutError
from urllib3.poolmanager import ProxyManager
from urllib3.response import HTTPResponse

_T = TypeVar("_T")

# What is sent at once: no more than one record of TLS, since Python starts the timeout anew with each of them.
_PIECE_BYTES: Final = 1 << 14
_RETRY_AFTER_MAX_SECS: Final = 86_400.0
_PORTS: Final = {"http": 80, "https": 443}
_SOCKS_PORT: Final = 1080


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What the environment says of calls to an address.

    Args:
        proxies: By scheme, as requests takes them.
        verify: What vouches for certificates: the path of a CA bundle, or True for the one that requests brings.
        proxy: The proxy by which the address is reached; empty where there is none.
    """

    proxies: Mapping[str, str]
    verify: bool | str
    proxy: str

    @property
    def problem(self) -> str:
        """Why no call can be made; empty where there is no reason."""
        if isinstance(self.verify, str) and not Path(self.verify).exists():
            return f"$REQUESTS_CA_BUNDLE or $CURL_CA_BUNDLE is {self.verify}, which does not exist"
        return ""


def environment_of(url: str) -> Environment:
    """Read `$http_proxy` and its kind, `$no_proxy`, `$REQUESTS_CA_BUNDLE` and `$CURL_CA_BUNDLE`.

    Args:
        url: Where calls go.
    """
    with requests.Session() as session:
        found = session.merge_environment_settings(url, {}, stream=True, verify=True, cert=None)
    proxies = dict(found["proxies"])
    return Environment(proxies=proxies, verify=found["verify"] or True, proxy=select_proxy(url, proxies) or "")


class ForbiddenAddressError(OSError):
    """The host has no address to which a connection may be made; holds the one it has."""


class DeadlineAdapter(HTTPAdapter):
    """Sends requests, each with one time limit for all of it: lookup, connection, TLS, request, answer and its body.

    It is used without a session: what a session adds (redirects, whose bodies it reads without bound, cookies, a look
    at the environment and at ~/.netrc for each request) is not wanted where it is used.

    Args:
        connections: How many are kept open for each host.
        resolve: In place of `socket.getaddrinfo`. A name is looked up once for each connection, in a thread that is
            left to itself when the time is over: the C library offers no other way out.
        permits: Asked for each address that a name resolves to whether to connect to it. It is not asked for the
            address of a proxy.
        monotonic: The clock, in seconds.
    """

    def __init__(
        self,
        *,
        connections: int,
        resolve: Callable[..., list[Any]] | None = None,
        permits: Callable[[str], bool] = lambda _address: True,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._monotonic = monotonic
        reach = _Reach(resolve=resolve or socket.getaddrinfo, permits=permits)
        self._pools: dict[str, Any] = {
            "http": partial(_make_pool, HTTPConnectionPool, partial(_Connection, reach)),
            "https": partial(_make_pool, HTTPSConnectionPool, partial(_TlsConnection, reach)),
        }
        self._last_pool: tuple[Any, Any] = (None, None)
        super().__init__(pool_maxsize=connections, max_retries=0)

    def send_within(
        self,
        request: requests.PreparedRequest,
        environment: Environment,
        timeout_secs: float,
        *,
        connect_secs: float | None = None,
    ) -> requests.Response:
        """Send a request and read the head of its answer. Reading the body from `raw` keeps to the same time limit.

        Args:
            request: Its body, if it has one, is bytes.
            environment: Of its URL.
            timeout_secs: More than 0.
            connect_secs: For the part until the request is sent; all of `timeout_secs` unless told otherwise.

        Returns:
            The answer, its body not read. Whoever gets it closes it.

        Raises:
            requests.RequestException: There is none. `failure_text` says why.
            urllib3.exceptions.HTTPError: The same.
            OSError: The CA bundle does not exist.
            ValueError: A header cannot be sent, or there was no time.
        """
        whole = _Deadline(timeout_secs, self._monotonic)
        first = whole if connect_secs is None else _Deadline(min(connect_secs, timeout_secs), self._monotonic)
        verify, proxies = environment.verify, environment.proxies
        return self.send(request, stream=True, timeout=(first, whole), verify=verify, proxies=proxies)

    def connect_within(self, url: str, environment: Environment, timeout_secs: float) -> None:
        """Make the connection that a request would use, TLS included, and close it. Nothing is sent.

        Where a proxy is in between, the connection ends there.

        Args:
            url: Where a request would go.
            environment: Of the URL.
            timeout_secs: More than 0.

        Raises:
            requests.RequestException: As `send_within`.
            urllib3.exceptions.HTTPError: As `send_within`.
            OSError: As `send_within`.
        """
        if environment.proxy:
            parts = proxy_parts(environment.proxy)
            pool = self.poolmanager.connection_from_host(parts.hostname, port_of(parts), "http")
        else:
            request = requests.Request("GET", url).prepare()
            pool = self.get_connection_with_tls_context(request, environment.verify)
            self.cert_verify(pool, url, environment.verify, None)  # type: ignore[no-untyped-call] # a gap in the stubs
        connection = cast("Any", pool)._new_conn()  # noqa: SLF001 - all that is public of a pool sends a request
        try:
            connection.timeout = _Deadline(timeout_secs, self._monotonic)
            connection.connect()
        finally:
            connection.close()

    def get_connection_with_tls_context(self, request: Any, verify: Any, *args: Any, **kwargs: Any) -> Any:
        """Called by requests for each request, whose search for the right pool costs a tenth of all else it does.

        The environment, and so the proxy, is the same for all of a host's URLs.
        """
        parts = urlsplit(request.url)
        wanted = (parts.scheme, parts.netloc, verify)
        known, pool = self._last_pool
        if known != wanted:
            pool = super().get_connection_with_tls_context(request, verify, *args, **kwargs)
            self._last_pool = (wanted, pool)
        return pool

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """Called by requests."""
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        """Called by requests."""
        manager = super().proxy_manager_for(*args, **kwargs)
        if isinstance(manager, ProxyManager):  # one for SOCKS has connections of its own
            manager.pool_classes_by_scheme = self._pools
        return manager


# --- how each step gets what is left of the time ----------------------------------------------------------------------


class _Deadline(float):
    """A timeout that knows when it ends: requests and urllib3 hand it on to the connection as the number that it is."""

    __slots__ = ("_ends_at", "_monotonic")

    _ends_at: float
    _monotonic: Callable[[], float]

    def __new__(cls, secs: float, monotonic: Callable[[], float]) -> Self:
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
class _Reach:
    resolve: Callable[..., list[Any]]
    permits: Callable[[str], bool]


class _Connection(HTTPConnection):
    """A connection whose every step keeps to the deadline of the call that it serves, which is its `timeout`."""

    def __init__(self, reach: _Reach, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reach = reach
        self._answer: _Answer | None = None

    def left_secs(self) -> float:
        return cast("_Deadline", self.timeout).left_secs()

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
        failure = OSError("it has no address")
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

    def _tunnel(self) -> None:
        super()._tunnel()
        self.sock.settimeout(self.left_secs())

    def send(self, data: Any) -> None:
        if self.sock is None:
            self.connect()
        rest = memoryview(data)
        while rest:
            self.sock.settimeout(self.left_secs())
            super().send(rest[:_PIECE_BYTES])
            rest = rest[_PIECE_BYTES:]

    def response_class(  # type: ignore[override] # http.client only calls it
        self, sock: socket.socket, *args: Any, **kwargs: Any
    ) -> http.client.HTTPResponse:
        self._answer = _Answer(sock, cast("_Deadline", self.timeout))
        return http.client.HTTPResponse(cast("socket.socket", self._answer), *args, **kwargs)

    def getresponse(self) -> HTTPResponse:  # type: ignore[override] # as in urllib3
        try:
            return super().getresponse()
        except BaseException:
            if self._answer is not None:  # urllib3 leaves one open whose Content-Length it does not like
                self._answer.close()
            raise


class _TlsConnection(_Connection, HTTPSConnection):
    """The same, encrypted."""


class _Answer(io.RawIOBase):
    """What a socket brings in while there is time. Stands in the socket's place for http.client."""

    def __init__(self, sock: socket.socket, deadline: _Deadline) -> None:
        super().__init__()
        self._sock = sock
        self._deadline = deadline
        self._holder = sock.makefile("rb", buffering=0)  # the socket is open until this is closed, too

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(self._deadline.left_secs())
        return self._sock.recv_into(buffer)

    def close(self) -> None:
        self._holder.close()
        super().close()


def _make_pool(pool_class: type[HTTPConnectionPool], connection: Any, *args: Any, **kwargs: Any) -> HTTPConnectionPool:
    pool = pool_class(*args, **kwargs)
    pool.ConnectionCls = connection
    return pool


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


# --- what came of it, in words ----------------------------------------------------------------------------------------


def failure_text(error: BaseException, timeout_secs: float) -> str:
    """What a person should know of a call that failed: the end of a sentence that begins with host and port.

    It holds nothing of the URL, whose query may be a secret; the text of the error itself may.

    Args:
        error: What `send_within`, or reading a body, raised.
        timeout_secs: What the call had.
    """
    # A NewConnectionError only wraps what says more, and is a TimeoutError merely by inheritance.
    telling = (cause for cause in causes(error) if not isinstance(cause, NewConnectionError))
    said = (_said_by(cause, timeout_secs) for cause in telling)
    return next(filter(None, said), f"cannot be reached: {type(error).__name__}")


def causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and those that it wraps: requests and urllib3 keep them in `args`, `reason` or `__cause__`."""
    yield error
    for inner in (*error.args, getattr(error, "reason", None), error.__cause__):
        if isinstance(inner, BaseException):
            yield from causes(inner)


def _said_by(cause: BaseException, timeout_secs: float) -> str:
    """What one of the causes says; nothing where it only wraps another one."""
    said = ""
    match cause:
        case ForbiddenAddressError():
            said = f"is at {cause}, to which no connection may be made"
        case socket.gaierror():
            said = f"cannot be found: {cause.strerror} (is the name right, does DNS work?)"
        case ssl.SSLCertVerificationError():
            said = f"cannot be trusted: {cause.verify_message} (is its certificate right?)"
        case ssl.SSLError():
            said = f"failed at TLS: {cause.reason or 'it hung up'} (does it speak https?)"
        case ConnectTimeoutError():
            said = f"could not be reached within {timeout_secs:g} s (is a firewall in between?)"
        case TimeoutError() | Urllib3TimeoutError():
            said = f"did not answer within {timeout_secs:g} s"
        case ConnectionRefusedError():
            said = "refused the connection (is the receiver running?)"
        case http.client.HTTPException() | ConnectionError():
            said = "closed the connection without a whole answer"
        case OSError(strerror=str(why)):
            said = f"cannot be reached: {why}"
    return said


def shown_url(url: str) -> str:
    """A URL without what may be secret in it: credentials, query, fragment."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "an address that cannot be read"
    return f"{parts.scheme}://{bracketed(parts.hostname)}{port}{parts.path}"


def bracketed(host: str | None) -> str:
    """A host as it stands before a colon and a port."""
    return f"[{host}]" if host and ":" in host else host or "?"


def port_of(parts: SplitResult) -> int:
    """The port of an address, or of a proxy, given or not."""
    return parts.port or _PORTS.get(parts.scheme, _SOCKS_PORT)


def proxy_parts(proxy: str) -> SplitResult:
    """The parts of a proxy's address, which may come without a scheme."""
    return urlsplit(proxy if "://" in proxy else f"http://{proxy}")


def retry_after_secs(headers: Mapping[str, str], now: float) -> float | None:
    """How long an answer asks to be left alone; None where it does not.

    RFC 9110, section 10.2.3: seconds or a date. More than a day counts as a day.

    Args:
        headers: Of the answer.
        now: Unix time, in seconds.
    """
    text = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]+", text):
        return min(float(text), _RETRY_AFTER_MAX_SECS)
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    at = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    return min(max(at - now, 0.0), _RETRY_AFTER_MAX_SECS)
