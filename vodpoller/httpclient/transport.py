"""HTTP calls that end in time, whatever the other side does.

requests and urllib3 have timeouts for one operation of a socket: a peer that sends a byte now and then is waited for
without end, and none bounds the lookup of a name (urllib3's `total` is the sum of two such operations only). Here each
operation gets what is left of the whole call's time. All else is theirs: pools, TLS, proxies, reading answers;
http.client bounds what an answer's head may hold, to 100 lines of 64 KiB.

A connection that was idle for long, or that breaks when it is used again, is replaced.
"""

import http.client
import logging
import re
import socket
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError, ProtocolError

from vodpoller.errors import ConfigError
from vodpoller.httpclient.address import Environment, port_of, proxy_parts
from vodpoller.httpclient.connection import BoundedConnection, Connection, Reach, TlsConnection
from vodpoller.httpclient.deadline import Deadline
from vodpoller.httpclient.trust import Roots, RootsError
from vodpoller.httpclient.words import UnusableProxyError, causes

_NEW_CONNECTION: Final = 0


class _WithoutQueries(logging.Filter):
    """Cuts the query, which may be a secret, out of the URLs in the lines of urllib3, and whatever quotes an answer."""

    def filter(self, record: logging.LogRecord) -> bool:
        said, _, _ = record.getMessage().partition(", unparsed data:")
        record.msg, record.args = _QUERY.sub("?…", said), ()
        record.exc_info = None
        return True


_QUERY: Final = re.compile(r"\?[^\s\"')]*")
_WITHOUT_QUERIES: Final = _WithoutQueries()
_LOGGERS_THAT_SHOW_URLS: Final = ("urllib3.connection", "urllib3.connectionpool", "urllib3.util.retry")


# All that a call, or reading a body, may raise. `failure_text` says what it means.
CALL_ERRORS: Final = (requests.RequestException, HTTPError, http.client.HTTPException, OSError, ValueError)


def was_repeated(response: requests.Response) -> bool:
    """Whether the request was sent twice: the first time on a connection that had been idle and broke before an answer.

    What was asked for may have been done at the first time already.

    Args:
        response: What `send_within` returned.
    """
    return bool(getattr(response.raw, "is_repeated", False))


