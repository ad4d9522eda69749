"""The interface to systemd: the notify protocol (sd_notify(3)) and passed sockets (sd_listen_fds(3))."""

import fcntl
import os
import socket
import time
from collections.abc import Mapping, MutableMapping
from typing import Final

_FIRST_PASSED: Final = 3  # SD_LISTEN_FDS_START


def passed_sockets(environ: MutableMapping[str, str]) -> list[socket.socket]:
    """The sockets that the service manager has opened for this process (sd_listen_fds(3)).

    Args:
        environ: The environment of the process. The variables of the protocol are removed, so that no child process
            gets them.
    """
    pid, number = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not number.isdecimal():
        return []
    passed = range(_FIRST_PASSED, _FIRST_PASSED + int(number))
    for fd in passed:
        fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    return [socket.socket(fileno=fd) for fd in passed]


class Notifier:
    """Reports the state of the daemon to the service manager; does nothing if there is none.

    Args:
        address: `$NOTIFY_SOCKET`; a leading @ means the abstract namespace; empty means no service manager.
        watchdog_secs: Maximum time between two messages to the watchdog; None for no watchdog.
    """

    def __init__(self, address: str, *, watchdog_secs: float | None = None) -> None:
        self.watchdog_secs = watchdog_secs
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._last_status = ""

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> "Notifier":
        """The notifier that the service manager has configured for this process (sd_watchdog_enabled(3)).

        Args:
            environ: `$WATCHDOG_USEC` is the period of the watchdog; it is meant for another process if `$WATCHDOG_PID`
                is not this one's id.
        """
        period, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
        is_meant = period.isdecimal() and int(period) > 0 and pid in ("", str(os.getpid()))
        return cls(environ.get("NOTIFY_SOCKET", ""), watchdog_secs=int(period) / 1_000_000 if is_meant else None)

    def notify(self, *assignments: str) -> None:
        """Send `NAME=value` lines in one datagram. A manager that does not listen is not a reason to fail."""
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify_socket:
                notify_socket.settimeout(1)
                notify_socket.sendto("\n".join(assignments).encode(errors="replace"), self._address)
        except OSError:
            pass

    def ready(self) -> None:
        """Report that the start, or a reload, is over."""
        self.notify("READY=1")

    def reloading(self) -> None:
        """Report that a reload has begun; `ready` reports its end. The time distinguishes it from an earlier reload."""
        self.notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """Report that the stop has begun."""
        self.notify("STOPPING=1")

    def status(self, text: str) -> None:
        """Report the line for `systemctl status`, if it has changed."""
        if text != self._last_status:
            self._last_status = text
            self.notify(f"STATUS={' '.join(text.split())}")  # a second line would be another assignment

    def extend(self, secs: float) -> None:
        """Extend the time limit of the start or the stop that is under way: it may take `secs` from now."""
        self.notify(f"EXTEND_TIMEOUT_USEC={secs * 1e6:.0f}")

    def alive(self) -> None:
        """Feed the watchdog."""
        self.notify("WATCHDOG=1")
