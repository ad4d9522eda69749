"""Pools that keep a connection only if the next bytes on it must be the answer to the next request."""

import socket
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from vodpoller.httpclient.connection import BoundedConnection, Connection, ConnectPolicy, TlsConnection

PoolClasses = Mapping[str, Callable[..., "Pool"]]
"""For each scheme, the callable that makes its pools."""


class Pool(HTTPConnectionPool):
    """A pool of urllib3, to which an answer returns its connection when it has been read to its end."""

    def take(self, *, is_new: bool = False) -> BoundedConnection:
        """Take a connection that is open and idle; if there is none, one that is not open yet.

        Args:
            is_new: Do not take an idle one.

        Raises:
            urllib3.exceptions.ClosedPoolError: The pool is closed.
        """
        connection = cast("BoundedConnection", self._get_conn())
        if is_new or connection.is_stale():
            connection.close()  # a closed connection connects again when it is used
        return connection

    def open(self, connection: BoundedConnection, *, tunnels: bool) -> None:
        """Connect.

        Args:
            connection: A connection of this pool.
            tunnels: Connect to the host through the pool's proxy, not only to the proxy.
        """
        if tunnels:
            self._prepare_proxy(connection)
        else:
            connection.connect()

    def _put_conn(self, conn: Any) -> None:
        if conn is not None and not conn.is_closed:
            conn.end_use()
        super()._put_conn(conn)


class TlsPool(Pool, HTTPSConnectionPool):
    """A pool of encrypted connections."""


def pool_classes(policy: ConnectPolicy) -> PoolClasses:
    """The pool makers for hosts and for HTTP proxies, by scheme.

    Args:
        policy: How the connections are made.
    """
    return {
        "http": partial(_make_pool, Pool, partial(Connection, policy)),
        "https": partial(_make_pool, TlsPool, partial(TlsConnection, policy)),
    }


class _BoundedSocks(BoundedConnection):
    """PySocks gives each of its steps the full timeout; the TLS handshake after them gets the time that is left."""

    def _new_conn(self) -> socket.socket:
        sock: socket.socket = super()._new_conn()
        try:
            sock.settimeout(self.left_secs())
        except TimeoutError:
            sock.close()
            raise
        return sock


def socks_pool_classes(classes: Mapping[str, Any], policy: ConnectPolicy) -> PoolClasses:
    """The pool makers for a SOCKS proxy, by scheme. Their connections are made by the optional package PySocks.

    Args:
        classes: The pool classes of urllib3.
        policy: How the connections are made.
    """
    pools: dict[str, Callable[..., Pool]] = {}
    for scheme, pool_class in classes.items():
        connection = type("_SocksConnection", (_BoundedSocks, pool_class.ConnectionCls), {})
        pools[scheme] = partial(_make_pool, type("_SocksPool", (Pool, pool_class), {}), partial(connection, policy))
    return pools


def _make_pool(pool_class: type[Pool], connection: Any, *args: Any, **kwargs: Any) -> Pool:
    pool = pool_class(*args, **kwargs)
    pool.ConnectionCls = connection
    return pool
