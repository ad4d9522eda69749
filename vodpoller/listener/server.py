"""The server: a socket, waitress, and limits for its clients.

The behaviour of waitress (3.0, from its source code and from tests with real clients): one thread that never waits for
a client reads heads and bodies, so the answering threads only handle complete requests. A head or body that exceeds its
limit ends the connection with 431 or 413. A connection without a byte for `channel_timeout` is closed. A connection
that sends a byte now and then is not, so this module limits the age of each connection.
"""

import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.server import create_server

from vodpoller.config.tables import host_of, port_of
from vodpoller.listener.app import App
from vodpoller.listener.view import View
from vodpoller.telemetry import Telemetry

THREADS: Final = 4
CONNECTIONS: Final = 100
IDLE_SECS: Final = 10
CONNECTION_SECS: Final = 30.0
HEAD_MAX_BYTES: Final = 16 * 1024
BODY_MAX_BYTES: Final = 64 * 1024  # no body is used here; waitress keeps one of this size in memory
RETRY_SECS: Final = 5.0
STOP_SECS: Final = 2
LOOP_SECS: Final = 0.2  # interval at which the loop checks whether it must stop
_OWN_DESCRIPTORS: Final = 2  # descriptors of its own that waitress counts as connections


class ListeningSocket(socket.socket):
    """A listening socket that waits if no descriptor is left for a connection, where waitress would retry at once."""

    def accept(self) -> tuple[socket.socket, Any]:
        """As `socket.accept`."""
        try:
            return super().accept()
        except BlockingIOError:
            raise
        except OSError:
            time.sleep(LOOP_SECS)
            raise


def listen(address: str) -> ListeningSocket:
    """Make a listening socket.

    Args:
        address: HOST:PORT, as in the configuration.

    Raises:
        OSError: The address does not belong to this machine, or is in use, or is not allowed.
    """
    host, port = host_of(address), port_of(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return ListeningSocket(fileno=socket.create_server((host, port), family=family, backlog=CONNECTIONS).detach())


class Listener:
    """Listens and answers, in threads of its own, until it is closed. It stays open when a reload replaces the daemon.

    If it cannot listen, it logs this and tries again; the delivery of events does not wait for it.

    Args:
        address: HOST:PORT, as in the configuration.
        current: Called for each request; returns what is shown, None while there is nothing to show.
        telemetry: Destination of log lines.
        sock: A socket that already listens there, kept open when the process executed itself again; None to make one.
        connection_secs: The maximum age of a connection.
    """

    def __init__(
        self,
        address: str,
        current: Callable[[], View | None],
        *,
        telemetry: Telemetry,
        sock: socket.socket | None = None,
        connection_secs: float = CONNECTION_SECS,
    ) -> None:
        self.address = address
        self.socket: ListeningSocket | None = None if sock is None else ListeningSocket(fileno=sock.detach())
        self._telemetry = telemetry.scope()
        self._app = App(current, self._telemetry)
        self._connection_secs = connection_secs
        self._stopped = threading.Event()
        # waitress logs clients that disconnect, and several requests at the same time: an operator does not need that.
        for name in ("waitress", "waitress.queue"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._thread = threading.Thread(target=self._run, name="listener", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # no thread can be started
            self._log_failure(error)

    def close(self) -> None:
        """Stop answering. Answers that are in progress are awaited for at most `STOP_SECS`."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(STOP_SECS)

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self.socket = self.socket or listen(self.address)
                self._serve(self.socket)
            except Exception as error:  # noqa: BLE001 - no error here may affect the delivery of events
                self._log_failure(error)
                self._stopped.wait(RETRY_SECS)

    def _log_failure(self, error: Exception) -> None:
        self._telemetry.repeated(
            "error", "listener.failed", cause=repr(error), address=self.address, error_message=str(error)
        )

    def _serve(self, sock: socket.socket) -> None:
        channels: dict[int, Any] = {}
        server: Any = create_server(  # its declared type is a union of several servers, some without these methods
            self._app,
            map=channels,
            sockets=[sock],
            threads=THREADS,
            connection_limit=CONNECTIONS + _OWN_DESCRIPTORS,
            channel_timeout=IDLE_SECS,
            cleanup_interval=1,
            max_request_header_size=HEAD_MAX_BYTES,
            max_request_body_size=BODY_MAX_BYTES,
            clear_untrusted_proxy_headers=True,
            log_socket_errors=False,
            asyncore_use_poll=True,
            ident=None,
        )
        self._telemetry.log.info("listener.started", address=self.address)
        try:
            while not self._stopped.is_set():
                wasyncore.loop(timeout=LOOP_SECS, use_poll=True, map=channels, count=1)
                _end_old(channels, created_before=time.time() - self._connection_secs)
        finally:
            self.socket = None
            _close(server, channels)


def _close(server: Any, channels: dict[int, Any]) -> None:
    server.task_dispatcher.shutdown(timeout=STOP_SECS)
    for channel in list(channels.values()):
        if channel is not server.trigger:
            wasyncore.dispatcher.close(channel)
    # A thread that still answers writes to this pipe to wake the loop. If the pipe were closed, the thread could write
    # to another file that has got the same descriptor.
    if not server.task_dispatcher.threads:
        server.trigger.close()


def _end_old(channels: dict[int, Any], *, created_before: float) -> None:
    """End connections that are too old, even if they are still sending, but not while they are answered."""
    for channel in list(channels.values()):
        if isinstance(channel, HTTPChannel) and channel.creation_time < created_before and not channel.requests:
            channel.will_close = True
