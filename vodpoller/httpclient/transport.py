"""HTTP calls that end within their time limit, whatever the other side does.

The timeouts of requests and urllib3 are for one operation of a socket: a call to a peer that sends a byte now and then
never ends, and no timeout bounds the lookup of a name (urllib3's `total` is only the sum of two such operations). Here
each operation gets the time that is left of the whole call. Everything else is left to these libraries: pools, TLS,
proxies, bodies of answers and the limits of their heads, which are 100 lines of 64 KiB.

A connection that was idle for a long time, or that breaks when it is used again, is replaced.
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
from vodpoller.httpclient.connection import ConnectPolicy
from vodpoller.httpclient.deadline import Deadline
from vodpoller.httpclient.exchange import Exchanged, Route, exchange
from vodpoller.httpclient.pool import Pool, pool_classes, socks_pool_classes
from vodpoller.httpclient.trust import Roots, RootsError
from vodpoller.httpclient.words import UnusableProxyError

# All errors that a call, or reading a body, may raise. `failure_text` describes them.
CALL_ERRORS: Final = (requests.RequestException, HTTPError, http.client.HTTPException, OSError, ValueError)


def was_repeated(response: requests.Response) -> bool:
    """Whether the request was sent twice: the first time on a connection that had been idle and broke before an answer.

    The receiver may already have processed the first request.

    Args:
        response: The response that `send_within` returned.
    """
    return isinstance(response.raw, Exchanged) and response.raw.is_repeated


class Transport(Protocol):
    """Sends requests: `DeadlineAdapter`, or a replacement for it in a test."""

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
    """Sends requests, each with one time limit for all steps: lookup, connection, TLS, request, answer and its body.

    It takes prepared requests and returns and raises the same as the adapters of requests, but has no session. What a
    session adds is not wanted here: redirects (whose bodies it reads without a limit), cookies, and reading the
    environment and ~/.netrc for each request.

    If a connection that was idle breaks before a byte of the answer arrives, the request is sent again on a new
    connection within the same time limit. Either the receiver must tolerate the same request twice, or the caller must
    check `was_repeated`.

    Args:
        connections: The number of idle connections that are kept open for each host.
        ca_file: PEM file with the trusted root certificates; None: those of the environment, or the public CAs.
        resolve: Replacement for `socket.getaddrinfo`. A name is looked up once for each connection, in a thread. When
            the time is over, the thread is abandoned, since the C library cannot cancel a lookup.
        permits: Called with each address that a name resolves to; returns whether a connection to it is permitted. It
            is not called for the address of a proxy.
        monotonic: The monotonic clock, in seconds.
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
        self._policy = ConnectPolicy(resolve=resolve or socket.getaddrinfo, permits=permits, monotonic=monotonic)
        # Used only to configure the pools and proxies of urllib3; it sends nothing.
        self._requests = HTTPAdapter(pool_maxsize=connections)
        self._pool_classes = pool_classes(self._policy)
        self._requests.poolmanager.pool_classes_by_scheme = self._pool_classes
        self._last_route: tuple[object, Route | None] = (None, None)
        self._manager_lock = threading.Lock()

    def check_roots(self) -> None:
        """Read the root certificates now instead of at the first https call.

        Raises:
            RootsError: They cannot be read.
        """
        self._roots.context()

    def reread_roots(self, key: str) -> None:
        """Read the root certificates again, for all calls that begin from now on.

        Args:
            key: The key of the configuration that the error message names.

        Raises:
            ConfigError: They cannot be read; those that were read before stay in use.
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
            request: A request whose body, if it has one, is bytes.
            environment: The environment of its URL.
            timeout_secs: The time limit in seconds; more than 0.
            connect_secs: The time limit for the part until the request is sent; None: the same as `timeout_secs`.

        Returns:
            The answer with its body unread. The caller closes it.

        Raises:
            requests.RequestException: No answer came. `failure_text` describes the reason.
            RootsError: The root certificates cannot be read.
            UnusableProxyError: The proxy in the environment cannot be used.
            ValueError: The head of the request holds a character that cannot be sent.
        """
        if environment.problem:
            raise UnusableProxyError(environment.problem)
        try:
            route = self._route(request, environment)  # before the time starts: the first call reads certificates
            total = Deadline(timeout_secs, self._monotonic)
            connect = total if connect_secs is None else Deadline(min(connect_secs, timeout_secs), self._monotonic)
            answer = exchange(route, request, connect, total)
        except (RootsError, requests.RequestException):
            raise
        except (HTTPError, http.client.HTTPException, OSError) as error:
            raise _as_requests_error(error, request) from error
        return _Response(request, answer)

    def connect_within(self, url: str, environment: Environment, timeout_secs: float) -> float | None:
        """Make the connection that a request would use, TLS included, and close it. Nothing is sent.

        If there is a proxy, the connection is made to the proxy only.

        Args:
            url: The URL of such a request.
            environment: The environment of the URL.
            timeout_secs: The time limit in seconds; more than 0.

        Returns:
            The end of validity of the other side's certificate, in seconds since 1970; None if it has no certificate.

        Raises:
            urllib3.exceptions.HTTPError: The connection cannot be made. `failure_text` describes the reason.
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
        """The route of a request.

        The route of the last request is kept, since finding it takes as much CPU time as all other steps of a call. A
        URL always has the same environment, and therefore the same proxy.
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
        with self._manager_lock:  # else other threads could use a manager of requests before it has our pools
            if proxy in self._requests.proxy_manager:
                return self._requests.proxy_manager[proxy]
            is_encrypted = proxy.startswith("https:")
            manager = self._requests.proxy_manager_for(
                proxy, **({"proxy_ssl_context": trust["ssl_context"]} if is_encrypted else {})
            )
            manager.pool_classes_by_scheme = (
                socks_pool_classes(manager.pool_classes_by_scheme, self._policy)
                if proxy.startswith("socks")
                else self._pool_classes
            )
            return manager


class _Response(requests.Response):
    """A response of requests with only the attributes that are used; it has no cookie jar, for example."""

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


def _as_requests_error(error: Exception, request: requests.PreparedRequest) -> requests.RequestException:
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
