"""The listener of a process, which lives over reloads: opened, moved, handed over, closed."""

import socket
from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING

from vodpoller.listener.view import View
from vodpoller.telemetry import Telemetry

if TYPE_CHECKING:
    from vodpoller.listener.server import Listener


class Listening:
    """Follows the configuration. Between two configurations with the same address the socket lives on.

    Args:
        current: What is shown, asked at each request; None while there is nothing to show.
        telemetry: Destination of log lines.
        inherited: Sockets that an earlier life of the process has left, by address. What is used is taken out.
    """

    def __init__(
        self,
        current: Callable[[], View | None],
        *,
        telemetry: Telemetry,
        inherited: MutableMapping[str, socket.socket],
    ) -> None:
        self._current = current
        self._telemetry = telemetry
        self._inherited = inherited
        self._listener: Listener | None = None

    def follow(self, address: str | None) -> None:
        """Listen there, and nowhere else.

        Args:
            address: HOST:PORT, as in the configuration; None for no listener.
        """
        if self._listener is not None:
            if self._listener.address == address:
                return
            self.close()
        if address is not None:
            from vodpoller.listener.server import Listener  # noqa: PLC0415 - else its packages are not needed

            inherited = self._inherited.pop(address, None)
            self._listener = Listener(address, self._current, telemetry=self._telemetry, sock=inherited)

    def handed_over(self) -> dict[str, int]:
        """The descriptor of the socket that listens, by its address, for the next life of the process."""
        sock = None if self._listener is None else self._listener.socket
        return {} if sock is None or self._listener is None else {self._listener.address: sock.fileno()}

    def close(self) -> None:
        """Answer nothing more."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