class DeadlineAdapter(HTTPAdapter):
    """Sends requests, each with one time limit for all of it: lookup, connection, TLS, request, answer and its body.

    It is used without a session: what a session adds (redirects, whose bodies it reads without bound, cookies, a look
    at the environment and at ~/.netrc for each request) is not wanted where it is used.

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
        self._reach = reach = Reach(resolve=resolve or socket.getaddrinfo, permits=permits, monotonic=monotonic)
        self._pools: dict[str, Any] = {
            "http": partial(_make_pool, _Pool, partial(Connection, reach)),
            "https": partial(_make_pool, _TlsPool, partial(TlsConnection, reach)),
        }
        self._last_pool: tuple[Any, Any] = (None, None)
        for name in _LOGGERS_THAT_SHOW_URLS:
            logging.getLogger(name).addFilter(_WITHOUT_QUERIES)
        super().__init__(pool_maxsize=connections, max_retries=0)

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
        self.proxy_manager.clear()

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
            urllib3.exceptions.HTTPError: The same.
            RootsError: What vouches for certificates cannot be read.
            UnusableProxyError: The environment names one.
            ValueError: A header cannot be sent, or there was no time.
        """
        if environment.problem:
            raise UnusableProxyError(environment.problem)
        if str(request.url).startswith("https:"):
            self.check_roots()  # before the time begins, of which it would take a part at the first call
        whole = Deadline(timeout_secs, self._monotonic)
        first = whole if connect_secs is None else Deadline(min(connect_secs, timeout_secs), self._monotonic)
        return self.send(request, stream=True, timeout=(first, whole), proxies=environment.proxies)

    def connect_within(self, url: str, environment: Environment, timeout_secs: float) -> None:
        """Make the connection that a request would use, TLS included, and close it. Nothing is sent.

        If a proxy is in between, the connection ends there.

        Args:
            url: Where a request would go.
            environment: Of the URL.
            timeout_secs: More than 0.

        Raises:
            requests.RequestException: As `send_within`.
            urllib3.exceptions.HTTPError: As `send_within`.
            RootsError: As `send_within`.
            UnusableProxyError: As `send_within`.
        """
        if environment.problem:
            raise UnusableProxyError(environment.problem)
        if url.startswith("https:"):
            self.check_roots()
        if environment.proxy:
            parts = proxy_parts(environment.proxy)
            pool = self.poolmanager.connection_from_host(parts.hostname, port_of(parts), "http")
        else:
            request = requests.Request("GET", url).prepare()
            pool = self.get_connection_with_tls_context(request, True)  # noqa: FBT003 - as requests calls it
        connection = cast("Any", pool)._new_conn()  # noqa: SLF001 - all that is public of a pool sends a request
        try:
            connection.timeout = Deadline(timeout_secs, self._monotonic)
            connection.connect()
        finally:
            connection.close()

    def get_connection_with_tls_context(self, request: Any, verify: Any, *args: Any, **kwargs: Any) -> Any:
        """Called by requests for each request, whose search for the right pool costs a tenth of all else it does.

        The environment, and so the proxy, is the same for all of a host's URLs.
        """
        parts = urlsplit(request.url)
        wanted = (parts.scheme, parts.netloc, self._roots.context() if parts.scheme == "https" else None)
        known, pool = self._last_pool
        if known != wanted:
            pool = super().get_connection_with_tls_context(request, verify, *args, **kwargs)
            self._last_pool = (wanted, pool)
        return pool

    def build_connection_pool_key_attributes(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """Called by requests. It would have each connection read the CA bundle anew."""
        host, _ = super().build_connection_pool_key_attributes(request, *args, **kwargs)
        return host, {"ssl_context": self._roots.context()} if host["scheme"] == "https" else {}

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        """Called by requests, to add what is in the pool's `ssl_context` already."""

    def build_response(self, req: Any, resp: Any) -> requests.Response:
        """Called by requests, whose own looks for cookies and a charset, which nothing here wants."""
        response = requests.Response()
        response.status_code = resp.status
        response.reason = resp.reason
        response.headers = CaseInsensitiveDict(resp.headers)
        response.url = req.url
        response.request = req
        response.raw = resp
        return response

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """Called by requests."""
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        """Called by requests."""
        if proxy in self.proxy_manager:
            return self.proxy_manager[proxy]
        scheme = proxy_parts(proxy).scheme
        if scheme == "https":
            kwargs["proxy_ssl_context"] = self._roots.context()
        manager = super().proxy_manager_for(proxy, **kwargs)
        manager.pool_classes_by_scheme = (
            _socks_pools(manager.pool_classes_by_scheme, self._reach) if scheme.startswith("socks") else self._pools
        )
        return manager


class _Pool(HTTPConnectionPool):
    """Keeps connections while they can be trusted to bring the answer to the next request, and nothing else."""

    def _get_conn(self, timeout: float | None = None) -> Any:
        connection: Any = super()._get_conn(timeout)
        if timeout == _NEW_CONNECTION or connection.is_stale():
            connection.close()  # one that is closed connects anew
        return connection

    def _put_conn(self, conn: Any) -> None:
        if conn is not None and not conn.is_closed:
            conn.rest()
        super()._put_conn(conn)

    def _make_request(self, conn: Any, *args: Any, **kwargs: Any) -> Any:
        was_idle = conn.idle_since is not None and not conn.is_closed
        if was_idle:
            conn.wake()
        try:
            return super()._make_request(conn, *args, **kwargs)
        except (HTTPError, http.client.HTTPException, OSError) as error:
            if was_idle and not conn.has_heard and conn.has_time:
                raise _LostConnectionError from error
            raise

    def urlopen(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().urlopen(*args, **kwargs)
        except ProtocolError as error:
            if not any(isinstance(cause, _LostConnectionError) for cause in causes(error)):
                raise
        response: Any = super().urlopen(*args, **{**kwargs, "pool_timeout": _NEW_CONNECTION})
        response.is_repeated = True
        return response


class _TlsPool(_Pool, HTTPSConnectionPool):
    """The same, encrypted."""


class _LostConnectionError(ConnectionError):
    """A connection that had been idle broke before a byte of the answer came."""


def _make_pool(pool_class: type[HTTPConnectionPool], connection: Any, *args: Any, **kwargs: Any) -> HTTPConnectionPool:
    pool = pool_class(*args, **kwargs)
    pool.ConnectionCls = connection
    return pool


def _socks_pools(pool_classes: Mapping[str, Any], reach: Reach) -> dict[str, Any]:
    """The pools of a proxy for SOCKS, by scheme. They connect in their own way, which needs a package of its own."""
    pools = {}
    for scheme, pool_class in pool_classes.items():
        connection = type("_SocksConnection", (BoundedConnection, pool_class.ConnectionCls), {})
        pools[scheme] = partial(_make_pool, type("_SocksPool", (_Pool, pool_class), {}), partial(connection, reach))
    return pools
