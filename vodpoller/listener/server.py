"""The server: a socket, waitress, and what one client may take of it.

What waitress does (3.0, read in its source and tested with real clients): heads and bodies are read by one thread that
never waits for a client, so that the threads that answer are kept for whole requests. A head or body beyond its limit
ends the connection with 431 or 413. A connection without a byte for `channel_timeout` is closed; one that trickles is
not, so the age of each connection has a limit here.
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
BODY_MAX_BYTES: Final = 1024 * 1024
RETRY_SECS: Final = 5.0
STOP_SECS: Final = 2
LOOK_SECS: Final = 0.2  # how long a stop may go unnoticed
_IN_MEMORY_BYTES: Final = 64 * 1024  # of a body; nothing here reads one
_OWN_DESCRIPTORS: Final = 2  # that waitress counts as connections


class PatientSocket(socket.socket):
    """Waits if there is no descriptor for a connection: waitress would try again at once, until there is one."""

    def accept(self) -> tuple[socket.socket, Any]:
        """As `socket.accept`."""
        try:
            return super().accept()
        except BlockingIOError:
            raise
        except OSError:
            time.sleep(LOOK_SECS)
            raise


def listen(address: str) -> PatientSocket:
    """A socket that listens.

    Args:
        address: HOST:PORT, as in the configuration.

    Raises:
        OSError: It cannot: the address is not one of this machine's, or in use, or not allowed.
    """
    host, port = host_of(address), port_of(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return PatientSocket(fileno=socket.create_server((host, port), family=family, backlog=CONNECTIONS).detach())


class Listener:
    """Listens and answers, in threads of its own, until it is closed. Outlives builds of the daemon.

    If it cannot listen, it says so and tries again: events do not wait for that.

    Args:
        address: HOST:PORT, as in the configuration.
        current: What is shown; asked at each request, so it may be exchanged. None while there is nothing to show.
        telemetry: Destination of log lines.
        sock: Listens there already, from an earlier life of the process; None to make one.
        connection_secs: The longest life of a connection.
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
        self.socket: PatientSocket | None = None if sock is None else PatientSocket(fileno=sock.detach())
        self._telemetry = telemetry.scope()
        self._app = App(current, self._telemetry)
        self._connection_secs = connection_secs
        self._stopped = threading.Event()
        # What it says of clients is not news: that they went away, or that several ask at once.
        for name in ("waitress", "waitress.queue"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._thread = threading.Thread(target=self._run, name="listener", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # the system has no more threads
            self._say_failed(error)

    def close(self) -> None:
        """Answer nothing more; what is being answered is not awaited for long."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(STOP_SECS)

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self.socket = self.socket or listen(self.address)
                self._serve(self.socket)
            except Exception as error:  # noqa: BLE001 - whatever it is, events must not wait for it
                self._say_failed(error)
                self._stopped.wait(RETRY_SECS)

    def _say_failed(self, error: Exception) -> None:
        self._telemetry.repeated(
            "error", "listener.failed", cause=repr(error), address=self.address, error_message=str(error)
        )

    def _serve(self, sock: socket.socket) -> None:
        channels: dict[int, Any] = {}
        server: Any = create_server(  # its types are those of several servers, and of a trigger without methods
            self._app,
            map=channels,
            sockets=[sock],
            threads=THREADS,
            connection_limit=CONNECTIONS + _OWN_DESCRIPTORS,
            channel_timeout=IDLE_SECS,
            cleanup_interval=1,
            max_request_header_size=HEAD_MAX_BYTES,
            max_request_body_size=BODY_MAX_BYTES,
            inbuf_overflow=_IN_MEMORY_BYTES,
            clear_untrusted_proxy_headers=True,
            log_socket_errors=False,
            asyncore_use_poll=True,
            ident=None,
        )
        self._telemetry.log.info("listener.started", address=self.address)
        try:
            while not self._stopped.is_set():
                wasyncore.loop(timeout=LOOK_SECS, use_poll=True, map=channels, count=1)
                _end_old(channels, born_before=time.time() - self._connection_secs)
        finally:
            self.socket = None
            _close(server, channels)


def _close(server: Any, channels: dict[int, Any]) -> None:
    server.task_dispatcher.shutdown(timeout=STOP_SECS)
    for channel in list(channels.values()):
        if channel is not server.trigger:
            wasyncore.dispatcher.close(channel)
    # A thread that still answers wakes the loop by this pipe, and would write into what has its number by then.
    if not server.task_dispatcher.threads:
        server.trigger.close()


def _end_old(channels: dict[int, Any], *, born_before: float) -> None:
    """End connections that have lived too long, whatever they are about to send, unless they are being answered."""
    for channel in list(channels.values()):
        if isinstance(channel, HTTPChannel) and channel.creation_time < born_before and not channel.requests:
            channel.will_close = True
