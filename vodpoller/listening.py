"""The listener of the process, which a reload does not close: opened, moved, handed over, closed."""

import socket
from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING

from vodpoller.listener.view import View
from vodpoller.telemetry import Telemetry

if TYPE_CHECKING:
    from vodpoller.listener.server import Listener


class Listening:
    """Opens the listener where the configuration says. If the address stays the same, so does the socket.

    Args:
        current: Returns what is shown; called for each request; None while there is nothing to show.
        telemetry: Destination of log lines.
        inherited: Sockets, by address, that the process passed on when it executed itself anew. What is used is
            removed.
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
        """Listen at this address only.

        Args:
            address: HOST:PORT, as in the configuration; None for no listener.
        """
        if self._listener is not None:
            if self._listener.address == address:
                return
            self.close()
        if address is not None:
            from vodpoller.listener.server import Listener  # noqa: PLC0415 - its packages may be missing

            inherited = self._inherited.pop(address, None)
            self._listener = Listener(address, self._current, telemetry=self._telemetry, sock=inherited)

    def handed_over(self) -> dict[str, int]:
        """The descriptor of the listening socket, by its address, for the program that is executed anew."""
        sock = None if self._listener is None else self._listener.socket
        return {} if sock is None or self._listener is None else {self._listener.address: sock.fileno()}

    def close(self) -> None:
        """Stop listening."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
