"""Checks of the addresses at which callbacks are received."""

import errno
from collections.abc import Iterable, Iterator

from vodpoller.callback.sockets import listen, why_not
from vodpoller.checkup.finding import Finding, Level


def check_callbacks(addresses: Iterable[str]) -> Iterator[Finding]:
    """Try to listen at the addresses for callbacks. No connection is accepted meanwhile.

    Args:
        addresses: IP address and port of each, as in the configuration.
    """
    for address in addresses:
        what = f"callbacks at {address}"
        try:
            listen(address).close()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                text = "something listens there already: the daemon or systemd, if they run; if not, another program"
                yield Finding(what=what, level=Level.INFORMATION, text=text)
            else:
                yield Finding(what=what, level=Level.PROBLEM, text=why_not(address, error), remedy="correct `listen`")
        else:
            yield Finding(what=what, level=Level.GOOD, text="the address is free and can be used")
