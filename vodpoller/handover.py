"""The process executes its program anew: with the same pid and arguments, and with the sockets that stay open.

This ends threads that hang; nothing else could end them without ending the process.
"""

import fcntl
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Final, NoReturn

from vodpoller.errors import StoppingError
from vodpoller.process import ENDING, HELD, Signals

VARIABLE: Final = "VODPOLLER_HANDOVER"


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """What a process passes on to itself.

    Args:
        stuck: The parts that had a thread that did not end; empty if there is nothing to pass on.
        journal: The path of the journal that it had; empty if there is nothing to pass on.
        asking: Descriptors of connections whose clients wait for the end of the reload.
        listening: Descriptors of sockets that listen, each with its name.
        passed: The names of those among them that the service manager has opened.
    """

    stuck: Sequence[str] = ()
    journal: str = ""
    asking: Sequence[int] = ()
    listening: Mapping[str, int] = field(default_factory=dict)
    passed: Sequence[str] = ()

    @classmethod
    def of(cls, environ: MutableMapping[str, str]) -> "Handover":
        """What was passed on to this process. It is removed from the environment, so that no child process gets it.

        Args:
            environ: The environment of the process.
        """
        passed_on = environ.pop(VARIABLE, "")
        return cls(**json.loads(passed_on)) if passed_on else cls()

    def clients(self) -> list[socket.socket]:
        """The connections of `asking`, which belong to this process only from now on."""
        return [_own(fd) for fd in self.asking]

    def listeners(self) -> dict[str, socket.socket]:
        """The sockets of `listening` by their names, which belong to this process only from now on."""
        return {name: _own(fd) for name, fd in self.listening.items()}


def execute_anew(handover: Handover, signals: Signals) -> NoReturn:
    """Execute the program of this process again. Call it from the main thread.

    A signal that comes meanwhile is held for the new program; if another thread gets it, it ends the process.

    Args:
        handover: What is passed on.
        signals: Signals that may ask for the end of the process.

    Raises:
        StoppingError: A signal has asked for the end.
        OSError: The program cannot be executed.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)
    if signals.is_stopping:
        raise StoppingError("a signal asked for the end")
    for fd in (*handover.asking, *handover.listening.values()):
        fcntl.fcntl(fd, fcntl.F_SETFD, 0)  # without FD_CLOEXEC
    environ = {**os.environ, VARIABLE: json.dumps(asdict(handover))}
    os.execve(sys.executable, sys.orig_argv, environ)  # noqa: S606 - this program


def _own(fd: int) -> socket.socket:
    fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    return socket.socket(fileno=fd)
