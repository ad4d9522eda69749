"""The socket on which a running daemon reports its status: `<journal.path>.sock`, for its own user and root only.

A connection has one request and one answer, each a line of JSON.
"""

import json
import os
import selectors
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from vodpoller.logs import Logger

REQUEST_MAX_BYTES: Final = 4096
ANSWER_MAX_BYTES: Final = 16 * 1024 * 1024
CLIENT_SECS: Final = 2.0
_PATH_MAX_BYTES: Final = 107  # sockaddr_un(7)
_ENDING: Final = ".sock"
_MODE: Final = 0o600
_UCRED: Final = "3i"  # struct ucred: process, user, group
_LISTENS: Final = 0x10000  # __SO_ACCEPTCON of the kernel's net.h, in the flags of /proc/net/unix


def socket_path(journal_path: Path) -> Path:
    """The path of the socket of the daemon with this journal."""
    return journal_path.with_name(journal_path.name + _ENDING)


def socket_of_process(pid: int) -> Path | None:
    """The path of the status socket of a process; None if it has none, or one with a relative path.

    The open files of a process (/proc/PID/fd) are hidden from the sandbox in which a unit's ExecReload= runs. So this
    connects to each socket that may be the right one, and the kernel says which process listens there (unix(7),
    SO_PEERCRED).

    Args:
        pid: The process id.
    """
    try:
        lines = Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines()[1:]
    except OSError:
        return None
    for line in lines:
        _, _, _, flags, _, _, _, *name = line.split(maxsplit=7)
        if name and int(flags, 16) & _LISTENS and _listener_at(Path(name[0])) == pid:
            return Path(name[0])
    return None


def _listener_at(path: Path) -> int | None:
    """The process that listens at a path; None if it is not a status socket, or connecting to it is not allowed."""
    try:
        if path.suffix != _ENDING or not path.is_absolute() or stat.S_IMODE(path.stat().st_mode) != _MODE:
            return None
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
            connection.settimeout(CLIENT_SECS)
            connection.connect(os.fspath(path))
            peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(_UCRED))
    except OSError:
        return None
    return int(struct.unpack(_UCRED, peer)[0])


class StatusSocket:
    """Answers requests, one at a time, in a thread of its own.

    Args:
        path: The path of the socket; a socket that an earlier process left there is replaced.
        answer: Makes the answer to a request.
        later: For commands whose answer takes long, by their names: takes the client, and answers it later.
        listening: The socket that listens there already; None to make it.
        log: Returns the destination of log lines; called for each line, since a reload may change it.

    Attributes:
        path: The path of the socket.

    Raises:
        OSError: The socket cannot be made there.
    """

    def __init__(
        self,
        path: Path,
        answer: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        *,
        later: Mapping[str, Callable[["WaitingClient"], None]] = MappingProxyType({}),
        listening: socket.socket | None = None,
        log: Callable[[], Logger],
    ) -> None:
        self.path = path
        self._answer = answer
        self._later = later
        self._log = log
        self._listening = listening or _listen_at(path)
        self._listening.setblocking(False)  # noqa: FBT003 - its only argument
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        for each in (self._listening, self._woken):
            self._selector.register(each, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="status", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """The descriptor of the listening socket."""
        return self._listening.fileno()

    def close(self) -> None:
        """Stop answering. An answer that is under way is awaited for `CLIENT_SECS` at most."""
        with suppress(OSError):
            self.path.unlink()
        self._wake.close()
        self._thread.join(CLIENT_SECS)
        if self._thread.is_alive():  # the end of the process closes what it still uses
            return
        self._selector.close()
        self._listening.close()
        self._woken.close()

    def _serve(self) -> None:
        while True:
            ready = {key.fileobj for key, _ in self._selector.select()}
            if self._woken in ready:
                return
            try:
                connection, _ = self._listening.accept()
                with ExitStack() as serving:
                    serving.enter_context(connection)
                    if self._serve_one(connection):
                        serving.pop_all()
            except OSError:  # the client went away or sends nothing, or there are no more descriptors
                time.sleep(0.05)
            except Exception:  # noqa: BLE001 - one failed request must not end the thread
                self._log().error("task.failed", task="status", exc_info=True)

    def _serve_one(self, connection: socket.socket) -> bool:
        """Answer one request. Returns whether the connection is kept, to be answered later."""
        request = _line_from(connection, REQUEST_MAX_BYTES, CLIENT_SECS)
        try:
            wanted = json.loads(request)
        except ValueError:
            wanted = None
        if isinstance(wanted, dict) and (take := self._later.get(str(wanted.get("command")))):
            take(WaitingClient(connection))
            return True
        answer = self._answer(wanted) if isinstance(wanted, dict) else {"error": "the request is not a JSON object"}
        _send(connection, answer)
        return False


class WaitingClient:
    """A client whose request takes long: it is answered later, from any thread, and delays no other client.

    Args:
        connection: The connection to the client.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def fileno(self) -> int:
        """The descriptor of the connection."""
        return self._connection.fileno()

    def answer(self, answer: Mapping[str, Any]) -> None:
        """Answer, and close the connection. A client that has gone away is not a reason to fail."""
        with self._connection, suppress(OSError):
            _send(self._connection, answer)


def _send(connection: socket.socket, answer: Mapping[str, Any]) -> None:
    connection.settimeout(CLIENT_SECS)
    connection.sendall(json.dumps(answer).encode() + b"\n")


def _listen_at(path: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with suppress(FileNotFoundError):
            path.unlink()
        os.fchmod(listening.fileno(), _MODE)  # before it has a name: Linux gives the name this mode
        with _address(path) as address:
            listening.bind(address)
        listening.listen(8)
    except OSError:
        listening.close()
        raise
    return listening


def ask(path: Path, request: Mapping[str, Any], *, timeout_secs: float) -> dict[str, Any] | None:
    """Send a request to the daemon that listens at a path.

    Args:
        path: The path of its socket.
        request: The request.
        timeout_secs: Time limit of each step of the exchange.

    Returns:
        Its answer; None if no daemon listens.

    Raises:
        OSError: It listens, but this user may not connect to it, or no answer came in time.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        connection.settimeout(timeout_secs)
        try:
            with _address(path) as address:
                connection.connect(address)
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
            return None
        connection.sendall(json.dumps(request).encode() + b"\n")
        answer = json.loads(_line_from(connection, ANSWER_MAX_BYTES, timeout_secs) or b"null")
    if not isinstance(answer, dict):
        raise ConnectionError("the daemon closed the connection without an answer")
    return answer


def _line_from(connection: socket.socket, max_bytes: int, within_secs: float) -> bytes:
    ends_at = time.monotonic() + within_secs
    line = bytearray()
    while not line.endswith(b"\n") and len(line) < max_bytes:
        connection.settimeout(max(ends_at - time.monotonic(), 0.001))
        chunk = connection.recv(64 * 1024)
        if not chunk:
            break
        line += chunk
    return bytes(line)


@contextmanager
def _address(path: Path) -> Iterator[str]:
    """The path in a form that `bind` and `connect` accept: a long one is given relative to its folder's descriptor."""
    if len(os.fsencode(path)) <= _PATH_MAX_BYTES:
        yield os.fspath(path)
        return
    folder_fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder_fd}/{path.name}"
    finally:
        os.close(folder_fd)
