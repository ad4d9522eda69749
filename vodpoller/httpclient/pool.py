"""Pools that keep connections while they can be trusted to bring the answer to the next request, and nothing else."""

import socket
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from vodpoller.httpclient.connection import BoundedConnection, Connection, Reach, TlsConnection

PoolClasses = Mapping[str, Callable[..., "Pool"]]
"""What makes the pools of a scheme."""


class Pool(HTTPConnectionPool):
    """As in urllib3, whose answers give their connections back when they are read to their end."""

    def take(self, *, is_new: bool = False) -> BoundedConnection:
        """A connection that is open and idle, or else one that is not open yet.

        Args:
            is_new: It shall not be an idle one.

        Raises:
            urllib3.exceptions.ClosedPoolError: The pool is closed.
        """
        connection = cast("BoundedConnection", self._get_conn())
        if is_new or connection.is_stale():
            connection.close()  # one that is closed connects anew
        return connection

    def open(self, connection: BoundedConnection, *, tunnels: bool) -> None:
        """Connect.

        Args:
            connection: Of this pool.
            tunnels: Whether through the pool's proxy to the host, not to the proxy alone.
        """
        if tunnels:
            self._prepare_proxy(connection)
        else:
            connection.connect()

    def _put_conn(self, conn: Any) -> None:
        if conn is not None and not conn.is_closed:
            conn.rest()
        super()._put_conn(conn)


class TlsPool(Pool, HTTPSConnectionPool):
    """The same, encrypted."""


def pool_classes(reach: Reach) -> PoolClasses:
    """The pools of hosts, and of proxies for HTTP, by scheme.

    Args:
        reach: Of their connections.
    """
    return {
        "http": partial(_make_pool, Pool, partial(Connection, reach)),
        "https": partial(_make_pool, TlsPool, partial(TlsConnection, reach)),
    }


class _BoundedSocks(BoundedConnection):
    """PySocks gives each of its own steps the whole time; TLS, which comes then, gets what is left of it."""

    def _new_conn(self) -> socket.socket:
        sock: socket.socket = super()._new_conn()
        try:
            sock.settimeout(self.left_secs())
        except TimeoutError:
            sock.close()
            raise
        return sock


def socks_pool_classes(classes: Mapping[str, Any], reach: Reach) -> PoolClasses:
    """The pools of a proxy for SOCKS, by scheme. They connect in their own way, which needs a package of its own.

    Args:
        classes: Those of urllib3.
        reach: Of their connections.
    """
    pools: dict[str, Callable[..., Pool]] = {}
    for scheme, pool_class in classes.items():
        connection = type("_SocksConnection", (_BoundedSocks, pool_class.ConnectionCls), {})
        pools[scheme] = partial(_make_pool, type("_SocksPool", (Pool, pool_class), {}), partial(connection, reach))
    return pools


def _make_pool(pool_class: type[Pool], connection: Any, *args: Any, **kwargs: Any) -> Pool:
    pool = pool_class(*args, **kwargs)
    pool.ConnectionCls = connection
    return pool
