"""HTTP calls that end in time, whatever the other side does.

requests and urllib3 have timeouts for one operation of a socket: a peer that sends a byte now and then is waited for
without end, and none bounds the lookup of a name (urllib3's `total` is the sum of two such operations only). Here each
operation gets what is left of the whole call's time. All else is theirs: pools, TLS, proxies, bodies of answers and
what their heads may hold, which is 100 lines of 64 KiB.

A connection that was idle for long, or that breaks when it is used again, is replaced.
"""

import http.client
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol, cast

import requests
from requests.adapters import HTTPAdapter
from requests.utils import urldefragauth
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    InvalidHeader,
    LocationValueError,
    NewConnectionError,
    SSLError,
)

from vodpoller.errors import ConfigError
from vodpoller.httpclient.address import Environment, host_header, port_of, proxy_parts
from vodpoller.httpclient.connection import Reach
from vodpoller.httpclient.deadline import Deadline
from vodpoller.httpclient.exchange import Exchanged, Route, exchange
from vodpoller.httpclient.pool import Pool, pool_classes, socks_pool_classes
from vodpoller.httpclient.trust import Roots, RootsError
from vodpoller.httpclient.words import UnusableProxyError

# All that a call, or reading a body, may raise. `failure_text` says what it means.
CALL_ERRORS: Final = (requests.RequestException, HTTPError, http.client.HTTPException, OSError, ValueError)


def was_repeated(response: requests.Response) -> bool:
    """Whether the request was sent twice: the first time on a connection that had been idle and broke before an answer.

    What was asked for may have been done at the first time already.

    Args:
        response: What `send_within` returned.
    """
    return isinstance(response.raw, Exchanged) and response.raw.is_repeated


class Transport(Protocol):
    """What sends requests: `DeadlineAdapter`, or what a test has in its place."""

    def send_within(
        self,
        request: requests.PreparedRequest,
        environment: Environment,
        timeout_secs: float,
        *,
        connect_secs: float | None = None,
    ) -> requests.Response:
        """As `DeadlineAdapter.send_within`."""

    def connect_within(self, url: str, environment: Environment, timeout_secs: float) -> float | None:
        """As `DeadlineAdapter.connect_within`."""

    def reread_roots(self, key: str) -> None:
        """As `DeadlineAdapter.reread_roots`."""

    def close(self) -> None:
        """As `DeadlineAdapter.close`."""


