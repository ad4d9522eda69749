"""The sockets that receive callbacks. They belong to the process and stay open during a reload.

A connection that is made while nothing accepts it waits in the kernel. systemd may open a socket and pass it to the
process (sd_listen_fds(3)); then it also stays open during a restart.
"""

import errno
import socket
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from ipaddress import ip_address
from typing import Final

from vodpoller.config.tables import host_of, port_of
from vodpoller.errors import ConfigError, StorageError

# A longer queue is worse: VOD waits 5 s, and after a stall connections at its end would only be accepted when VOD has
# given up. If the queue is full, the client's kernel tries the connection again after one second.
BACKLOG: Final = 512


class CallbackSockets:
    """Listening sockets, by address.

    Args:
        inherited: Sockets that the process kept open when it executed itself again, by address. A socket that is used
            is removed from it.
        passed: Sockets that the service manager has opened. They are never closed.
        passed_before: The addresses of the sockets in `inherited` that the service manager has opened.
    """

    def __init__(
        self,
        *,
        inherited: MutableMapping[str, socket.socket],
        passed: Sequence[socket.socket] = (),
        passed_before: Sequence[str] = (),
    ) -> None:
        self._inherited = inherited
        own = [*passed, *(inherited.pop(address) for address in passed_before)]
        self._passed = {_name_of(sock): sock for sock in own}
        self._open: dict[str, socket.socket] = {}

    def problems(self, addresses: Collection[str]) -> Iterator[str]:
        """Check whether it is possible to listen at exactly these addresses.

        Args:
            addresses: IP address and port of each, as in the configuration.

        Yields:
            The problems, for messages.
        """
        yield from self._unnamed(addresses)
        for address in addresses:
            if address in self._open or _normal(address) in self._passed or self._is_given_up(address, addresses):
                continue
            try:
                listen(address).close()
            except OSError as error:
                yield f"sources: {why_not(address, error)}"

    def _unnamed(self, addresses: Collection[str]) -> Iterator[str]:
        wanted = {_normal(address) for address in addresses}
        for name in self._passed:
            if name not in wanted:
                yield (
                    f"sources: systemd passes a socket that listens at {name}, and no source names it (add a source"
                    f' with type = "callback" and listen = "{name}", or remove the address from vodpoller.socket)'
                )

    def open(self, addresses: Collection[str]) -> Mapping[str, socket.socket]:
        """Listen at these addresses; sockets that are already open stay as they are.

        An open socket at another address is closed if one of these has the same port: the system may not allow both.

        Args:
            addresses: IP address and port of each, as in the configuration.

        Raises:
            ConfigError: The user lacks the right to listen there, or systemd passes a socket of another address.
            StorageError: An address is in use, or does not exist on this machine; both may be temporary.
        """
        if problems := list(self._unnamed(addresses)):
            raise ConfigError(problems)
        ports = {port_of(address) for address in addresses}
        self.keep([it for it in self._open if it in addresses or port_of(it) not in ports])
        for address in addresses:
            if address not in self._open:
                self._open[address] = self._opened(address)
                self._open[address].settimeout(0.0)
        return {address: self._open[address] for address in addresses}

    def keep(self, addresses: Collection[str]) -> None:
        """Close the sockets of all other addresses, except those that the service manager has opened."""
        for address in self._open.keys() - set(addresses):
            sock = self._open.pop(address)
            if sock not in self._passed.values():
                sock.close()

    @property
    def passed(self) -> list[str]:
        """The addresses of the sockets that the service manager has opened."""
        return [address for address, sock in self._open.items() if sock in self._passed.values()]

    def handed_over(self) -> dict[str, int]:
        """The descriptors of the sockets by address, for the process when it executes itself again."""
        return {address: sock.fileno() for address, sock in self._open.items()}

    def close(self) -> None:
        """Close all sockets, except those that the service manager has opened."""
        self.keep(())

    def _opened(self, address: str) -> socket.socket:
        found = self._passed.get(_normal(address)) or self._inherited.pop(address, None)
        if found is not None:
            return found
        try:
            return listen(address)
        except PermissionError as error:
            raise ConfigError([f"sources: {why_not(address, error)}"]) from error
        except OSError as error:
            raise StorageError(why_not(address, error)) from error

    def _is_given_up(self, address: str, addresses: Collection[str]) -> bool:
        """Whether the port is in use only by a socket of this process that `open` closes first."""
        given_up = (it for it in self._open if it not in addresses and it not in self.passed)
        return port_of(address) in map(port_of, given_up)


def listen(address: str) -> socket.socket:
    """Make a listening socket.

    Args:
        address: IP address and port, as in the configuration.

    Raises:
        OSError: The address does not belong to this machine, or is in use, or is not allowed.
    """
    host = host_of(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port_of(address)), family=family, backlog=BACKLOG)


def why_not(address: str, error: OSError) -> str:
    """A message that says why it is not possible to listen at an address."""
    what = {
        errno.EADDRINUSE: "another program listens there",
        errno.EADDRNOTAVAIL: "this machine has no such address",
        errno.EACCES: "ports below 1024 need a special right: choose a higher one, or let systemd open the socket",
    }.get(error.errno or 0, "")
    return f"{address} cannot be listened at: {error.strerror or error}{f' ({what})' if what else ''}"


def _normal(address: str) -> str:
    """An address in the same form as from `_name_of`."""
    host = str(ip_address(host_of(address)))
    return f"[{host}]:{port_of(address)}" if ":" in host else f"{host}:{port_of(address)}"


def _name_of(sock: socket.socket) -> str:
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return f"{sock.getsockname()!r}"
    host, port = sock.getsockname()[:2]
    return _normal(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
