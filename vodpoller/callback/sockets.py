"""The sockets at which callbacks come in. They belong to the process, and live over a reload of what it runs.

A connection that comes while nothing accepts waits in the kernel. systemd may open a socket and pass it on
(sd_listen_fds(3)); then it stays open over restarts, too.
"""

import errno
import socket
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from ipaddress import ip_address
from typing import Final

from vodpoller.config.tables import host_of, port_of
from vodpoller.errors import ConfigError, StorageError

# A longer queue is worse: VOD waits 5 s, and after a stall what stands further back would only be accepted when it has
# given up. A connection that finds the queue full is tried again after a second, by its own kernel.
BACKLOG: Final = 512


class CallbackSockets:
    """Sockets that listen, by address.

    Args:
        inherited: Sockets that an earlier life of the process has left, by address. What is used is taken out.
        passed: Sockets that the service manager has opened. They are never closed.
        passed_before: The addresses of those in `inherited` that are such.
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
        """What speaks against listening at these addresses, and at no others.

        Args:
            addresses: IP address and port of each, as in the configuration.
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
                    f"sources: systemd passes a socket that listens at {name}, and no source names it (a source with"
                    f' type = "callback" and listen = "{name}"; or take it out of vodpoller.socket)'
                )

    def open(self, addresses: Collection[str]) -> Mapping[str, socket.socket]:
        """Listen at these addresses; those that are open already stay as they are.

        Another address with the port of one of these is given up: both together the system may not allow.

        Args:
            addresses: IP address and port of each, as in the configuration.

        Raises:
            ConfigError: The system does not allow that, or passes a socket that is not among them.
            StorageError: An address is in use, or not there, which may pass.
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
        """Close what listens at other addresses."""
        for address in self._open.keys() - set(addresses):
            sock = self._open.pop(address)
            if sock not in self._passed.values():
                sock.close()

    @property
    def passed(self) -> list[str]:
        """The addresses of those that the service manager has opened."""
        return [address for address, sock in self._open.items() if sock in self._passed.values()]

    def handed_over(self) -> dict[str, int]:
        """The descriptors of the sockets by their addresses, for the next life of the process."""
        return {address: sock.fileno() for address, sock in self._open.items()}

    def close(self) -> None:
        """Listen no more."""
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
        """A port that is in use here is given up before it is taken again at another address."""
        given_up = (it for it in self._open if it not in addresses and it not in self.passed)
        return port_of(address) in map(port_of, given_up)


def listen(address: str) -> socket.socket:
    """A socket that listens.

    Args:
        address: IP address and port, as in the configuration.

    Raises:
        OSError: It cannot: the address is not one of this machine's, or in use, or not allowed.
    """
    host = host_of(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port_of(address)), family=family, backlog=BACKLOG)


def why_not(address: str, error: OSError) -> str:
    """Why an address cannot be listened at, for a person."""
    what = {
        errno.EADDRINUSE: "another program listens there",
        errno.EADDRNOTAVAIL: "this machine has no such address",
        errno.EACCES: "ports below 1024 are not for every user: choose a higher one, or let systemd open the socket",
    }.get(error.errno or 0, "")
    return f"{address} cannot be listened at: {error.strerror or error}{f' ({what})' if what else ''}"


def _normal(address: str) -> str:
    """An address as `_name_of` writes it."""
    host = str(ip_address(host_of(address)))
    return f"[{host}]:{port_of(address)}" if ":" in host else f"{host}:{port_of(address)}"


def _name_of(sock: socket.socket) -> str:
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return f"{sock.getsockname()!r}"
    host, port = sock.getsockname()[:2]
    return _normal(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