class DeadlineAdapter:
    """Sends requests, each with one time limit for all of it: lookup, connection, TLS, request, answer and its body.

    It takes what requests prepares, and answers and fails as its adapters do, but has no session: what that adds
    (redirects, whose bodies it reads without bound, cookies, a look at the environment and at ~/.netrc for each
    request) is not wanted where it is used.

    A request on a connection that was idle, and broke before a byte of an answer came, is sent again on a new one
    within the same time limit. The receiver must be able to take it twice, or the caller ask `was_repeated`.

    Args:
        connections: The number that is kept open for each host.
        ca_file: PEM with what vouches for certificates; None is what the environment says, or the public CAs.
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
        ca_file: Path | None = None,
        resolve: Callable[..., list[Any]] | None = None,
        permits: Callable[[str], bool] = lambda _address: True,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._monotonic = monotonic
        self._roots = Roots(ca_file)
        self._reach = Reach(resolve=resolve or socket.getaddrinfo, permits=permits, monotonic=monotonic)
        # requests knows what urllib3 has to be told of pools and proxies; nothing is sent by it.
        self._requests = HTTPAdapter(pool_maxsize=connections)
        self._pool_classes = pool_classes(self._reach)
        self._requests.poolmanager.pool_classes_by_scheme = self._pool_classes
        self._last_route: tuple[object, Route | None] = (None, None)
        self._making_manager = threading.Lock()

    def check_roots(self) -> None:
        """Read what vouches for certificates now, not at the first https call.

        Raises:
            RootsError: It cannot be read.
        """
        self._roots.context()

    def reread_roots(self, key: str) -> None:
        """Read what vouches for certificates again, for all connections that are used from now on.

        Args:
            key: The configuration's, for the message.

        Raises:
            ConfigError: It cannot be read; what was read before stays in use.
        """
        try:
            self._roots.reread()
        except RootsError as error:
            raise ConfigError([f"{key}: {error}; what was read before stays in use"]) from None
        self.close()
        self._requests.proxy_manager.clear()

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
            The answer, its body not read. The caller closes it.

        Raises:
            requests.RequestException: There is none. `failure_text` says why.
            RootsError: What vouches for certificates cannot be read.
            UnusableProxyError: The environment names one.
            ValueError: A header cannot be sent, or there was no time.
        """
        if environment.problem:
            raise UnusableProxyError(environment.problem)
        try:
            route = self._route(request, environment)  # before the time begins: the first time, it reads certificates
            whole = Deadline(timeout_secs, self._monotonic)
            connect = whole if connect_secs is None else Deadline(min(connect_secs, timeout_secs), self._monotonic)
            answer = exchange(route, request, connect, whole)
        except (RootsError, requests.RequestException):
            raise
        except (HTTPError, http.client.HTTPException, OSError) as error:
            raise _as_requests_says(error, request) from error
        return _Response(request, answer)

    def connect_within(self, url: str, environment: Environment, timeout_secs: float) -> float | None:
        """Make the connection that a request would use, TLS included, and close it. Nothing is sent.

        If a proxy is in between, the connection ends there.

        Args:
            url: Where a request would go.
            environment: Of the URL.
            timeout_secs: More than 0.

        Returns:
            When the certificate of the other side ends, in seconds since 1970; None if there is none.

        Raises:
            urllib3.exceptions.HTTPError: It cannot be made. `failure_text` says why.
            OSError: The same.
            RootsError: As `send_within`.
            UnusableProxyError: As `send_within`.
        """
        if environment.problem:
            raise UnusableProxyError(environment.problem)
        if environment.proxy:
            parts = proxy_parts(environment.proxy)
            pool = self._requests.poolmanager.connection_from_host(parts.hostname, port_of(parts), "http")
        else:
            pool = self._route(requests.Request("GET", url).prepare(), environment).pool
        connection = cast("Pool", pool).take(is_new=True)
        try:
            connection.timeout = Deadline(timeout_secs, self._monotonic)
            connection.connect()
            return _end_of_certificate(connection.sock)
        finally:
            connection.close()

    def close(self) -> None:
        """Close the idle connections; those in use are closed when their answers are read."""
        self._last_route = (None, None)
        self._requests.close()

    def _route(self, request: requests.PreparedRequest, environment: Environment) -> Route:
        """How it goes; that of the last request is kept, since looking for it costs as much as all else.

        The environment, and so the proxy, is the same for a URL each time.
        """
        proxy = proxy_parts(environment.proxy).geturl() if environment.proxy else ""
        is_encrypted = str(request.url).startswith("https:") or proxy.startswith("https:")
        wanted = (request.url, self._roots.context() if is_encrypted else None)
        known, route = self._last_route
        if route is None or known != wanted:
            route = self._new_route(request, proxy, {"ssl_context": wanted[1]} if is_encrypted else {})
            self._last_route = (wanted, route)
        return route

    def _new_route(self, request: requests.PreparedRequest, proxy: str, trust: dict[str, Any]) -> Route:
        url = str(request.url)
        manager = self._manager_of(proxy, trust) if proxy else self._requests.poolmanager
        pool = cast("Pool", manager.connection_from_url(url, pool_kwargs=trust))
        headers = {"Host": host_header(url), "Accept-Encoding": "identity"}
        forwards = pool.proxy is not None and url.startswith("http:")
        return Route(
            pool=pool,
            tunnels=pool.proxy is not None and not forwards,
            target=urldefragauth(url) if forwards else request.path_url,
            headers={**headers, **pool.proxy_headers} if forwards else headers,
        )

    def _manager_of(self, proxy: str, trust: dict[str, Any]) -> Any:
        with self._making_manager:  # requests shows a manager to other threads before it has our pools
            if proxy in self._requests.proxy_manager:
                return self._requests.proxy_manager[proxy]
            is_encrypted = proxy.startswith("https:")
            manager = self._requests.proxy_manager_for(
                proxy, **({"proxy_ssl_context": trust["ssl_context"]} if is_encrypted else {})
            )
            manager.pool_classes_by_scheme = (
                socks_pool_classes(manager.pool_classes_by_scheme, self._reach)
                if proxy.startswith("socks")
                else self._pool_classes
            )
            return manager


class _Response(requests.Response):
    """What of requests' answer is used here; the rest, such as a jar for cookies, is not made."""

    def __init__(self, request: requests.PreparedRequest, answer: Exchanged) -> None:
        self.request = request
        self.url = str(request.url)
        self.status_code = answer.status
        self.reason = str(answer.reason)
        self.headers = cast("Any", answer.headers)
        self.raw = answer

    def close(self) -> None:
        self.raw.close()
        self.raw.release_conn()


def _as_requests_says(error: Exception, request: requests.PreparedRequest) -> requests.RequestException:
    match error:
        case LocationValueError():
            kind: type[requests.RequestException] = requests.exceptions.InvalidURL
        case InvalidHeader():
            kind = requests.exceptions.InvalidHeader
        case ConnectTimeoutError() if not isinstance(error, NewConnectionError):
            kind = requests.ConnectTimeout
        case TimeoutError():
            kind = requests.ReadTimeout
        case SSLError() | ssl.SSLError():
            kind = requests.exceptions.SSLError
        case _:
            kind = requests.ConnectionError
    return kind(error, request=request)


def _end_of_certificate(sock: Any) -> float | None:
    certificate = sock.getpeercert() if isinstance(sock, ssl.SSLSocket) else None
    return ssl.cert_time_to_seconds(str(certificate["notAfter"])) if certificate else None
