"""The environment of the process: standard streams, locale, signals and, as process 1 of a container, orphans.

`prepare` is called before anything else is imported: a signal that comes meanwhile must neither end the process nor be
lost.
"""

import os
import signal
import sys
import threading
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Final, TextIO

ENDING: Final = frozenset({signal.SIGTERM, signal.SIGINT})
HELD: Final = ENDING | {signal.SIGHUP}
_PASSED_ON: Final = HELD | {signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}


def prepare() -> None:
    """Set up the process as the commands expect it. To be called once, first, from the main thread.

    Signals are held back until a command catches them (`Signals.catch`) or lets them act (`let_signals_act`).
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler prints a traceback
    # If it is ignored (some supervisors pass that on), the kernel discards the exit codes of child processes.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _use_utf8()
    if os.getpid() == 1:
        fork_and_reap_orphans()
    _open_streams()


def let_signals_act() -> None:
    """Unblock the signals that were held back: one that came meanwhile ends the process now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)


def is_stdout_closed() -> bool:
    """Whether the process was started without a standard output: what is written to descriptor 1 is lost.

    The interpreter notes this before anything of this program runs: `sys.__stdout__`.
    """
    return sys.__stdout__ is None


class Signals:
    """The signals for the daemon: SIGTERM and SIGINT ask it to end, SIGHUP asks it to reload.

    The handlers only record the signal, so signals can be caught long before there is a daemon. A second request to
    end ends the process at once, with 128 plus the signal's number as its exit code.
    """

    def __init__(self) -> None:
        self._received: SimpleQueue[int] = SimpleQueue()
        self.is_stopping = False

    def catch(self) -> None:
        """Install the handlers, and unblock the signals. Does nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in HELD:
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)

    def any_waits(self) -> bool:
        """Whether `next` would return at once."""
        return not self._received.empty()

    def next(self, timeout_secs: float) -> signal.Signals | None:
        """Wait for the next signal and take it.

        Args:
            timeout_secs: The longest wait.

        Returns:
            The signal; None if none came.
        """
        try:
            return signal.Signals(self._received.get(timeout=timeout_secs))
        except Empty:
            return None

    def reload(self) -> None:
        """Ask for a reload, as SIGHUP does. From any thread."""
        self._received.put(signal.SIGHUP)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number in ENDING:
            if self.is_stopping:
                os._exit(128 + number)
            self.is_stopping = True
        self._received.put(number)


def fork_and_reap_orphans() -> None:
    """As process 1 of a container: run the program in a child, and reap orphans in this process.

    A process whose parent ends becomes a child of process 1, and stays as a zombie if that does not reap it. Only the
    child returns from this function. The commands that it starts are its own children, so their exit codes are never
    reaped here. The parent passes signals on, and ends with the child's exit code.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {*_PASSED_ON, signal.SIGCHLD})
    child = os.fork()
    if child == 0:
        # A terminal's Ctrl-C reaches each process of its group: without setsid the child would get it twice.
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*_PASSED_ON - HELD, signal.SIGCHLD})
        return
    while True:
        number = signal.sigwait({*_PASSED_ON, signal.SIGCHLD})
        if number == signal.SIGCHLD:
            _reap_until(child)
        else:
            os.kill(child, number)


def _reap_until(child: int) -> None:
    """Reap all children that have ended; if `child` has, end this process with the same exit code."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def _use_utf8() -> None:
    """Encode paths in UTF-8, whatever the locale: else the same configuration would name other files in another locale.

    Python chooses the encoding of paths before the first line of a program runs, so this executes the program again, in
    the same process (PEP 540, "UTF-8 Mode"). Output keeps the locale's encoding.
    """
    if sys.getfilesystemencoding() == "utf-8" or sys.flags.utf8_mode or not (sys.executable and sys.orig_argv):
        return
    stream = sys.stdout or sys.stderr
    if stream is not None:
        os.environ.setdefault("PYTHONIOENCODING", stream.encoding)
    try:
        os.execv(sys.executable, [sys.orig_argv[0], "-X", "utf8", *sys.orig_argv[1:]])  # noqa: S606 - this program
    except OSError:
        return  # then only paths that the locale can encode can be used


def _open_streams() -> None:
    """Open those of the descriptors 0 to 2 that are closed, and let output replace characters that it cannot encode.

    open(2) returns the lowest closed descriptor: the journal could get one of these, and all output would go into it.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            try:
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # noqa: FBT003 - os has no other form
            except OSError as error:
                sys.exit(f"vodpoller: descriptor {fd} is closed, and {os.devnull} cannot be opened: {error.strerror}")
    sys.stdin = sys.stdin or _stream(0, "r")
    sys.stdout = sys.stdout or _stream(1, "w")
    sys.stderr = sys.stderr or _stream(2, "w")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # at the start they are the interpreter's own


def _stream(fd: int, mode: str) -> TextIO:
    return os.fdopen(fd, mode, encoding="utf-8", closefd=False)  # type: ignore[return-value]  # the modes are of text
